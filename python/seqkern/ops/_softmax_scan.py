"""softmax_scan as linear scans, for the derivatives that no kernel computes, and in plain torch, as the reference.

The letters are those of softmax_scan.py. In both o does not depend on the scale in which n and w are kept: the running
maximum is one that suits, held constant. Only the last state is in the scale of its own m, which depends on a score or
on m_0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._sequences import Span, previous, spans
from .._torch import accumulator
from .linear_scan import linear_scan

State = tuple[Tensor, Tensor, Tensor]


def empty_state(v: Tensor, rows: int, dtype: torch.dtype) -> State:
    _, _, H, V = v.shape
    m, n, w = v.new_zeros(rows, H, dtype=dtype), v.new_zeros(rows, H, dtype=dtype), v.new_zeros(rows, H, V, dtype=dtype)
    return m - torch.inf, n, w


def num_states(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def exp_difference(x: Tensor, scale: Tensor) -> Tensor:
    """exp(x - scale) for x <= scale, and 0 for -inf less -inf."""
    return (x - scale).masked_fill(scale == -torch.inf, -torch.inf).exp()


def quotient(w: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """w / n, and 0 for an empty state."""
    return w / n.masked_fill(m == -torch.inf, 1)[..., None]


def unless_empty(m: Tensor, *tensors: Tensor) -> list[Tensor]:
    """(S, H) and (S, H, V) tensors with zeros where a state is empty."""
    empty = m == -torch.inf
    return [t.masked_fill(empty if t.dim() == 2 else empty[..., None], 0) for t in tensors]


class Call:
    """A call as a linear scan of V + 2 channels a head, with decays that are constant.

    They are n, w, and d, the maximum less its value: always zero, but with the derivative of the maximum, which is that
    of the latest score to raise it, or that of m_0.

    Args:
        normalizers: (B, L, H, 2), what the forward kept.
        m: (S, H) or None, of the initial state.
        packing: (cu_seqlens, seq_idx).
    """

    def __init__(self, normalizers: Tensor, m: Tensor | None, packing: tuple, reverse: bool):
        cu_seqlens, seq_idx = packing
        self.dtype = normalizers.dtype
        self.options = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "reverse": reverse, "return_final_state": True}
        self.initial_m = None if m is None else m.detach().to(self.dtype)
        self.m = normalizers[..., 0]
        if seq_idx is not None:
            self.m = self.m.masked_fill((seq_idx < 0)[..., None], -torch.inf)
        before = previous(self.m, self.initial_m, None, *packing, reverse, fill=-torch.inf)
        self.raised = self.m > before
        self.decay = exp_difference(before, self.m)

    def tangent(self, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivatives of o and the final (m, n, w) along tangents of (s, v, m, n, w): a differentiable function."""
        s, v, *state = (None if t is None else t.to(self.dtype) for t in primals)
        st, vt, *statet = (None if t is None else t.to(self.dtype) for t in tangents)
        p = exp_difference(s, self.m)
        pt = p * st
        entering = p, p[..., None] * v, (s - self.m).masked_fill(~self.raised, 0)
        enteringt = pt, pt[..., None] * v + p[..., None] * vt, st.masked_fill(~self.raised, 0)
        initial, initialt = self._initial(state, statet)
        (n, w, _), (last_n, last_w, last_d) = self._scan(entering, initial)
        (nt, wt, _), (last_nt, last_wt, last_dt) = self._scan(enteringt, initialt)

        o = quotient(w, n, self.m)
        ot = quotient(wt - nt[..., None] * o, n, self.m)
        rescale = torch.exp(-last_d)
        last_nt = rescale * (last_nt - last_n * last_dt)
        last_wt = rescale[..., None] * (last_wt - last_w * last_dt[..., None])
        return tuple(t.contiguous() for t in (ot, last_dt, last_nt, last_wt))  # torch wants the strides of o

    def _initial(self, state: list, statet: list) -> tuple[tuple | None, tuple | None]:
        """What enters the first tokens, and its derivative: nothing from an empty state, whatever its n and w."""
        if state[0] is None:
            return None, None
        m, n, w, mt, nt, wt = unless_empty(self.initial_m, *state, *statet)
        d = m - unless_empty(self.initial_m, self.initial_m)[0]
        unit = d.exp()
        initialt = unit * (nt + n * mt), unit[..., None] * (wt + w * mt[..., None]), mt
        return (unit * n, unit[..., None] * w, d), initialt

    def _scan(self, entering: tuple, initial: tuple | None) -> tuple[State, State]:
        """(n, w, d) of every token and of the last state, from what enters at every token and before the first."""
        b, initial = join(*entering), None if initial is None else join(*initial).flatten(1)
        decay = self.decay[..., None].expand_as(b[..., 1:])
        decay = torch.cat([decay, 1 - self.raised.to(self.dtype)[..., None]], dim=-1)
        h, last = linear_scan(decay.flatten(2), b.flatten(2), initial, **self.options)
        return part(h.view_as(b)), part(last.unflatten(1, b.shape[2:]))

    def second_order(self, primals: tuple, tangents: tuple, cotangents: tuple) -> tuple[tuple, tuple]:
        """(what `tangent` returns, the gradients of its product with the cotangents of o and the final state)."""
        given = [i for i, t in enumerate(primals) if t is not None]

        def of_given(*tensors: Tensor):
            full = [None] * len(primals)
            for i, tensor in zip(given, tensors, strict=True):
                full[i] = tensor
            return self.tangent(full, tangents)

        outputs, pull = torch.func.vjp(of_given, *(primals[i] for i in given))
        filled = (
            torch.zeros_like(output) if cotangent is None else cotangent.to(output.dtype)
            for output, cotangent in zip(outputs, cotangents, strict=True)
        )
        return outputs, pull(tuple(filled))


