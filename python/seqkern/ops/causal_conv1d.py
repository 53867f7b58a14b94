"""Depthwise causal convolution over time, the short filter in front of Mamba, GLA, DeltaNet and Hyena layers.

Equations (the tags stand beside the code in csrc/causal_conv1d):

    [conv]   pre_t = bias + sum_j weight_j x_{t - (W-1-j) dilation},   y_t = pre_t or silu(pre_t)
    [state]  x_{-S} .. x_{-1} is the initial state, x_{L-S} .. x_{L-1} the final state,   S = (W-1) dilation
    [dx]     dx_t = sum_j weight_j dpre_{t + (W-1-j) dilation},        dpre_t = dy_t or dy_t silu'(pre_t)
    [dw]     dweight_j = sum_t dpre_t x_{t - (W-1-j) dilation},        dbias = sum_t dpre_t

Without the activation the map is linear in x, state and bias and linear in weight, so its second derivatives are the
same two kernels again: `_Conv` and `_ConvBackward` below call each other and differentiate to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import library
from .._sequences import runs
from .._torch import (
    accumulator,
    autocast_operands,
    check_devices,
    empty_like_tokens,
    forbid_grad,
    needs_graph,
    vmap_over_channels,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    dilation: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution, with optional SiLU.

    .. math:: y_t = \mathrm{act}\Big(bias + \sum_{j=0}^{W-1} weight_j \; x_{t-(W-1-j)\,dilation}\Big)

    Args:
        x: (B, D, L), float32, bfloat16, float16 or float64. Contiguous time and contiguous channels are both native;
            any other layout is copied. The output has the memory order of x.
        weight: (D, W), W from 1 to 64, any of these dtypes. The last column multiplies the current token.
        bias: (D,) or None.
        activation: None, "silu" or "swish".
        initial_state: (N, D, S) with S = (W - 1) * dilation: the S tokens before the sequence, oldest first; None is
            zeros. N is B, or the number of sequences in cu_seqlens.
        return_final_state: also return the last S tokens (with the initial state's where the sequence is shorter).
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        seq_idx: (B, L) int32: in each row every maximal run of one id is a sequence, ids below 0 are padding with zero
            output and zero gradient. The initial state enters the row's first sequence, the final state follows its
            last token that is not padding. Not together with cu_seqlens.
        reverse: run from the last token to the first; the state enters at token L - 1.
        dilation: distance between taps.

    Returns:
        y (B, D, L) in the dtype of x; with return_final_state, (y, final_state), the state (N, D, S) in float32
        (float64 for float64 data).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.
        ValueError: an unknown activation.

    Sums run in float32 (float64 for float64 data) in a fixed order: results and gradients repeat bitwise, and a
    sequence gives the same bits alone, batched or packed. Gradients of every tensor argument, of any order, and
    forward mode are exact. Under autocast x and weight are cast. See Mamba [2312.00752 sec. 3.4].

    Example:
        >>> import torch, seqkern
        >>> x, weight = torch.randn(2, 8, 16), torch.randn(8, 4)
        >>> y, state = seqkern.causal_conv1d(x, weight, activation="silu", return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 8, 16]), torch.Size([2, 8, 3]))
    """
    silu = _is_silu("causal_conv1d", activation)
    x, weight = autocast_operands(x, weight)
    tensors = (x, weight, bias, initial_state)
    args = (*tensors, cu_seqlens, seq_idx, silu, dilation, reverse, return_final_state)
    outputs = _Conv.apply(*args) if needs_graph(*tensors) else library.ops.causal_conv1d_fwd(*args)
    return tuple(outputs) if return_final_state else outputs[0]


