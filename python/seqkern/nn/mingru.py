"""Minimal gated recurrences: gates that see the token alone, and so a linear recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._scan import LinearScanLayer, wide


class _Minimal(LinearScanLayer):
    """What MinGRU and MinLSTM share: projections without a common bias, and g."""

    log_space = True

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.state_size = dim, hidden or dim
        for name in self.projections:
            setattr(self, name, nn.Linear(dim, self.state_size, bias=bias, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        for name in self.projections:
            getattr(self, name).reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.dim}, hidden={self.state_size}"


class MinGRU(_Minimal):
    r"""The minimal GRU: a candidate and one gate, both of the token alone.

    .. math::
        z_t = \sigma(W_z x_t), \quad \tilde h_t = g(W_h x_t), \quad h_t = (1 - z_t) h_{t-1} + z_t \tilde h_t, \quad
        g(x) = \begin{cases} x + 1/2 & x \ge 0 \\ \sigma(x) & x < 0 \end{cases}

    Args:
        dim: size of a token.
        hidden: size of the output, which is the state; default dim.
        bias: whether the projections have a bias.

    This is the log-space form in the appendix of [2410.01201]: the decay is given to the scan as its logarithm,
    :math:`-\mathrm{softplus}(W_z x)`, and g keeps states positive. A state is h itself, whole or step by step; the
    paper's parallel form, which applies g to the state it is given, begins with `state = g(h_0)`. Parameters and their
    first values are those of torch.nn.Linear, as published: linear_z, linear_h.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.MinGRU(8)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-6)
        True
    """

    projections = ("linear_z", "linear_h")

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        z, candidate = wide(self.linear_z(x)), self.linear_h(x)
        return -F.softplus(z), (torch.sigmoid(z) * _positive(wide(candidate))).to(candidate.dtype)


class MinLSTM(_Minimal):
    r"""The minimal LSTM: a candidate, and a forget and an input gate that sum to one, all of the token alone.

    .. math::
        f_t = \sigma(W_f x_t), \quad i_t = \sigma(W_i x_t), \quad \tilde h_t = g(W_h x_t), \quad
        h_t = \frac{f_t}{f_t + i_t} h_{t-1} + \frac{i_t}{f_t + i_t} \tilde h_t

    Args:
        dim: size of a token.
        hidden: size of the output, which is the state; default dim.
        bias: whether the projections have a bias.

    This is the log-space form of [2410.01201], with g and states as in `MinGRU`: with
    :math:`d = \mathrm{softplus}(-W_f x) - \mathrm{softplus}(-W_i x)` the decay's logarithm is
    :math:`-\mathrm{softplus}(d)`. Parameters and their first values are those of torch.nn.Linear, as published:
    linear_f, linear_i, linear_h.

    Example:
        >>> import torch, seqkern.nn
        >>> seqkern.nn.MinLSTM(8, 12)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 12])
    """

    projections = ("linear_f", "linear_i", "linear_h")

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        forget, enter, candidate = self.linear_f(x), self.linear_i(x), self.linear_h(x)
        ratio = F.softplus(-wide(forget)) - F.softplus(-wide(enter))  # log(i / f)
        return -F.softplus(ratio), (torch.sigmoid(ratio) * _positive(wide(candidate))).to(candidate.dtype)


def _positive(x: Tensor) -> Tensor:
    """g of the paper: positive, and as smooth as its derivative at zero lets it be."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
