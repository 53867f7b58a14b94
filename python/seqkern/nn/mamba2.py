"""The Mamba-2 layer: `seqkern.causal_conv1d` and `seqkern.ssd` between projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..ops.ssd import ssd, ssd_step
from ._norm import RMSNormGated


class Mamba2(nn.Module):
    r"""The Mamba-2 block: heads of linear attention whose decay and step size depend on the token.

    .. math::
        [z, v, \delta] = W_{in} x, \quad [u, B, C] = \mathrm{silu}(\mathrm{conv}(v)), \quad
        h = \mathrm{ssd}(u, \delta, -e^{A_{log}}, B, C, D, b_{dt}), \quad
        y = W_{out} \; \mathrm{norm}(h \odot \mathrm{silu}(z))

    Args:
        d_model: size of a token, in and out.
        d_state: states of each channel.
        d_conv: taps of the convolution.
        conv_init: its weights are at first uniform between plus and minus that; None leaves torch.nn's beginning.
        expand: the layer has d_inner = expand * d_model channels.
        headdim: channels of a head.
        d_ssm: channels that have heads; the others are a gated unit without memory. Default d_inner.
        ngroups: groups of heads that share B and C, and of channels that are normed together.
        A_init_range: the decay rates of the heads are at first uniform in this range.
        D_has_hdim: D has a number for each channel instead of each head.
        rmsnorm: a norm stands before the projection out; else z gates what the scan returns.
        norm_before_gate: the norm comes before the gate.
        dt_min, dt_max, dt_init_floor: at first the step sizes of the heads lie between dt_min and dt_max, uniform in
            their logarithm, and are at least dt_init_floor.
        dt_limit: step sizes are clamped to this range.
        bias, conv_bias: whether the projections in and out, and the convolution, have a bias.

    Names and shapes of the parameters are those of mamba_ssm's Mamba2: a state_dict serves both. Activations stay
    (B, L, channels) in memory. Under autocast the parameters of the scan keep their dtype. See [2405.21060 sec. 7].

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.Mamba2(8, d_state=16, headdim=4)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.d_ssm, self.headdim, self.ngroups = d_ssm or self.d_inner, headdim, ngroups
        self.nheads = self.d_ssm // headdim
        if self.d_ssm % headdim or self.nheads % ngroups or self.d_ssm > self.d_inner:
            raise ValueError(
                f"Mamba2: d_ssm must be a multiple of headdim * ngroups = {headdim * ngroups} and at most expand * "
                f"d_model = {self.d_inner}, got {self.d_ssm}"
            )
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"Mamba2: A_init_range must rise and be positive, got {A_init_range}")
        self.conv_init, self.A_init_range, self.D_has_hdim = conv_init, A_init_range, D_has_hdim
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self._scan_has_gate = not (rmsnorm and norm_before_gate)
        self.dt_min, self.dt_max, self.dt_init_floor, self.dt_limit = dt_min, dt_max, dt_init_floor, dt_limit

        factory = {"device": device, "dtype": dtype}
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        # What leaves in_proj, in this order: the gated unit's gate and value, z, what the convolution sees, dt.
        d_mlp = self.d_inner - self.d_ssm
        self._sizes = [d_mlp, d_mlp, self.d_ssm, conv_dim, self.nheads]
        self.in_proj = nn.Linear(d_model, sum(self._sizes), bias=bias, **factory)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, bias=conv_bias, **factory)
        # A rounded to 16 bits would change long memories.
        wide = {"device": device, "dtype": accumulator(self.in_proj.weight.dtype)}
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **wide))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **wide))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **wide))
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **factory
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        # What training scripts for such models look for when they choose what to decay.
        self.dt_bias._no_weight_decay = self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in (self.in_proj, self.conv1d, self.out_proj):
            module.reset_parameters()
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        if self.rmsnorm:
            self.norm.reset_parameters()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        dt.clamp_(min=self.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus turns it into dt again
        nn.init.uniform_(self.A_log, *self.A_init_range).log_()
        nn.init.ones_(self.D)

    def zero_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Nothing has been seen: of the convolution (B, channels, d_conv - 1), of the scan (B, H, headdim, d_state).

        Both are float32 (float64 for float64 parameters).
        """
        weight = self.in_proj.weight
        shapes = (self.conv1d.in_channels, self.d_conv - 1), (self.nheads, self.headdim, self.d_state)
        conv_state, scan_state = (
            weight.new_zeros(batch_size, *shape, dtype=accumulator(weight.dtype)) for shape in shapes
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

        cu_seqlens and seq_idx mark several sequences in a row, as in `seqkern.ssd`; with cu_seqlens a state has a row
        for each of them.
        """
        packing = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
        conv_state, scan_state = state or (None, None)
        *mlp, z, value, dt = self.in_proj(x).split(self._sizes, dim=-1)

        options = {"initial_state": conv_state, "return_final_state": return_state, **packing}
        outputs = causal_conv1d(value.mT, *self._conv_parameters(), "silu", **options)
        mixed, conv_state = outputs if return_state else (outputs, None)

        options = {"initial_state": scan_state, "return_final_state": return_state, **packing}
        outputs = ssd(*self._scan_arguments(mixed.mT, dt, z), **self._scan_options(), **options)
        y, scan_state = outputs if return_state else (outputs, None)

        y = self._output(y, z, mlp)
        return (y, (conv_state, scan_state)) if return_state else y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, d_model), the next token -> y: (B, d_model); state moves on in place. Call under torch.no_grad()."""
        conv_state, scan_state = state
        *mlp, z, value, dt = self.in_proj(x).split(self._sizes, dim=-1)
        mixed = causal_conv1d_step(value, conv_state, *self._conv_parameters(), "silu")
        y = ssd_step(scan_state, *self._scan_arguments(mixed, dt, z), **self._scan_options())
        return self._output(y, z, mlp)

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias  # (channels, d_conv), (channels,)

    def _scan_arguments(self, mixed: Tensor, dt: Tensor, z: Tensor) -> tuple[Tensor | None, ...]:
        """mixed (..., channels of the convolution), dt (..., H), z (..., d_ssm): what ssd takes by position."""
        states = self.ngroups * self.d_state
        u, B, C = mixed.split([self.d_ssm, states, states], dim=-1)
        u, z = (t.unflatten(-1, (self.nheads, self.headdim)) for t in (u, z))
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        A = -torch.exp(self.A_log.to(accumulator(self.A_log.dtype)))
        D = self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D
        return u, dt, A, B, C, D, z if self._scan_has_gate else None

    def _scan_options(self) -> dict:
        return {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}

    def _output(self, y: Tensor, z: Tensor, mlp: list[Tensor]) -> Tensor:
        """y (..., H, headdim) -> (..., d_model)."""
        y = y.flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, None if self._scan_has_gate else z)
        if self.d_ssm < self.d_inner:
            gate, value = mlp
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, headdim={self.headdim}, ngroups={self.ngroups}"
