"""What every operator needs to know about torch's state at the moment of a call."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function.

    It need not when nothing requires a gradient, no forward-mode level is open (a dual tensor has
    ``requires_grad=False``) and no torch.func transform is active: the raw operator is several times cheaper to call.
    Nor under compilation, where a Function with a jvp does not trace: the raw operator has a registered backward.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # the registered operator would return tangents of zero
            raise RuntimeError("seqkern: forward mode does not work under torch.compile; use it outside")
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if sum(transform.key() == TransformType.Jvp for transform in transforms) > 1:
        # torch switches forward mode off inside a Function's jvp: the second tangent would silently be zero.
        raise RuntimeError(
            "seqkern: forward mode inside forward mode (jvp of jvp, jacfwd of jacfwd) is not supported; take one of "
            "the derivatives in reverse mode, as torch.func.hessian does"
        )
    if transforms or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forbid_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Step functions update a state in place and have no derivative: they say so instead of returning a constant."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires a gradient, but a step has none; call it under torch.no_grad() or detach "
                    f"{name}. For training use the function over whole sequences."
                )


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """What op.cpp checks of real tensors, for shape functions: torch calls those as soon as one tensor is "meta"."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != reference.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {first}; move it with .to({first}.device)")


def autocast_operands(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrix operands of an operator as autocast wants them: its dtype inside autocast, untouched outside."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums and states: float64 for float64 data, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
