r"""Nonlinear recurrences whose channels do not mix, token by token or solved over time in parallel, and their adjoint.

Equations (the tags stand beside the code in csrc/elementwise_rnn; the README there has the cells), for each batch row
and channel, with J_t = d s_t / d s_{t-1}:

    [cell]      s_t = cell(x_t, s_{t-1}), h_t the first number of s_t
    [adjoint]   ds_{t-1} = J_t^T ds_t, to whose first number dh_{t-1} is added;  dx_t and dweights from ds_t likewise

Shooting looks for the states s_p at the boundaries of chunks. In a sweep k every chunk p runs the cell from its s_p:

    [sweep]     F_p = the state after the chunk, M_p = d F_p / d s_p,  N_p = the largest |d s_t / d s_p| in the chunk
    [correct]   s_{p+1} = F_p + M_p (s_p - the s_p that the sweep began with), in the order of p
    [estimate]  e_{p+1} = |M_p| e_p + |F_p - s_{p+1}|, of the sweep's s; the error within chunk p is N_p e_p

Kernels compute h and its gradients. Forward mode and second derivatives are in `_elementwise_rnn.Cells`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .._cells import State, check_part, parts_of, state_rows
from .._config import settings
from .._load import library
from .._recurrence import num_states
from .._torch import accumulator, check_devices, forbid_grad, needs_graph, requires_grad, vmap_over_channels
from ._elementwise_rnn import (
    Cells,
    ElementwiseRnnStats,
    carried,
    cell_at,
    cell_of,
    index_of,
    options_of,
    published,
    reference,
    reference_step,
)

__all__ = ["ElementwiseRnnStats", "elementwise_rnn", "elementwise_rnn_step", "reference", "reference_step", "register"]

PIECE = 16  # tokens between two states that are kept for the backward (kKept there)


def elementwise_rnn(
    x: Tensor,
    weights: Tensor,
    initial_state: State | None = None,
    *,
    cell: str = "gru",
    solver: str = "auto",
    atol: float | None = None,
    max_sweeps: int | None = None,
    on_fail: str = "repair",
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple:
    r"""A nonlinear recurrence with recurrent weights that act on each channel alone.

    The gates are G pre-activations for each channel; what x contributes to them is computed before, by a matrix product
    for example. With s the sigmoid, h (and c) those of the token before:

    - ``"gru"``, ParaGRU [2510.21450]: gates z, r, n, weights a_z, a_r, a_n, state (h,).
      z = s(a_z h + x_z), r = s(a_r h + x_r), n = tanh(a_n h r + x_n), h' = (1 - z) h + z n
    - ``"lstm"``, ParaLSTM [2510.21450]: gates f, g, o, weights a_f, a_g, a_o, c_f, c_o, state (h, c).
      f = s(a_f h + c_f c + x_f), g = tanh(a_g h + x_g), c' = f c + (1 - f) g, o = s(a_o h + c_o c' + x_o),
      h' = o tanh(c')
    - ``"slstm"``, the sLSTM of xLSTM [2405.04517, equations 8 to 14]: gates i, f, z, o, weights a_i, a_f, a_z, a_o,
      state (h, c, n, m). i = exp(a_i h + x_i), f = s(a_f h + x_f), z = tanh(a_z h + x_z), o = s(a_o h + x_o),
      c' = f c + i z, n' = f n + i, h' = o c' / n', with c and n in the scale exp(m), so that gates may be of any size
    - ``"indrnn"``, IndRNN [1803.04831]: one gate, one weight, state (h,). h' = relu(a h + x)
    - ``"elman"`` [Elman 1990]: one gate, one weight, state (h,). h' = tanh(a h + x)

    Args:
        x: (B, L, G, D), the gates in the order above, float32, bfloat16, float16 or float64. Any strides; copied where
            channels are not contiguous.
        weights: (W, D), in the order above, in a dtype of their own.
        initial_state: the tuple of parts above, each (N, D), in dtypes of their own; None is an empty state: zeros, and
            of slstm m = -inf. N is B, or the number of sequences in cu_seqlens. A channel of slstm with n = 0 is empty,
            whatever its c and m.
        cell: one of those above.
        solver: how the recurrence is solved; every solver gives its states, within `atol`.
            "serial": token by token, channels side by side.
            "shooting": tokens in chunks side by side, from states at their boundaries that are corrected until they fit
            (multiple shooting by Newton's method).
            "newton": the same with one token in a chunk, for comparison.
            "auto": shooting with as many chunks as it takes to fill a GPU, serial where these are few, and on the CPU.
        atol: the error that a state may have. None: 1e-5 (1e-11 for float64 x) times the larger of 1 and the state.
        max_sweeps: passes over the tokens before a channel is given up. None: 4 of "shooting", 10 of "newton".
        on_fail: what becomes of a channel whose estimated error stays above `atol`. "repair" computes it token by
            token from the last state that is exact, as "serial" does and with the same bits. "raise" and "warn" do so
            too and then say so; they wait for the device, and do not work under torch.compile and torch.func.vmap.
        reset: (B, L) bool: where it is true the token starts from an empty state, instead of initial states too.
            Nothing passes, neither gradients to the left nor inf and NaN to the right.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        reverse: run from the last token to the first; the state enters at token L - 1.
        return_final_state: also return the state after the last token.
        return_stats: also return an `ElementwiseRnnStats`.

    Returns:
        h (B, L, D) in the dtype of x, contiguous; or (h, final_state), (h, stats), (h, final_state, stats). The state
        is a tuple as above, (N, D) each, in float32 (float64 for float64 x); of slstm the one with n = 1.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there. With
            on_fail="raise", a channel that had to be repaired.
        ValueError: an unknown cell, solver or on_fail; an atol below 0 or max_sweeps below 1.

    The estimate is of first order: exact for infinitesimal errors, a bound for small ones. A channel with NaN is not
    accepted, so it is repaired.

    States and sums are float32 (float64 for float64 x), in a fixed order and without atomics: results and gradients
    repeat bitwise. With `seqkern.batch_invariant` every solver is "serial", and a sequence gives the same bits alone,
    batched or packed; without it a plan may cut time to keep the machine busy. Under autocast nothing is cast.

    Gradients are those of the recurrence at the states that were found; the backward is linear and takes one pass,
    whichever solver the forward took.

    Memory: where a gradient is wanted, every 16th state is kept besides the inputs, and the backward recomputes those
    between. Second derivatives and forward mode are exact and slower, in plain torch operations, 32 tokens at a time:
    some twenty tensors (B, 32, G, D), and for second derivatives two states for every 32 tokens. Derivatives beyond the
    second keep the intermediate values of all tokens.

    Example:
        >>> import torch, seqkern
        >>> x, weights = torch.randn(2, 300, 3, 8), torch.randn(3, 8) / 2
        >>> h, (last,) = seqkern.elementwise_rnn(x, weights, return_final_state=True)
        >>> h.shape, torch.equal(h[:, -1], last)
        (torch.Size([2, 300, 8]), True)
        >>> solved, stats = seqkern.elementwise_rnn(x, weights, solver="shooting", return_stats=True)
        >>> torch.allclose(solved, h, rtol=0, atol=2e-5), stats.sweeps.shape
        (True, torch.Size([2, 8]))
    """
    made_of, options = options_of("elementwise_rnn", cell, solver, atol, max_sweeps, on_fail)
    state = parts_of("elementwise_rnn", "initial_state", cell, made_of.published, initial_state)
    if state is not None:
        for name, part in zip(made_of.published, state, strict=True) if x.dim() == 4 else ():
            check_part("elementwise_rnn", name, part, state_rows(x, cu_seqlens) | {"D": x.shape[3]}, x)
        state = carried(made_of, state, accumulator(x.dtype))
    wants_stats = return_stats or on_fail != "repair"
    args = (x, weights, state, reset, cu_seqlens, *options, reverse, not settings.batch_invariant, return_final_state)
    if needs_graph(x, weights, state):
        outputs = _Solve.apply(*args, wants_stats)
    else:
        outputs = library.ops.elementwise_rnn_fwd(*args, requires_grad(x, weights, state), wants_stats)
    results = [outputs[0]]
    if return_final_state:
        results.append(published(made_of, outputs[1]))
    if wants_stats:
        stats = ElementwiseRnnStats(*outputs[-3:])
        _report(stats, on_fail)
        results += [stats] * return_stats
    return tuple(results) if len(results) > 1 else results[0]


def elementwise_rnn_step(
    state: State, x: Tensor, weights: Tensor, *, cell: str = "gru", state_indices: Tensor | None = None
) -> Tensor:
    """The next token of a running `elementwise_rnn`: moves the state on in place and returns the token's output.

    Args:
        state: the tuple of parts of the cell, (R, D) each, any strides, any floating dtypes, updated in place. A
            channel of slstm with n = 0 is empty.
        x: (B, G, D).
        weights: (W, D).
        cell: as in `elementwise_rnn`.
        state_indices: (B,) int32 or int64: the row of state of each row of x. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    A row is reset by zeros in all parts, and m = -inf.

    Returns:
        h (B, D) in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: an unknown cell.

    Example:
        >>> import torch, seqkern
        >>> x, weights = torch.randn(2, 5, 4, 8), torch.randn(4, 8) / 2
        >>> _, state = seqkern.elementwise_rnn(x[:, :4], weights, cell="slstm", return_final_state=True)
        >>> last = seqkern.elementwise_rnn_step(state, x[:, 4], weights, cell="slstm")
        >>> torch.allclose(last, seqkern.elementwise_rnn(x, weights, cell="slstm")[:, 4], atol=1e-5)
        True
    """
    made_of = cell_of("elementwise_rnn_step", cell)
    parts = parts_of("elementwise_rnn_step", "state", cell, made_of.published, state)
    named = {f"state's {name}": part for name, part in zip(made_of.published, parts, strict=True)}
    forbid_grad("elementwise_rnn_step", **named, x=x, weights=weights)
    absent = [None] * (4 - len(parts))
    return library.ops.elementwise_rnn_step(*parts, *absent, x, weights, state_indices, index_of(cell))


def _report(stats: ElementwiseRnnStats, on_fail: str) -> None:
    if on_fail == "repair" or not stats.repaired.any():
        return
    count, estimate = int(stats.repaired.sum()), float(stats.estimate[stats.repaired].max())
    message = (
        f"elementwise_rnn: {count} of {stats.repaired.numel()} channels had an estimated error of up to "
        f'{estimate:.1e}, above atol, and were computed token by token; use solver="serial", or more max_sweeps'
    )
    if on_fail == "raise":
        raise RuntimeError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


class _Solve(torch.autograd.Function):
    """x, weights, state (S, N, D), reset, packing and options -> (h[, final state], checkpoints[, stats])."""

    @staticmethod
    def forward(*args):
        *args, return_stats = args
        return tuple(library.ops.elementwise_rnn_fwd(*args, True, return_stats))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*_keep(ctx, inputs[:-1], output))
        ctx.mark_non_differentiable(*output[1 + ctx.return_final_state :])

    @staticmethod
    def backward(ctx, dh, *others):
        args = _backward_arguments(ctx, dh, *others)
        if needs_graph(*args[:4], args[5]):
            grads = _SolveBackward.apply(*args)
        else:
            grads = library.ops.elementwise_rnn_bwd(*args)
        return *_spread(grads, args), *[None] * 11

    @staticmethod
    def jvp(ctx, *tangents):
        x, weights, _, state, *masks = ctx.saved_tensors
        call = Cells(cell_at(ctx.cell), x, weights, state, *masks, ctx.reverse)
        ht, final_t = call.jvp(call.tangents(*tangents[:3]))
        derivatives = [ht.to(x.dtype), call.joined(final_t)][: 1 + ctx.return_final_state]
        return *derivatives, *[None] * (ctx.num_outputs - len(derivatives))

    @staticmethod
    def vmap(info, in_dims, *args):
        return_final_state, return_stats = args[-2:]
        out_axes = [2] + [2] * return_final_state + [1] + [1, 1, 1] * return_stats
        return vmap_over_channels(_Solve, info, in_dims, args, (3, 1, 2), out_axes)


class _SolveBackward(torch.autograd.Function):
    """dh, dfinal_state, x, weights, checkpoints, state, reset, packing, options -> gradients of those given."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.elementwise_rnn_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.cell, ctx.reverse, ctx.split_time, ctx.want_dweights = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dh, h> + <dfinal, final>, so v^T of its Jacobian is
        the gradient of the directional derivative of phi along v."""
        dh, dfinal = ctx.saved_tensors[:2]
        g_dh, g_dfinal, (g_x, g_weights, g_state) = _second_order(
            ctx, _spread(cotangents, (*ctx.saved_tensors, ctx.want_dweights))
        )
        g_dfinal = None if dfinal is None else g_dfinal
        return g_dh.to(dh.dtype), g_dfinal, g_x, g_weights, None, g_state, *[None] * 6

    @staticmethod
    def jvp(ctx, dh_t, dfinal_t, x_t, weights_t, _, state_t, *others):
        """The map is linear in dh and dfinal, and a gradient, with a symmetric Jacobian, in the rest, of which the
        checkpoints are a function."""
        dh, _, *kept = ctx.saved_tensors
        *_, (along_x, along_weights, along_state) = _second_order(ctx, (x_t, weights_t, state_t))
        dh_t = torch.zeros_like(dh) if dh_t is None else dh_t
        grads = _SolveBackward.apply(dh_t, dfinal_t, *kept, ctx.cell, ctx.reverse, ctx.split_time, ctx.want_dweights)
        along = [along_x] + [along_weights] * ctx.want_dweights + [along_state] * (along_state is not None)
        return tuple(grad + gradient for grad, gradient in zip(grads, along, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        state, want_dweights = args[5], args[-1]
        out_axes = [3] + [1] * want_dweights + [2] * (state is not None)
        return vmap_over_channels(_SolveBackward, info, in_dims, args, (2, 2, 3, 1, 1, 2), out_axes)


def _keep(ctx, inputs, output):
    """What the backward needs: x, weights, checkpoints, the state and masks. `inputs` end with return_final_state."""
    x, weights, *state_and_masks, ctx.cell, _, _, _, ctx.reverse, ctx.split_time, ctx.return_final_state = inputs
    ctx.num_outputs = len(output)
    ctx.set_materialize_grads(False)
    saved = (x, weights, output[1 + ctx.return_final_state], *state_and_masks)
    ctx.save_for_backward(*saved)
    return saved


def _backward_arguments(ctx, dh, *others):
    x, *kept = ctx.saved_tensors
    dh = x.new_zeros(*x.shape[:2], x.shape[3]) if dh is None else dh
    dfinal_state = others[0] if ctx.return_final_state else None
    return dh, dfinal_state, x, *kept, ctx.cell, ctx.reverse, ctx.split_time, ctx.needs_input_grad[1]


def _spread(grads, args):
    """Gradients of (x, weights, state) from those that a backward with these arguments returns."""
    state, want_dweights, rest = args[5], args[-1], iter(grads)
    return next(rest), next(rest) if want_dweights else None, None if state is None else next(rest)


def _second_order(ctx, tangents):
    """(the gradients of dh and dfinal_state, those of x, weights and the state)."""
    dh, dfinal, x, weights, _, state, *masks = ctx.saved_tensors
    call = Cells(cell_at(ctx.cell), x, weights, state, *masks, ctx.reverse)
    final = None if dfinal is None else dict(zip(call.parts, dfinal.unbind(), strict=True))
    g_dh, g_final, gradients = call.second_order(call.tangents(*tangents), dh, final)
    return g_dh, call.joined(g_final), call.gradients(gradients)


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(x, weights, state, reset, cu_seqlens, **others):
        named = {"weights": weights, "initial_state": state, "reset": reset, "cu_seqlens": cu_seqlens}
        check_devices("elementwise_rnn", x=x, **named, **others)

    def fwd(x, weights, state, reset, cu_seqlens, cell, solver, atol, max_sweeps, reverse, split_time, *wanted):
        check(x, weights, state, reset, cu_seqlens)
        return_final_state, keep_states, return_stats = wanted
        (B, L, _, D), S, dtype = x.shape, len(cell_at(cell).empty), accumulator(x.dtype)
        outputs = [x.new_empty(B, L, D)]
        if return_final_state:
            outputs.append(x.new_empty(S, num_states(x, cu_seqlens), D, dtype=dtype))
        if keep_states:
            outputs.append(x.new_empty(S * B * ((L + PIECE - 1) // PIECE), D, dtype=dtype))
        stats = (torch.int32, torch.float32, torch.bool) if return_stats else ()
        return outputs + [x.new_empty(B, D, dtype=dtype) for dtype in stats]

    def bwd(dh, dfinal_state, x, weights, checkpoints, state, reset, cu_seqlens, *options):
        check(x, weights, state, reset, cu_seqlens, dh=dh, dfinal_state=dfinal_state, checkpoints=checkpoints)
        given = [x, *([weights] if options[-1] else []), *([] if state is None else [state])]
        return [t.new_empty(t.shape) for t in given]

    def step(h, c, n, m, x, weights, state_indices, cell):
        state = {"state's h": h, "state's c": c, "state's n": n, "state's m": m}
        check_devices("elementwise_rnn_step", x=x, weights=weights, **state, state_indices=state_indices)
        return x.new_empty(x.shape[0], x.shape[2])

    def setup_context(ctx, inputs, output):
        *inputs, keep_states, _ = inputs
        ctx.was_kept = keep_states
        if keep_states:
            _keep(ctx, inputs, output)

    def backward(ctx, grads):
        if not ctx.was_kept:
            raise RuntimeError("elementwise_rnn_fwd: a gradient needs keep_states=True")
        args = _backward_arguments(ctx, *grads)
        return *_spread(ops.elementwise_rnn_bwd(*args), args), *[None] * 11

    torch.library.register_fake(f"{namespace}::elementwise_rnn_fwd", fwd)
    torch.library.register_fake(f"{namespace}::elementwise_rnn_bwd", bwd)
    torch.library.register_fake(f"{namespace}::elementwise_rnn_step", step)
    torch.library.register_autograd(f"{namespace}::elementwise_rnn_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::elementwise_rnn_bwd",
        lambda ctx, cotangents: _SolveBackward.backward(ctx, *cotangents),
        setup_context=_SolveBackward.setup_context,
    )
