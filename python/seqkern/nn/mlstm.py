"""The mLSTM block of the xLSTM: `seqkern.causal_conv1d` and `seqkern.mlstm` between projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..ops.mlstm import mlstm, mlstm_step
from ._norm import gated_norm


class MLSTM(nn.Module):
    r"""An LSTM with a matrix for its memory and exponential input gates, between an up- and a down-projection.

    .. math::
        [u, z] = W_{up} x, \quad c = \mathrm{silu}(\mathrm{conv}(u)), \quad
        q, k, v = Q c, K c, V u, \quad i, f = W_{if} [q, k, v] + b_{if}, \quad
        y = W_{down} \big((\mathrm{norm}(\mathrm{mlstm}(q, k, v, i, f)) + s \odot c) \odot \mathrm{silu}(z)\big)

    Args:
        dim: size of a token, in and out.
        num_heads: heads, each with its own memory, gates and norm.
        expand: the block has expand * dim channels inside.
        conv_width: taps of the convolution.
        block_size: Q, K and V are block-diagonal, with blocks of block_size by block_size.
        depth: blocks of the whole model, by which W_down is scaled down at first.
        eps: of the norm, which centres and scales the values of a head.
        conv_bias: whether the convolution has a bias.

    After [2405.04517 sec. 2.3 and 2.4]. Gates begin without a view of the token, forget gates with biases from 3 to 6.
    A state is (last inputs of the convolution, C, n, m), the last three those of `seqkern.mlstm`.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.MLSTM(16, num_heads=2)
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
        expand: float = 2.0,
        conv_width: int = 4,
        block_size: int = 4,
        depth: int = 1,
        eps: float = 1e-5,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        inner = int(expand * dim)
        if inner % num_heads or inner % block_size:
            raise ValueError(
                f"MLSTM: expand * dim = {inner} must be a multiple of num_heads={num_heads} and block_size={block_size}"
            )
        self.dim, self.inner, self.num_heads, self.head_size = dim, inner, num_heads, inner // num_heads
        self.conv_width, self.block_size, self.depth, self.eps = conv_width, block_size, depth, eps
        factory = {"device": device, "dtype": dtype}
        self.proj_up = nn.Linear(dim, 2 * inner, bias=False, **factory)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, bias=conv_bias, **factory)
        blocks = (inner // block_size, block_size, block_size)  # outputs before inputs
        self.q_proj, self.k_proj, self.v_proj = (nn.Parameter(torch.empty(blocks, **factory)) for _ in "qkv")
        self.igate = nn.Linear(3 * inner, num_heads, **factory)
        self.fgate = nn.Linear(3 * inner, num_heads, **factory)
        self.norm = nn.Parameter(torch.empty(inner, **factory))
        self.skip = nn.Parameter(torch.empty(inner, **factory))
        self.proj_down = nn.Linear(inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.conv1d.reset_parameters()
        for weight in (self.proj_up.weight, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.normal_(self.proj_down.weight, std=2 / self.depth / math.sqrt(self.dim))
        for gate in (self.igate, self.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads))
        nn.init.ones_(self.norm)
        nn.init.ones_(self.skip)

    def zero_state(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nothing has been seen: (B, inner, conv_width - 1), C (B, H, D, D), n (B, H, D), m (B, H), which is -inf.

        All are float32 (float64 for float64 parameters).
        """
        weight, head = self.proj_up.weight, (batch_size, self.num_heads)
        shapes = (batch_size, self.inner, self.conv_width - 1), (*head, self.head_size, self.head_size)
        dtype = accumulator(weight.dtype)
        conv_state, C = (weight.new_zeros(shape, dtype=dtype) for shape in shapes)
        n = weight.new_zeros(*head, self.head_size, dtype=dtype)
        return conv_state, C, n, weight.new_full(head, -math.inf, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow.

        cu_seqlens marks several sequences in a row, as in `seqkern.mlstm`; a state then has a row for each of them.
        """
        conv_state, *memory = state or (None,)
        options = {"cu_seqlens": cu_seqlens, "return_final_state": return_state}
        u, z = self.proj_up(x).chunk(2, dim=-1)
        outputs = causal_conv1d(u.mT, *self._conv_parameters(), "silu", initial_state=conv_state, **options)
        c, conv_state = outputs if return_state else (outputs, None)
        c = c.mT
        outputs = mlstm(*self._inputs(c, u), initial_state=tuple(memory) or None, **options)
        h, memory = outputs if return_state else (outputs, None)
        y = self._output(h, c, z)
        return (y, (conv_state, *memory)) if return_state else y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); state moves on in place. Call under torch.no_grad()."""
        conv_state, *memory = state
        u, z = self.proj_up(x).chunk(2, dim=-1)
        c = causal_conv1d_step(u, conv_state, *self._conv_parameters(), "silu")
        return self._output(mlstm_step(tuple(memory), *self._inputs(c, u)), c, z)

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias  # (inner, conv_width), (inner,)

    def _inputs(self, c: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (..., H, D) and i, f (..., H) from c, u (..., inner)."""

        def projected(t, blocks):
            t = t.unflatten(-1, (-1, self.block_size))
            return torch.einsum("...ni,noi->...no", t, blocks.to(t.dtype)).flatten(-2)

        q, k, v = projected(c, self.q_proj), projected(c, self.k_proj), projected(u, self.v_proj)
        qkv = torch.cat([q, k, v], dim=-1)
        heads = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return *heads, self.igate(qkv), self.fgate(qkv)

    def _output(self, h: Tensor, c: Tensor, z: Tensor) -> Tensor:
        h = gated_norm(h.flatten(-2), self.norm, eps=self.eps, group_size=self.head_size, centred=True)
        return self.proj_down((h + self.skip.to(c.dtype) * c) * F.silu(z))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, expand={self.inner / self.dim:g}"
