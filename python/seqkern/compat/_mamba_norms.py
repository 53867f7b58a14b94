"""The norms of the package mamba_ssm: with a gate, and with a residual stream. All in float32, or float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..nn._norm import RMSNormGated, gated_norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) silu(z), or norm(x silu(z)), of groups of channels.

    Args:
        x, z: (..., D). weight, bias: (D,).
        group_size: channels that are normed together; None is D.

    Returns:
        Like x.
    """
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, centred=not is_rms_norm)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` as an RMS norm."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate)


def gated_rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` again; upcast changes nothing."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate)


class LayerNormGated(RMSNormGated):
    """`layernorm_fn` with its weight and bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """norm(dropout(rowscale x) + dropout(x1) + residual), and a second norm of the same sum.

    Args:
        x, x1, residual: (..., D). weight, bias, weight1, bias1: (D,).
        rowscale: (...), of x.
        residual_in_fp32: where there is no residual, the sum is returned in float32 instead of the dtype of x.

    Returns:
        The norm in the dtype of x; with weight1 the second one; with prenorm the sum, in the dtype of residual; with
        return_dropout_mask the masks of what was kept of x and of x1, None where there is none.
    """
    dtype = accumulator(x.dtype)
    total, masks = None, []
    for term in (x, x1):
        mask = None
        if term is not None:
            wide = term.to(dtype)
            wide = wide * rowscale[..., None] if rowscale is not None and term is x else wide
            if dropout_p > 0:
                mask = torch.rand_like(wide) >= dropout_p
                wide = wide.masked_fill(~mask, 0) / (1 - dropout_p)
            total = wide if total is None else total + wide
        masks.append(mask)
    total = total if residual is None else total + residual
    outputs = [gated_norm(total, weight, bias, eps=eps, centred=not is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outputs.append(gated_norm(total, weight1, bias1, eps=eps, centred=not is_rms_norm).to(x.dtype))
    if prenorm:
        kept = residual.dtype if residual is not None else (dtype if residual_in_fp32 else x.dtype)
        outputs.append(total.to(kept))
    outputs += masks if return_dropout_mask else []
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """`layer_norm_fn` as an RMS norm."""
    terms = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    return layer_norm_fn(*terms, prenorm, residual_in_fp32, True, return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A projection of norm(x + residual); with prenorm also the sum."""
    options = {"eps": eps, "prenorm": True, "residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, **options)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """`rms_norm_fn` with its weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.drop = eps, nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        options = {"eps": self.eps, "dropout_p": dropout_p, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, self.bias, residual, **options)
