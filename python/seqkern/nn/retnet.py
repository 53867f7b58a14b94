"""The multi-scale retention layer: `seqkern.linear_attention` with constant decays between projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.linear_attention import linear_attention, linear_attention_step
from ._norm import gated_norm


class RetNet(nn.Module):
    r"""Linear attention whose heads forget at fixed rates, with rotated queries and keys.

    .. math::
        q_n = e^{i n \theta} W_q x_n, \quad k_n = e^{i n \theta} W_k x_n, \quad v_n = W_v x_n, \quad
        y = W_{out} \big(\mathrm{norm}(\mathrm{retention}(q, k, v)) \odot \mathrm{silu}(W_g x)\big)

    Args:
        dim: size of a token, in and out.
        num_heads: heads, each with its own state and norm. Head h forgets by 1 - 2^(-5-h).
        expand_v: all heads together have expand_v * dim value channels; they have dim key channels.
        base: the angles theta fall from 1 to 1 / base over the pairs of channels 2 j and 2 j + 1 of a head.
        eps: of the norm, which centres and scales the values of a head.

    After [2307.08621 sec. 2.2]. Names and shapes of the parameters are those of torchscale's MultiScaleRetention:
    q_proj, k_proj, v_proj, g_proj, out_proj. A state is (S, position): the number of tokens before the next one goes
    with it.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.RetNet(16, num_heads=2)
        >>> x = torch.randn(2, 5, 16)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-4)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        expand_v: float = 2.0,
        base: float = 10000.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        values = int(expand_v * dim)
        if dim % (2 * num_heads) or values % num_heads:
            raise ValueError(
                f"RetNet: dim={dim} must be a multiple of 2 num_heads = {2 * num_heads}, and expand_v * dim = {values} "
                f"of num_heads"
            )
        self.dim, self.num_heads, self.base, self.eps = dim, num_heads, base, eps
        self.key_size, self.value_size = dim // num_heads, values // num_heads
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.k_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.v_proj = nn.Linear(dim, values, bias=False, **factory)
        self.g_proj = nn.Linear(dim, values, bias=False, **factory)
        self.out_proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def zero_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Nothing has been seen: S (B, H, key_size, value_size), position (B,) int64.

        S is float32 (float64 for float64 parameters).
        """
        weight = self.out_proj.weight
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        S = weight.new_zeros(shape, dtype=accumulator(weight.dtype))
        return S, torch.zeros(batch_size, dtype=torch.int64, device=weight.device)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow.

        cu_seqlens marks several sequences in a row, as in `seqkern.linear_attention`; a state then has a row for each.
        """
        S, before = state or (None, None)
        positions, after = self._positions(x, before, cu_seqlens)
        options = {"initial_state": S, "cu_seqlens": cu_seqlens, "return_final_state": return_state}
        outputs = linear_attention(*self._inputs(x, positions), **options)
        o, S = outputs if return_state else (outputs, None)
        y = self._output(o, x)
        return (y, (S, after)) if return_state else y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); state moves on in place. Call under torch.no_grad()."""
        S, position = state
        o = linear_attention_step(S, *self._inputs(x, position))
        position += 1
        return self._output(o, x)

    def _positions(self, x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each token in its sequence, (B or 1, L), and of the token after each sequence."""
        B, L, _ = x.shape
        token = torch.arange(L, device=x.device)
        if cu_seqlens is None:
            return (token[None], token.new_full((B,), L)) if before is None else (before[:, None] + token, before + L)
        begins, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        before = torch.zeros_like(lengths, dtype=torch.int64) if before is None else before
        owner = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return ((before - begins)[owner] + token)[None], before + lengths

    def _inputs(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (..., H, K), v (..., H, V), log decay (H,) for tokens x (..., dim) at positions (...)."""
        q, k, v = (module(x).unflatten(-1, (self.num_heads, -1)) for module in (self.q_proj, self.k_proj, self.v_proj))
        fall = torch.linspace(0, 1, self.key_size // 2, dtype=torch.float64, device=x.device)
        angles = positions[..., None, None] * self.base**-fall  # (..., 1, K / 2); float64: positions may be large
        cos, sin = (t.to(accumulator(q.dtype)) for t in (angles.cos(), angles.sin()))

        def rotated(t):
            re, im = t[..., 0::2], t[..., 1::2]
            return torch.stack([re * cos - im * sin, re * sin + im * cos], dim=-1).flatten(-2).to(t.dtype)

        head = torch.arange(self.num_heads, dtype=torch.float64, device=x.device)
        log_decay = torch.log1p(-(2 ** (-5 - head))).to(accumulator(v.dtype))
        return rotated(q), rotated(k), v, log_decay

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        y = gated_norm(o.flatten(-2), None, gate=self.g_proj(x), eps=self.eps, group_size=self.value_size, centred=True)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"
