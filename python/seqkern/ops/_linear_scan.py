"""linear_scan in plain torch: the reference."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._sequences import spans
from .._torch import accumulator


def reference(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    log_space: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_scan` in plain torch, token by token, in the widest dtype of its arguments."""
    tensors = [t for t in (a, b, initial_state) if t is not None]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    data_dtype = b.dtype.to_complex() if dtype.is_complex else b.dtype
    state_dtype = accumulator(data_dtype)
    B, L, D = b.shape
    a, b = a.to(dtype), b.to(dtype)
    a = (a.exp() if log_space else a).expand(B, L, D)  # [decay]

    blocks, states = {}, []
    for span in spans(B, L, cu_seqlens, seq_idx, reverse):
        h = b.new_zeros(span.rows.stop - span.rows.start, D)
        if span.initial is not None and initial_state is not None:
            h = initial_state[span.initial].to(dtype)
        tokens = range(span.begin, span.end), *(x[span.rows, span.begin : span.end].unbind(1) for x in (a, b))
        hs, tokens = [h], list(zip(*tokens, strict=True))
        for t, a_t, b_t in reversed(tokens) if reverse else tokens:
            entering = hs[-1] if reset is None else hs[-1].masked_fill(reset[span.rows, t, None], 0)
            hs.append(a_t * entering + b_t)  # [state]
        if span.final is not None:
            states.append(hs[-1])
        joined = torch.stack([h, *(reversed(hs[1:]) if reverse else hs[1:])], dim=1)[:, 1:]
        block = torch.nn.functional.pad(joined, (0, 0, span.begin, L - span.end))
        blocks[span.rows.start] = blocks[span.rows.start] + block if span.rows.start in blocks else block
    h = torch.cat(list(blocks.values())) if blocks else torch.zeros_like(b)
    h = h.to(data_dtype)
    if not return_final_state:
        return h
    return h, (torch.cat(states) if states else b.new_zeros(0, D)).to(state_dtype)


def reference_step(
    state: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    log_space: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`linear_scan_step` in plain torch."""
    a, dtype = a.expand(b.shape), b.dtype.to_complex() if state.is_complex() else b.dtype
    h = torch.zeros_like(b, dtype=dtype)
    for i, row in enumerate(range(len(b)) if state_indices is None else state_indices.tolist()):
        if row >= 0:
            tokens = (t[i, None, None] for t in (a, b))
            result = reference(*tokens, state[row, None], log_space=log_space, return_final_state=True)
            h[i], state[row] = (t.flatten() for t in result)
    return h
