"""Attention as a recurrent network: `seqkern.softmax_scan` between projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.softmax_scan import softmax_scan, softmax_scan_step

State = tuple[Tensor, Tensor, Tensor]


class Aaren(nn.Module):
    r"""Softmax attention of a learned query over the tokens so far, with a state of constant size.

    .. math::
        s_t = \frac{(W_q q) \cdot (W_k x_t)}{\sqrt{K}}, \quad
        o_t = \sum_{j \le t} \mathrm{softmax}(s_{\le t})_j W_v x_j, \quad y_t = W_o o_t \qquad \text{for each head}

    Args:
        dim: size of a token, in and out.
        num_heads: dim is a multiple of it, K = dim / num_heads.
        bias: whether the projections have a bias; that of W_k would change nothing and is never there.

    After [2405.13956]: attention whose query q is a parameter of the layer and not a token. Because q does not depend
    on the tokens, keys are not formed: W_q q and W_k make one vector for each head. At first q is standard normal, the
    matrices uniform with the variances of Xavier, as in torch.nn.MultiheadAttention, and the biases zero.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.Aaren(8, num_heads=2)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Aaren: dim must be a multiple of num_heads={num_heads}, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(torch.empty(dim, **factory))
        self.q_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.k_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.v_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.out_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def zero_state(self, batch_size: int) -> State:
        """Nothing has been seen: m (B, H) is -inf, n (B, H) and w (B, H, K) are zero.

        All are float32 (float64 for float64 parameters).
        """
        factory = {"device": self.query.device, "dtype": accumulator(self.query.dtype)}
        heads = (batch_size, self.num_heads)
        w = torch.zeros(*heads, self.dim // self.num_heads, **factory)
        return torch.full(heads, -math.inf, **factory), torch.zeros(heads, **factory), w

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow.

        Tokens where reset (B, L) is True start from nothing, whatever came before, a state included. cu_seqlens and
        seq_idx mark several sequences in a row, as in `seqkern.softmax_scan`; with cu_seqlens a state has a row for
        each of them. reset and cu_seqlens do not go together.
        """
        if reset is not None:
            if cu_seqlens is not None:
                raise ValueError("Aaren: reset and cu_seqlens do not go together; begin a sequence at every reset")
            state, seq_idx = _cut(reset, state, seq_idx)
        options = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "return_final_state": return_state}
        outputs = softmax_scan(*self._inputs(x), state, **options)
        o, state = outputs if return_state else (outputs, None)
        y = self.out_proj(o.flatten(-2))
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); state moves on in place.

        Rows where reset (B,) is True start from nothing. Call under torch.no_grad().
        """
        if reset is not None:
            state[0].masked_fill_(reset[:, None], -math.inf)
        return self.out_proj(softmax_scan_step(state, *self._inputs(x)).flatten(-2))

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (..., H) and values (..., H, K) of tokens x (..., dim)."""
        heads = (self.num_heads, -1)
        query = self.q_proj(self.query).unflatten(0, heads) * (self.dim // self.num_heads) ** -0.5  # (H, K)
        keys = self.k_proj.weight.unflatten(0, heads)  # (H, K, dim)
        return F.linear(x, torch.einsum("hk,hkd->hd", query, keys)), self.v_proj(x).unflatten(-1, heads)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"


def _cut(reset: Tensor, state: State | None, seq_idx: Tensor | None) -> tuple[State | None, Tensor]:
    """The state, and seq_idx, with which a sequence begins at every reset."""
    ids = torch.zeros_like(reset, dtype=torch.int32) if seq_idx is None else seq_idx
    is_token, begins = ids >= 0, reset.clone()
    begins[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    if state is not None:  # it enters a row's first sequence, unless this begins with a reset
        first = is_token & (is_token.cumsum(1) == 1)
        m, n, w = state
        state = m.masked_fill((reset & first).any(1)[:, None], -math.inf), n, w
    return state, torch.where(is_token, begins.cumsum(1), -1).to(torch.int32)
