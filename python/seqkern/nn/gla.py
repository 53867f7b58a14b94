"""The gated linear attention layer: `seqkern.gla` between projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.linear_attention import gla, linear_attention_step
from ._norm import RMSNormGated
from ._scan import wide


class GLA(nn.Module):
    r"""Linear attention whose every key channel forgets at a rate of its own that depends on the token.

    .. math::
        q, k, v = W_q x, W_k x, W_v x, \quad g = \log \sigma(W_2 W_1 x + b) / \tau, \quad
        y = W_o \big(\mathrm{norm}(\mathrm{gla}(q, k, v, g)) \odot \mathrm{silu}(W_r x)\big)

    Args:
        dim: size of a token, in and out.
        num_heads: heads, each with its own state and norm.
        expand_k, expand_v: all heads together have expand_k * dim key channels and expand_v * dim value channels.
        gate_rank: rows of W_1.
        gate_normalizer: tau. The larger, the longer is the memory at first.
        eps: of the RMS norm.

    After [2312.06635 sec. 4.4]. Names and shapes of the parameters are those of fla's GatedLinearAttention: q_proj,
    k_proj, v_proj, g_proj (W_r), gk_proj.0 and .1 (W_1, W_2), g_norm_swish_gate, one weight for all heads, and o_proj.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.GLA(16, num_heads=2)
        >>> x = torch.randn(2, 5, 16)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        keys, values = int(expand_k * dim), int(expand_v * dim)
        if keys % num_heads or values % num_heads:
            raise ValueError(
                f"GLA: expand_k * dim = {keys} and expand_v * dim = {values} must be multiples of num_heads={num_heads}"
            )
        self.dim, self.num_heads, self.gate_normalizer = dim, num_heads, gate_normalizer
        self.key_size, self.value_size = keys // num_heads, values // num_heads
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.k_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.v_proj = nn.Linear(dim, values, bias=False, **factory)
        self.g_proj = nn.Linear(dim, values, bias=False, **factory)
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False, **factory), nn.Linear(gate_rank, keys, **factory)
        )
        self.g_norm_swish_gate = RMSNormGated(self.value_size, eps, **factory)
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.v_proj, self.g_proj, self.gk_proj[1], self.g_norm_swish_gate, self.o_proj):
            module.reset_parameters()
        for module in (self.q_proj, self.k_proj, *self.gk_proj):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)

    def zero_state(self, batch_size: int) -> Tensor:
        """(B, H, key_size, value_size) float32 (float64 for float64 parameters): nothing has been seen."""
        weight = self.o_proj.weight
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        return weight.new_zeros(shape, dtype=accumulator(weight.dtype))

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow.

        cu_seqlens marks several sequences in a row, as in `seqkern.gla`; a state then has a row for each of them.
        """
        options = {"initial_state": state, "cu_seqlens": cu_seqlens, "return_final_state": return_state}
        outputs = gla(*self._inputs(x), **options)
        o, state = outputs if return_state else (outputs, None)
        y = self._output(o, x)
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); state moves on in place. Call under torch.no_grad()."""
        return self._output(linear_attention_step(state, *self._inputs(x)), x)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (..., H, K), v (..., H, V), log decay (..., H, K) for tokens x (..., dim)."""
        log_decay = F.logsigmoid(wide(self.gk_proj(x))) / self.gate_normalizer
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v, log_decay = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v, log_decay))
        return q, k, v, log_decay

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, -1))
        return self.o_proj(self.g_norm_swish_gate(o, gate).flatten(-2))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"
