"""What the operators on recurrent cells share: states that are tuples of named parts, and slstm.

slstm publishes its state as (h, c, n, m), with c and n in the scale exp(m), and carries (h, y, l) with y = c / n and
l = m + log n, whose numbers need no scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._recurrence import num_states

State = tuple[Tensor, ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parts_of(op: str, argument: str, cell: str, names: str, state: State | None) -> State | None:
    """The parts of a published state, whose names are letters."""
    if state is None and argument == "initial_state":
        return None
    if not isinstance(state, (tuple, list)) or len(state) != len(names):
        given = f"{len(state)} of them" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"
        tuple_of = f"({', '.join(names)}{',' * (len(names) == 1)})"
        raise RuntimeError(f"{op}: {argument} must be the tuple {tuple_of} of cell {cell!r}, got {given}")
    return tuple(state)


def state_rows(x: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    """What the rows of a state are called, and how many there are."""
    return {"B" if cu_seqlens is None else "num_sequences": num_states(x, cu_seqlens)}


def check_part(op: str, name: str, part: Tensor, sizes: dict[str, int], x: Tensor) -> None:
    """Of an initial state: kernels are given several parts in one tensor, and cannot name them."""
    if part.shape != tuple(sizes.values()):
        expected = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise RuntimeError(f"{op}: initial_state's {name} must be ({expected}), got {tuple(part.shape)}")
    if part.dtype not in FLOATS:
        given = str(part.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{op}: initial_state's {name} must be float32, bfloat16, float16 or float64, got {given}; convert it "
            "with .to(...)"
        )
    if part.device != x.device:
        raise RuntimeError(f"{op}: initial_state's {name} must be on the device of x; move it with .to(x.device)")


def slstm_token(q: Tensor, f: Tensor, z: Tensor, o: Tensor, y: Tensor, l: Tensor) -> State:
    """(h, y, l) after a token, of the gates i = exp(q), f, z, o before their functions."""
    p = l + logsigmoid(f)
    over = (q - p).masked_fill(q == -torch.inf, -torch.inf)  # a token with i = 0 adds nothing, to an empty state too
    y = y + torch.sigmoid(over) * (torch.tanh(z) - y)
    return torch.sigmoid(o) * y, y, torch.where(over > 0, q, p) + softplus(-over.abs())


def slstm_carried(c: Tensor, n: Tensor, m: Tensor) -> State:
    """(y, l). A unit with n = 0 is empty."""
    empty = n == 0
    n = n.masked_fill(empty, 1)
    return c.masked_fill(empty, 0) / n, m.masked_fill(empty, -torch.inf) + n.log()


def slstm_published(y: Tensor, l: Tensor) -> State:
    """The opposite of `slstm_carried`; of the states that it makes one, that with n = 1, or n = 0 where it is empty."""
    empty, finite = l == -torch.inf, l.masked_fill(l.isinf(), 0)
    n = 1 + (finite - finite)  # a constant with a derivative: zero
    return y.masked_fill(empty, 0), n.masked_fill(empty, 0), l
