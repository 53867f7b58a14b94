"""The running softmax: at every token the softmax of all scores so far, applied to their values.

Equations (the tags stand beside the code in csrc/softmax_scan), for each head, with values v_t of size V:

    [max]     m_t = max(m_{t-1}, s_t)
    [sum]     n_t = exp(m_{t-1} - m_t) n_{t-1} + exp(s_t - m_t)
    [sumv]    w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t
    [out]     o_t = w_t / n_t

The backward goes the other way, with p_t = exp(s_t - m_t) / n_t and r_t = exp(m_t - m_{t+1}) n_t / n_{t+1}, both at
most 1:

    [dout]    G_t = do_t + r_t G_{t+1},           the last one plus n_t dw
    [dsum]    R_t = do_t . o_t + r_t R_{t+1},     the last one minus n_t dn
    [dv]      dv_t = p_t G_t
    [ds]      ds_t = p_t (v_t . G_t - R_t)

where dm, dn and dw are the gradients of the final state. Before the first token, with q = exp(m_0 - m_1) / n_1, are
dw_0 = q G_1, dn_0 = -q R_1 and dm_0 = n_0 dn_0 + w_0 . dw_0. What the final m itself gets, dm - n dn - w . dw, goes to
where it came from: the first token that reached it, or m_0.

Kernels compute o and its gradients. Forward mode and second derivatives are in `_softmax_scan.Call`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from .._torch import accumulator, check_devices, forbid_grad, needs_graph, requires_grad, vmap_over_channels
from ._softmax_scan import Call, State, num_states, reference, reference_step

__all__ = ["reference", "reference_step", "register", "softmax_scan", "softmax_scan_step"]

HEADS = (2, 2, 1, 1, 1)  # the dimension of the heads in s, v, m, n and w


def softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    r"""Softmax attention of one query to every prefix of a sequence, in one pass [2405.13956, sections 3.1 and 3.2].

    .. math::
        o_t = \sum_{j \le t} \frac{e^{s_j}}{\sum_{i \le t} e^{s_i}} \, v_j

    computed with the running maximum m, the sum n = sum exp(s - m) and w = sum exp(s - m) v [1805.02867, algorithm 3],
    so that scores may be of any size.

    Args:
        s: (B, L, H), the scores, in a dtype of their own, any strides. -inf leaves a token out; while there is nothing
            but -inf, o is zero.
        v: (B, L, H, V), float32, bfloat16, float16 or float64; copied where the V values are not contiguous.
        initial_state: (m, n, w) of shapes (S, H), (S, H) and (S, H, V), as a call returned it; None is the empty state
            m = -inf, n = 0, w = 0, and so is every head with m = -inf. S is B, or the number of sequences in
            cu_seqlens.
        cu_seqlens: (S + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        seq_idx: (B, L) int32: in each row every maximal run of one id is a sequence, ids below 0 are padding with zero
            output and zero gradient. The initial state enters the row's first sequence, the final state follows its
            last token that is not padding. Not together with cu_seqlens.
        reverse: run from the last token to the first; the state enters at token L - 1.
        return_final_state: also return the state after the last token.

    Returns:
        o (B, L, H, V) in the dtype of v; with return_final_state, (o, (m, n, w)), the state in float32 (float64 for
        float64 v).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.

    The gradient of the final m goes to the first token that has the largest score, or to the initial m. NaN and +inf
    among the scores make every later output of their head NaN.

    States and sums are float32 (float64 for float64 v) in a fixed order and without atomics: results and gradients
    repeat bitwise. With `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed; without it
    a plan may cut time to keep the machine busy. Under autocast nothing is cast.

    The gradients of s, m and n are computed from o as it is returned: with v in half precision, from a rounded one.

    Memory: where a gradient is wanted, o, and m and n of every token, 8 bytes for each score (16 for float64 v).
    Second derivatives and forward mode are exact and slower: linear scans (`seqkern.linear_scan`) of V + 2 channels a
    head, some ten tensors the size of v in float32.

    Example:
        >>> import torch, seqkern
        >>> s, v = torch.randn(2, 16, 4), torch.randn(2, 16, 4, 8)
        >>> o, (m, n, w) = seqkern.softmax_scan(s, v, return_final_state=True)
        >>> weights = s.softmax(dim=1)[..., None]
        >>> torch.allclose(o[:, -1], (weights * v).sum(dim=1), atol=1e-6)
        True
        >>> m.shape, w.shape
        (torch.Size([2, 4]), torch.Size([2, 4, 8]))
    """
    tensors = (s, v, *_parts("softmax_scan", "initial_state", initial_state))
    split_time = not settings.batch_invariant
    args = (*tensors, cu_seqlens, seq_idx, reverse, split_time, return_final_state)
    if needs_graph(*tensors):
        o, *rest = _Scan.apply(*args)
    else:
        o, *rest = library.ops.softmax_scan_fwd(*args, requires_grad(*tensors))
    return (o, tuple(rest[:3])) if return_final_state else o


def softmax_scan_step(state: State, s: Tensor, v: Tensor, *, state_indices: Tensor | None = None) -> Tensor:
    """The next token of a running softmax: moves the state on in place and returns the token's output.

    Args:
        state: (m, n, w) of shapes (R, H), (R, H) and (R, H, V), any strides, any floating dtypes, updated in place. A
            head with m = -inf is empty, whatever its n and w.
        s: (B, H).
        v: (B, H, V).
        state_indices: (B,) int32 or int64: the row of state of each row of v. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        o in the shape and dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.

    Example:
        >>> import torch, seqkern
        >>> s, v = torch.randn(2, 5, 4), torch.randn(2, 5, 4, 8)
        >>> o, state = seqkern.softmax_scan(s[:, :4], v[:, :4], return_final_state=True)
        >>> last = seqkern.softmax_scan_step(state, s[:, 4], v[:, 4])
        >>> torch.allclose(last, seqkern.softmax_scan(s, v)[:, 4], atol=1e-6)
        True
    """
    m, n, w = _parts("softmax_scan_step", "state", state)
    forbid_grad("softmax_scan_step", **{"state's m": m, "state's n": n, "state's w": w}, s=s, v=v)
    return library.ops.softmax_scan_step(m, n, w, s, v, state_indices)


def _parts(op: str, name: str, state: State | None) -> tuple:
    if state is None:
        return None, None, None
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        given = f"{len(state)} of them" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
        raise RuntimeError(f"{op}: {name} must be the three tensors (m, n, w), got {given}")
    return tuple(state)


class _Scan(torch.autograd.Function):
    """(s, v, m, n, w), packing and options -> (o[, m, n, w], normalizers)."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.softmax_scan_fwd(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, ctx.split_time, ctx.return_final_state = inputs
        o, normalizers = output[0], output[-1]
        ctx.mark_non_differentiable(normalizers)
        ctx.save_for_backward(normalizers, o, *tensors)
        ctx.save_for_forward(normalizers, o, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, *others):
        args = _backward_arguments(ctx, do, *others[:-1])
        do, dm, dn, dw, _, _, *tensors = args[:11]
        if needs_graph(do, dm, dn, dw, *tensors):
            grads = _ScanBackward.apply(*args)
        else:
            grads = library.ops.softmax_scan_bwd(*args)
        return *_five(grads), *[None] * 5

    @staticmethod
    def jvp(ctx, *tangents):
        normalizers, o, *tensors, cu_seqlens, seq_idx = ctx.saved_tensors
        call = Call(normalizers, tensors[2], (cu_seqlens, seq_idx), ctx.reverse)
        ot, *final = call.tangent(tensors, _tangents(tensors, tangents))
        return ot.to(o.dtype), *(final if ctx.return_final_state else ()), None

    @staticmethod
    def vmap(info, in_dims, *args):
        out_axes = (2, 1, 1, 1, 2) if args[-1] else (2, 2)
        return vmap_over_channels(_Scan, info, in_dims, args, HEADS, out_axes)


class _ScanBackward(torch.autograd.Function):
    """do, (dm, dn, dw), normalizers, o, (s, v, m, n, w), packing and options -> gradients of the tensors given."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.softmax_scan_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, ctx.split_time = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <do, o> + <dfinal, final>, so v^T of its Jacobian is
        the gradient of the directional derivative of phi along v."""
        (g_do, *g_dfinal), grads = _second_order(ctx, _five(cotangents))
        do, dm, *_ = ctx.saved_tensors
        g_dfinal = (None, None, None) if dm is None else g_dfinal
        return g_do.to(do.dtype), *g_dfinal, None, None, *_five(grads), *[None] * 4

    @staticmethod
    def jvp(ctx, do_t, dm_t, dn_t, dw_t, normalizers_t, o_t, *tangents):
        """The map is linear in do and dfinal, and a gradient, with a symmetric Jacobian, in the rest, of which the
        normalizers and o are functions."""
        do, _, _, _, *kept = ctx.saved_tensors
        _, along = _second_order(ctx, tangents)
        do_t = torch.zeros_like(do) if do_t is None else do_t
        _, _, _, v, *_, cu_seqlens, _ = kept
        dfinal_t = _all_or_none((dm_t, dn_t, dw_t), v, cu_seqlens)
        grads = _ScanBackward.apply(do_t, *dfinal_t, *kept, ctx.reverse, ctx.split_time)
        return tuple(grad + gradient for grad, gradient in zip(grads, along, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        m = args[8]
        in_axes = (2, 1, 1, 1, 2, 2, *HEADS)
        out_axes = HEADS[:2] if m is None else HEADS
        return vmap_over_channels(_ScanBackward, info, in_dims, args, in_axes, out_axes)


def _backward_arguments(ctx, do, *dfinal):
    normalizers, o, s, v, *others = ctx.saved_tensors
    cu_seqlens = others[-2]
    do = torch.zeros_like(o) if do is None else do
    dfinal = _all_or_none(dfinal or (None, None, None), v, cu_seqlens)
    return do, *dfinal, normalizers, o, s, v, *others, ctx.reverse, ctx.split_time


def _all_or_none(dfinal, v, cu_seqlens):
    """Gradients of m, n and w, of which zeros replace those that are missing, unless they all are."""
    if all(part is None for part in dfinal):
        return dfinal
    shapes = _state_shapes(v, cu_seqlens)
    return tuple(
        v.new_zeros(shape, dtype=accumulator(v.dtype)) if part is None else part
        for part, shape in zip(dfinal, shapes, strict=True)
    )


def _state_shapes(v, cu_seqlens):
    rows, (_, _, H, V) = num_states(v, cu_seqlens), v.shape
    return (rows, H), (rows, H), (rows, H, V)


def _second_order(ctx, tangents):
    do, dm, dn, dw, normalizers, _, *tensors, cu_seqlens, seq_idx = ctx.saved_tensors
    call = Call(normalizers, tensors[2], (cu_seqlens, seq_idx), ctx.reverse)
    return call.second_order(tensors, _tangents(tensors, tangents), (do, dm, dn, dw))


def _tangents(tensors, tangents):
    """Of (s, v, m, n, w), zeros where there is none."""
    pairs = zip(tensors, tangents, strict=False)
    return [torch.zeros_like(t) if tangent is None and t is not None else tangent for t, tangent in pairs]


def _five(grads):
    """Gradients of (s, v, m, n, w); None for those of an initial state that is None."""
    return *grads, *[None] * (5 - len(grads))


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(tensors, cu_seqlens, seq_idx, **grads):
        s, v, *state = tensors
        named = {f"initial_state's {name}": part for name, part in zip("mnw", state, strict=True)}
        packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        check_devices("softmax_scan", v=v, s=s, **named, **packing, **grads)

    def fwd(s, v, m, n, w, cu_seqlens, seq_idx, reverse, split_time, return_final_state, keep_normalizers):
        check((s, v, m, n, w), cu_seqlens, seq_idx)
        dtype = accumulator(v.dtype)
        outputs = [v.new_empty(v.shape)]
        if return_final_state:
            outputs += [v.new_empty(shape, dtype=dtype) for shape in _state_shapes(v, cu_seqlens)]
        if keep_normalizers:
            outputs.append(v.new_empty(*v.shape[:3], 2, dtype=dtype))
        return outputs

    def bwd(do, dm, dn, dw, normalizers, o, s, v, m, n, w, cu_seqlens, seq_idx, reverse, split_time):
        dfinal = {f"dfinal_state's {name}": part for name, part in zip("mnw", (dm, dn, dw), strict=True)}
        check((s, v, m, n, w), cu_seqlens, seq_idx, do=do, o=o, normalizers=normalizers, **dfinal)
        return [t.new_empty(t.shape) for t in (s, v, m, n, w) if t is not None]

    def step(m, n, w, s, v, state_indices):
        state = {"state's m": m, "state's n": n, "state's w": w}
        check_devices("softmax_scan_step", v=v, s=s, **state, state_indices=state_indices)
        return v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.reverse, ctx.split_time, ctx.return_final_state, keep = inputs
        ctx.save_for_backward(output[-1] if keep else None, output[0], *tensors)

    def backward(ctx, grads):
        if ctx.saved_tensors[0] is None:
            raise RuntimeError("softmax_scan_fwd: a gradient needs keep_normalizers=True")
        args = _backward_arguments(ctx, *grads[: 4 if ctx.return_final_state else 1])
        return *_five(ops.softmax_scan_bwd(*args)), *[None] * 6

    torch.library.register_fake(f"{namespace}::softmax_scan_fwd", fwd)
    torch.library.register_fake(f"{namespace}::softmax_scan_bwd", bwd)
    torch.library.register_fake(f"{namespace}::softmax_scan_step", step)
    torch.library.register_autograd(f"{namespace}::softmax_scan_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::softmax_scan_bwd",
        lambda ctx, cotangents: _ScanBackward.backward(ctx, *cotangents),
        setup_context=_ScanBackward.setup_context,
    )
