"""The cells of rnn in plain torch, its random numbers, and its reference.

A state is published as in CELLS, and carried as csrc/rnn/params.h has it: h (N, H, Q), and stacked (C, N, H, P) the
numbers c that a unit has beside it, of slstm y and l.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._cells import State, parts_of, slstm_carried, slstm_published, slstm_token
from .._recurrence import Recurrence, Tensors, widest
from .._sequences import Span
from .._torch import accumulator

# [cell]: m_t and c_t of the gates of x_t, those of u_t, h_{t-1} and c_{t-1}.


def lstm(x: State, u: State, h: Tensor, c: State) -> tuple[Tensor, State]:
    i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
    new = torch.sigmoid(f) * c[0] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(new), (new,)


def gru(x: State, u: State, h: Tensor, c: State) -> tuple[Tensor, State]:
    r, z = torch.sigmoid(x[0] + u[0]), torch.sigmoid(x[1] + u[1])
    n = torch.tanh(x[2] + r * u[2])
    return n + z * (h - n), ()


def slstm(x: State, u: State, h: Tensor, c: State) -> tuple[Tensor, State]:
    m, *new = slstm_token(*(a + b for a, b in zip(x, u, strict=True)), *c)
    return m, tuple(new)


def elman_tanh(x: State, u: State, h: Tensor, c: State) -> tuple[Tensor, State]:
    return torch.tanh(x[0] + u[0]), ()


def elman_relu(x: State, u: State, h: Tensor, c: State) -> tuple[Tensor, State]:
    return torch.relu(x[0] + u[0]), ()


class Cell(NamedTuple):
    step: Callable[[State, State, Tensor, State], tuple[Tensor, State]]
    gates: int
    carried: dict[str, float]  # the numbers of a unit beside h, and what they are in an empty state
    published: str  # the parts of a published state
    reads_h: bool = False  # of its own unit: there is no proj


CELLS = {  # in the order of params.h
    "lstm": Cell(lstm, 4, {"c": 0.0}, "hc"),
    "gru": Cell(gru, 3, {}, "h", reads_h=True),
    "slstm": Cell(slstm, 4, {"y": 0.0, "l": -torch.inf}, "hcnm"),
    "elman_tanh": Cell(elman_tanh, 1, {}, "h"),
    "elman_relu": Cell(elman_relu, 1, {}, "h"),
}


class Options(NamedTuple):
    """In the order in which the operators take them."""

    cell: int
    reverse: bool
    zoneout: float
    recurrent_dropout: float
    training: bool
    grad_clip: float  # < 0: none

    @property
    def of(self) -> Cell:
        return list(CELLS.values())[self.cell]

    @property
    def draws(self) -> bool:
        """Whether there are random numbers."""
        return self.training and (self.zoneout > 0 or self.recurrent_dropout > 0)


def options_of(
    op: str,
    cell: str,
    proj: Tensor | None,
    zoneout: float,
    recurrent_dropout: float = 0.0,
    grad_clip: float | None = None,
    training: bool = False,
    reverse: bool = False,
) -> Options:
    if cell not in CELLS:
        raise ValueError(f"{op}: cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if proj is not None and CELLS[cell].reads_h:
        raise ValueError(f"{op}: proj must be None for cell {cell!r}, whose units read their own h; use another cell")
    for name, probability in (("zoneout", zoneout), ("recurrent_dropout", recurrent_dropout)):
        if not 0 <= probability < 1:
            raise ValueError(f"{op}: {name} must be at least 0 and below 1, got {probability}")
    if grad_clip is not None and not grad_clip >= 0:
        raise ValueError(f"{op}: grad_clip must be at least 0, or None, got {grad_clip}")
    clip = -1.0 if grad_clip is None else float(grad_clip)
    return Options(list(CELLS).index(cell), reverse, float(zoneout), float(recurrent_dropout), training, clip)


def seed_of(op: str, seed: int | Tensor | None, options: Options, x: Tensor) -> Tensor | None:
    """One number on the device of x, or None where none is needed."""
    if not options.draws:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), device=x.device)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=x.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        given = f"{str(seed.dtype).removeprefix('torch.')} {tuple(seed.shape)}"
        raise RuntimeError(f"{op}: seed must be an int, None, or a tensor of one int64, got {given}")
    return seed.reshape(())


def carried(cell: Cell, parts: State, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(h, c) of the published parts; c is None for cells with no number beside h."""
    h, *others = (part.to(dtype) for part in parts)
    if cell is CELLS["slstm"]:
        others = slstm_carried(*others)
    return h, None if not others else others[0].unsqueeze(0) if len(others) == 1 else torch.stack(others)


