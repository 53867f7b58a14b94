"""selective_scan in plain torch: the reference, and the derivatives that no kernel computes.

Everything here runs in plain torch operations on whole spans of time, so that autograd and torch.func see through it.
The letters are those of selective_scan.py; S is the number of rows of a state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from .._sequences import Span, spans
from .._torch import accumulator, in_order_of

CHUNK = 32  # tokens whose intermediate values are in memory at once

Tensors = dict[str, Tensor]  # by the name of the argument, without those that are None


class Call:
    """A call in plain torch, in one dtype, with complex numbers as such, and with time running forwards.

    Args:
        tensors: u, delta, A, B, C and those of D, z, delta_bias and initial_state that are given. Complex ones may also
            be pairs of real numbers: A, constant B and C and states in a last dimension of 2, variable B and C
            interleaved along time.
        packing: (cu_seqlens, seq_idx).
        dtype: what everything is computed in.
    """

    def __init__(
        self, tensors: Tensors, packing: tuple, delta_softplus: bool, two_exp: bool, reverse: bool, dtype: torch.dtype
    ):
        A = tensors["A"]
        self.batch, self.channels, self.length = tensors["u"].shape
        self.dtype = dtype
        self.pairs = A.dim() == 3
        self.complex = self.pairs or A.is_complex()
        self.states_dtype = dtype.to_complex() if self.complex else dtype
        self.softplus, self.two_exp, self.reverse = delta_softplus, two_exp, reverse
        self.variable = {"u", "delta", "z"} | {name for name in "BC" if tensors[name].dim() > A.dim()}
        self.given = tensors
        self.inputs = self.convert(tensors)

        cu_seqlens, seq_idx = packing
        self.spans = [self._in_time(span) for span in spans(self.batch, self.length, cu_seqlens, seq_idx, reverse)]
        self.num_states = self.batch if cu_seqlens is None else len(cu_seqlens) - 1

    def _in_time(self, span: Span) -> Span:
        if not self.reverse:
            return span
        return span._replace(begin=self.length - span.end, end=self.length - span.begin)

    def convert(self, tensors: Tensors) -> Tensors:
        """Arguments, or their tangents, as this call computes with them."""
        return {name: self._convert(name, tensor) for name, tensor in tensors.items()}

    def _convert(self, name: str, tensor: Tensor) -> Tensor:
        is_state = name in ("A", "B", "C", "initial_state") and self.complex
        if is_state and not tensor.is_complex():
            pairs = tensor.unflatten(-1, (-1, 2)) if name in self.variable else tensor
            tensor = torch.view_as_complex(pairs.to(self.dtype).contiguous())
        tensor = tensor.to(self.states_dtype if is_state else self.dtype)
        return tensor.flip(-1) if self.reverse and name in self.variable else tensor

    def restore(self, gradients: Tensors) -> Tensors:
        """Their gradients, as those of the arguments that were given: the opposite of `convert`."""
        restored = {}
        for name, given in self.given.items():
            if name not in gradients:
                continue
            gradient = gradients[name]
            gradient = gradient.flip(-1) if self.reverse and name in self.variable else gradient
            if gradient.is_complex() and not given.is_complex():
                gradient = torch.view_as_real(gradient)
                gradient = gradient.flatten(-2) if name in self.variable else gradient
            restored[name] = gradient.to(given.dtype)
        return restored

    def zero_states(self, rows: int) -> Tensor:
        return self.given["u"].new_zeros(rows, *self.inputs["A"].shape, dtype=self.states_dtype)

    def initial_state(self, span: Span, tensors: Tensors) -> Tensor:
        """(rows, D, N): the state, or its tangent, before the first token of a span."""
        if span.initial is None or "initial_state" not in tensors:
            return self.zero_states(span.rows.stop - span.rows.start)
        return tensors["initial_state"][span.initial]

    def cut(self, tensors: Tensors, span: Span, begin: int, end: int) -> Tensors:
        """Everything but the initial state, of some tokens of a span."""
        return {
            name: tensor[span.rows, ..., begin:end] if name in self.variable else tensor
            for name, tensor in tensors.items()
            if name != "initial_state"
        }

    # The recurrence.

    def scan(self, h: Tensor, x: Tensors) -> tuple[Tensor, Tensor]:
        """Some tokens (rows, D, T) of one span from the state h: (y, the state after them)."""
        delta = self.delta(x)  # [delta]
        a = self.decay(time_first(delta)[..., None] * x["A"])  # [decay]
        B, C = self.per_channel(x["B"]), self.per_channel(x["C"])
        h = recurrence(a, time_first(delta * x["u"])[..., None] * B, h)  # [state]
        out = time_last(self.real_sum(C * h[1:]))  # [out]
        if "D" in x:
            out = out + x["D"][:, None] * x["u"]
        return out * silu(x["z"]) if "z" in x else out, h[-1]

    def tangents(self, h: Tensor, ht: Tensor, x: Tensors, xt: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """The derivative of `scan` along (ht, xt): (that of y, the state after the tokens, its derivative)."""
        delta = self.delta(x)
        delta_t = xt["delta"] + xt["delta_bias"][:, None] if "delta_bias" in x else xt["delta"]
        if self.softplus:
            delta_t = delta_t * torch.sigmoid(
                x["delta"] + x["delta_bias"][:, None] if "delta_bias" in x else x["delta"]
            )
        u, ut, A, At = x["u"], xt["u"], x["A"], xt["A"]
        B, C, Bt, Ct = (self.per_channel(p) for p in (x["B"], x["C"], xt["B"], xt["C"]))

        exponent = time_first(delta)[..., None] * A
        a = self.decay(exponent)
        at = torch.exp(exponent) * (time_first(delta_t)[..., None] * A + time_first(delta)[..., None] * At)
        at = 2 * at if self.two_exp else at
        h = recurrence(a, time_first(delta * u)[..., None] * B, h)
        entering = time_first(delta_t * u + delta * ut)[..., None] * B + time_first(delta * u)[..., None] * Bt
        ht = recurrence(a, at * h[:-1] + entering, ht)
        out_t = time_last(self.real_sum(Ct * h[1:] + C * ht[1:]))
        if "D" in x:
            out_t = out_t + xt["D"][:, None] * u + x["D"][:, None] * ut
        if "z" in x:
            out = time_last(self.real_sum(C * h[1:]))
            out = out + x["D"][:, None] * u if "D" in x else out
            z, s = x["z"], torch.sigmoid(x["z"])
            out_t = out_t * (z * s) + out * s * (1 + z * (1 - s)) * xt["z"]
        return out_t, h[-1], ht[-1]

    def delta(self, x: Tensors) -> Tensor:
        delta = x["delta"] + x["delta_bias"][:, None] if "delta_bias" in x else x["delta"]
        return softplus(delta) if self.softplus else delta

    def decay(self, exponent: Tensor) -> Tensor:
        return 2 * torch.exp(exponent) - 1 if self.two_exp else torch.exp(exponent)

    def real_sum(self, terms: Tensor) -> Tensor:
        """Over the states; twice the real part of complex ones, which stand for pairs of conjugates."""
        return 2 * terms.sum(-1).real if self.complex else terms.sum(-1)

    def per_channel(self, projection: Tensor) -> Tensor:
        """B or C as (T, rows, D, N), or (D, N) where it is constant."""
        if projection.dim() == 2:
            return projection
        grouped = time_first(projection if projection.dim() == 4 else projection.unsqueeze(1))
        return grouped.repeat_interleave(self.channels // grouped.shape[2], dim=2)

    # Derivatives.

    def jvp(self, tangents: Tensors) -> tuple[Tensor, Tensor]:
        """The derivatives (yt, last_t) of y and the last state along tangents of every tensor."""
        tangents = self.convert(tangents)
        pieces, states = [], {}
        for span in self.spans:
            _, ht = before = self.before(span, tangents)
            for begin, end in self.chunks(span):
                yt, *before = self.tangents(*before, *self.cut_both(tangents, span, begin, end))
                pieces.append((span.rows, begin, yt))
                _, ht = before
            if span.final is not None:
                states[span.final.start] = ht
        return self.place_tangents(pieces, states)

    def second_order(self, tangents: Tensors, dy: Tensor, dlast_state: Tensor | None) -> tuple[Tensor, Tensor, Tensors]:
        """(yt, last_t, the gradients of <dy, yt> + <dlast_state, last_t>), with (yt, last_t) what `jvp` returns.

        One sweep forwards keeps the state and its derivative before every chunk, one sweep backwards recomputes and
        differentiates a chunk at a time.
        """
        tangents, dy = self.convert(tangents), self._convert("u", dy)
        dlast_state = None if dlast_state is None else self._convert("initial_state", dlast_state)
        pieces, states, initial_gradients = [], {}, {}
        gradients: Tensors = {}
        gradient_pieces: dict[str, list] = {name: [] for name in self.inputs if name in self.variable}
        for span in self.spans:
            before, kept = self.before(span, tangents), []
            for begin, end in self.chunks(span):
                kept.append((begin, end, before))
                yt, *before = self.tangents(*before, *self.cut_both(tangents, span, begin, end))
                pieces.append((span.rows, begin, yt))
            _, ht = before
            gh, ght = torch.zeros_like(ht), torch.zeros_like(ht)
            if span.final is not None:
                states[span.final.start] = ht
                ght = ght if dlast_state is None else dlast_state[span.final]
            for begin, end, before in reversed(kept):
                x, xt = self.cut_both(tangents, span, begin, end)
                _, pull = torch.func.vjp(functools.partial(self.tangents, xt=xt), *before, x)
                gh, ght, gx = pull((dy[span.rows, :, begin:end], gh, ght))
                for name, gradient in gx.items():
                    if name in self.variable:
                        gradient_pieces[name].append((span.rows, begin, gradient))
                    else:
                        gradients[name] = gradients[name] + gradient if name in gradients else gradient
            if span.initial is not None:
                initial_gradients[span.initial.start] = gh
        for name, tensor in self.inputs.items():
            if name in self.variable:
                gradients[name] = self.place(gradient_pieces[name], tensor)
            elif name == "initial_state":
                gradients[name] = self.place_states(initial_gradients)
            elif name not in gradients:
                gradients[name] = torch.zeros_like(tensor)
        return *self.place_tangents(pieces, states), self.restore(gradients)

    def before(self, span: Span, tangents: Tensors) -> tuple[Tensor, Tensor]:
        """The state and its derivative before the first token of a span."""
        return self.initial_state(span, self.inputs), self.initial_state(span, tangents)

    def cut_both(self, tangents: Tensors, span: Span, begin: int, end: int) -> tuple[Tensors, Tensors]:
        return self.cut(self.inputs, span, begin, end), self.cut(tangents, span, begin, end)

    def place_tangents(self, pieces: list[tuple[slice, int, Tensor]], states: dict[int, Tensor]):
        yt = self.restore({"u": self.place(pieces, self.inputs["u"])})["u"]
        return in_order_of(self.given["u"], yt), self.place_states(states)  # torch wants the strides of y

    def chunks(self, span: Span) -> Iterator[tuple[int, int]]:
        for begin in range(span.begin, span.end, CHUNK):
            yield begin, min(begin + CHUNK, span.end)

    # Results of spans and chunks, put together.

    def place(self, pieces: list[tuple[slice, int, Tensor]], like: Tensor) -> Tensor:
        """Pieces, each (batch rows, first token, values with time last), at their places in zeros like `like`."""
        rows = {span.rows.start: (span.rows, []) for span in self.spans}
        for batch, begin, piece in pieces:
            rows[batch.start][1].append((begin, piece))
        blocks = [place_in_time(row, like[batch]) for _, (batch, row) in sorted(rows.items())]
        return torch.cat(blocks) if blocks else torch.zeros_like(like)

    def place_states(self, states: dict[int, Tensor]) -> Tensor:
        """(S, D, N) from states by their first row, as pairs where the call was given pairs."""
        placed = [state for _, state in sorted(states.items())]
        joined = torch.cat(placed) if placed else self.zero_states(self.num_states)
        return torch.view_as_real(joined) if self.pairs else joined


def time_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0)


def time_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1)


def recurrence(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t over the first dimension: (T + 1, ...), beginning with the initial h."""
    states = [h]
    for a_t, b_t in zip(a.unbind(), b.unbind(), strict=True):
        states.append(a_t * states[-1] + b_t)
    return torch.stack(states)


