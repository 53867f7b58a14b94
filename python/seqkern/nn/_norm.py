"""Norms with a gate, as several published layers have them behind their recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator


def gated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    centred: bool = False,
    activation: str = "silu",
) -> Tensor:
    """norm(x) silu(gate), or norm(x silu(gate)); in float32 (float64 for float64 x), the result in the dtype of x.

    Args:
        x, gate: (..., D). weight, bias: (D,).
        group_size: channels that are normed together; None is all D.
        centred: layer norm; else RMS norm.
        activation: of the gate, "silu" or "sigmoid".
    """
    dtype = accumulator(x.dtype)
    y, gate = x.to(dtype), None if gate is None else getattr(F, activation)(gate.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    norm = F.layer_norm if centred else F.rms_norm
    y = norm(groups, groups.shape[-1:], eps=eps).flatten(-2)
    y = y if weight is None else y * weight.to(dtype)
    y = y if bias is None else y + bias.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


class RMSNormGated(nn.Module):
    """RMS norm of groups of channels, with silu(gate) before or after it.

    Args:
        hidden_size: channels, D.
        group_size: channels that are normed together; None is all.
        norm_before_gate: norm(x) silu(gate); else norm(x silu(gate)).
        activation: of the gate, "silu" or "sigmoid".
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "silu",
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., D); z is the gate, or None."""
        options = self.eps, self.group_size, self.norm_before_gate
        return gated_norm(x, self.weight, self.bias, z, *options, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"
