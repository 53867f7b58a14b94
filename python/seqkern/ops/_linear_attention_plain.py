"""linear_attention in plain torch: the references, and the derivatives that no kernel computes.

The letters are those of linear_attention.py; R is the number of batch rows of a span, T the tokens of a chunk, and S
may also be the number of rows of a state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import logsigmoid, silu, softplus
from torch.utils._pytree import tree_map

from .._sequences import Span, spans
from .._torch import accumulator

NAMES = ("q", "k", "v", "decay", "input", "A", "bias", "bonus", "skip", "gate", "S", "z", "m")
STATE = {"S": 0.0, "z": 0.0, "m": -math.inf}  # the parts of a state, and what is in an empty one
NONE, TOKEN, KEY, DELTA, EXP = range(5)  # forms of the gates (csrc/linear_attention/params.h)
UNNORMALIZED, SUM, MAX = range(3)  # normalizers
CHUNK = 32  # tokens whose intermediate values are in memory at once

Tensors = dict[str, Tensor]  # by their names in NAMES, without those that are None


class Options(NamedTuple):
    """What the kernels are told, in their order."""

    form: int
    normalizer: int = UNNORMALIZED
    softplus: bool = False
    low: float = 0.0
    high: float = math.inf
    read_previous: bool = False
    value_major: bool = False
    scale: float = 1.0
    eps: float = 0.0
    reverse: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a state."""
        return ("S", "z", "m")[: 1 + self.normalizer]


def default_scale(q: Tensor) -> float:
    return max(q.shape[-1], 1) ** -0.5


