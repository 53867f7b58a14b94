"""How the tokens of a batch form sequences, in plain Python: what the reference implementations iterate over."""

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
            spans = list(_spans(ids)) or [(0, 0)]
            first, last = (spans[-1], spans[0]) if reverse else (spans[0], spans[-1])
            for span in spans:
                yield Run(b, *span, b if span == first else None, b if span == last else None)
    else:
        for b in range(B):
            yield Run(b, 0, L, b, b)


def _spans(ids: list[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of every run of one id that is not padding."""
    begin = 0
    for id, run in groupby(ids):
        end = begin + len(list(run))
        if id >= 0:
            yield begin, end
        begin = end
