"""The simplified state space layer S5."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._torch import accumulator
from ._scan import LinearScanLayer, complex_from, real_from, wide


class S5(LinearScanLayer):
    r"""A state space model with many inputs and outputs and a diagonal state matrix.

    .. math::
        \bar\Lambda = e^{\Lambda \Delta}, \quad \bar B = \Lambda^{-1} (\bar\Lambda - 1) B, \quad
        h_t = \bar\Lambda h_{t-1} + \bar B x_t, \quad y_t = 2 \mathrm{Re}(C h_t) + D x_t

    Args:
        dim: size of a token, in and out.
        d_state: size of the state; its eigenvalues come in conjugate pairs, of which one is kept: a state holds
            d_state / 2 complex numbers.
        blocks: at first the state matrix has this many equal blocks on its diagonal; d_state / blocks is even.
        dt_min, dt_max: at first the steps lie between these, uniform in their logarithm, one for each pair.
        clip_eigs: keep the real parts of Lambda below -1e-4, and so the layer stable over any length.

    At first each block is the normal part of the HiPPO-LegS matrix, in the basis of its eigenvectors V, and B and C are
    the images of random matrices in that basis [2208.04933]: as released, V* times truncated normal entries of variance
    1 / d_state, and entries whose real and imaginary parts have that variance times V. D is standard normal.
    Parameters have the names and shapes of the released code: Lambda_re, Lambda_im (d_state / 2,), B (d_state / 2, dim,
    2), C (dim, d_state / 2, 2), D (dim,), log_step (d_state / 2, 1). All but B and C stay in float32 in a layer of
    16 bits.

    `reset` ends an episode within a row, as reinforcement learning in context needs it [2303.03982].

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.S5(8, 16)
        >>> x, done = torch.randn(2, 5, 8), torch.tensor([[0, 0, 1, 0, 0]] * 2, dtype=torch.bool)
        >>> y, state = layer(x, reset=done, return_state=True)
        >>> torch.allclose(y[:, 2:], layer(x[:, 2:]), atol=1e-5)
        True
        >>> state.shape
        torch.Size([2, 8])
    """

    has_complex_state = True

    def __init__(
        self,
        dim: int,
        d_state: int,
        *,
        blocks: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        clip_eigs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if d_state % (2 * blocks):
            raise ValueError(f"S5: d_state must be a multiple of 2 * blocks = {2 * blocks}, got {d_state}")
        self.dim, self.state_size, self.blocks = dim, d_state // 2, blocks
        self.dt_min, self.dt_max, self.clip_eigs = dt_min, dt_max, clip_eigs
        factory = {"device": device, "dtype": dtype}
        self.B = nn.Parameter(torch.empty(self.state_size, dim, 2, **factory))
        self.C = nn.Parameter(torch.empty(dim, self.state_size, 2, **factory))
        factory = {"device": device, "dtype": accumulator(self.B.dtype)}
        self.Lambda_re, self.Lambda_im = (nn.Parameter(torch.empty(self.state_size, **factory)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(dim, **factory))
        self.log_step = nn.Parameter(torch.empty(self.state_size, 1, **factory))
        for parameter in (self.Lambda_re, self.Lambda_im, self.D, self.log_step):
            parameter._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        d_state = 2 * self.state_size
        eigenvalues, vectors = hippo_pairs(d_state // self.blocks)
        V = torch.block_diag(*[vectors] * self.blocks)  # (d_state, d_state / 2)
        self.Lambda_re.copy_(eigenvalues.real.repeat(self.blocks))
        self.Lambda_im.copy_(eigenvalues.imag.repeat(self.blocks))
        B = _truncated_normal(d_state, self.dim, variance=1 / d_state)
        C = torch.view_as_complex(_truncated_normal(self.dim, d_state, 2, variance=1 / d_state))
        self.B.copy_(torch.view_as_real(V.mH @ B.to(V.dtype)))
        self.C.copy_(torch.view_as_real(C @ V))
        nn.init.normal_(self.D)
        nn.init.uniform_(self.log_step, math.log(self.dt_min), math.log(self.dt_max))

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        real = wide(self.Lambda_re)
        Lambda = torch.complex(real.clamp(max=-1e-4) if self.clip_eigs else real, wide(self.Lambda_im))
        exponent = Lambda * wide(self.log_step).squeeze(-1).exp()
        B = (torch.expm1(exponent) / Lambda)[:, None] * torch.view_as_complex(wide(self.B))
        return exponent.exp(), complex_from(x, B)

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        y = real_from(h, 2 * torch.view_as_complex(wide(self.C)), x.dtype)
        return (y + self.D * x).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, d_state={2 * self.state_size}, blocks={self.blocks}"


def hippo_pairs(size: int) -> tuple[Tensor, Tensor]:
    """The normal part of the HiPPO-LegS matrix: of each conjugate pair one eigenvalue (size / 2,), and as columns of
    (size, size / 2) the eigenvectors.

    LegS is A = N - p p^T with a normal N, which is a skew-symmetric matrix minus 1/2.
    """
    n = torch.arange(size, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    product = p[:, None] * p  # half of what A has below its diagonal, with a minus
    skew = product.triu(1) - product.tril(-1)
    imaginary, vectors = torch.linalg.eigh(-1j * skew)  # in ascending order: first the halves of pairs below zero
    return torch.complex(torch.full((size // 2,), -0.5, dtype=n.dtype), imaginary[: size // 2]), vectors[:, : size // 2]


def _truncated_normal(*shape: int, variance: float) -> Tensor:
    """Normal numbers within two standard deviations, scaled to have this variance."""
    std = variance**0.5 / 0.87962566103423978  # what cutting leaves of a standard deviation of 1
    return nn.init.trunc_normal_(torch.empty(shape, dtype=torch.float64), std=std, a=-2 * std, b=2 * std)
