"""The Mamba layer: `seqkern.causal_conv1d` and `seqkern.selective_scan` between projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..ops.selective_scan import selective_scan, selective_scan_step


class Mamba(nn.Module):
    r"""The Mamba block: a state space model whose step size, input and output maps depend on the token.

    .. math::
        [v, z] = W_{in} x, \quad u = \mathrm{silu}(\mathrm{conv}(v)), \quad [\delta, B, C] = W_x u, \quad
        y = W_{out} \; \mathrm{selective\_scan}(u, W_{dt} \delta, -e^{A_{log}}, B, C, D, z, b_{dt})

    Args:
        d_model: size of a token, in and out.
        d_state: states of each channel.
        d_conv: taps of the convolution.
        expand: the scan has d_inner = expand * d_model channels.
        dt_rank: size of the step size before its projection to the channels; "auto" is d_model / 16, rounded up.
        dt_min, dt_max, dt_init_floor: at first the step sizes of the channels lie between dt_min and dt_max, uniform in
            their logarithm, and are at least dt_init_floor.
        dt_init, dt_scale: the weights of the step size's projection are at first all dt_rank**-0.5 * dt_scale
            ("constant"), or uniform between plus and minus that ("random").
        conv_bias, bias: whether the convolution, and the projections in and out, have a bias.
        transition: "exp", or "two_exp_minus_one" for decays between -1 and 1, with which a state can count modulo two
            and follow other regular languages [2411.12537].

    Names and shapes of the parameters are those of mamba_ssm's Mamba: a state_dict serves both. Activations stay (B, L,
    channels) in memory, and both operators take them as transposed views, without a copy. Under autocast the parameters
    of the scan keep their dtype. See [2312.00752 sec. 3.4].

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.Mamba(8)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-6)
        True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transition: str = "exp",
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init must be "random" or "constant", got {dt_init!r}')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.transition = transition

        factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        # A rounded to 16 bits would change long memories.
        wide = {"device": device, "dtype": accumulator(self.in_proj.weight.dtype)}
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **wide))
        self.D = nn.Parameter(torch.empty(self.d_inner, **wide))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        # What training scripts for such models look for when they choose what to decay.
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        size = self.dt_rank**-0.5 * self.dt_scale
        nn.init.uniform_(self.dt_proj.weight, -size if self.dt_init == "random" else size, size)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty_like(self.dt_proj.bias, dtype=self.D.dtype).uniform_(low, high).exp()
        dt.clamp_(min=self.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus turns it into dt again
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def zero_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Nothing has been seen: for the convolution (B, d_inner, d_conv - 1), for the scan (B, d_inner, d_state).

        Both are float32 (float64 for float64 parameters).
        """
        weight = self.in_proj.weight
        sizes = (self.d_conv - 1, self.d_state)
        conv_state, scan_state = (
            weight.new_zeros(batch_size, self.d_inner, size, dtype=accumulator(weight.dtype)) for size in sizes
        )
        return conv_state, scan_state

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (B, L, d_model) -> y: (B, L, d_model), or (y, state) for the tokens that follow.

        cu_seqlens and seq_idx mark several sequences in a row, as in `seqkern.selective_scan`; with cu_seqlens a state
        has a row for each of them.
        """
        packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        conv_state, scan_state = state or (None, None)
        value, z = self.in_proj(x).chunk(2, dim=-1)

        options = {"initial_state": conv_state, "return_final_state": return_state, **packing}
        outputs = causal_conv1d(value.mT, *self._conv_parameters(), "silu", **options)
        u, conv_state = outputs if return_state else (outputs, None)

        delta, B, C = self._select(u.mT)
        args = (u, delta.mT, self._A(), B.mT, C.mT, self.D, z.mT, self.dt_proj.bias, True, return_state)
        outputs = selective_scan(*args, initial_state=scan_state, transition=self.transition, **packing)
        y, scan_state = outputs if return_state else (outputs, None)

        y = self.out_proj(y.mT)
        return (y, (conv_state, scan_state)) if return_state else y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, d_model), the next token -> y: (B, d_model); state moves on in place. Call under torch.no_grad()."""
        conv_state, scan_state = state
        value, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d_step(value, conv_state, *self._conv_parameters(), "silu")
        delta, B, C = self._select(u)
        args = (u, delta, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(selective_scan_step(scan_state, *args, transition=self.transition))

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias  # (d_inner, d_conv), (d_inner,)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the token: (..., d_inner) -> delta (..., d_inner), before its bias; B, C (..., d_state)."""
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(delta, self.dt_proj.weight), B, C

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.to(accumulator(self.A_log.dtype)))  # (d_inner, d_state)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, transition={self.transition!r}"
