"""The linear scan: a first-order linear recurrence for every channel, real or complex, and its adjoint.

Equations (the tags stand beside the code in csrc/linear_scan), elementwise over batch rows and channels; conj() leaves
real numbers as they are:

    [decay]   a_t as given, or exp of what is given with log_space
    [state]   h_t = a_t h_{t-1} + b_t
    [dstate]  g_t = dh_t + c_{t+1},  c_t = conj(a_t) g_t;  after the last token c is dfinal_state
              db_t = g_t,  dinitial_state = c_1
    [da]      da_t = conj(h_{t-1}) g_t, with log_space times conj(a_t);  summed over dimensions where a has size 1

Autograd sees real tensors only: complex ones are pairs of real numbers on the way in and out.

The adjoint of a scan is a scan backwards in time, whose adjoint is a scan forwards. So derivatives of every order are
calls of two functions, `_Scan` and `_Adjoint`, and products of their results; only a first derivative that nobody will
differentiate again takes the kernel that computes all of [dstate] and [da] at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from .._sequences import previous
from .._torch import (
    accumulator,
    check_devices,
    forbid_grad,
    needs_graph,
    vmap_over_channels,
    writable_pairs,
    write_pairs,
)
from ._linear_scan import reference, reference_step

__all__ = ["linear_scan", "linear_scan_step", "reference", "reference_step", "register"]


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    log_space: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The first-order linear recurrence, a scan with affine maps [Blelloch 1990, section 1.4; 1709.04057].

    .. math:: h_t = a_t h_{t-1} + b_t

    elementwise over batch rows and channels.

    Args:
        a: the decays, float32, bfloat16, float16 or float64, real of any sign and size, or complex. Broadcast against b
            as torch does: (B, L, D) with any dimension 1 or, from the left, missing, such as (D,), (L, D), (B, 1, D),
            (B, L, 1), (1,) or (). What is constant is read in place and its gradient is summed on the way; so are
            dimensions of stride 0.
        b: (B, L, D), in a dtype of its own. Channels that are not contiguous are copied, of a as well.
        initial_state: (N, D), in a dtype of its own; None is zeros. N is B, or the number of sequences in cu_seqlens.
        reverse: run from the last token to the first; the state enters at token L - 1.
        reset: (B, L) bool: where it is true the state before the token is dropped, initial states too, and the token
            starts from zero. Nothing passes, neither gradients to the left nor inf and NaN to the right.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        seq_idx: (B, L) int32: in each row every maximal run of one id is a sequence, ids below 0 are padding with zero
            output and zero gradient. The initial state enters the row's first sequence, the final state follows its
            last token that is not padding. Not together with cu_seqlens.
        log_space: a holds logarithms, and h_t = exp(a_t) h_{t-1} + b_t. At -inf the decay is 0 and so is the gradient
            of a; complex ones turn by their imaginary part.
        return_final_state: also return the state after the last token.

    If any of a, b and initial_state is complex, the recurrence is, and the others are converted; a real one gets a real
    gradient. Gradients of complex tensors follow torch's convention.

    Returns:
        h (B, L, D) in the dtype of b, contiguous; with return_final_state, (h, final_state), the state (N, D) in
        float32 (float64 for float64 b).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.

    States and sums are float32 (float64 for float64 b), in a fixed order and without atomics: results and gradients
    repeat bitwise. With `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed; without it
    a plan may cut time to keep the machine busy. The gradient of a is made of h as it was returned, rounded to the
    dtype of b. Under autocast nothing is cast.

    Memory: where a gradient is wanted, a and h are kept, and nothing else; the gradient of a constant a needs partial
    sums of a few rows. The adjoint of a scan is a scan backwards in time, so derivatives of every order, in reverse and
    forward mode, are exact, and run the same kernels with a few products of tensors (B, L, D) in torch between them.

    Example:
        >>> import torch, seqkern
        >>> h = seqkern.linear_scan(torch.tensor(0.5), torch.ones(1, 4, 1))
        >>> h.flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
        >>> reset = torch.tensor([[False, False, True, False]])
        >>> seqkern.linear_scan(torch.tensor(0.5), torch.ones(1, 4, 1), reset=reset).flatten()
        tensor([1.0000, 1.5000, 1.0000, 1.5000])
    """
    is_complex, (a, b, initial_state) = _numbers(a, b, initial_state)
    a = _with_dims(a, 4 if is_complex else 3)
    options = (is_complex, log_space, reverse, not settings.batch_invariant, return_final_state)
    args = (a, b, initial_state, reset, cu_seqlens, seq_idx, *options)
    outputs = _Scan.apply(*args) if needs_graph(a, b, initial_state) else library.ops.linear_scan_fwd(*args)
    outputs = tuple(map(torch.view_as_complex, outputs)) if is_complex else tuple(outputs)
    return outputs if return_final_state else outputs[0]