def num_states(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class Call:
    """A call in plain torch, in one dtype, with time running forwards and states as (S, HV, K, V).

    Args:
        tensors: by their names in NAMES, those that are given.
        packing: (cu_seqlens, seq_idx).
        dtype: what everything is computed in; by default the dtype of sums.
        dtype_of_m: what every m is rounded to, if not the same: S and z belong to the m that a step reads back.
    """

    def __init__(
        self,
        tensors: Tensors,
        packing: tuple,
        options: Options,
        dtype: torch.dtype | None = None,
        dtype_of_m: torch.dtype | None = None,
    ):
        q, v = tensors["q"], tensors["v"]
        self.batch, self.length, self.heads, self.keys = q.shape
        self.value_heads, self.size = v.shape[2:]
        self.dtype = dtype or accumulator(v.dtype)
        self.dtype_of_m = dtype_of_m or self.dtype
        self.options, self.given = options, tensors
        tokens = {"q", "k", "v", "decay", "input", "gate"}
        self.tokens = {name for name in tokens & tensors.keys() if tensors[name].dim() > 1}
        self.inputs = self.convert(tensors)
        cu_seqlens, seq_idx = packing
        self.num_states = num_states(v, cu_seqlens)
        self.spans = [self._in_time(s) for s in spans(self.batch, self.length, cu_seqlens, seq_idx, options.reverse)]

    def _in_time(self, span: Span) -> Span:
        if not self.options.reverse:
            return span
        return span._replace(begin=self.length - span.end, end=self.length - span.begin)

    def convert(self, tensors: Tensors) -> Tensors:
        """Arguments, or their tangents, as this call computes with them."""
        return {name: self._turned(name, tensor.to(self.dtype)) for name, tensor in tensors.items()}

    def restore(self, gradients: Tensors) -> Tensors:
        """Their gradients, as those of the arguments that were given: the opposite of `convert`."""
        given = self.given
        return {name: self._turned(name, gradients[name]).to(given[name].dtype) for name in given if name in gradients}

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        if name == "S":
            return tensor.mT if self.options.value_major else tensor
        return tensor.flip(1) if self.options.reverse and name in self.tokens else tensor

    def before(self, span: Span, tensors: Tensors) -> Tensors:
        """The state, or its tangent, before the first token of a span."""
        given = {name: tensors[name] for name in self.options.parts if name in tensors}
        if span.initial is not None and given:
            return {name: part[span.initial] for name, part in given.items()}
        empty = self.empty_state(span.rows.stop - span.rows.start)
        return empty if tensors is self.inputs else tree_map(torch.zeros_like, empty)

    def empty_state(self, rows: int) -> Tensors:
        shapes = {"S": (self.keys, self.size), "z": (self.keys,), "m": ()}
        full = functools.partial(self.given["v"].new_full, dtype=self.dtype)
        return {name: full((rows, self.value_heads, *shapes[name]), STATE[name]) for name in self.options.parts}

    def cut(self, tensors: Tensors, span: Span, begin: int, end: int) -> Tensors:
        """Everything but the state, of some tokens of a span."""
        return {
            name: tensor[span.rows, begin:end] if name in self.tokens else tensor
            for name, tensor in tensors.items()
            if name not in STATE
        }

    def chunks(self, span: Span) -> Iterator[tuple[int, int]]:
        for begin in range(span.begin, span.end, CHUNK):
            yield begin, min(begin + CHUNK, span.end)

    # The recurrence.

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        """Some tokens (R, T, ...) of one span from a state: (y, the state after them)."""
        q, k, v = self.per_value_head(x["q"], 2), self.per_value_head(x["k"], 2), x["v"]  # (R, T, HV, K or V)
        decay, weight, m = self.gates(x, state.get("m"))
        weighted = k if weight is None else weight[..., None] * k

        S, columns = state["S"], v
        if "z" in state:  # z is the state of one more value, which is always 1
            S = torch.cat([S, state["z"][..., None]], dim=-1)
            columns = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        if "m" in state:
            S = S.masked_fill((state["m"] == -math.inf)[..., None, None], 0)  # an empty one, whatever S and z are
        states = [S]
        entering = (weighted[..., None] * columns[..., None, :]).unbind(1)
        decays = [1] * len(entering) if decay is None else decay[..., None].unbind(1)
        for decay_t, entering_t in zip(decays, entering, strict=True):
            states.append(decay_t * states[-1] + entering_t)  # [state], [sum]
        read = torch.stack(states[:-1] if self.options.read_previous else states[1:], dim=1)
        n = (q[..., None, :] @ read).squeeze(-2)  # [read]
        if "bonus" in x:
            n = n + (q * k * self.per_value_head(x["bonus"], 0)).sum(-1, keepdim=True) * columns
        o = self.normalized(n, m)
        if "skip" in x:
            o = o + (x["skip"] if x["skip"].dim() == 2 else x["skip"][:, None]) * v  # [skip]
        y = o * silu(x["gate"]) if "gate" in x else o

        S = states[-1]
        after = {"S": S[..., :-1], "z": S[..., -1]} if "z" in state else {"S": S}
        return y, after if m is None else after | {"m": m[:, -1]}

    def per_value_head(self, tensor: Tensor, dim: int) -> Tensor:
        """What key heads have, for the value heads that they serve."""
        group = self.value_heads // max(self.heads, 1)
        return tensor if group == 1 else tensor.repeat_interleave(group, dim=dim)

    def gates(self, x: Tensors, m: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """[gate]: exp(g) (R, T, HV, 1 or K) and w (R, T, HV), None where they are 1, and m (R, T, HV) of form EXP."""
        form, v, decay = self.options.form, x["v"], x.get("decay")
        if form == NONE:
            return None, None, None
        if form in (TOKEN, KEY):
            per_key = decay if form == KEY else decay.expand(v.shape[:3])[..., None]
            return per_key.exp(), None, None
        if form == DELTA:
            delta = decay + x["bias"] if "bias" in x else decay
            delta = softplus(delta) if self.options.softplus else delta
            delta = delta.clamp(self.options.low, self.options.high)
            return (delta * x["A"]).exp()[..., None], delta, None
        carried, maxima = [], []
        for f, i in zip(logsigmoid(decay).unbind(1), x["input"].unbind(1), strict=True):
            carried.append(f + m)
            m = torch.where(carried[-1] >= i, carried[-1], i)
            m = m.masked_fill(m == -math.inf, -math.inf).to(self.dtype_of_m).to(m.dtype)  # -inf: nothing changes it
            maxima.append(m)
        carried, maxima = torch.stack(carried, dim=1), torch.stack(maxima, dim=1)
        return exp_difference(carried, maxima)[..., None], exp_difference(x["input"], maxima), maxima

    def normalized(self, n: Tensor, m: Tensor | None) -> Tensor:
        """[norm], [out]: o from what was read, whose last column is that of z."""
        scale, eps = self.options.scale, self.options.eps
        if self.options.normalizer == UNNORMALIZED:
            return scale * n
        n, e = n[..., :-1], n[..., -1]
        if m is None:
            return n / (e + eps)[..., None]
        empty = m == -math.inf
        limit = math.log(torch.finfo(self.dtype).max) - 1
        least = (-m.masked_fill(empty, 0)).clamp(max=limit).exp()
        d = torch.maximum((scale * e).abs(), least) + eps
        return (scale * n / d[..., None]).masked_fill(empty[..., None], 0)

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
        tangents, dy = self.convert(tangents), self._turned("v", dy.to(self.dtype))
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
            elif name in STATE:
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
        y = self._turned("v", self.place(pieces, self.inputs["v"])).contiguous()  # torch wants the strides of y
        final = {name: self._turned(name, part).contiguous() for name, part in self.place_states(states).items()}
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


def exp_difference(x: Tensor, scale: Tensor) -> Tensor:
    """exp(x - scale) for x <= scale, and 0 for -inf less -inf."""
    return (x - scale).masked_fill(scale == -math.inf, -math.inf).exp()


def place_in_time(pieces: list[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """Pieces, each (first token, values), with zeros between them."""
    parts, end = [], 0
    for begin, piece in sorted(pieces, key=lambda piece: piece[0]):
        parts += [torch.zeros_like(like[:, end:begin]), piece]
        end = begin + piece.shape[1]
    return torch.cat([*parts, torch.zeros_like(like[:, end:])], dim=1)


def attend(
    tensors: tuple[Tensor | None, ...],
    packing: tuple,
    options: Options,
    return_final_state: bool,
    dtype_of_m: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """What the kernels compute, in the widest dtype of the tensors in NAMES: y, then the parts of the final state."""
    given = {name: t for name, t in zip(NAMES, tensors, strict=True) if t is not None}
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in given.values()), torch.float32)
    y, final = Call(given, packing, options, dtype, dtype_of_m).run()
    v = given["v"]
    kept = [final[name].to(accumulator(v.dtype)) for name in options.parts] if return_final_state else []
    return y.to(v.dtype), *kept


def attend_step(
    state: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...], options: Options, state_indices: Tensor | None
) -> Tensor:
    """What the step kernel computes: one token for each row of the tensors in NAMES, those of the state left out."""
    v = tensors[2]
    y = torch.zeros_like(v)
    constant = {"A", "bias", "bonus", "skip"}
    for b, row in enumerate(range(len(v)) if state_indices is None else state_indices.tolist()):
        if row < 0:
            continue
        token = [
            t if t is None or name in constant or t.dim() == 1 else t[b : b + 1, None]
            for name, t in zip(NAMES, tensors, strict=False)
        ]
        before = [part[row : row + 1] for part in state] + [None] * (3 - len(state))
        y_b, *after = attend((*token, *before), (None, None), options, True, state[-1].dtype)
        y[b] = y_b[0, 0]
        for part, value in zip(state, after, strict=True):
            part[row] = value[0]
    return y
