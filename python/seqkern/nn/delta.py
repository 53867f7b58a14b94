"""The delta rule layers: `seqkern.delta_rule` behind short convolutions, between projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import accumulator
from ..ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..ops.delta_rule import delta_rule, delta_rule_step
from ._norm import RMSNormGated
from ._scan import wide


class _DeltaLayer(nn.Module):
    """What the layers share; they differ in the gates of the state and of the outputs, and in initial decays."""

    smallest_rate: float  # A begins between this and 16

    @property
    def gates_of_head(self) -> int:
        """Log decays of a head and token."""
        raise NotImplementedError

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_size: int | None,
        expand_v: float,
        num_v_heads: int | None,
        d_conv: int,
        conv_bias: bool,
        allow_neg_eigval: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        name = type(self).__name__
        if head_size is None and dim % num_heads:
            raise ValueError(f"{name}: dim must be a multiple of num_heads={num_heads}, got {dim}; or give a head_size")
        self.dim, self.num_heads, self.num_v_heads = dim, num_heads, num_v_heads or num_heads
        if self.num_v_heads % num_heads:
            raise ValueError(f"{name}: num_v_heads must be a multiple of num_heads={num_heads}, got {num_v_heads}")
        self.key_size = head_size or dim // num_heads
        self.value_size = int(expand_v * self.key_size)
        if self.value_size != expand_v * self.key_size:
            raise ValueError(
                f"{name}: expand_v times the size of a head must be whole, got {expand_v} * {self.key_size}"
            )
        self.d_conv, self.allow_neg_eigval = d_conv, allow_neg_eigval
        keys, values = num_heads * self.key_size, self.num_v_heads * self.value_size
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.k_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.v_proj = nn.Linear(dim, values, bias=False, **factory)
        self.q_conv1d = nn.Conv1d(keys, keys, d_conv, groups=keys, bias=conv_bias, **factory)
        self.k_conv1d = nn.Conv1d(keys, keys, d_conv, groups=keys, bias=conv_bias, **factory)
        self.v_conv1d = nn.Conv1d(values, values, d_conv, groups=values, bias=conv_bias, **factory)
        self.b_proj = nn.Linear(dim, self.num_v_heads, bias=False, **factory)
        # A rounded to 16 bits would change long memories.
        exact = {"device": device, "dtype": accumulator(self.q_proj.weight.dtype)}
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads, **exact))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads * self.gates_of_head, **exact))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True
        self.o_proj = nn.Linear(values, dim, bias=False, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.A_log.copy_((16 - (16 - self.smallest_rate) * torch.rand_like(self.A_log)).log())  # never of 0
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus turns it into dt again

    def zero_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Nothing has been seen: of the convolutions (B, channels, d_conv - 1), of the rule (B, HV, K, V).

        Both are float32 (float64 for float64 parameters).
        """
        weight = self.o_proj.weight
        channels = 2 * self.q_conv1d.in_channels + self.v_conv1d.in_channels
        shapes = (channels, self.d_conv - 1), (self.num_v_heads, self.key_size, self.value_size)
        conv_state, S = (weight.new_zeros(batch_size, *shape, dtype=accumulator(weight.dtype)) for shape in shapes)
        return conv_state, S

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (B, L, dim) -> y: (B, L, dim), or (y, state) for the tokens that follow.

        cu_seqlens marks several sequences in a row, as in `seqkern.delta_rule`; a state then has a row for each.
        """
        packing = {"cu_seqlens": cu_seqlens, "return_final_state": return_state}
        conv_state, S = state or (None, None)
        outputs = causal_conv1d(self._qkv(x).mT, *self._conv_parameters(), "silu", initial_state=conv_state, **packing)
        mixed, conv_state = outputs if return_state else (outputs, None)
        tokens, options = self._inputs(x, mixed.mT)
        outputs = delta_rule(*tokens, **options, initial_state=S, **packing)
        o, S = outputs if return_state else (outputs, None)
        y = self._output(o, x)
        return (y, (conv_state, S)) if return_state else y

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, dim), the next token -> y: (B, dim); state moves on in place. Call under torch.no_grad()."""
        conv_state, S = state
        tokens, options = self._inputs(
            x, causal_conv1d_step(self._qkv(x), conv_state, *self._conv_parameters(), "silu")
        )
        return self._output(delta_rule_step(S, *tokens, **options), x)

    def _qkv(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        convs = self.q_conv1d, self.k_conv1d, self.v_conv1d
        bias = None if self.q_conv1d.bias is None else torch.cat([conv.bias for conv in convs])
        return torch.cat([conv.weight.squeeze(1) for conv in convs]), bias

    def _inputs(self, x: Tensor, mixed: Tensor) -> tuple[tuple[Tensor, ...], dict]:
        """x (..., dim), mixed (..., channels): q, k, v, beta, and the options of the rule."""
        keys = self.q_conv1d.in_channels
        q, k, v = mixed.split([keys, keys, self.v_conv1d.in_channels], dim=-1)
        q, k = (t.unflatten(-1, (self.num_heads, self.key_size)) for t in (q, k))
        v = v.unflatten(-1, (self.num_v_heads, self.value_size))
        beta = self.b_proj(x).sigmoid()
        beta = 2 * beta if self.allow_neg_eigval else beta
        dt = F.softplus(wide(self._decay(x)) + self.dt_bias)
        if self.gates_of_head > 1:
            dt = dt.unflatten(-1, (self.num_v_heads, self.gates_of_head))
        rate = wide(self.A_log).exp()
        log_decay = -(rate[:, None] if self.gates_of_head > 1 else rate) * dt
        return (q, k, v, beta), {"log_decay": log_decay, "qk_l2norm": True}

    def _decay(self, x: Tensor) -> Tensor:
        """Pre-activations of the decays (..., HV * gates_of_head)."""
        raise NotImplementedError

    def _gate(self, x: Tensor) -> Tensor | None:
        """Pre-activations of the gate of the outputs (..., HV * V), if there is one."""
        raise NotImplementedError

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self._gate(x)
        gate = None if gate is None else gate.unflatten(-1, (self.num_v_heads, self.value_size))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, num_v_heads={self.num_v_heads}, key_size={self.key_size}"


class GatedDeltaNet(_DeltaLayer):
    r"""A memory that corrects what it holds under a key, and forgets at a rate that depends on the token.

    .. math::
        q, k, v = \mathrm{silu}(\mathrm{conv}(W_q x, W_k x, W_v x)), \quad \beta = \sigma(W_b x), \quad
        g = -e^{A} \, \mathrm{softplus}(W_a x + dt), \quad
        y = W_o \big(\mathrm{norm}(\mathrm{delta\_rule}(q, k, v, \beta, g)) \odot \mathrm{silu}(W_g x)\big)

    with q and k of every head divided by their length.

    Args:
        dim: size of a token, in and out.
        num_heads: heads of q and k.
        head_size: size of a key; default dim / num_heads.
        expand_v: a value is as many times as large as a key.
        num_v_heads: heads of v, each with its own state, a multiple of num_heads; default num_heads.
        d_conv: taps of the convolutions. conv_bias: whether they have a bias.
        allow_neg_eigval: beta lies between 0 and 2 instead of 0 and 1: what is stored under a key can change its sign
            with every token, which parity and other counting needs [2411.12537].
        use_gate: whether the outputs have a gate.
        eps: of the RMS norm.

    After [2412.06464 sec. 3.4]. Names and shapes of the parameters are those of fla's GatedDeltaNet.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.GatedDeltaNet(16, num_heads=2)
        >>> x = torch.randn(2, 5, 16)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    smallest_rate = 0.0
    gates_of_head = 1

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        head_size: int | None = None,
        expand_v: float = 2.0,
        num_v_heads: int | None = None,
        d_conv: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim, num_heads, head_size, expand_v, num_v_heads, d_conv, conv_bias, allow_neg_eigval, device, dtype
        )
        factory = {"device": device, "dtype": dtype}
        self.a_proj = nn.Linear(dim, self.num_v_heads, bias=False, **factory)
        self.g_proj = nn.Linear(dim, self.o_proj.in_features, bias=False, **factory) if use_gate else None
        self.o_norm = RMSNormGated(self.value_size, eps, **factory)
        self.reset_parameters()

    def _decay(self, x: Tensor) -> Tensor:
        return self.a_proj(x)

    def _gate(self, x: Tensor) -> Tensor | None:
        return None if self.g_proj is None else self.g_proj(x)


class KDA(_DeltaLayer):
    r"""Kimi Delta Attention: a gated delta rule whose every key channel forgets at a rate of its own.

    .. math::
        q, k, v = \mathrm{silu}(\mathrm{conv}(W_q x, W_k x, W_v x)), \quad \beta = \sigma(W_b x), \quad
        g = -e^{A} \, \mathrm{softplus}(W_2 W_1 x + dt), \quad
        y = W_o \big(\mathrm{norm}(\mathrm{delta\_rule}(q, k, v, \beta, g)) \odot \sigma(W_4 W_3 x + b)\big)

    with q and k of every head divided by their length.

    Args:
        dim: size of a token, in and out.
        num_heads: heads of q and k.
        head_size: size of a key; default dim / num_heads.
        expand_v: a value is as many times as large as a key.
        num_v_heads: heads of v, each with its own state, a multiple of num_heads; default num_heads.
        d_conv: taps of the convolutions. conv_bias: whether they have a bias.
        allow_neg_eigval: beta lies between 0 and 2 instead of 0 and 1.
        eps: of the RMS norm.

    After [2510.26692 sec. 4]. Names and shapes of the parameters are those of fla's KimiDeltaAttention: f_proj.0 and .1
    are W_1 and W_2, g_proj.0 and .1 W_3 and W_4.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.KDA(16, num_heads=2)
        >>> x = torch.randn(2, 5, 16)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    smallest_rate = 1.0

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        head_size: int | None = None,
        expand_v: float = 1.0,
        num_v_heads: int | None = None,
        d_conv: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim, num_heads, head_size, expand_v, num_v_heads, d_conv, conv_bias, allow_neg_eigval, device, dtype
        )
        factory = {"device": device, "dtype": dtype}
        self.f_proj = self._bottleneck(self.num_v_heads * self.key_size, bias=False, **factory)
        self.g_proj = self._bottleneck(self.o_proj.in_features, bias=True, **factory)
        self.o_norm = RMSNormGated(self.value_size, eps, activation="sigmoid", **factory)
        self.reset_parameters()

    @property
    def gates_of_head(self) -> int:
        return self.key_size

    def _bottleneck(self, size: int, bias: bool, **factory) -> nn.Sequential:
        inner = self.value_size
        return nn.Sequential(
            nn.Linear(self.dim, inner, bias=False, **factory), nn.Linear(inner, size, bias=bias, **factory)
        )

    def _decay(self, x: Tensor) -> Tensor:
        return self.f_proj(x)

    def _gate(self, x: Tensor) -> Tensor:
        return self.g_proj(x)