def causal_conv1d_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    dilation: int = 1,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of a running convolution: reads the state, returns their outputs, moves the state on in place.

    Args:
        x: (B, D), one token for each row, or (B, D, T), several.
        conv_state: (R, D, S') with S' >= S = (W - 1) * dilation, any strides, any floating dtype, updated in place: its
            columns are the latest S' tokens, oldest first, of which the newest S are read.
        weight, bias, activation, dilation: as in `causal_conv1d`.
        state_indices: (B,) int32 or int64: the row of conv_state of each row of x. Negative rows are skipped: their
            output is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        y in the shape and dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: an unknown activation.

    Example:
        >>> import torch, seqkern
        >>> x, weight = torch.randn(2, 8, 5), torch.randn(8, 4)
        >>> y, state = seqkern.causal_conv1d(x[..., :4], weight, return_final_state=True)
        >>> last = seqkern.causal_conv1d_step(x[..., 4], state, weight)
        >>> torch.allclose(last, seqkern.causal_conv1d(x, weight)[..., 4], atol=1e-6)
        True
    """
    silu = _is_silu("causal_conv1d_step", activation)
    forbid_grad("causal_conv1d_step", x=x, conv_state=conv_state, weight=weight, bias=bias)
    x, weight = autocast_operands(x, weight)
    return library.ops.causal_conv1d_step(x, conv_state, weight, bias, state_indices, silu, dilation)


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    dilation: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` in plain torch, one sequence after another, in the widest dtype of its arguments."""
    (B, D, L), W = x.shape, weight.shape[1]
    S = (W - 1) * dilation
    dtype = torch.promote_types(x.dtype, weight.dtype)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    states = x.new_zeros(N, D, S, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    rows, finals = [[] for _ in range(B)], [None] * N
    for run in runs(B, L, cu_seqlens, seq_idx, reverse):
        tokens = x[run.b, :, run.begin : run.end].to(dtype)
        tokens = tokens.flip(-1) if reverse else tokens
        state = x.new_zeros(D, S, dtype=dtype) if run.initial is None else states[run.initial]
        history = torch.cat([state, tokens], dim=1)
        n = tokens.shape[1]
        pre = sum(weight[:, j : j + 1].to(dtype) * history[:, j * dilation : j * dilation + n] for j in range(W))
        pre = pre if bias is None else pre + bias[:, None].to(dtype)
        y = torch.nn.functional.silu(pre) if _is_silu("causal_conv1d", activation) else pre
        rows[run.b].append((run.begin, y.flip(-1) if reverse else y))
        if run.final is not None:
            finals[run.final] = history[:, n:]
    y = torch.stack([_place(pieces, x.new_zeros(D, L, dtype=dtype)) for pieces in rows]) if B else x.to(dtype)
    y = y.to(x.dtype)
    final_state = torch.stack(finals) if N else states
    return (y, final_state.to(accumulator(x.dtype))) if return_final_state else y


def _place(pieces: list[tuple[int, Tensor]], zeros: Tensor) -> Tensor:
    """(D, L): the pieces at their places, zeros between them."""
    parts, end = [], 0
    for begin, piece in sorted(pieces, key=lambda piece: piece[0]):
        parts += [zeros[:, end:begin], piece]
        end = begin + piece.shape[1]
    return torch.cat([*parts, zeros[:, end:]], dim=1)


def reference_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    dilation: int = 1,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_step` in plain torch."""
    tokens = x[..., None] if x.dim() == 2 else x
    S = (weight.shape[1] - 1) * dilation
    y = torch.zeros_like(tokens)
    for b, row in enumerate(range(len(x)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            state = conv_state[row]
            initial = state[None, :, state.shape[1] - S :]
            y[b] = reference(tokens[b : b + 1], weight, bias, activation, initial_state=initial, dilation=dilation)[0]
            state.copy_(torch.cat([state, tokens[b].to(state.dtype)], dim=1)[:, tokens.shape[2] :])
    return y[..., 0] if x.dim() == 2 else y


class _Conv(torch.autograd.Function):
    """(x, weight, bias, initial_state), packing and options -> (y[, final_state])."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.causal_conv1d_fwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu, ctx.dilation, ctx.reverse, ctx.return_final_state = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dfinal_state=None):
        x, weight, bias, initial_state, cu_seqlens, seq_idx = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        primals = (dy, dfinal_state, x, weight, bias, initial_state)
        args = (*primals, cu_seqlens, seq_idx, ctx.silu, ctx.dilation, ctx.reverse)
        if needs_graph(*primals):
            grads = _ConvBackward.apply(*args)
        else:
            grads = library.ops.causal_conv1d_bwd(*args)
        return *_spread(grads, bias, initial_state), *[None] * 6

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, dinitial_state, *_):
        x, weight, bias, initial_state, *packing = ctx.saved_tensors
        linear = _Linear(packing, ctx.dilation, ctx.reverse)
        dpre = linear.tangent((x, weight, initial_state), (dx, dweight, dbias, dinitial_state))
        dy = dpre * _silu_derivatives(linear.pre(x, weight, bias, initial_state))[0].to(x.dtype) if ctx.silu else dpre
        if not ctx.return_final_state:
            return (dy,)
        dx = torch.zeros_like(x) if dx is None else dx
        return dy, linear.final_state(dx, weight, dinitial_state)

    @staticmethod
    def vmap(info, in_dims, *args):
        out_axes = (1, 1) if args[-1] else (1,)
        return vmap_over_channels(_Conv, info, in_dims, args, _channel_axes(args[:4], in_dims), out_axes)


class _ConvBackward(torch.autograd.Function):
    """(dy, dfinal_state, x, weight, bias, initial_state), packing and options -> (dx, dweight[, dbias][, dinitial])."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.causal_conv1d_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu, ctx.dilation, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dpre, pre> + <dfinal, final>, so v^T of its Jacobian
        is the gradient of the directional derivative of phi along v. SiLU enters through dpre = dy silu'(pre)."""
        dy, dfinal_state, x, weight, bias, initial_state, *packing = ctx.saved_tensors
        linear = _Linear(packing, ctx.dilation, ctx.reverse)
        vx, vweight, vbias, vinitial = _spread(cotangents, bias, initial_state)
        vpre = linear.tangent((x, weight, initial_state), (vx, vweight, vbias, vinitial))
        vx, vweight, vinitial = _zeros_where_none((vx, vweight, vinitial), (x, weight, initial_state))
        g_dfinal = None if dfinal_state is None else linear.final_state(vx, weight, vinitial)
        if ctx.silu:
            pre = linear.pre(x, weight, bias, initial_state)
            first, second = (d.to(x.dtype) for d in _silu_derivatives(pre))
            dpre, g_dy = dy * first, vpre * first
        else:
            dpre, g_dy = dy, vpre
        gx, gweight, _, ginitial = linear.backward(dpre, None, vx, vweight, None, vinitial)
        gbias = None
        if ctx.silu:
            along_pre = linear.backward(vpre * dy * second, None, x, weight, bias, initial_state)
            gx, gweight, gbias, ginitial = _add((gx, gweight, gbias, ginitial), along_pre)
        return g_dy, g_dfinal, gx, gweight, gbias, ginitial, *[None] * 5

    @staticmethod
    def jvp(ctx, tdy, tdfinal, tx, tweight, tbias, tinitial, *_):
        dy, _, x, weight, bias, initial_state, *packing = ctx.saved_tensors
        linear = _Linear(packing, ctx.dilation, ctx.reverse)
        tdy = torch.zeros_like(dy) if tdy is None else tdy
        if ctx.silu:
            tpre = linear.tangent((x, weight, initial_state), (tx, tweight, tbias, tinitial))
            first, second = (d.to(x.dtype) for d in _silu_derivatives(linear.pre(x, weight, bias, initial_state)))
            tdy, dy = tdy * first + dy * second * tpre, dy * first
        along_dy = linear.backward(tdy, tdfinal, x, weight, bias, initial_state)
        tx, tweight, tinitial = _zeros_where_none((tx, tweight, tinitial), (x, weight, initial_state))
        along_x = linear.backward(dy, None, tx, tweight, None, tinitial)
        return tuple(t for t in _add(along_dy, along_x) if t is not None)

    @staticmethod
    def vmap(info, in_dims, *args):
        in_axes = _channel_axes(args[:6], in_dims)
        out_axes = [axis for axis, t in zip(in_axes[2:], args[2:], strict=False) if t is not None]
        return vmap_over_channels(_ConvBackward, info, in_dims, args, in_axes, out_axes)


class _Linear:
    """The convolution without activation, and its transpose: differentiable pieces for derivatives of higher order."""

    def __init__(self, packing, dilation, reverse):
        self.options = (*packing, False, dilation, reverse)

    def pre(self, x, weight, bias, initial_state):
        return _Conv.apply(x, weight, bias, initial_state, *self.options, False)[0]

    def final_state(self, x, weight, initial_state):
        return _Conv.apply(x, weight, None, initial_state, *self.options, True)[1]

    def tangent(self, primals, tangents):
        """Directional derivative of pre, bilinear in (x, initial_state) and weight; None is zero."""
        (x, weight, initial_state), (dx, dweight, dbias, dinitial_state) = primals, tangents
        dx, dweight, dinitial_state = _zeros_where_none((dx, dweight, dinitial_state), primals)
        return self.pre(dx, weight, dbias, dinitial_state) + self.pre(x, dweight, None, initial_state)

    def backward(self, dpre, dfinal_state, x, weight, bias, initial_state):
        args = (dpre, dfinal_state, x, weight, bias, initial_state)
        return _spread(_ConvBackward.apply(*args, *self.options), bias, initial_state)


def _spread(grads, bias, initial_state):
    """(dx, dweight, dbias, dinitial_state) from the ones an operator returned; None for arguments that are None."""
    rest = list(grads[2:])
    return grads[0], grads[1], None if bias is None else rest.pop(0), None if initial_state is None else rest.pop(0)


def _zeros_where_none(tangents, primals):
    return tuple(
        torch.zeros_like(p) if t is None and p is not None else t for t, p in zip(tangents, primals, strict=True)
    )


def _add(a, b):
    return tuple(q if p is None else p if q is None else p + q for p, q in zip(a, b, strict=True))


def _silu_derivatives(pre: Tensor) -> tuple[Tensor, Tensor]:
    pre = pre.to(accumulator(pre.dtype))
    s = torch.sigmoid(pre)
    return s * (1 + pre * (1 - s)), s * (1 - s) * (2 + pre * (1 - 2 * s))


def _channel_axes(tensors, in_dims):
    """Where x, weight and the others have their channels, without a mapped dimension."""
    return [int(t is not None and t.dim() - (dim is not None) == 3) for t, dim in zip(tensors, in_dims, strict=False)]


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(x, weight, bias, initial_state, cu_seqlens, seq_idx, **grads):
        packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        check_devices("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state, **packing, **grads)

    def fwd(x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, dilation, reverse, return_final_state):
        check(x, weight, bias, initial_state, cu_seqlens, seq_idx)
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        S = (weight.shape[1] - 1) * dilation
        state = [x.new_empty(N, x.shape[1], S, dtype=accumulator(x.dtype))] if return_final_state else []
        return [empty_like_tokens(x), *state]

    def bwd(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, dilation, reverse):
        check(x, weight, bias, initial_state, cu_seqlens, seq_idx, dy=dy, dfinal_state=dfinal_state)
        parameters = [t for t in (weight, bias, initial_state) if t is not None]
        return [empty_like_tokens(x), *(t.new_empty(t.shape) for t in parameters)]

    def step(x, conv_state, weight, bias, state_indices, silu, dilation):
        tensors = {"weight": weight, "bias": bias, "conv_state": conv_state, "state_indices": state_indices}
        check_devices("causal_conv1d_step", x=x, **tensors)
        return x.new_empty(x.shape)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu, ctx.dilation, ctx.reverse, _ = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grads):
        dy, dfinal_state = (*grads, None)[:2]
        x, weight, bias, initial_state, *packing = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        args = (dy, dfinal_state, x, weight, bias, initial_state, *packing, ctx.silu, ctx.dilation, ctx.reverse)
        return *_spread(ops.causal_conv1d_bwd(*args), bias, initial_state), *[None] * 6

    torch.library.register_fake(f"{namespace}::causal_conv1d_fwd", fwd)
    torch.library.register_fake(f"{namespace}::causal_conv1d_bwd", bwd)
    torch.library.register_fake(f"{namespace}::causal_conv1d_step", step)
    torch.library.register_autograd(f"{namespace}::causal_conv1d_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::causal_conv1d_bwd",
        lambda ctx, cotangents: _ConvBackward.backward(ctx, *cotangents),
        setup_context=_ConvBackward.setup_context,
    )
