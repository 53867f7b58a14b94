"""The linear recurrent unit: a complex diagonal recurrence that does not depend on the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._torch import accumulator
from ._scan import LinearScanLayer, complex_from, real_from, wide


class LRU(LinearScanLayer):
    r"""The linear recurrent unit.

    .. math::
        \lambda = \exp(-e^{\nu_{log}} + i e^{\theta_{log}}), \quad
        h_t = \lambda h_{t-1} + e^{\gamma_{log}} \odot (B x_t), \quad y_t = \mathrm{Re}(C h_t) + D x_t

    Args:
        dim: size of a token, in and out.
        d_state: complex states.
        r_min, r_max: at first the eigenvalues lie on the ring between these radii, uniform in area.
        max_phase: and have phases between 0 and this.

    Initial values are those of [2303.06349 sec. 3.2 to 3.4]: gamma is sqrt(1 - |lambda|^2), which keeps the states'
    size that of their input; the real and imaginary parts of B are normal with variance 1 / (2 dim), those of C with
    variance 1 / d_state, D with variance 1. nu_log, theta_log, gamma_log and D stay in float32 in a layer of 16 bits.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.LRU(8, 16, r_min=0.9, r_max=0.999)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    has_complex_state = True

    def __init__(
        self,
        dim: int,
        d_state: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"LRU: r_min and r_max must satisfy 0 <= r_min <= r_max <= 1, got {r_min} and {r_max}")
        self.dim, self.state_size = dim, d_state
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        factory = {"device": device, "dtype": dtype}
        self.B_re, self.B_im = (nn.Parameter(torch.empty(d_state, dim, **factory)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.empty(dim, d_state, **factory)) for _ in range(2))
        factory = {"device": device, "dtype": accumulator(self.B_re.dtype)}
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(d_state, **factory)) for _ in range(3))
        self.D = nn.Parameter(torch.empty(dim, **factory))
        for parameter in (self.nu_log, self.theta_log, self.gamma_log, self.D):
            parameter._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Doubles: nu is a small difference from one where |lambda| is near one.
        area = torch.empty_like(self.nu_log, dtype=torch.float64).uniform_(self.r_min**2, self.r_max**2)
        phase = torch.empty_like(area).uniform_(0, self.max_phase)
        self.nu_log.copy_((-0.5 * area.log()).log())
        self.theta_log.copy_(phase.log())
        self.gamma_log.copy_(0.5 * torch.log1p(-area))
        for parameter in (self.B_re, self.B_im):
            nn.init.normal_(parameter, std=(2 * self.dim) ** -0.5)
        for parameter in (self.C_re, self.C_im):
            nn.init.normal_(parameter, std=self.state_size**-0.5)
        nn.init.normal_(self.D)

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        nu, theta, gamma = (wide(log).exp() for log in (self.nu_log, self.theta_log, self.gamma_log))
        B = gamma[:, None] * torch.complex(wide(self.B_re), wide(self.B_im))
        return torch.exp(torch.complex(-nu, theta)), complex_from(x, B)

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        y = real_from(h, torch.complex(wide(self.C_re), wide(self.C_im)), x.dtype)
        return (y + self.D * x).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, d_state={self.state_size}"