def linear_scan_step(
    state: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_space: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running scan: moves the state on in place and returns it as the token's output.

    Args:
        state: (R, D), any strides, any floating or complex dtype, updated in place; complex if a or b is.
        a: (B, D), with any dimension 1 or, from the left, missing.
        b: (B, D).
        log_space: as in `linear_scan`.
        state_indices: (B,) int32 or int64: the row of state of each row of b. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    A row is reset by setting it to zero.

    Returns:
        h (B, D) in the dtype of b.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.

    Example:
        >>> import torch, seqkern
        >>> a, b = torch.rand(2, 5, 8), torch.randn(2, 5, 8)
        >>> _, state = seqkern.linear_scan(a[:, :4], b[:, :4], return_final_state=True)
        >>> last = seqkern.linear_scan_step(state, a[:, 4], b[:, 4])
        >>> torch.allclose(last, seqkern.linear_scan(a, b)[:, 4], atol=1e-6)
        True
    """
    forbid_grad("linear_scan_step", state=state, a=a, b=b)
    if is_complex := state.is_complex():
        pairs, a, b = writable_pairs(state), _pairs(a), _pairs(b)
    elif a.is_complex() or b.is_complex():
        given = str(state.dtype).removeprefix("torch.")
        advice = "convert it with .to(state.dtype.to_complex())"
        raise RuntimeError(f"linear_scan_step: state must be complex where a or b is, got {given}; {advice}")
    a = _with_dims(a, 3 if is_complex else 2)
    h = library.ops.linear_scan_step(pairs if is_complex else state, a, b, state_indices, is_complex, log_space)
    if not is_complex:
        return h
    write_pairs(state, pairs)
    return torch.view_as_complex(h)


def _numbers(*tensors: Tensor | None) -> tuple[bool, tuple[Tensor | None, ...]]:
    """Whether a call is complex, and its tensors, as pairs of real numbers if it is."""
    is_complex = any(t is not None and t.is_complex() for t in tensors)
    return is_complex, tuple(map(_pairs, tensors)) if is_complex else tensors


def _pairs(tensor: Tensor | None) -> Tensor | None:
    """A tensor, real or complex, as complex numbers, and these as real numbers, two in a last dimension."""
    if tensor is None:
        return None
    dtype = torch.promote_types(tensor.dtype, torch.complex32)  # torch.compile does not know dtype.to_complex
    return torch.view_as_real(tensor.to(dtype).resolve_conj())


def _with_dims(a: Tensor, dims: int) -> Tensor:
    """With the leading dimensions that broadcasting adds."""
    return a[(None,) * (dims - a.dim())] if a.dim() < dims else a


class _Scan(torch.autograd.Function):
    """(a, b, initial_state), reset, packing and options -> (h[, final_state])."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.linear_scan_fwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, _, initial_state, *masks = inputs[:6]
        *ctx.options, ctx.return_final_state = inputs[6:]
        ctx.save_for_backward(output[0], initial_state, a, *masks)
        ctx.save_for_forward(output[0], initial_state, a, *masks)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dh, dfinal_state=None):
        return *_gradients(ctx, dh, dfinal_state), *[None] * 8

    @staticmethod
    def jvp(ctx, at, bt, initial_t, *_):
        """The scan of what the tangents add to every token."""
        h, initial_state, *recurrence = ctx.saved_tensors
        recurrence = _Recurrence(*recurrence, *ctx.options)
        bt = torch.zeros_like(h) if bt is None else bt
        if at is not None:
            entering = recurrence.number(recurrence.entering(h, initial_state))
            bt = bt + recurrence.parts(recurrence.decay_tangent(at) * entering)
        return recurrence.scan(bt.to(h.dtype), initial_t)[: 1 + ctx.return_final_state]

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_over_channels(_Scan, info, in_dims, args, (2, 2, 1), (2, 1)[: 1 + args[-1]])


