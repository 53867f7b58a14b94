"""The selective scan of Mamba: a linear recurrence whose decay, input and output maps depend on the token.

Equations (the tags stand beside the code in csrc/selective_scan), for each channel, with states n = 1 .. N:

    [delta]   delta'_t = delta_t + delta_bias, through softplus if delta_softplus
    [decay]   a_t = exp(delta'_t A), or 2 exp(delta'_t A) - 1
    [state]   h_t = a_t h_{t-1} + delta'_t u_t B_t
    [out]     out_t = sum_n C_t h_t + D u_t,                         y_t = out_t silu(z_t), or out_t without z
    [gate]    dout_t = dy_t silu(z_t),                               dz_t = dy_t out_t silu'(z_t)
    [dstate]  g_t = k conj(C_t) dout_t + conj(a_{t+1}) g_{t+1},      the last one plus dlast_state
    [dC]      dC_t = sum over channels of k dout_t conj(h_t)
    [dB]      dB_t = sum over channels of delta'_t u_t g_t
    [du]      du_t = D dout_t + delta'_t Re(sum_n conj(B_t) g_t)
    [dA]      dA = sum_t delta'_t e_t,                               e_t = conj(a'_t h_{t-1}) g_t
    [ddelta]  ddelta'_t = u_t Re(sum_n conj(B_t) g_t) + Re(sum_n conj(A) e_t)

with a'_t = exp(delta'_t A), twice that for 2 exp - 1; k = 1, and for complex A, where out_t has 2 Re(sum_n C_t h_t),
k = 2. Autograd sees real tensors only: complex ones are pairs of real numbers on the way in and out.

Kernels compute y and its gradients. Forward mode and second derivatives are in `_selective_scan.Call`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from .._torch import (
    accumulator,
    check_devices,
    empty_like_tokens,
    forbid_grad,
    needs_graph,
    requires_grad,
    vmap_over_channels,
    writable_pairs,
    write_pairs,
)
from ._selective_scan import Call, is_two_exp, reference, reference_step

__all__ = ["reference", "reference_step", "register", "selective_scan", "selective_scan_step"]

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CHUNK = 32  # tokens between two checkpoints (csrc/selective_scan/params.h)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    transition: str = "exp",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective state space scan of Mamba [2312.00752, equation 2 and algorithm 2].

    .. math::
        \delta'_t = \mathrm{softplus}(delta_t + delta\_bias), \quad
        h_t = e^{\delta'_t A} h_{t-1} + \delta'_t u_t B_t, \quad
        y_t = \Big(\sum_n C_t h_t + D u_t\Big) \, \mathrm{silu}(z_t)

    Args:
        u: (B, D, L), float32, bfloat16, float16 or float64. Contiguous time and contiguous channels are both native;
            any other layout is copied, as of delta and z. The output has the memory order of u.
        delta: (B, D, L), the step sizes; like every tensor here, in a dtype of its own.
        A: (D, N), real of any sign, or complex.
        B, C: (D, N), constant in time; or (B, N, L); or (B, G, N, L), group g for D/G channels. Any strides. With
            complex A they are complex as well, or, if they vary in time, real with real and imaginary parts
            interleaved: (B, N, 2L) or (B, G, N, 2L). Complex ones whose time is not contiguous are copied.
        D: (D,) or None: y gets D u.
        z: (B, D, L) or None: y is multiplied by silu(z).
        delta_bias: (D,) or None: is added to delta.
        delta_softplus: delta goes through softplus (after the bias).
        return_last_state: also return the state after the last token.
        initial_state: (S, D, N), complex if A is; None is zeros. S is B, or the number of sequences in cu_seqlens.
        cu_seqlens: (S + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        seq_idx: (B, L) int32: in each row every maximal run of one id is a sequence, ids below 0 are padding with zero
            output and zero gradient. The initial state enters the row's first sequence, the last state follows its
            last token that is not padding. Not together with cu_seqlens.
        reverse: run from the last token to the first; the state enters at token L - 1.
        transition: "exp", or "two_exp_minus_one" for decays 2 exp(delta' A) - 1, which lie between -1 and 1 where
            delta' A is negative [2411.12537].

    With complex A, y has 2 Re(sum C h): states stand for pairs of conjugates. Gradients of complex tensors follow
    torch's convention.

    Returns:
        y (B, D, L) in the dtype of u; with return_last_state, (y, last_state), the state (S, D, N) in float32 (float64
        for float64 u), complex if A is.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.
        ValueError: an unknown transition.

    States and sums are float32 (float64 for float64 u) in a fixed order and without atomics: results and gradients
    repeat bitwise. With `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed; without it
    a plan may cut time to keep the machine busy. Under autocast nothing is cast.

    Memory: where a gradient is wanted, the states at every 32nd token, N/8 bytes (complex: N/4) for each element of
    a float32 u, and nothing else besides the inputs; the backward recomputes the states between them. Second
    derivatives and forward mode are exact and slower, in plain torch operations, 32 tokens at a time: some twenty
    tensors (B, D, 32, N), and for second derivatives N/4 bytes for each element of u. Derivatives beyond the second
    keep the intermediate values of all tokens.

    Example:
        >>> import torch, seqkern
        >>> u, delta = torch.randn(2, 8, 16), torch.rand(2, 8, 16)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
        >>> y, state = seqkern.selective_scan(u, delta, A, B, C, return_last_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 8, 16]), torch.Size([2, 8, 4]))
    """
    two_exp = is_two_exp("selective_scan", transition)
    is_complex = A.is_complex()
    if is_complex:
        A, B, C = torch.view_as_real(A.resolve_conj()), _projection("B", B), _projection("C", C)
        initial_state = None if initial_state is None else _pairs("selective_scan", "initial_state", initial_state)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    split_time = not settings.batch_invariant
    args = (*tensors, cu_seqlens, seq_idx, delta_softplus, two_exp, reverse, split_time, return_last_state)
    if needs_graph(*tensors):
        B, C = (t.unsqueeze(1) if t.dim() == 3 and not is_complex else t for t in (B, C))
        y, *rest = _Scan.apply(u, delta, A, B, C, *args[5:])
    else:
        y, *rest = library.ops.selective_scan_fwd(*args, requires_grad(*tensors))
    if not return_last_state:
        return y
    return y, torch.view_as_complex(rest[0]) if is_complex else rest[0]


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    transition: str = "exp",
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running scan: moves the state on in place and returns the token's output.

    Channels are D, or H heads of P channels, each with its own A, D and delta_bias.

    Args:
        state: (R, D, N) or (R, H, P, N), complex if A is, any strides, any floating dtype, updated in place.
        u, delta, z: (B, D) or (B, H, P).
        A: (D, N) or (H, P, N).
        B, C: (B, N) or (B, G, N), group g for D/G channels or H/G heads; complex if A is. One that is constant in time
            is passed as `constant.expand(B, D, N)`, every channel a group of its own.
        D, delta_bias: (D,) or (H, P).
        delta_softplus, transition: as in `selective_scan`.
        state_indices: (B,) int32 or int64: the row of state of each row of u. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        y in the shape and dtype of u.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: an unknown transition.

    Example:
        >>> import torch, seqkern
        >>> u, delta = torch.randn(2, 8, 5), torch.rand(2, 8, 5)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
        >>> first = [t[..., :4] for t in (u, delta)], [t[..., :4] for t in (B, C)]
        >>> y, state = seqkern.selective_scan(*first[0], A, *first[1], return_last_state=True)
        >>> last = seqkern.selective_scan_step(state, u[..., 4], delta[..., 4], A, B[..., 4], C[..., 4])
        >>> torch.allclose(last, seqkern.selective_scan(u, delta, A, B, C)[..., 4], atol=1e-5)
        True
    """
    two_exp = is_two_exp("selective_scan_step", transition)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    forbid_grad("selective_scan_step", state=state, **tensors)
    others = (D, z, delta_bias, state_indices, delta_softplus, two_exp)
    if not A.is_complex():
        return library.ops.selective_scan_step(state, u, delta, A, B, C, *others)
    named = {"state": state, "A": A, "B": B, "C": C}
    _, A, B, C = (_pairs("selective_scan_step", name, tensor) for name, tensor in named.items())
    pairs = writable_pairs(state)
    y = library.ops.selective_scan_step(pairs, u, delta, A, B, C, *others)
    write_pairs(state, pairs)
    return y


def _pairs(op: str, name: str, tensor: Tensor) -> Tensor:
    """A complex tensor as real numbers, two in a last dimension."""
    if not tensor.is_complex():
        given = str(tensor.dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: {name} must be complex where A is, got {given}; convert it with .to(A.dtype)")
    return torch.view_as_real(tensor.resolve_conj())


def _projection(name: str, tensor: Tensor) -> Tensor:
    """B or C beside a complex A: constant (D, N, 2), or (B, G, N, 2L), real and imaginary parts in turn along time."""
    if tensor.dim() < 3:
        return _pairs("selective_scan", name, tensor)
    grouped = tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
    return torch.view_as_real(grouped.resolve_conj()).flatten(-2) if grouped.is_complex() else grouped


class _Scan(torch.autograd.Function):
    """Tensors as in NAMES, packing and options -> (y[, last_state], checkpoints)."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.selective_scan_fwd(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, ctx.two_exp, ctx.reverse, ctx.split_time, _ = inputs
        checkpoints = output[-1]
        ctx.mark_non_differentiable(checkpoints)
        ctx.save_for_backward(checkpoints, *tensors)
        ctx.save_for_forward(checkpoints, *tensors)
        ctx.num_outputs = len(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, *others):
        args = _backward_arguments(ctx, dy, *others[:-1])
        if needs_graph(*args[:2], *args[3 : 3 + len(NAMES)]):
            grads = _ScanBackward.apply(*args)
        else:
            grads = library.ops.selective_scan_bwd(*args)
        return *_spread(grads, ctx.saved_tensors[1:]), *[None] * 7

    @staticmethod
    def jvp(ctx, *tangents):
        tensors = ctx.saved_tensors[1:]
        derivatives = _call(ctx, tensors).jvp(_tangents(tensors, tangents))
        return *derivatives[: ctx.num_outputs - 1], None

    @staticmethod
    def vmap(info, in_dims, *args):
        return_last_state = args[-1]
        out_axes = (1, 1, 1) if return_last_state else (1, 1)
        return vmap_over_channels(_Scan, info, in_dims, args, _channel_axes(NAMES, in_dims, args), out_axes)


