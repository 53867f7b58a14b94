r"""Recurrences with dense weights between the units of a head, and their adjoint.

Equations (the tags stand beside the code in csrc/rnn; the README there has the cells), for each batch row and head:

    [recur]    u_t = R h_{t-1} + bias
    [cell]     m_t, c_t = cell(x_t, u_t, c_{t-1}), for every unit by itself; c what it carries beside h
    [proj]     h_t = proj m_t, or m_t without proj
    [zoneout]  in training an element of h_t is that of h_{t-1} with a probability, else their mean with such weights
    [dropout]  in training R reads h_{t-1} with elements dropped, the same ones throughout a sequence
    [adjoint]  dm_t = proj^T dh_t;  dx_t, du_t, dc_{t-1} by the adjoint of the cell
    [return]   dh_{t-1} gets R^T du_t and what cell and zoneout read of h_{t-1}, clamped, and the gradient of the output
    [weights]  dR = sum of du_t h_{t-1}^T, dbias = sum of du_t, dproj = sum of dh_t m_t^T

Kernels compute h and its gradients. Forward mode and second derivatives are in `_rnn.Cells`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._cells import State, check_part, parts_of, state_rows
from .._config import settings
from .._load import library
from .._recurrence import num_states
from .._torch import (
    accumulator,
    autocast_operands,
    check_devices,
    empty_tokens,
    forbid_grad,
    is_time_major,
    needs_graph,
    requires_grad,
    vmap_over_channels,
)
from ._rnn import (
    Cells,
    Options,
    carried,
    options_of,
    published,
    reference,
    reference_step,
    seed_of,
)

__all__ = ["reference", "reference_step", "register", "rnn", "rnn_step"]


def rnn(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    initial_state: State | None = None,
    *,
    cell: str = "lstm",
    proj: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    seed: int | Tensor | None = None,
    grad_clip: float | None = None,
    training: bool = True,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    r"""A recurrent network with a matrix of weights from the units of each head to their gates. H = 1 is classical.

    The gates are G pre-activations for each unit; what x contributes to them is computed before, by one matrix product
    for all tokens. With :math:`u_t = R h_{t-1} + bias`, gate g of unit p getting :math:`\sum_q R_{gpq} h_q`, s the
    sigmoid, h, c, n those of the token before, and a sum :math:`x + u` where a gate's name stands in a function:

    - ``"lstm"`` [Hochreiter and Schmidhuber 1997, Gers et al. 2000]: gates i, f, g, o, state (h, c).
      c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c')
    - ``"gru"`` [1406.1078], as in torch.nn: gates r, z, n, state (h,).
      n = tanh(x_n + s(r) u_n), h' = (1 - s(z)) n + s(z) h
    - ``"slstm"``, the sLSTM of xLSTM [2405.04517, equations 8 to 14]: gates i, f, z, o, state (h, c, n, m).
      c' = s(f) c + exp(i) tanh(z), n' = s(f) n + exp(i), h' = s(o) c' / n', with c and n in the scale exp(m), so that
      gates may be of any size
    - ``"elman_tanh"``, ``"elman_relu"`` [Elman 1990]: one gate a, state (h,). h' = tanh(a) or relu(a)

    With `proj`, h' is proj times that [LSTMP, 1402.1128].

    Args:
        x: (B, L, H, G, P), the gates in the order above, float32, bfloat16, float16 or float64. Any strides; copied
            where units are not contiguous.
        R: (H, G, P, Q), from the Q outputs of a head to the gates of its P units; Q is P without `proj`. In a dtype of
            its own, but multiplied as elements of the dtype of x.
        bias: (H, G, P), added to the products, with "gru" inside of s(r) u_n; None is zero. In a dtype of its own.
        initial_state: the tuple of parts above, h (N, H, Q), the others (N, H, P), in dtypes of their own; None is an
            empty state: zeros, and of slstm m = -inf. N is B, or the number of sequences in cu_seqlens. A unit of slstm
            with n = 0 is empty, whatever its c and m.
        cell: one of those above.
        proj: (H, Q, P), in a dtype of its own as R is. Not with "gru", whose units read their own h.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        reverse: run from the last token to the first; the state enters at token L - 1.
        reset: (B, L) bool: where it is true the token starts from an empty state, instead of initial states too.
            Nothing passes, neither gradients to the left nor inf and NaN to the right.
        zoneout: the probability, below 1, with which in training an element of h keeps its old value [1606.01305];
            otherwise h is the mean of the old and the new one with these weights.
        recurrent_dropout: the probability, below 1, with which in training an element of h is zero in the products with
            R throughout a sequence [1512.05287]; the others are divided by 1 - recurrent_dropout.
        seed: of those random numbers: the same seed and sizes give the same ones. An int or a tensor of one int64 on
            the device of x; None draws one there from torch's generator.
        grad_clip: every element of the gradient that a token sends to the h before it is clamped to at most this size,
            before the gradient of that h as an output is added. It changes neither the forward nor forward mode; there
            are no second derivatives with it.
        training: whether zoneout and recurrent_dropout draw random numbers.
        return_final_state: also return the state after the last token.

    Returns:
        h (B, L, H, Q) in the dtype of x, in its memory order of batch and time; or (h, final_state), a tuple as above
        in float32 (float64 for float64 x); of slstm the one with n = 1.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.
        ValueError: an unknown cell; proj with "gru"; a zoneout or recurrent_dropout below 0 or from 1 on; a grad_clip
            below 0.

    States, their gradients and sums are float32 (float64 for float64 x). Operands of matrix products of bfloat16 and
    float16 x may be rounded to such a dtype. Nothing is added atomically: results and gradients repeat bitwise. With
    `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed, but for random numbers, which are
    a function of a token's place in memory. A NaN reaches later tokens of its sequence and head, nothing else. Under
    autocast x, R and proj are cast, bias and states never.

    Memory: where a gradient is wanted, u (B, L, H, G, P) in the dtype of x and c, one number for each token and unit
    (two of slstm, none of gru and elman) in the dtype of sums, are kept besides the inputs and h; no random number is.
    Second derivatives and forward mode are exact and slower, in plain torch operations, 32 tokens at a time: some
    twenty tensors (B, 32, H, G, P), and for second derivatives two states for every 32 tokens. Derivatives beyond the
    second keep the intermediate values of all tokens.

    Example:
        >>> import torch, seqkern
        >>> x, R = torch.randn(2, 30, 1, 4, 8), torch.randn(1, 4, 8, 8) / 4
        >>> h, (last, c) = seqkern.rnn(x, R, return_final_state=True)
        >>> h.shape, torch.equal(h[:, -1], last)
        (torch.Size([2, 30, 1, 8]), True)
        >>> lstm = torch.nn.LSTM(32, 8, batch_first=True, bias=False)
        >>> _ = lstm.weight_ih_l0.data.copy_(torch.eye(32)), lstm.weight_hh_l0.data.copy_(R.view(32, 8))
        >>> torch.allclose(lstm(x.flatten(2))[0], h[:, :, 0], atol=1e-5)
        True
    """
    x, R, proj = autocast_operands(x, R, proj)
    options = options_of("rnn", cell, proj, zoneout, recurrent_dropout, grad_clip, training, reverse)
    made_of, h0, c0 = options.of, None, None
    parts = parts_of("rnn", "initial_state", cell, made_of.published, initial_state)
    if parts is not None:
        for name, part in zip(made_of.published, parts, strict=True) if x.dim() == 5 and R.dim() == 4 else ():
            size = {"Q": R.shape[3]} if name == "h" else {"P": x.shape[4]}
            check_part("rnn", name, part, state_rows(x, cu_seqlens) | {"H": x.shape[2]} | size, x)
        h0, c0 = carried(made_of, parts, accumulator(x.dtype))
    seed = seed_of("rnn", seed, options, x)
    tensors = (x, R, bias, proj, h0, c0)
    args = (*tensors, reset, cu_seqlens, seed, *options, settings.batch_invariant, return_final_state)
    if needs_graph(*tensors):
        h, *others = _Run.apply(*args)
    else:
        h, *others = library.ops.rnn_fwd(*args, requires_grad(*tensors))
    return (h, published(made_of, *others[:2])) if return_final_state else h


def rnn_step(
    state: State,
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    *,
    cell: str = "lstm",
    proj: Tensor | None = None,
    zoneout: float = 0.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running `rnn`: moves the state on in place and returns the token's output.

    Args:
        state: the tuple of parts of the cell, h (S, H, Q), the others (S, H, P), any strides, any floating dtypes,
            updated in place. A unit of slstm with n = 0 is empty.
        x: (B, H, G, P).
        R, bias, cell, proj: as in `rnn`.
        zoneout: as in `rnn` without training.
        state_indices: (B,) int32 or int64: the row of state of each row of x. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and S = B.

    A row is reset by zeros in all parts, and m = -inf. Under autocast x, R and proj are cast.

    Returns:
        h (B, H, Q) in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: an unknown cell; proj with "gru"; a zoneout below 0 or from 1 on.

    Example:
        >>> import torch, seqkern
        >>> x, R = torch.randn(2, 5, 1, 3, 8), torch.randn(1, 3, 8, 8) / 4
        >>> _, state = seqkern.rnn(x[:, :4], R, cell="gru", return_final_state=True)
        >>> last = seqkern.rnn_step(state, x[:, 4], R, cell="gru")
        >>> torch.allclose(last, seqkern.rnn(x, R, cell="gru")[:, 4], atol=1e-5)
        True
    """
    x, R, proj = autocast_operands(x, R, proj)
    options = options_of("rnn_step", cell, proj, zoneout)
    names = options.of.published
    parts = parts_of("rnn_step", "state", cell, names, state)
    named = {f"state's {name}": part for name, part in zip(names, parts, strict=True)}
    forbid_grad("rnn_step", **named, x=x, R=R, bias=bias, proj=proj)
    absent = [None] * (4 - len(parts))
    return library.ops.rnn_step(*parts, *absent, x, R, bias, proj, state_indices, options.cell, options.zoneout)


class _Run(torch.autograd.Function):
    """x, R, bias, proj, state, reset, packing, seed and options -> h[, final h, final c], u, c."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.rnn_fwd(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*_keep(ctx, inputs, output))
        ctx.mark_non_differentiable(*output[-2:])

    @staticmethod
    def backward(ctx, dh, *others):
        args = _backward_arguments(ctx, dh, *others)
        if needs_graph(*args[:9]):
            grads = _RunBackward.apply(*args)
        else:
            grads = library.ops.rnn_bwd(*args)
        return *_spread(grads, args), *[None] * 11

    @staticmethod
    def jvp(ctx, *tangents):
        *inputs, _, _, _ = ctx.saved_tensors
        x, call = inputs[0], Cells(*inputs, ctx.options._replace(grad_clip=-1.0))
        ht, final_t = call.jvp(call.tangents(*tangents[:6]))
        ht = ht.to(x.dtype)
        ht = ht.transpose(0, 1).contiguous().transpose(0, 1) if is_time_major(x) else ht  # torch wants the strides of h
        final = (final_t["h"], call.joined(final_t)) if ctx.return_final_state else ()
        return ht, *final, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        seed, return_final_state = args[8], args[-1]
        final_axes = [1, 2] * return_final_state
        return vmap_over_channels(_Run, info, in_dims, args, _axes(seed, (2, 0, 0, 0, 1, 2)), [2, *final_axes, 2, 3])


class _RunBackward(torch.autograd.Function):
    """The arguments of rnn_bwd -> gradients of those given."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.rnn_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = Options(*inputs[15:21])
        ctx.batch_invariant, ctx.want_weights = inputs[21:]
        ctx.save_for_backward(*inputs[:15])
        ctx.save_for_forward(*inputs[:15])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dh, h> + <dfinal, final>, so v^T of its Jacobian is
        the gradient of the directional derivative of phi along v."""
        dh, *dfinal = ctx.saved_tensors[:3]
        args = (*ctx.saved_tensors, *ctx.options, ctx.batch_invariant, ctx.want_weights)
        g_dh, g_final, gradients = _second_order(ctx, _spread(cotangents, args))
        g_final = (None if t is None else g for t, g in zip(dfinal, g_final, strict=True))
        return g_dh.to(dh.dtype), *g_final, *gradients, *[None] * 14

    @staticmethod
    def jvp(ctx, *tangents):
        """The map is linear in dh and dfinal, and a gradient, with a symmetric Jacobian, in the rest, of which h, u and
        c are a function."""
        dh, *kept = ctx.saved_tensors
        *_, along = _second_order(ctx, tangents[3:9])
        dh_t = torch.zeros_like(dh) if tangents[0] is None else tangents[0]
        args = (dh_t, *tangents[1:3], *kept[2:], *ctx.options, ctx.batch_invariant, ctx.want_weights)
        dx, dR, dbias, dproj, *dstate = (
            None if grad is None else grad + t
            for grad, t in zip(_spread(_RunBackward.apply(*args), args), along, strict=True)
        )
        return tuple(grad for grad in (dx, dR, dbias, dproj, *dstate) if grad is not None)

    @staticmethod
    def vmap(info, in_dims, *args):
        bias, proj, *state, _, _, seed = args[5:12]
        weights = (True, bias is not None, proj is not None) if args[-1] else ()
        out_axes = [2, *[0] * sum(weights), *(axis for axis, t in zip((1, 2), state, strict=True) if t is not None)]
        in_axes = _axes(seed, (2, 1, 2, 2, 0, 0, 0, 1, 2, None, None, None, 2, 2, 3))
        return vmap_over_channels(_RunBackward, info, in_dims, args, in_axes, out_axes)


def _axes(seed, axes):
    """The heads of arguments; no head may become another where random numbers are a function of it."""
    return axes if seed is None else ()


def _keep(ctx, inputs, output):
    """What the backward needs: all that was given, h, u and c."""
    ctx.options = Options(*inputs[9:15])
    ctx.batch_invariant, ctx.return_final_state = inputs[15:]
    ctx.set_materialize_grads(False)
    saved = (*inputs[:9], output[0], *output[-2:])
    ctx.save_for_backward(*saved)
    return saved


def _backward_arguments(ctx, dh, *others):
    h = ctx.saved_tensors[9]
    dh = torch.zeros_like(h) if dh is None else dh
    dfinal = others[:2] if ctx.return_final_state else (None, None)
    want_weights = any(ctx.needs_input_grad[1:4])
    return dh, *dfinal, *ctx.saved_tensors, *ctx.options, ctx.batch_invariant, want_weights


def _spread(grads, args):
    """Gradients of (x, R, bias, proj, h, c) from those that a backward with these arguments returns."""
    x, R, bias, proj, *state = args[3:9]
    weights, rest = (R, bias, proj) if args[-1] else (None, None, None), iter(grads)
    return [None if t is None else next(rest) for t in (x, *weights, *state)]


def _second_order(ctx, tangents):
    """(the gradients of dh and of the final h and c, those of x, R, bias, proj, h and c)."""
    if ctx.options.grad_clip >= 0:
        raise RuntimeError("rnn: there are no second derivatives with grad_clip, which makes gradients that are none")
    dh, dfinal_h, dfinal_c, *inputs = ctx.saved_tensors[:12]
    call = Cells(*inputs, ctx.options)
    g_dh, g_final, gradients = call.second_order(call.tangents(*tangents), dh, call.final(dfinal_h, dfinal_c))
    return g_dh, (g_final["h"], call.joined(g_final)), call.gradients(gradients)


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed, **others):
        named = {"R": R, "bias": bias, "proj": proj, "initial_h": initial_h, "initial_c": initial_c, "reset": reset}
        check_devices("rnn", x=x, **named, cu_seqlens=cu_seqlens, seed=seed, **others)

    def fwd(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed, *options_and_wanted):
        check(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed)
        *options, _, return_final_state, keep = options_and_wanted
        (_, _, H, G, P), Q, dtype = x.shape, R.shape[3], accumulator(x.dtype)
        outputs, N, C = [empty_tokens(x, H, Q)], num_states(x, cu_seqlens), len(Options(*options).of.carried)
        if return_final_state:
            outputs += [x.new_empty(N, H, Q, dtype=dtype), x.new_empty(C, N, H, P, dtype=dtype)]
        if keep:
            outputs += [empty_tokens(x, H, G, P), empty_tokens(x, H, P, front=(C,), dtype=dtype)]
        return outputs

    def bwd(dh, dfinal_h, dfinal_c, x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed, h, u, c, *options):
        named = {"dh": dh, "dfinal_h": dfinal_h, "dfinal_c": dfinal_c, "h": h, "u": u, "c": c}
        check(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed, **named)
        weights = (R, bias, proj) if options[-1] else ()
        given = (t for t in (*weights, initial_h, initial_c) if t is not None)
        return [empty_tokens(x, *x.shape[2:]), *(t.new_empty(t.shape) for t in given)]

    def step(state0, state1, state2, state3, x, R, bias, proj, state_indices, cell, zoneout):
        state = {"state's h": state0, "state's c": state1, "state's n": state2, "state's m": state3}
        check_devices("rnn_step", x=x, R=R, bias=bias, proj=proj, **state, state_indices=state_indices)
        return x.new_empty(*x.shape[:2], R.shape[3])

    def setup_context(ctx, inputs, output):
        *inputs, keep = inputs
        ctx.was_kept = keep
        if keep:
            _keep(ctx, inputs, output)

    def backward(ctx, grads):
        if not ctx.was_kept:
            raise RuntimeError("rnn_fwd: a gradient needs keep=True")
        args = _backward_arguments(ctx, *grads)
        return *_spread(ops.rnn_bwd(*args), args), *[None] * 12

    torch.library.register_fake(f"{namespace}::rnn_fwd", fwd)
    torch.library.register_fake(f"{namespace}::rnn_bwd", bwd)
    torch.library.register_fake(f"{namespace}::rnn_step", step)
    torch.library.register_autograd(f"{namespace}::rnn_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::rnn_bwd",
        lambda ctx, cotangents: _RunBackward.backward(ctx, *cotangents),
        setup_context=_RunBackward.setup_context,
    )
