"""The cells of elementwise_rnn in plain torch, their states, and its reference.

A state is published as in CELLS, and carried as cells.h in csrc/elementwise_rnn has it: stacked into one tensor
(S, N, D), and of slstm (h, y, l).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._cells import State, parts_of, slstm_carried, slstm_published, slstm_token
from .._recurrence import Recurrence, Tensors, widest
from .._torch import accumulator

SOLVERS = ("auto", "serial", "newton", "shooting")  # csrc/elementwise_rnn/params.h


def gru(w: State, x: State, s: State) -> State:
    (a_z, a_r, a_n), (z, r, n), (h,) = w, x, s
    z, r = torch.sigmoid(a_z * h + z), torch.sigmoid(a_r * h + r)
    return (h + z * (torch.tanh(a_n * h * r + n) - h),)


def lstm(w: State, x: State, s: State) -> State:
    (a_f, a_g, a_o, c_f, c_o), (f, g, o), (h, c) = w, x, s
    f, g = torch.sigmoid(a_f * h + c_f * c + f), torch.tanh(a_g * h + g)
    c = g + f * (c - g)
    return torch.sigmoid(a_o * h + c_o * c + o) * torch.tanh(c), c


def slstm(w: State, x: State, s: State) -> State:
    h, y, l = s
    return slstm_token(*(a * h + pre for a, pre in zip(w, x, strict=True)), y, l)


def indrnn(w: State, x: State, s: State) -> State:
    return (torch.relu(w[0] * s[0] + x[0]),)


def elman(w: State, x: State, s: State) -> State:
    return (torch.tanh(w[0] * s[0] + x[0]),)


class ElementwiseRnnStats(NamedTuple):
    """How each channel of each row was solved."""

    sweeps: Tensor  # (B, D) int32: passes over the tokens before its states were accepted, 0 by "serial"
    estimate: Tensor  # (B, D) float32: of the error of its states, as the solver last saw it, 0 by "serial"
    repaired: Tensor  # (B, D) bool: it was not accepted, and computed token by token


class Cell(NamedTuple):
    step: Callable[[State, State, State], State]  # [cell], of weights, gates and a carried state
    gates: int
    weights: int
    empty: dict[str, float]  # the parts of a carried state, h first, and what is in one without a past
    published: str  # the parts of a published one


CELLS = {
    "gru": Cell(gru, 3, 3, {"h": 0.0}, "h"),
    "lstm": Cell(lstm, 3, 5, {"h": 0.0, "c": 0.0}, "hc"),
    "slstm": Cell(slstm, 4, 4, {"h": 0.0, "y": 0.0, "l": -torch.inf}, "hcnm"),
    "indrnn": Cell(indrnn, 1, 1, {"h": 0.0}, "h"),
    "elman": Cell(elman, 1, 1, {"h": 0.0}, "h"),
}


def cell_of(op: str, name: str) -> Cell:
    if name not in CELLS:
        raise ValueError(f"{op}: cell must be one of {', '.join(CELLS)}, got {name!r}")
    return CELLS[name]


def carried(cell: Cell, parts: State, dtype: torch.dtype) -> Tensor:
    """(S, N, D) of the published parts (N, D)."""
    parts = tuple(part.to(dtype) for part in parts)
    if cell is CELLS["slstm"]:
        parts = parts[0], *slstm_carried(*parts[1:])
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def published(cell: Cell, state: Tensor) -> State:
    """The opposite of `carried`."""
    if len(state) == 1:
        return (state.squeeze(0),)
    h, *others = state.unbind()
    return h, *(slstm_published(*others) if cell is CELLS["slstm"] else others)


class Cells(Recurrence):
    """A call in plain torch, token by token.

    Args:
        x: (B, L, G, D).
        weights: (W, D).
        state: carried, or None.
        reset: (B, L) or None.
        dtype: what everything is computed in; by default the dtype of states.
    """

    def __init__(
        self,
        cell: Cell,
        x: Tensor,
        weights: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        dtype: torch.dtype | None = None,
    ):
        self.cell = cell
        tensors = self.named(x, weights, state) | ({} if reset is None else {"reset": reset})
        super().__init__(tensors, {"x", "reset"} & tensors.keys(), cell.empty, (cu_seqlens, None), reverse, dtype)

    def named(self, x: Tensor, weights: Tensor, state: Tensor | None) -> Tensors:
        """Arguments, or their tangents, as a Recurrence takes them."""
        parts = () if state is None else state.unbind()
        return {"x": x, "weights": weights, **dict(zip(self.cell.empty, parts, strict=False))}

    def tangents(self, *tangents: Tensor | None) -> Tensors:
        """Those of x, weights and the state, zeros where there is none."""
        given = dict(zip(("x", "weights", "state"), tangents, strict=True))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in self.given.items()}
        if given["state"] is not None:
            given |= dict(zip(self.cell.empty, given["state"].unbind(), strict=True))
        return {name: zero if given.get(name) is None else given[name] for name, zero in zeros.items()}

    def gradients(self, named: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those of x, weights and the state."""
        has_state = "h" in self.given
        return named["x"], named["weights"], self.joined(named) if has_state else None

    def joined(self, state: Tensors) -> Tensor:
        return torch.stack([state[name] for name in self.cell.empty])

    def like(self, tensors: Tensors) -> Tensor:
        return tensors["x"][:, :, 0]

    def shapes_of_state(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.cell.empty, ())

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        s, weights, outputs = tuple(state.values()), x["weights"].unbind(), []
        tokens = x["x"].unbind(1)
        resets = (x["reset"] != 0)[..., None].unbind(1) if "reset" in x else [None] * len(tokens)
        for x_t, reset_t in zip(tokens, resets, strict=True):  # (R, G, D), (R, 1)
            if reset_t is not None:
                s = tuple(t.masked_fill(reset_t, empty) for t, empty in zip(s, self.cell.empty.values(), strict=True))
            s = self.cell.step(weights, x_t.unbind(1), s)
            outputs.append(s[0])
        return torch.stack(outputs, dim=1), dict(zip(state, s, strict=True))