class _ScanBackward(torch.autograd.Function):
    """(dy, dlast_state, checkpoints), tensors as in NAMES, packing and options -> gradients of the tensors given."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.selective_scan_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, ctx.two_exp, ctx.reverse, ctx.split_time = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dy, y> + <dlast_state, last_state>, so v^T of its
        Jacobian is the gradient of the directional derivative of phi along v."""
        dy, dlast_state, _, *tensors = ctx.saved_tensors
        v = _tangents(tensors, _spread(cotangents, tensors))
        g_dy, g_dlast_state, grads = _call(ctx, tensors).second_order(v, dy, dlast_state)
        g_dlast_state = None if dlast_state is None else g_dlast_state
        return g_dy, g_dlast_state, None, *(grads.get(name) for name in NAMES), *[None] * 6

    @staticmethod
    def jvp(ctx, dy_t, dlast_state_t, _, *tangents):
        """The map is linear in dy and dlast_state, and a gradient, with a symmetric Jacobian, in the rest."""
        dy, dlast_state, checkpoints, *tensors = ctx.saved_tensors
        *_, along = _call(ctx, tensors).second_order(_tangents(tensors, tangents), dy, dlast_state)
        dy_t = torch.zeros_like(dy) if dy_t is None else dy_t
        options = (ctx.softplus, ctx.two_exp, ctx.reverse, ctx.split_time)
        grads = _ScanBackward.apply(dy_t, dlast_state_t, checkpoints, *tensors, *options)
        return tuple(grad + gradient for grad, gradient in zip(grads, along.values(), strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        names = ("dy", "dlast_state", "checkpoints", *NAMES)
        in_axes = _channel_axes(names, in_dims, args)
        out_axes = [axis for axis, t in zip(in_axes[3:], args[3:], strict=False) if t is not None]
        return vmap_over_channels(_ScanBackward, info, in_dims, args, in_axes, out_axes)


def _backward_arguments(ctx, dy, dlast_state=None):
    checkpoints, *tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    return dy, dlast_state, checkpoints, *tensors, ctx.softplus, ctx.two_exp, ctx.reverse, ctx.split_time


def _call(ctx, tensors):
    given = {name: t for name, t in zip(NAMES, tensors, strict=False) if t is not None}
    packing = tensors[len(NAMES) :]
    return Call(given, packing, ctx.softplus, ctx.two_exp, ctx.reverse, accumulator(given["u"].dtype))


def _tangents(tensors, tangents):
    """By name, of the tensors that are given, zeros where there is none."""
    everything = zip(NAMES, tensors, tangents, strict=False)
    return {
        name: torch.zeros_like(t) if tangent is None else tangent for name, t, tangent in everything if t is not None
    }


def _spread(grads, tensors):
    """Gradients of the tensors in NAMES from those of the ones that are given; None for the others."""
    rest = iter(grads)
    return [None if t is None else next(rest) for t in tensors[: len(NAMES)]]


def _channel_axes(names, in_dims, args):
    """Where the arguments of an autograd function have their channels, or groups of channels, without a mapped one."""
    dims = {name: t.dim() - (d is not None) for name, t, d in zip(names, args, in_dims, strict=False) if t is not None}
    first = {"A", "D", "delta_bias"} | {name for name in "BC" if dims[name] == dims["A"]}
    return [0 if name in first else 1 for name in names]


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(tensors, packing, **grads):
        cu_seqlens, seq_idx = packing
        named = dict(zip(NAMES, tensors, strict=True)) | {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        check_devices("selective_scan", **named, **grads)

    def fwd(*args):
        (*tensors, cu_seqlens, seq_idx), options = args[: len(NAMES) + 2], args[len(NAMES) + 2 :]
        return_last_state, keep_checkpoints = options[-2:]
        check(tensors, (cu_seqlens, seq_idx))
        u, _, A, *_ = tensors
        B, D, L = u.shape
        dtype = accumulator(u.dtype)
        outputs = [empty_like_tokens(u)]
        if return_last_state:
            rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
            outputs.append(u.new_empty(rows, *A.shape, dtype=dtype))
        if keep_checkpoints:
            rows = B * ((L + CHUNK - 1) // CHUNK) * A.shape[1:].numel()
            outputs.append(u.new_empty(rows, D, dtype=dtype))
        return outputs

    def bwd(*args):
        dy, dlast_state, checkpoints, *tensors = args[: len(NAMES) + 5]
        *tensors, cu_seqlens, seq_idx = tensors
        grads = {"dy": dy, "dlast_state": dlast_state, "checkpoints": checkpoints}
        check(tensors, (cu_seqlens, seq_idx), **grads)
        given = [(name, t) for name, t in zip(NAMES, tensors, strict=True) if t is not None]
        tokens = ("u", "delta", "z")
        return [empty_like_tokens(t) if name in tokens else t.new_empty(t.shape) for name, t in given]

    def step(state, u, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus, two_exp):
        named = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "state": state}
        check_devices("selective_scan_step", u=u, **named, state_indices=state_indices)
        return u.new_empty(u.shape)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, ctx.two_exp, ctx.reverse, ctx.split_time, ctx.return_last_state, keep = inputs
        ctx.save_for_backward(output[-1] if keep else None, *tensors)

    def backward(ctx, grads):
        args = _backward_arguments(ctx, *grads[: 1 + ctx.return_last_state])
        if args[2] is None:
            raise RuntimeError("selective_scan_fwd: a gradient needs keep_checkpoints=True")
        return *_spread(ops.selective_scan_bwd(*args), ctx.saved_tensors[1:]), *[None] * 8

    torch.library.register_fake(f"{namespace}::selective_scan_fwd", fwd)
    torch.library.register_fake(f"{namespace}::selective_scan_bwd", bwd)
    torch.library.register_fake(f"{namespace}::selective_scan_step", step)
    torch.library.register_autograd(f"{namespace}::selective_scan_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::selective_scan_bwd",
        lambda ctx, cotangents: _ScanBackward.backward(ctx, *cotangents),
        setup_context=_ScanBackward.setup_context,
    )