def published(cell: Cell, h: Tensor, c: Tensor) -> State:
    """The opposite of `carried`."""
    if len(c) == 1:
        return h, c.squeeze(0)
    return h, *(slstm_published(*c.unbind()) if cell is CELLS["slstm"] else ())


# Random numbers: csrc/common/random.h, in numbers of 64 bits.

LOW = 2**32 - 1


def philox(seed: Tensor, first: Tensor, second: Tensor, third: int) -> Tensor:
    """Four words of 32 bits for each position, in a last dimension."""
    x = [first & LOW, (first >> 32) & LOW, second & LOW, third]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [((b >> 32) & LOW) ^ x[1] ^ key[0], b & LOW, ((a >> 32) & LOW) ^ x[3] ^ key[1], a & LOW]
        key = [(key[0] + 0x9E3779B9) & LOW, (key[1] + 0xBB67AE85) & LOW]
    return torch.stack(torch.broadcast_tensors(*x), dim=-1)


def happens(words: Tensor, probability: float) -> Tensor:
    return (words >> 8).double() * 2**-24 < torch.tensor(probability, dtype=torch.float32).double()


def mask(seed: Tensor, first: Tensor, heads: int, outputs: int, kind: int, probability: float) -> Tensor:
    """(*first.shape, H, Q): where it happens. Four neighbours of (H, Q) share a call of philox."""
    count = heads * outputs
    second = torch.arange((count + 3) // 4, device=seed.device)
    words = philox(seed, first[..., None], second, kind).flatten(-2)[..., :count]
    return happens(words, probability).unflatten(-1, (heads, outputs))


class ClampGradient(torch.autograd.Function):
    """The same numbers; their gradient is clamped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, limit):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.limit = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()


class Cells(Recurrence):
    """A call in plain torch, token by token.

    Args:
        x, R, bias, proj: as the operator takes them, or None.
        initial_h, initial_c: carried, or None.
        reset, cu_seqlens, seed: as the operators take them, or None.
        options: of the call. Its grad_clip is for gradients of `run` alone.
        dtype: what everything is computed in; by default the dtype of states.
    """

    def __init__(
        self,
        x: Tensor,
        R: Tensor,
        bias: Tensor | None,
        proj: Tensor | None,
        initial_h: Tensor | None,
        initial_c: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        options: Options,
        dtype: torch.dtype | None = None,
    ):
        self.cell, self.options, self.outputs = options.of, options, R.shape[3]
        tensors = self.named(x, R, bias, proj, initial_h, initial_c) | ({} if reset is None else {"reset": reset})
        tensors |= self._masks(x, cu_seqlens, seed)
        tokens, parts = {"x", "reset", "zoneout"} & tensors.keys(), {"h": 0.0} | self.cell.carried
        super().__init__(tensors, tokens, parts, (cu_seqlens, None), options.reverse, dtype)

    def _masks(self, x: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None) -> Tensors:
        """What [zoneout] keeps of every token (B, L, H, Q), and [dropout] drops of every sequence (N, H, Q)."""
        if not self.options.draws:
            return {}
        (B, L, H), o = x.shape[:3], self.options
        masks = {}
        if o.zoneout > 0:
            first = torch.arange(B * L, device=x.device).reshape(B, L)
            masks["zoneout"] = mask(seed, first, H, self.outputs, 0, o.zoneout)
        if o.recurrent_dropout > 0:
            first = torch.arange(B if cu_seqlens is None else len(cu_seqlens) - 1, device=x.device)
            masks["dropout"] = mask(seed, first, H, self.outputs, 1, o.recurrent_dropout)
        return masks

    def named(self, *arguments: Tensor | None) -> Tensors:
        """Arguments, or their tangents, as a Recurrence takes them."""
        *tensors, c = arguments
        numbers = () if c is None else c.unbind()
        named = dict(zip(("x", "R", "bias", "proj", "h"), tensors, strict=True))
        return {name: t for name, t in named.items() if t is not None} | dict(
            zip(self.cell.carried, numbers, strict=False)
        )

    def tangents(self, *tangents: Tensor | None) -> Tensors:
        """Those of x, R, bias, proj and the state, zeros where there is none."""
        return {name: torch.zeros_like(t) for name, t in self.given.items()} | self.named(*tangents)

    def gradients(self, named: Tensors) -> tuple[Tensor | None, ...]:
        """Those of x, R, bias, proj and the state."""
        of_c = self.joined(named) if self.given.keys() >= self.cell.carried.keys() and self.cell.carried else None
        return *(named[name] if name in self.given else None for name in ("x", "R", "bias", "proj", "h")), of_c

    def joined(self, state: Tensors) -> Tensor:
        """The numbers beside h in one tensor (C, N, H, P)."""
        numbers = [state[name] for name in self.cell.carried]
        x = self.given["x"]
        return torch.stack(numbers) if numbers else x.new_zeros(0, self.num_states, x.shape[2], x.shape[4])

    def final(self, h: Tensor | None, c: Tensor | None) -> Tensors | None:
        """Gradients of the final state by the names of its parts, zeros where one of them is None."""
        if h is None and c is None:
            return None
        parts = self.empty_state(self.num_states)
        given = ({} if h is None else {"h": h}) | dict(zip(self.cell.carried, () if c is None else c, strict=False))
        return {name: torch.zeros_like(part) for name, part in parts.items()} | given

    def like(self, tensors: Tensors) -> Tensor:
        return tensors["x"].new_zeros(1).expand(*tensors["x"].shape[:3], self.outputs)

    def shapes_of_state(self) -> dict[str, tuple[int, ...]]:
        units = self.given["x"].shape[4]
        return {"h": (self.outputs,)} | dict.fromkeys(self.cell.carried, (units,))

    def cut(self, tensors: Tensors, span: Span, begin: int, end: int) -> Tensors:
        cut = super().cut(tensors, span, begin, end)
        return cut | ({"dropout": cut["dropout"][span.initial]} if "dropout" in cut else {})

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        h, *c = state.values()
        outputs, scale = [], 1 - self.options.recurrent_dropout
        times = [x[name].unbind(1) if name in x else None for name in ("x", "reset", "zoneout")]
        for t in range(len(times[0])):
            x_t, reset_t, kept_t = (None if tokens is None else tokens[t] for tokens in times)
            if self.options.grad_clip >= 0:
                h = ClampGradient.apply(h, self.options.grad_clip)
            if reset_t is not None:
                fresh, empty = (reset_t != 0)[:, None, None], self.parts.values()
                h, *c = (part.masked_fill(fresh, value) for part, value in zip((h, *c), empty, strict=True))
            operand = h.masked_fill(x["dropout"] != 0, 0) / scale if "dropout" in x else h
            u = torch.einsum("hgpq,rhq->rhgp", x["R"], operand)
            u = u + x["bias"] if "bias" in x else u
            m, c = self.cell.step(x_t.unbind(2), u.unbind(2), h, c)
            new = torch.einsum("hqp,rhp->rhq", x["proj"], m) if "proj" in x else m
            if kept_t is not None:
                new = torch.where(kept_t != 0, h, new)
            elif self.options.zoneout > 0 and not self.options.training:
                new = new + self.options.zoneout * (h - new)
            h = new
            outputs.append(h)
        return torch.stack(outputs, dim=1), dict(zip(state, (h, *c), strict=True))


def solve(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None,
    proj: Tensor | None,
    parts: State | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, State]:
    """(h, the final state), in the widest dtype of the tensors; states are published ones."""
    cell = options.of
    dtype = widest({str(i): t for i, t in enumerate((x, R, bias, proj, *(parts or ()))) if t is not None})
    state = (None, None) if parts is None else carried(cell, parts, dtype)
    call = Cells(x, R, bias, proj, *state, reset, cu_seqlens, seed, options, dtype)
    h, final = call.run()
    final_state = published(cell, final["h"], call.joined(final))
    return h.to(x.dtype), tuple(part.to(accumulator(x.dtype)) for part in final_state)


def reference(
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
    """`rnn` in plain torch, token by token, in the widest dtype of its arguments."""
    options = options_of("rnn", cell, proj, zoneout, recurrent_dropout, grad_clip, training, reverse)
    parts = parts_of("rnn", "initial_state", cell, options.of.published, initial_state)
    seed = seed_of("rnn", seed, options, x)
    h, final_state = solve(x, R, bias, proj, parts, reset, cu_seqlens, seed, options)
    return (h, final_state) if return_final_state else h


def reference_step(
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
    """`rnn_step` in plain torch."""
    options = options_of("rnn_step", cell, proj, zoneout)
    h = x.new_zeros(*x.shape[:2], R.shape[3])
    for b, row in enumerate(range(len(x)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            before = tuple(part[row, None] for part in state)
            h_b, after = solve(x[b, None, None], R, bias, proj, before, None, None, None, options)
            h[b] = h_b[0, 0]
            for part, value in zip(state, after, strict=True):
                part[row] = value[0]
    return h
