"""linear_attention in plain torch: the references, and the derivatives that no kernel computes.

The letters are those of linear_attention.py; R is the number of batch rows of a span, T the tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

from .._recurrence import Recurrence, Tensors, given, per_value_head, widest
from .._torch import accumulator

NAMES = ("q", "k", "v", "decay", "input", "A", "bias", "bonus", "skip", "gate", "S", "z", "m")
STATE = {"S": 0.0, "z": 0.0, "m": -math.inf}  # the parts of a state, and what is in an empty one
NONE, TOKEN, KEY, DELTA, EXP = range(5)  # forms of the gates (csrc/linear_attention/params.h)
UNNORMALIZED, SUM, MAX = range(3)  # normalizers


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


class Call(Recurrence):
    """A call in plain torch, with states as (S, HV, K, V).

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
        self.keys, self.size = tensors["q"].shape[3], tensors["v"].shape[3]
        self.options = options
        tokens = {"q", "k", "v", "decay", "input", "gate"}
        tokens = {name for name in tokens & tensors.keys() if tensors[name].dim() > 1}
        parts = {name: STATE[name] for name in options.parts}
        super().__init__(tensors, tokens, parts, packing, options.reverse, dtype)
        self.dtype_of_m = dtype_of_m or self.dtype

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        if name == "S":
            return tensor.mT if self.options.value_major else tensor
        return super().turned(name, tensor)

    def shapes_of_state(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.keys, self.size), "z": (self.keys,), "m": ()}

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        """Some tokens (R, T, ...) of one span from a state: (y, the state after them)."""
        HV = self.value_heads
        q, k, v = per_value_head(x["q"], HV, 2), per_value_head(x["k"], HV, 2), x["v"]  # (R, T, HV, K or V)
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
            n = n + (q * k * per_value_head(x["bonus"], HV, 0)).sum(-1, keepdim=True) * columns
        o = self.normalized(n, m)
        if "skip" in x:
            o = o + (x["skip"] if x["skip"].dim() == 2 else x["skip"][:, None]) * v  # [skip]
        y = o * silu(x["gate"]) if "gate" in x else o

        S = states[-1]
        after = {"S": S[..., :-1], "z": S[..., -1]} if "z" in state else {"S": S}
        return y, after if m is None else after | {"m": m[:, -1]}

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


def exp_difference(x: Tensor, scale: Tensor) -> Tensor:
    """exp(x - scale) for x <= scale, and 0 for -inf less -inf."""
    return (x - scale).masked_fill(scale == -math.inf, -math.inf).exp()


def attend(
    tensors: tuple[Tensor | None, ...],
    packing: tuple,
    options: Options,
    return_final_state: bool,
    dtype_of_m: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """What the kernels compute, in the widest dtype of the tensors in NAMES: y, then the parts of the final state."""
    named = given(NAMES, tensors)
    y, final = Call(named, packing, options, widest(named), dtype_of_m).run()
    v = named["v"]
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
