"""The real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ._scan import LinearScanLayer, wide

C = 8.0  # the constant c of the paper
MAX_SQRT_GRADIENT = 1000.0  # as released


class RGLRU(LinearScanLayer):
    r"""The real-gated linear recurrent unit.

    .. math::
        r_t = \sigma(W_a x_t + b_a), \quad i_t = \sigma(W_x x_t + b_x), \quad a_t = a^{c r_t}, \quad
        h_t = a_t h_{t-1} + \sqrt{1 - a_t^2} \, (i_t \odot x_t)

    with c = 8: eqs. 1 to 4 of [2402.19427].

    Args:
        dim: size of a token, which is that of the state and of the output.
        num_heads: W_a and W_x are block-diagonal with this many blocks; dim is a multiple of it.
        w_init_variance_scale: their entries are at first normal with variance w_init_variance_scale * num_heads / dim,
            and their biases zero.
        scale_resets: whether the factor sqrt(1 - a^2) stands before a token that is reset as before any other. The
            model released with the paper leaves it out there: it is reproduced by False and
            `reset=(position_in_sequence == 0)`.

    At first a^c is uniform between 0.9 and 0.999. Names and shapes of the parameters are those of recurrentgemma's
    RGLRU: a_param is minus the paper's :math:`\Lambda`, a = sigmoid(-a_param), and stays in float32 in a layer of
    16 bits. As there, the gradient of the square root is bounded, by 1000: it is infinite where a gate closes.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.RGLRU(8, num_heads=2)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-6)
        True
    """

    log_space = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        w_init_variance_scale: float = 1.0,
        scale_resets: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"RGLRU: dim must be a multiple of num_heads={num_heads}, got {dim}")
        self.state_size, self.scale_resets = dim, scale_resets
        gate = {"blocks": num_heads, "variance_scale": w_init_variance_scale, "device": device, "dtype": dtype}
        self.input_gate, self.a_gate = _BlockDiagonal(dim, **gate), _BlockDiagonal(dim, **gate)
        self.a_param = nn.Parameter(torch.empty(dim, device=device, dtype=accumulator(self.a_gate.w.dtype)))
        self.a_param._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.input_gate.reset_parameters()
        self.a_gate.reset_parameters()
        power = torch.empty_like(self.a_param, dtype=torch.float64).uniform_(0.9, 0.999)  # a^c
        self.a_param.copy_(torch.expm1(-power.log() / C).log())  # softplus turns it into -log(a) again

    def _inputs(self, x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        i, r = torch.sigmoid(wide(self.input_gate(x))), torch.sigmoid(wide(self.a_gate(x)))
        log_a = -C * r * F.softplus(wide(self.a_param))
        scale = _BoundedSqrt.apply(-torch.expm1(2 * log_a))
        if reset is not None and not self.scale_resets:
            scale = scale.masked_fill(reset[..., None], 1)
        return log_a, (scale * i * wide(x)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.state_size}, num_heads={self.a_gate.w.shape[0]}"


class _BlockDiagonal(nn.Module):
    """A linear map of each block of channels into itself."""

    def __init__(self, dim: int, *, blocks: int, variance_scale: float, **factory):
        super().__init__()
        self.variance_scale = variance_scale
        size = dim // blocks
        self.w = nn.Parameter(torch.empty(blocks, size, size, **factory))  # input, then output
        self.b = nn.Parameter(torch.empty(blocks, size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, std=(self.variance_scale / self.w.shape[1]) ** 0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        blocks = x.unflatten(-1, self.b.shape)
        return (torch.einsum("...hi,hij->...hj", blocks, self.w) + self.b).flatten(-2)


class _BoundedSqrt(torch.autograd.Function):
    """The square root, with a derivative of at most MAX_SQRT_GRADIENT."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy / (2 * y).clamp(min=1 / MAX_SQRT_GRADIENT)
