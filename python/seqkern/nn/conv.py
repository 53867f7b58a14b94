"""Layers around `seqkern.causal_conv1d`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step


class GatedConv(nn.Module):
    r"""A gated unit whose one branch sees the tokens before it through a causal convolution.

    .. math:: y = W_{out} \big(\mathrm{silu}(\mathrm{conv}(value)) \odot gate\big), \quad [value, gate] = W_{in} x

    Args:
        dim: size of a token, in and out.
        hidden: channels of the convolution; default dim.
        width, dilation: taps of the convolution and the distance between them.

    Activations stay (B, L, channels) in memory: the convolution takes them as a transposed view, without a copy.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.GatedConv(8, width=4)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        width: int = 4,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.hidden, self.width, self.dilation = dim, hidden or dim, width, dilation
        self.in_proj = nn.Linear(dim, 2 * self.hidden, bias=False, **factory)
        self.weight = nn.Parameter(torch.empty(self.hidden, width, **factory))
        self.bias = nn.Parameter(torch.empty(self.hidden, **factory))
        self.out_proj = nn.Linear(self.hidden, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)
        nn.init.zeros_(self.bias)

    def zero_state(self, batch_size: int) -> Tensor:
        """(B, hidden, (width - 1) * dilation) float32 (float64 for float64 parameters): nothing has been seen."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.new_zeros(batch_size, self.hidden, (self.width - 1) * self.dilation, dtype=dtype)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        options = {"dilation": self.dilation, "initial_state": state, "return_final_state": return_state}
        outputs = causal_conv1d(value.mT, self.weight, self.bias, "silu", **options)
        mixed, state = outputs if return_state else (outputs, None)
        y = self.out_proj(mixed.mT * gate)
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); the state moves on in place. Call under torch.no_grad()."""
        value, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed = causal_conv1d_step(value, state, self.weight, self.bias, "silu", dilation=self.dilation)
        return self.out_proj(mixed * gate)

    def extra_repr(self) -> str:
        return f"{self.dim}, hidden={self.hidden}, width={self.width}, dilation={self.dilation}"