class _Adjoint(torch.autograd.Function):
    """(a, dh, dfinal_state, initial_state), reset, packing and options -> (db[, dinitial_state]).

    Of initial_state only the presence, shape and dtype count.
    """

    @staticmethod
    def forward(a, dh, dfinal_state, initial_state, *others):
        return tuple(library.ops.linear_scan_bwd(dh, dfinal_state, a, None, initial_state, *others))

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, _, *states_and_masks = inputs[:7]
        ctx.options = inputs[7:]
        ctx.save_for_backward(output[0], *states_and_masks[:2], a, *states_and_masks[2:])
        ctx.save_for_forward(output[0], *states_and_masks[:2], a, *states_and_masks[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v, v_initial=None):
        """The adjoint of the adjoint: the scan of its cotangents."""
        g, dfinal_state, _, *recurrence = ctx.saved_tensors
        recurrence = _Recurrence(*recurrence, *ctx.options)
        x, last = recurrence.scan(torch.zeros_like(g) if v is None else v, v_initial)
        da = recurrence.decay_gradient(x, v_initial, g) if ctx.needs_input_grad[0] else None
        return da, x, None if dfinal_state is None else last.to(dfinal_state.dtype), *[None] * 8

    @staticmethod
    def jvp(ctx, at, dht, dfinal_t, *_):
        g, _, initial_state, *recurrence = ctx.saved_tensors
        recurrence = _Recurrence(*recurrence, *ctx.options)
        dht, entering_t = torch.zeros_like(g) if dht is None else dht, []
        if at is not None:
            # conj(at_t) g_t goes where what enters token t came from: `entering`, which is linear, transposed.
            _, pull = torch.func.vjp(recurrence.entering, *(t for t in (g, initial_state) if t is not None))
            added, *entering_t = pull(recurrence.parts(recurrence.decay_tangent(at).conj() * recurrence.number(g)))
            dht = dht + added
        gt, *initial_t = recurrence.adjoint(dht.to(g.dtype), dfinal_t, initial_state)
        return gt, *((t + added).to(t.dtype) for t, added in zip(initial_t, entering_t or [0], strict=False))

    @staticmethod
    def vmap(info, in_dims, *args):
        out_axes = (2,) if args[3] is None else (2, 1)
        return _vmap_over_channels(_Adjoint, info, in_dims, args, (2, 2, 1, 1), out_axes)


class _Recurrence(NamedTuple):
    """The decays of a call and how its tokens form sequences: what its derivatives are composed of."""

    a: Tensor
    reset: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    complex: bool
    log_space: bool
    reverse: bool
    split_time: bool

    def scan(self, b: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h, final_state)"""
        return _Scan.apply(self.a, b, initial_state, *self[1:], True)

    def adjoint(self, dh: Tensor, dfinal_state: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, ...]:
        """(db[, dinitial_state])"""
        return _Adjoint.apply(self.a, dh, dfinal_state, initial_state, *self[1:])

    def entering(self, h: Tensor, initial_state: Tensor | None = None) -> Tensor:
        """h_{t-1}, in the dtype of states."""
        dtype = accumulator(h.dtype)
        initial_state = None if initial_state is None else initial_state.to(dtype)
        masks = (self.reset, self.cu_seqlens, self.seq_idx)
        return previous(h.to(dtype), initial_state, *masks, self.reverse)

    def number(self, tensor: Tensor) -> Tensor:
        """From pairs, where these are complex numbers."""
        tensor = tensor.to(accumulator(tensor.dtype))
        return torch.complex(*tensor.unbind(-1)) if self.complex else tensor

    def parts(self, number: Tensor) -> Tensor:
        return torch.view_as_real(number) if self.complex else number

    def decay_tangent(self, at: Tensor) -> Tensor:
        """The tangent of what multiplies the state."""
        return self.number(at) * self.number(self.a).exp() if self.log_space else self.number(at)

    def decay_gradient(self, h: Tensor, initial_state: Tensor | None, g: Tensor) -> Tensor:
        """[da]"""
        a = self.number(self.a)
        da = self.number(self.entering(h, initial_state)).conj() * self.number(g)
        da = da * a.exp().conj() if self.log_space else da
        return self.parts(da.sum_to_size(a.shape)).to(self.a.dtype)


def _gradients(ctx, dh: Tensor | None, dfinal_state: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """(da, db, dinitial_state), None where it is not needed."""
    h, initial_state, a, *masks = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    differentiable = needs_graph(dh, dfinal_state, h, initial_state, a)
    bwd = _differentiable_bwd if differentiable else library.ops.linear_scan_bwd
    needs_da = ctx.needs_input_grad[0]
    db, *others = bwd(dh, dfinal_state, a, h if needs_da else None, initial_state, *masks, *ctx.options)
    da = others.pop(0) if needs_da else None
    return da, db, others[0] if others else None


def _differentiable_bwd(dh, dfinal_state, a, h, initial_state, *others) -> tuple[Tensor, ...]:
    """What the operator linear_scan_bwd returns, composed of what has derivatives."""
    recurrence = _Recurrence(a, *others)
    db, *dinitial_state = recurrence.adjoint(dh, dfinal_state, initial_state)
    da = [] if h is None else [recurrence.decay_gradient(h, initial_state, db)]
    return db, *da, *dinitial_state


def _vmap_over_channels(function, info, in_dims, args, in_axes, out_axes):
    """With a spread over the channels, which the mapped dimension joins."""
    (a, b, *others), (a_dim, b_dim, *_) = args, in_dims
    channels = b.shape[2] if b_dim is None else b.movedim(b_dim, 0).shape[3]
    if a_dim is not None:
        a, a_dim = a.movedim(a_dim, 0), 0
    at = 2 if a_dim is None else 3
    a = a.expand(*a.shape[:at], channels, *a.shape[at + 1 :])
    in_dims = (a_dim, *in_dims[1:])
    return vmap_over_channels(function, info, in_dims, (a, b, *others), in_axes, out_axes)


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""

    def fwd(a, b, initial_state, reset, cu_seqlens, seq_idx, complex, log_space, reverse, split_time, return_final):
        packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        check_devices("linear_scan", b=b, a=a, initial_state=initial_state, reset=reset, **packing)
        outputs = [b.new_empty(b.shape)]
        if return_final:
            rows = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            outputs.append(b.new_empty(rows, *b.shape[2:], dtype=accumulator(b.dtype)))
        return outputs

    def bwd(dh, dfinal_state, a, h, initial_state, reset, cu_seqlens, seq_idx, *options):
        named = {"dh": dh, "dfinal_state": dfinal_state, "h": h, "initial_state": initial_state, "reset": reset}
        check_devices("linear_scan", a=a, **named, cu_seqlens=cu_seqlens, seq_idx=seq_idx)
        given = [dh, *([] if h is None else [a]), *([] if initial_state is None else [initial_state])]
        return [t.new_empty(t.shape) for t in given]

    def step(state, a, b, state_indices, complex, log_space):
        check_devices("linear_scan_step", b=b, a=a, state=state, state_indices=state_indices)
        return b.new_empty(b.shape)

    def backward(ctx, grads):
        return *_gradients(ctx, *grads), *[None] * 8

    def bwd_setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:8])
        ctx.options = inputs[8:]

    def bwd_backward(ctx, cotangents):
        names, masks = ("dh", "dfinal_state", "a", "h", "initial_state"), ctx.saved_tensors[5:]
        given = {name: t for name, t in zip(names, ctx.saved_tensors, strict=False) if t is not None}
        outputs, pull = torch.func.vjp(
            lambda given: _differentiable_bwd(*map(given.get, names), *masks, *ctx.options), given
        )
        cotangents = (torch.zeros_like(o) if v is None else v for v, o in zip(cotangents, outputs, strict=True))
        (grads,) = pull(tuple(cotangents))
        return *map(grads.get, names), *[None] * 7

    torch.library.register_fake(f"{namespace}::linear_scan_fwd", fwd)
    torch.library.register_fake(f"{namespace}::linear_scan_bwd", bwd)
    torch.library.register_fake(f"{namespace}::linear_scan_step", step)
    torch.library.register_autograd(f"{namespace}::linear_scan_fwd", backward, setup_context=_Scan.setup_context)
    torch.library.register_autograd(f"{namespace}::linear_scan_bwd", bwd_backward, setup_context=bwd_setup_context)