def place_in_time(pieces: list[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """Pieces, each (first token, values with time last), with zeros between them."""
    parts, end = [], 0
    for begin, piece in sorted(pieces, key=lambda piece: piece[0]):
        if begin > end:
            parts.append(torch.zeros_like(like[..., end:begin]))
        parts.append(piece)
        end = max(end, begin + piece.shape[-1])
    return torch.cat([*parts, torch.zeros_like(like[..., end:])], dim=-1)


def reference(
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
    """`selective_scan` in plain torch, one sequence after another, in the widest dtype of its arguments."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors = {name: t for name, t in (given | {"initial_state": initial_state}).items() if t is not None}
    dtype = functools.reduce(torch.promote_types, (t.dtype.to_real() for t in tensors.values()), torch.float32)
    two_exp = is_two_exp("selective_scan", transition)
    call = Call(tensors, (cu_seqlens, seq_idx), delta_softplus, two_exp, reverse, dtype)
    pieces, states = [], {}
    for span in call.spans:
        h = call.initial_state(span, call.inputs)
        y, h = call.scan(h, call.cut(call.inputs, span, span.begin, span.end))
        pieces.append((span.rows, span.begin, y))
        if span.final is not None:
            states[span.final.start] = h
    y = call.restore({"u": call.place(pieces, call.inputs["u"])})["u"]
    if not return_last_state:
        return y
    state_dtype = accumulator(u.dtype)
    return y, call.place_states(states).to(state_dtype.to_complex() if call.complex else state_dtype)


def reference_step(
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
    """`selective_scan_step` in plain torch."""

    def flat(t: Tensor | None, first: int) -> Tensor | None:
        """Heads and their channels as one dimension."""
        return t.flatten(first, first + 1) if t is not None and u.dim() == 3 else t

    y = torch.zeros_like(u)
    for b, row in enumerate(range(len(u)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            tokens = (None if t is None else flat(t[b : b + 1], 1)[..., None] for t in (u, delta, z))
            token_u, token_delta, token_z = tokens
            y_b, h = reference(
                *(token_u, token_delta, flat(A, 0), B[b : b + 1, ..., None], C[b : b + 1, ..., None]),
                *(flat(D, 0), token_z, flat(delta_bias, 0), delta_softplus, True),
                initial_state=flat(state[row : row + 1], 1),
                transition=transition,
            )
            y[b] = y_b.reshape(u.shape[1:])
            state[row] = h.reshape(state.shape[1:])
    return y


def is_two_exp(op: str, transition: str) -> bool:
    if transition not in ("exp", "two_exp_minus_one"):
        raise ValueError(f'{op}: transition must be "exp" or "two_exp_minus_one", got {transition!r}')
    return transition == "two_exp_minus_one"