def solve(
    cell: Cell,
    x: Tensor,
    weights: Tensor,
    parts: State | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """(h, the final state), in the widest dtype of the tensors; states are published ones."""
    named = {"x": x, "weights": weights} | ({} if parts is None else dict(zip(cell.published, parts, strict=True)))
    dtype = widest(named)
    state = None if parts is None else carried(cell, parts, dtype)
    call = Cells(cell, x, weights, state, reset, cu_seqlens, reverse, dtype)
    h, final = call.run()
    return h.to(x.dtype), tuple(part.to(accumulator(x.dtype)) for part in published(cell, call.joined(final)))


def reference(
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
    """`elementwise_rnn` in plain torch, token by token, in the widest dtype of its arguments."""
    made_of, _ = options_of("elementwise_rnn", cell, solver, atol, max_sweeps, on_fail)
    parts = parts_of("elementwise_rnn", "initial_state", cell, made_of.published, initial_state)
    h, final_state = solve(made_of, x, weights, parts, reset, cu_seqlens, reverse)
    results = [h]
    if return_final_state:
        results.append(final_state)
    if return_stats:
        zeros = h.new_zeros(h.shape[0], h.shape[2])
        results.append(ElementwiseRnnStats(zeros.int(), zeros.float(), zeros.bool()))
    return tuple(results) if len(results) > 1 else results[0]


def reference_step(
    state: State, x: Tensor, weights: Tensor, *, cell: str = "gru", state_indices: Tensor | None = None
) -> Tensor:
    """`elementwise_rnn_step` in plain torch."""
    made_of = cell_of("elementwise_rnn_step", cell)
    h = torch.zeros_like(x[:, 0])
    for b, row in enumerate(range(len(x)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            before = tuple(part[row, None] for part in state)
            h_b, after = solve(made_of, x[b, None, None], weights, before, None, None, False)
            h[b] = h_b[0, 0]
            for part, value in zip(state, after, strict=True):
                part[row] = value[0]
    return h


def options_of(op: str, cell: str, solver: str, atol, max_sweeps, on_fail: str) -> tuple[Cell, tuple]:
    """The cell, and what kernels are told of it and its solver."""
    made_of = cell_of(op, cell)
    if solver not in SOLVERS:
        raise ValueError(f"{op}: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if on_fail not in ("repair", "raise", "warn"):
        raise ValueError(f'{op}: on_fail must be "repair", "raise" or "warn", got {on_fail!r}')
    if atol is not None and not atol >= 0:
        raise ValueError(f"{op}: atol must be at least 0, or None, got {atol}")
    if max_sweeps is not None and max_sweeps < 1:
        raise ValueError(f"{op}: max_sweeps must be at least 1, or None, got {max_sweeps}")
    return made_of, (index_of(cell), SOLVERS.index(solver), -1.0 if atol is None else float(atol), max_sweeps or 0)


def index_of(cell: str) -> int:
    return list(CELLS).index(cell)


def cell_at(index: int) -> Cell:
    return list(CELLS.values())[index]
