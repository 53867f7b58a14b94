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
    return requires_grad(*tensors)


def requires_grad(*tensors: torch.Tensor | None) -> bool:
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


def writable_pairs(state: torch.Tensor) -> torch.Tensor:
    """A complex state as pairs of real numbers for a step to update; afterwards goes `write_pairs`.

    The compiler cannot follow a write through a view of another dtype: for it they are a copy.
    """
    pairs = torch.view_as_real(state)
    return pairs.clone() if torch.compiler.is_compiling() else pairs


def write_pairs(state: torch.Tensor, pairs: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        state.copy_(torch.view_as_complex(pairs))


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """What op.cpp checks of real tensors, for shape functions: torch calls those as soon as one tensor is "meta"."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != reference.device:
            raise RuntimeError(f"{op}: {name} must be on the device of {first}; move it with .to({first}.device)")


def autocast_operands(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The matrix operands of an operator as autocast wants them: its dtype inside autocast, untouched outside."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def is_cast(tensor):
        return tensor.is_floating_point() and tensor.dtype != torch.float64

    return tuple(t.to(dtype) if t is not None and is_cast(t) else t for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums and states: float64 for float64 data, else float32; complex for complex data."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def prefers_channels(x: torch.Tensor) -> bool:
    """Whether kernels lay their outputs out with contiguous channels, for (B, D, L) data x (csrc/common/tensor.h)."""
    _, D, L = x.shape
    channels, time = x.stride(1) == 1 or D == 1, x.stride(2) == 1 or L == 1
    return channels and (not time or (L == 1 and D > 1))


def empty_like_tokens(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the memory order of outputs for the (B, D, L) data x."""
    B, D, L = x.shape
    return x.new_empty(B, L, D).transpose(1, 2) if prefers_channels(x) else x.new_empty(B, D, L)


def in_order_of(x: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A (B, D, L) tensor in the memory order of outputs for x."""
    return tensor.mT.contiguous().mT if prefers_channels(x) else tensor.contiguous()


def is_time_major(x: torch.Tensor) -> bool:
    """Whether outputs for (B, L, ...) data x have time before batch in memory."""
    return x.shape[0] > 1 and x.shape[1] > 1 and x.stride(0) < x.stride(1)


def empty_tokens(x: torch.Tensor, *rest: int, front: tuple[int, ...] = (), dtype: torch.dtype | None = None):
    """Uninitialised (*front, B, L, *rest), batch and time in the memory order of outputs for the (B, L, ...) data x."""
    (B, L), at = x.shape[:2], len(front)
    if is_time_major(x):
        return x.new_empty(*front, L, B, *rest, dtype=dtype).transpose(at, at + 1)
    return x.new_empty(*front, B, L, *rest, dtype=dtype)


def vmap_over_channels(function, info, in_dims, args, in_axes, out_axes):
    """Channels are independent: the mapped dimension joins them, and one call serves all. Only mapped arguments without
    channels, as packings are, loop.

    Args:
        function: an autograd function.
        info, in_dims, args: what torch gives to its `vmap`.
        in_axes: the dimension of the channels in each of the first arguments where it is not mapped. None, as for the
            rest: it has none.
        out_axes: that of each output.
    """
    V, axes = info.batch_size, (*in_axes, *[None] * (len(args) - len(in_axes)))
    if any(dim is not None and axis is None for dim, axis in zip(in_dims, axes, strict=True)):
        calls = [
            function.apply(*(a if dim is None else a.select(dim, v) for a, dim in zip(args, in_dims, strict=True)))
            for v in range(V)
        ]
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), tuple(0 for _ in calls[0])

    def fold(tensor, dim, axis):
        if tensor is None or axis is None:
            return tensor
        tensor = tensor.unsqueeze(0).expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.movedim(0, axis).flatten(axis, axis + 1)

    outputs = function.apply(*map(fold, args, in_dims, axes))
    unfolded = (t.unflatten(axis, (V, t.shape[axis] // V)) for t, axis in zip(outputs, out_axes, strict=True))
    return tuple(unfolded), tuple(out_axes)
