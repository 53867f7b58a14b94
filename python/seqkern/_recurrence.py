"""A recurrence in plain torch, some tokens at a time: references, and the derivatives that no kernel computes.

R is the number of batch rows of a span, T the tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_map

from ._sequences import Span, spans
from ._torch import accumulator

CHUNK = 32  # tokens whose intermediate values are in memory at once

Tensors = dict[str, Tensor]  # by their names, without those that are None


class Recurrence:
    """A call in plain torch, in one dtype, with time running forwards. A subclass says what tokens do to a state.

    Args:
        tensors: by their names, those that are given.
        tokens: names of those with time as their second dimension.
        parts: what the parts of a state are called, and what is in an empty one.
        packing: (cu_seqlens, seq_idx).
        reverse: whether the tensors' time runs backwards.
        dtype: what everything is computed in; by default the dtype of sums.
    """

    def __init__(
        self,
        tensors: Tensors,
        tokens: set[str],
        parts: dict[str, float],
        packing: tuple,
        reverse: bool,
        dtype: torch.dtype | None = None,
    ):
        like = self.like(tensors)
        self.length, self.value_heads = like.shape[1:3]
        self.dtype = dtype or accumulator(like.dtype)
        self.given, self.tokens, self.parts, self.reverse = tensors, tokens, parts, reverse
        self.inputs = self.convert(tensors)
        cu_seqlens, seq_idx = packing
        self.num_states = num_states(like, cu_seqlens)
        self.spans = [self._in_time(s) for s in spans(len(like), self.length, cu_seqlens, seq_idx, reverse)]

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        """Some tokens (R, T, ...) of one span from a state: (y, the state after them)."""
        raise NotImplementedError

    def shapes_of_state(self) -> dict[str, tuple[int, ...]]:
        """Of the parts of one row and value head."""
        raise NotImplementedError

    def like(self, tensors: Tensors) -> Tensor:
        """What y is like: (B, L, HV, ...)."""
        return tensors["v"]

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """An argument, or its tangent or gradient, as this call computes with it; and back."""
        return self.in_time(tensor) if name in self.tokens else tensor

    def in_time(self, tokens: Tensor) -> Tensor:
        return tokens.flip(1) if self.reverse else tokens

    def _in_time(self, span: Span) -> Span:
        if not self.reverse:
            return span
        return span._replace(begin=self.length - span.end, end=self.length - span.begin)

    def convert(self, tensors: Tensors) -> Tensors:
        """Arguments, or their tangents, as this call computes with them."""
        return {name: self.turned(name, tensor.to(self.dtype)) for name, tensor in tensors.items()}

    def restore(self, gradients: Tensors) -> Tensors:
        """Their gradients, as those of the arguments that were given: the opposite of `convert`."""
        given = self.given
        return {name: self.turned(name, gradients[name]).to(given[name].dtype) for name in given if name in gradients}

    def before(self, span: Span, tensors: Tensors) -> Tensors:
        """The state, or its tangent, before the first token of a span."""
        given = {name: tensors[name] for name in self.parts if name in tensors}
        if span.initial is not None and given:
            return {name: part[span.initial] for name, part in given.items()}
        empty = self.empty_state(span.rows.stop - span.rows.start)
        return empty if tensors is self.inputs else tree_map(torch.zeros_like, empty)

    def empty_state(self, rows: int) -> Tensors:
        full, shapes = functools.partial(self.like(self.given).new_full, dtype=self.dtype), self.shapes_of_state()
        return {name: full((rows, self.value_heads, *shapes[name]), value) for name, value in self.parts.items()}

    def cut(self, tensors: Tensors, span: Span, begin: int, end: int) -> Tensors:
        """Everything but the state, of some tokens of a span."""
        return {
            name: tensor[span.rows, begin:end] if name in self.tokens else tensor
            for name, tensor in tensors.items()
            if name not in self.parts
        }

    def chunks(self, span: Span) -> Iterator[tuple[int, int]]:
        for begin in range(span.begin, span.end, CHUNK):
            yield begin, min(begin + CHUNK, span.end)

    def run(self) -> tuple[Tensor, Tensors]:
        """(y, the final state)."""
        pieces, states = [], {}
        for span in self.spans:
            state = self.before(span, self.inputs)
            for begin, end in self.chunks(span):
                y, state = self.chunk(state, self.cut(self.inputs, span, begin, end))
                pieces.append((span.rows, begin, y))
            if span.final is not None:
                states[span.final.start] = state
        return self.place_outputs(pieces, states)

    # Derivatives. Forward mode is two reverse ones, which work inside any other transform.

    def jvp(self, tangents: Tensors) -> tuple[Tensor, Tensors]:
        """The derivatives of y and the final state along tangents of every tensor."""
        tangents = self.convert(tangents)
        pieces, states = [], {}
        for span in self.spans:
            state, statet = self.before(span, self.inputs), self.before(span, tangents)
            for begin, end in self.chunks(span):
                yt, state, statet = self.push(state, statet, *self.cut_both(tangents, span, begin, end))
                pieces.append((span.rows, begin, yt))
            if span.final is not None:
                states[span.final.start] = statet
        return self.place_outputs(pieces, states)

    def second_order(self, tangents: Tensors, dy: Tensor, dfinal: Tensors | None) -> tuple[Tensor, Tensors, Tensors]:
        """(yt, finalt, the gradients of <dy, yt> + <dfinal, finalt>), with (yt, finalt) what `jvp` returns.

        One sweep forwards keeps the state and its derivative before every chunk, one sweep backwards recomputes and
        differentiates a chunk at a time.
        """
        tangents, dy = self.convert(tangents), self.in_time(dy.to(self.dtype))
        dfinal = None if dfinal is None else self.convert(dfinal)
        pieces, states, initial = [], {}, {}
        gradients: Tensors = {}
        gradient_pieces: dict[str, list] = {name: [] for name in self.tokens}
        for span in self.spans:
            state, statet = self.before(span, self.inputs), self.before(span, tangents)
            kept = []
            for begin, end in self.chunks(span):
                if kept:
                    _, state, statet = self.push(*kept[-1][2:])
                kept.append((begin, end, state, statet, *self.cut_both(tangents, span, begin, end)))
            g, gt = tree_map(torch.zeros_like, state), tree_map(torch.zeros_like, state)
            if span.final is not None:
                gt = gt if dfinal is None else {name: part[span.final] for name, part in dfinal.items()}
            for begin, end, *before in reversed(kept):
                g, gt, gx, yt, aftert = self.pull(*before, dy[span.rows, begin:end], g, gt)
                statet = aftert if end == span.end else statet  # the final one
                pieces.append((span.rows, begin, yt))
                for name, gradient in gx.items():
                    if name in self.tokens:
                        gradient_pieces[name].append((span.rows, begin, gradient))
                    else:
                        gradients[name] = gradients[name] + gradient if name in gradients else gradient
            if span.final is not None:
                states[span.final.start] = statet
            if span.initial is not None:
                initial[span.initial.start] = g
        for name, tensor in self.inputs.items():
            if name in self.tokens:
                gradients[name] = self.place(gradient_pieces[name], tensor)
            elif name in self.parts:
                gradients[name] = self.place_states(initial)[name]
            elif name not in gradients:
                gradients[name] = torch.zeros_like(tensor)
        return *self.place_outputs(pieces, states), self.restore(gradients)

    def push(self, state: Tensors, statet: Tensors, x: Tensors, xt: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """The derivative of `chunk` along (statet, xt): (that of y, the state after the tokens, its derivative)."""
        outputs = self.chunk(state, x)
        _, transposed = vjp(
            lambda cotangents: vjp(self.chunk, state, x)[1](cotangents), tree_map(torch.zeros_like, outputs)
        )
        ((yt, aftert),) = transposed((statet, xt))
        return yt, outputs[1], aftert

    def pull(self, state: Tensors, statet: Tensors, x: Tensors, xt: Tensors, dy: Tensor, g: Tensors, gt: Tensors):
        """The gradients of <dy, yt> + <g, after> + <gt, aftert> of `push`: those of state, statet and x; yt, aftert."""

        def pulled(state, x, dy, gt):
            (_, after), pull = vjp(self.chunk, state, x)
            return pull((dy, gt)), after

        ((g_statet, _), _), pull = vjp(pulled, state, x, dy, gt)
        g_state, gx, yt, aftert = pull(((statet, xt), g))
        return g_state, g_statet, gx, yt, aftert

    def cut_both(self, tangents: Tensors, span: Span, begin: int, end: int) -> tuple[Tensors, Tensors]:
        return self.cut(self.inputs, span, begin, end), self.cut(tangents, span, begin, end)

    # Results of spans and chunks, put together.

    def place_outputs(self, pieces: list, states: dict[int, Tensors]) -> tuple[Tensor, Tensors]:
        y = self.in_time(self.place(pieces, self.like(self.inputs))).contiguous()  # torch wants the strides of y
        final = {name: self.turned(name, part).contiguous() for name, part in self.place_states(states).items()}
        return y, final

    def place(self, pieces: list[tuple[slice, int, Tensor]], like: Tensor) -> Tensor:
        """Pieces, each (batch rows, first token, values), at their places in zeros like `like`."""
        rows = {span.rows.start: (span.rows, []) for span in self.spans}
        for batch, begin, piece in pieces:
            rows[batch.start][1].append((begin, piece))
        blocks = [place_in_time(row, like[batch]) for _, (batch, row) in sorted(rows.items())]
        return torch.cat(blocks) if blocks else torch.zeros_like(like)

    def place_states(self, states: dict[int, Tensors]) -> Tensors:
        """States by their first row, as whole tensors."""
        placed = [state for _, state in sorted(states.items())]
        if not placed:
            return self.empty_state(self.num_states)
        return {name: torch.cat([state[name] for state in placed]) for name in placed[0]}


def place_in_time(pieces: list[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """Pieces, each (first token, values), with zeros between them."""
    parts, end = [], 0
    for begin, piece in sorted(pieces, key=lambda piece: piece[0]):
        parts += [torch.zeros_like(like[:, end:begin]), piece]
        end = begin + piece.shape[1]
    return torch.cat([*parts, torch.zeros_like(like[:, end:])], dim=1)


def num_states(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def default_scale(q: Tensor) -> float:
    return max(q.shape[-1], 1) ** -0.5


def per_value_head(tensor: Tensor, value_heads: int, dim: int) -> Tensor:
    """What key heads have, for the value heads that they serve."""
    group = value_heads // max(tensor.shape[dim], 1)
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=dim)


def widest(tensors: Tensors) -> torch.dtype:
    """The dtype that a reference computes in."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()), torch.float32)


# Arguments of autograd functions, of which the first are tensors with names.


def given(names: Sequence[str], tensors: Sequence[Tensor | None]) -> Tensors:
    return {name: t for name, t in zip(names, tensors, strict=False) if t is not None}


def tangents_of(names: Sequence[str], tensors: Sequence[Tensor | None], tangents: Sequence[Any]) -> Tensors:
    """Of the tensors that are given, zeros where there is none."""
    everything = zip(names, tensors, tangents, strict=False)
    return {
        name: torch.zeros_like(t) if tangent is None else tangent for name, t, tangent in everything if t is not None
    }


def spread(names: Sequence[str], grads: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the named tensors from those of the ones that are given; None for the others."""
    rest = iter(grads)
    return [None if t is None else next(rest) for _, t in zip(names, tensors, strict=False)]
