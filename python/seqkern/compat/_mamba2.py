"""The Mamba-2 functions of the package mamba_ssm: `seqkern.ssd`, alone and between convolution, norm and projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn._norm import gated_norm
from ..ops.causal_conv1d import causal_conv1d
from ..ops.ssd import ssd


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`seqkern.ssd`, differentiable in every tensor argument.

    Args:
        x, z: (B, L, H, P).
        dt: (B, L, H).
        A, dt_bias: (H,).
        B, C: (B, L, G, N).
        chunk_size, state_dtype: change nothing.
        D: (H,) or (H, P).
        initial_states: (B, H, P, N), of the first sequence of each row.
        seq_idx: (B, L): runs of one number are sequences; numbers below 0 are padding.
        cu_seqlens: (S + 1,): with return_varlen_states the sequences are these, of a batch of one, and seq_idx says
            nothing more; without, it is ignored.

    Returns:
        y like x, then, as asked for, the state of each row after its last token (B, H, P, N), and the state of each
        sequence of cu_seqlens after its last token (S, H, P, N); float32.
    """
    if return_varlen_states and cu_seqlens is None:
        raise RuntimeError("mamba_chunk_scan_combined: return_varlen_states needs cu_seqlens, got None")
    packing = {"cu_seqlens": cu_seqlens} if return_varlen_states else {"seq_idx": seq_idx}
    if return_varlen_states and initial_states is not None:  # the other sequences start from zero
        initial_states = F.pad(initial_states, (0, 0, 0, 0, 0, 0, 0, len(cu_seqlens) - 1 - len(initial_states)))
    y, *states = _scan(
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states),
        return_final_states or return_varlen_states,
        **packing,
    )
    if not states:
        return y
    if return_varlen_states and return_final_states:
        return y, _last(*states, cu_seqlens), *states
    return y, *states


def _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_states, return_states, **packing):
    """(y,), or (y, states), of `seqkern.ssd`."""
    B, C = B.to(x.dtype), C.to(x.dtype)
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "initial_state": initial_states}
    outputs = ssd(x, dt, A, B, C, D, z, **options, return_final_state=return_states, **packing)
    return outputs if return_states else (outputs,)


def _last(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The state after the last token of all, (1, H, P, N): that of the last sequence which has tokens."""
    lengths = cu_seqlens.diff()
    last = (lengths > 0).long().cumsum(0).argmax()  # the first index that has seen them all
    return states.index_select(0, last[None])


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything between a Mamba-2 layer's first projection and its output: convolution, scan, gate, norm, projection.

    Differentiable in every tensor argument. Under autocast the projection runs in its dtype.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): gate and value of a gated unit (M may be 0), z, what the convolution
            sees, dt.
        conv1d_weight: (H P + 2 G N, W). conv1d_bias: (H P + 2 G N,).
        dt_bias, A: (H,).
        D: (H,), and then headdim says P; or (H, P).
        chunk_size, state_dtype: change nothing.
        initial_states: (B, H, P, N), of the scan.
        seq_idx: (B, L): runs of one number are sequences; numbers below 0 are padding.
        rmsnorm_weight: (H P,): RMS norm of each group of H P / G channels; without it z gates what the scan returns.
        norm_before_gate: norm(y) silu(z); else norm(y silu(z)).
        outproj_weight: (E, M + H P). outproj_bias: (E,).

    Returns:
        (B, L, E), or (B, L, M + H P) without a projection; with return_final_states also the states (B, H, P, N).
    """
    if D.dim() == 1 and headdim is None:
        raise RuntimeError("mamba_split_conv1d_scan_combined: D of shape (H,) needs headdim, got None")
    H, P = (len(D), headdim) if D.dim() == 1 else D.shape
    inner, G = H * P, ngroups
    N = (len(conv1d_weight) - inner) // (2 * G)
    M = (zxbcdt.shape[-1] - 2 * inner - 2 * G * N - H) // 2
    gate, value, z, xBC, dt = zxbcdt.split([M, M, inner, inner + 2 * G * N, H], dim=-1)
    xBC = causal_conv1d(xBC.mT, conv1d_weight, conv1d_bias, activation, seq_idx=seq_idx).mT
    x, B, C = xBC.split([inner, G * N, G * N], dim=-1)
    x = x.unflatten(-1, (H, P))
    B, C = (t.unflatten(-1, (G, N)) for t in (B, C))
    scan_gate, norm_gate = z.unflatten(-1, (H, P)), None
    if rmsnorm_weight is not None and norm_before_gate:
        scan_gate, norm_gate = None, z
    y, *states = _scan(
        *(x, dt, A, B, C, D, scan_gate, dt_bias, True, dt_limit, initial_states), return_final_states, seq_idx=seq_idx
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_norm(y, rmsnorm_weight, None, norm_gate, rmsnorm_eps, inner // G)
    if M > 0:
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, *states) if return_final_states else y


class MambaChunkScanCombinedFn:
    """For code that calls ``MambaChunkScanCombinedFn.apply``."""

    apply = staticmethod(mamba_chunk_scan_combined)


class MambaSplitConv1dScanCombinedFn:
    """For code that calls ``MambaSplitConv1dScanCombinedFn.apply``."""

    apply = staticmethod(mamba_split_conv1d_scan_combined)
