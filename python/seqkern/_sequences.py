"""How the tokens of a batch form sequences: in plain Python, as references iterate over them, and as masks in torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch


class Run(NamedTuple):
    """Tokens [begin, end) of batch row b; `initial` and `final` are rows of the states, None where there is none."""

    b: int
    begin: int
    end: int
    initial: int | None
    final: int | None


def runs(B: int, L: int, cu_seqlens: torch.Tensor | None, seq_idx: torch.Tensor | None, reverse: bool) -> Iterator[Run]:
    """The sequences of a batch without padding; every state row is the `final` of exactly one of them."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        for n, (begin, end) in enumerate(pairwise(bounds)):
            yield Run(0, begin, end, n, n)
    elif seq_idx is not None:
        for b, ids in enumerate(seq_idx.tolist()):
            spans = list(_stretches(ids)) or [(0, 0)]
            first, last = (spans[-1], spans[0]) if reverse else (spans[0], spans[-1])
            for span in spans:
                yield Run(b, *span, b if span == first else None, b if span == last else None)
    else:
        for b in range(B):
            yield Run(b, 0, L, b, b)


class Span(NamedTuple):
    """Tokens [begin, end) of the batch rows `rows`; `initial` and `final` are rows of the states, None where there is
    none."""

    rows: slice
    begin: int
    end: int
    initial: slice | None
    final: slice | None


def spans(
    B: int, L: int, cu_seqlens: torch.Tensor | None, seq_idx: torch.Tensor | None, reverse: bool
) -> Iterator[Span]:
    """The same, with the rows of a batch that is not packed in one."""
    if cu_seqlens is None and seq_idx is None:
        rows = slice(0, B)
        yield Span(rows, 0, L, rows, rows)
        return
    for b, begin, end, *states in runs(B, L, cu_seqlens, seq_idx, reverse):
        yield Span(slice(b, b + 1), begin, end, *(None if n is None else slice(n, n + 1) for n in states))


def _stretches(ids: list[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of every run of one id that is not padding."""
    begin = 0
    for id, run in groupby(ids):
        end = begin + len(list(run))
        if id >= 0:
            yield begin, end
        begin = end


def previous(
    h: torch.Tensor,
    initial_state: torch.Tensor | None,
    reset: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    reverse: bool,
    fill: float = 0,
) -> torch.Tensor:
    """The state that enters each token (B, L, ...): that of the token before it in its sequence, at the first one the
    initial state, and zero (`fill`) after a reset, in padding and where there is no initial state. No host
    synchronisation."""
    B, L, *rest = h.shape
    gap = h.new_zeros(B, min(L, 1), *rest)
    shifted = torch.cat([h[:, 1:], gap] if reverse else [gap, h[:, :-1]], dim=1)

    if cu_seqlens is not None:
        ends = cu_seqlens[1:].contiguous()
        ids = torch.bucketize(torch.arange(L, dtype=ends.dtype, device=h.device), ends, right=True)[None]
    else:
        ids = h.new_zeros(1, L, dtype=torch.int32) if seq_idx is None else seq_idx
    changes, edge = ids[:, 1:] != ids[:, :-1], ids.new_ones(len(ids), min(L, 1), dtype=torch.bool)
    fresh = starts = torch.cat([changes, edge] if reverse else [edge, changes], dim=1)
    if seq_idx is not None:
        counted = (ids >= 0).cumsum(1)  # the state enters the first token of a row that is not padding
        starts = (ids >= 0) & (counted == (counted[:, -1:] if reverse else 1))
        fresh = fresh | (ids < 0)

    def spread(mask: torch.Tensor) -> torch.Tensor:
        return mask.reshape(*mask.shape, *[1] * len(rest))

    entering = shifted.masked_fill(spread(fresh), fill)
    if initial_state is not None:
        rows = initial_state[:, None]
        if cu_seqlens is not None:
            rows = initial_state[None, ids[0].clamp(max=len(initial_state) - 1)]
        entering = torch.where(spread(starts), rows, entering)
    return entering if reset is None else entering.masked_fill(spread(reset), fill)
