"""What every operator needs to know about torch's state at the moment of a call."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its autograd.Function.

    It need not when nothing requires a gradient, no forward-mode level is open (a dual tensor has
    ``requires_grad=False``) and no torch.func transform is active: the raw operator is several times cheaper to call.
    """
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
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
