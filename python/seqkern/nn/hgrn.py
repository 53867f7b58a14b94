"""The token mixer of the hierarchically gated recurrent network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ._scan import LinearScanLayer, wide


class HGRNLowerBounds(nn.Module):
    r"""Lower bounds of the forget gates of all layers of a model: zero for the first, rising with depth, learned.

    .. math:: P = \mathrm{softmax}(\Gamma) \text{ over the layers}, \quad \gamma_k = P_1 + \dots + P_k - P_1

    Args:
        num_layers, dim: of the model.

    :math:`\Gamma` is at first one everywhere: the bounds rise evenly.

    Example:
        >>> import seqkern.nn
        >>> bounds = seqkern.nn.HGRNLowerBounds(num_layers=4, dim=8)
        >>> layers = [seqkern.nn.HGRN(8, lower_bound=bounds, layer=k) for k in range(4)]
        >>> bounds()[:, 0].tolist()
        [0.0, 0.25, 0.5, 0.75]
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(num_layers, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def forward(self) -> Tensor:  # (num_layers, dim)
        shares = torch.softmax(wide(self.gamma), dim=0)
        return shares.cumsum(dim=0) - shares[0]


class HGRN(LinearScanLayer):
    r"""A recurrence whose complex forget gate depends on the token in size and turns by a learned angle.

    .. math::
        \lambda_t = \gamma + (1 - \gamma) \, \sigma(W_\lambda x_t), \quad c_t = \mathrm{silu}(W_c x_t) \in \mathbb{C}^d,
        \quad h_t = \lambda_t e^{i \theta} h_{t-1} + (1 - \lambda_t) c_t, \quad
        y_t = W_o \big(\mathrm{norm}([\mathrm{Re}\, h_t, \mathrm{Im}\, h_t]) \odot \mathrm{silu}(W_g x_t)\big)

    Args:
        dim: size of a token, in and out, and of the state.
        lower_bound: gamma: a number, or the `HGRNLowerBounds` that the layers of a model share.
        layer: which of these bounds is that of this layer, counted from 0.
        complex: False leaves out the angle: states are real, and norm and W_g have dim channels instead of 2 dim.
        bias: whether the projections have a bias.

    After [2311.04823 sec. 3]. Names and shapes of the parameters are those of hgru's Hgru1d and HgruRealV6: input_proj
    with real and imaginary rows in turn, lambda_proj, gate, norm (a LayerNorm), out_proj, and theta (1, 1, dim), at
    first 10000^(-2 k / dim) for channel k, in float32 in a layer of 16 bits. The others begin as torch.nn has them.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.HGRN(8, lower_bound=0.5)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        lower_bound: float | HGRNLowerBounds = 0.0,
        layer: int = 0,
        complex: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(lower_bound, nn.Module) and not 0 <= lower_bound < 1:
            raise ValueError(f"HGRN: lower_bound must be at least 0 and below 1, got {lower_bound}")
        self.state_size, self.has_complex_state = dim, complex
        self.lower_bound, self.layer = lower_bound, layer
        parts = 2 if complex else 1
        factory = {"device": device, "dtype": dtype}
        self.input_proj = nn.Linear(dim, parts * dim, bias=bias, **factory)
        self.lambda_proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.gate = nn.Linear(dim, parts * dim, bias=bias, **factory)
        self.norm = nn.LayerNorm(parts * dim, **factory)
        self.out_proj = nn.Linear(parts * dim, dim, bias=bias, **factory)
        if complex:
            wide_dtype = accumulator(self.gate.weight.dtype)
            self.theta = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=wide_dtype))
            self.theta._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in (self.input_proj, self.lambda_proj, self.gate, self.norm, self.out_proj):
            module.reset_parameters()
        if self.has_complex_state:
            channel = torch.arange(self.state_size, dtype=torch.float64)
            self.theta.copy_(10000 ** (-2 * channel / self.state_size))

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        shared = isinstance(self.lower_bound, nn.Module)
        bound = self.lower_bound()[self.layer] if shared else self.lower_bound
        enter = (1 - bound) * torch.sigmoid(-wide(self.lambda_proj(x)))  # 1 - lambda, without a difference
        c = self.input_proj(x)
        if not self.has_complex_state:
            return 1 - enter, (enter * F.silu(wide(c))).to(c.dtype)
        theta = wide(self.theta).flatten()
        turn = torch.stack([theta.cos(), theta.sin()], dim=-1)  # (dim, 2)
        a, b = (1 - enter)[..., None] * turn, enter[..., None] * F.silu(wide(c)).unflatten(-1, (-1, 2))
        return torch.view_as_complex(a), torch.view_as_complex(b)

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        gate = F.silu(self.gate(x))
        h = torch.cat([h.real, h.imag], dim=-1) if self.has_complex_state else h
        return self.out_proj(self.norm(h.to(gate.dtype)) * gate)

    def extra_repr(self) -> str:
        return f"{self.state_size}, complex={self.has_complex_state}"