def join(n: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """(..., H, V + 2)."""
    return torch.cat([n[..., None], w, d[..., None]], dim=-1)


def part(joined: Tensor) -> State:
    return joined[..., 0], joined[..., 1:-1], joined[..., -1]


def reference(
    s: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """`softmax_scan` in plain torch, one sequence after another, in the widest dtype of its arguments."""
    B, L, *_ = v.shape
    dtype = torch.float32
    for tensor in (s, v, *(initial_state or ())):
        dtype = torch.promote_types(dtype, tensor.dtype)
    empty = empty_state(v, num_states(v, cu_seqlens), dtype)
    states = empty if initial_state is None else [part.to(dtype) for part in initial_state]
    rows, finals = {}, {}
    for span in spans(B, L, cu_seqlens, seq_idx, reverse):
        tokens = (x[span.rows, span.begin : span.end].to(dtype) for x in (s, v))
        size = span.rows.stop - span.rows.start
        state = (part[span.initial] for part in states) if span.initial else (part[:size] for part in empty)
        o, state = scan(*((x.flip(1) if reverse else x) for x in tokens), *state)
        rows.setdefault(span.rows.start, []).append((span, o.flip(1) if reverse else o))
        if span.final is not None:
            finals[span.final.start] = state
    o = torch.cat([place(pieces, v.to(dtype)) for _, pieces in sorted(rows.items())]) if rows else v.to(dtype)
    if not return_final_state:
        return o.to(v.dtype)
    parts = zip(*(state for _, state in sorted(finals.items())), strict=True) if finals else ([part] for part in empty)
    return o.to(v.dtype), tuple(torch.cat(part).to(accumulator(v.dtype)) for part in parts)


def scan(s: Tensor, v: Tensor, m: Tensor, n: Tensor, w: Tensor) -> tuple[Tensor, State]:
    """Scores (B, L, H) and values (B, L, H, V) of one sequence in the order of time, from a state: (o, the state)."""
    scores = torch.cat([m[:, None], s], dim=1)
    maxima = scores.detach().cummax(dim=1).values  # [max], m_0, m_1, ..
    before, after, last = maxima[:, :-1], maxima[:, 1:], maxima[:, -1]
    decay, p = exp_difference(before, after), exp_difference(s, after)
    unit = exp_difference(m, maxima[:, 0])
    n, w = (unit * t if t.dim() == 2 else unit[..., None] * t for t in unless_empty(m, n, w))
    ns, ws = [], []
    for decay_t, p_t, v_t in zip(*(x.unbind(1) for x in (decay, p, v)), strict=True):  # a slice each is quadratic in L
        n = decay_t * n + p_t  # [sum]
        w = decay_t[..., None] * w + p_t[..., None] * v_t  # [sumv]
        ns.append(n), ws.append(w)
    o = quotient(torch.stack(ws, dim=1), torch.stack(ns, dim=1), after) if ws else v  # [out]

    first = (maxima == last[:, None]).byte().argmax(dim=1, keepdim=True)
    m = torch.where(last.isfinite(), scores.gather(1, first)[:, 0], last)
    rescale = exp_difference(last, m)
    return o, (m, rescale * n, rescale[..., None] * w)


def place(pieces: list[tuple[Span, Tensor]], like: Tensor) -> Tensor:
    """The pieces of some batch rows at their places in time, zeros between them."""
    parts, end = [], 0
    for span, piece in sorted(pieces, key=lambda piece: piece[0].begin):
        parts += [torch.zeros_like(like[span.rows, end : span.begin]), piece]
        end = span.end
    return torch.cat([*parts, torch.zeros_like(like[span.rows, end:])], dim=1)


def reference_step(state: State, s: Tensor, v: Tensor, *, state_indices: Tensor | None = None) -> Tensor:
    """`softmax_scan_step` in plain torch."""
    o = torch.zeros_like(v)
    for b, row in enumerate(range(len(v)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            before = tuple(part[row : row + 1] for part in state)
            o_b, after = reference(s[b : b + 1, None], v[b : b + 1, None], before, return_final_state=True)
            o[b] = o_b[0, 0]
            m, n, w = (value[0] for value in after)
            kept = m.to(state[0].dtype).to(m.dtype)  # n and w belong to the m that is read back
            unit = (m - kept).masked_fill(m == kept, 0).exp()
            for part, value in zip(state, (kept, unit * n, unit[:, None] * w), strict=True):
                part[row] = value
    return o
