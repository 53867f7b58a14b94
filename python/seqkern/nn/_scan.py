"""What the layers around `seqkern.linear_scan` share."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.linear_scan import linear_scan, linear_scan_step


class LinearScanLayer(nn.Module):
    """A layer whose state follows `h_t = a_t h_{t-1} + b_t`. What a and b are, and what is read, says the subclass."""

    log_space: ClassVar[bool] = False  # whether `_inputs` returns log(a)
    state_size: int
    has_complex_state: bool = False

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """a, and b (..., state_size), for tokens x (..., dim); a may lack leading dimensions."""
        raise NotImplementedError

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        """y from the states h (..., state_size) and the tokens x (..., dim)."""
        return h

    def zero_state(self, batch_size: int) -> Tensor:
        """Nothing has been seen: (B, state_size), float32 (float64 for float64 parameters), or complex."""
        parameter = next(self.parameters())
        dtype = accumulator(parameter.dtype)
        dtype = dtype.to_complex() if self.has_complex_state else dtype
        return torch.zeros(batch_size, self.state_size, dtype=dtype, device=parameter.device)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, L, dim) -> y: (B, L, size of the output), or (y, state) for the tokens that follow.

        Tokens where reset (B, L) is True start from nothing, whatever came before, a state included. cu_seqlens and
        seq_idx mark several sequences in a row, as in `seqkern.linear_scan`; with cu_seqlens a state has a row for each
        of them.
        """
        a, b = self._inputs(x, reset)
        packing = {"reset": reset, "cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        outputs = linear_scan(a, b, state, **packing, log_space=self.log_space, return_final_state=return_state)
        h, state = outputs if return_state else (outputs, None)
        y = self._output(h, x)
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """x: (B, dim), the next token -> y: (B, size of the output); state moves on in place.

        Rows where reset (B,) is True start from nothing. Call under torch.no_grad().
        """
        if reset is not None:
            state.masked_fill_(reset[:, None], 0)
        a, b = self._inputs(x, reset)
        return self._output(linear_scan_step(state, a, b, log_space=self.log_space), x)


def wide(t: Tensor) -> Tensor:
    """In the dtype of states: 16 bits are too few for decays near one."""
    return t.to(accumulator(t.dtype))


def complex_from(x: Tensor, B: Tensor) -> Tensor:
    """B x: real x (..., dim) and complex B (N, dim) -> (..., N), as one real product."""
    pairs = torch.view_as_real(B).transpose(1, 2).flatten(0, 1)  # (2N, dim), real and imaginary rows in turn
    return torch.view_as_complex(wide(F.linear(x, pairs.to(x.dtype))).unflatten(-1, (-1, 2)))


def real_from(h: Tensor, C: Tensor, dtype: torch.dtype) -> Tensor:
    """Re(C h): complex h (..., N) and C (dim, N) -> (..., dim) in dtype, as one real product."""
    pairs = torch.view_as_real(C.conj().resolve_conj()).flatten(-2)  # (dim, 2N)
    return F.linear(torch.view_as_real(h).flatten(-2).to(dtype), pairs.to(dtype))
