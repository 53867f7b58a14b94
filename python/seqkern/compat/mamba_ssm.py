"""The package mamba_ssm, Mamba-1 and Mamba-2, as compositions of seqkern's operators and torch.

Names, argument orders, layouts and dtypes of results are those of mamba_ssm 2.3. Beyond it: CPU, float64, arguments of
different dtypes, any number of channels and states, convolutions up to 64 taps, differentiable last states, also of
each sequence in a pack, second derivatives, `None` for every optional argument of `selective_state_update`. The
differences:

- Gradients of `mamba_inner_fn` pass through its RMS norms, and reach their weights.
- What says how to compute and not what changes nothing: `checkpoint_lvl`, `use_fast_path`, `use_mem_eff_path`,
  `chunk_size`, `state_dtype`. One path serves, and its backward recomputes the states of the scan, not the convolution.
- `Mamba2` keeps A_log, D and dt_bias in float32 in a layer of 16 bits. It keeps the sequences of `cu_seqlens` apart
  whether or not `seq_idx` is given. Its `process_group` must be None.
- Bad arguments raise seqkern's errors.

Mamba-3 and language models are not here: importing them raises an ImportError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._torch import accumulator
from ..ops.causal_conv1d import causal_conv1d
from ..ops.selective_scan import selective_scan, selective_scan_step
from ..ops.ssd import ssd_step
from ._mamba2 import (  # noqa: F401
    MambaChunkScanCombinedFn,
    MambaSplitConv1dScanCombinedFn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from ._mamba_layers import Mamba, Mamba2  # noqa: F401
from ._mamba_norms import (  # noqa: F401
    LayerNormGated,
    RMSNorm,
    RMSNormGated,
    gated_rms_norm_ref,
    layer_norm_fn,
    layer_norm_linear_fn,
    layernorm_fn,
    rms_norm_fn,
    rmsnorm_fn,
)

VERSION = "2.3.0"  # the last without Mamba-3: programs that find a later one import its functions unasked
MODULES = {
    "mamba_ssm": ("Mamba", "Mamba2", "mamba_inner_fn", "selective_scan_fn"),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba2": (
        "Mamba2",
        "RMSNormGated",
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
        "selective_state_update",
    ),
    "mamba_ssm.modules.mamba_simple": ("Mamba",),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (
        "MambaInnerFn",
        "SelectiveScanFn",
        "mamba_inner_fn",
        "mamba_inner_ref",
        "selective_scan_fn",
        "selective_scan_ref",
    ),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.layer_norm": ("RMSNorm", "layer_norm_fn", "layer_norm_linear_fn", "rms_norm_fn"),
    "mamba_ssm.ops.triton.layernorm_gated": {
        "LayerNorm": "LayerNormGated",
        "RMSNorm": "RMSNormGated",
        "layernorm_fn": "layernorm_fn",
        "rms_norm_ref": "gated_rms_norm_ref",
        "rmsnorm_fn": "rmsnorm_fn",
    },
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
    "mamba_ssm.ops.triton.ssd_combined": (
        "MambaChunkScanCombinedFn",
        "MambaSplitConv1dScanCombinedFn",
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
    ),
}


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`seqkern.selective_scan`, differentiable in every tensor argument.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real or complex.
        B, C: (D, N), (B, N, L) or (B, G, N, L); with complex A (D, N) complex, or real with pairs along time: 2 L.
        D, delta_bias: (D,).
        return_last_state: return (y, last_state).

    Returns:
        y (B, D, L) in u's dtype, or (y, last_state): (B, D, N) float32, or complex64 where A is complex.
    """
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` in plain torch: `seqkern.reference.selective_scan`."""
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Everything between a Mamba layer's first projection and its output: convolution, projections, scan and gate.

    Differentiable in every tensor argument. Under autocast the convolution and the projections run in its dtype; A, D,
    delta_bias and the states keep theirs.

    Args:
        xz: (B, 2 D, L), either memory order: what the convolution sees, then the gate.
        conv1d_weight: (D, 1, W). conv1d_bias: (D,).
        x_proj_weight: (R + ..., D): rows for delta, and N rows (complex A: 2 N, pairs) each for B and C not given.
        delta_proj_weight: (D, R).
        out_proj_weight: (E, D). out_proj_bias: (E,).
        A: (D, N), real or complex.
        B, C: (D, N) or as in `selective_scan_fn`, or None: projected from the token.
        D, delta_bias: (D,).
        B_proj_bias, C_proj_bias: (N,) (complex A: (2 N,)), added to projected B and C.
        b_rms_weight, c_rms_weight: (N,): RMS norm of projected B and C.
        dt_rms_weight: (D,): RMS norm of delta over the channels, after delta_proj_weight.

    Returns:
        (B, L, E).
    """
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")  # (B, D, L)
    selected = F.linear(u.mT, x_proj_weight)  # (B, L, R + what B and C take)
    R, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    def projected(columns, bias, rms_weight):
        """(B, L, N) -> (B, N, L); complex: (B, L, 2N) -> (B, N, 2L), pairs along time."""
        columns = columns if bias is None else columns + bias.to(columns.dtype)
        columns = _rms_norm(columns, rms_weight, b_c_dt_rms_eps)
        return columns.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2) if A.is_complex() else columns.mT

    if B is None:
        B = projected(selected[..., R : R + width], B_proj_bias, b_rms_weight)
    if C is None:
        C = projected(selected[..., -width:], C_proj_bias, c_rms_weight)
    delta = F.linear(selected[..., :R], delta_proj_weight)  # (B, L, D)
    delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    y = selective_scan(u, delta.mT, A, B, C, D, z, delta_bias, delta_softplus)
    out_proj_bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension, in float32 (float64 for float64 data); x where there is no weight."""
    if weight is None:
        return x
    wide = accumulator(x.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` again: it has no fused path beside the composition of operators that this stands for."""
    projections = (x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    biases = (delta_bias, B_proj_bias, C_proj_bias)
    return mamba_inner_fn(xz, conv1d_weight, conv1d_bias, *projections, A, B, C, D, *biases, delta_softplus)


class SelectiveScanFn:
    """For code that calls ``SelectiveScanFn.apply``."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """For code that calls ``MambaInnerFn.apply``."""

    apply = staticmethod(mamba_inner_fn)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of Mamba or Mamba-2; no gradient, also where parameters require one.

    With heads and one dt, A and dt_bias for each of them (expanded tensors, with strides of 0) this is
    `seqkern.ssd_step`, which reads each of them once; else `seqkern.selective_scan_step`.

    Args:
        state: (R, D, N) or (R, H, P, N), updated in place.
        x, dt, z: (B, D) or (B, H, P).
        A: (D, N) or (H, P, N).
        B, C: (B, N) or (B, G, N).
        D, dt_bias: (D,) or (H, P).
        state_batch_indices: (B,): the row of state for each row of x; negative rows are skipped. None: R = B.

    Returns:
        y like x.
    """
    if state.dim() == 4 and _constant(dt, -1) and _constant(A, -1, -2) and _constant(dt_bias, -1):
        dt_bias = None if dt_bias is None else dt_bias[..., 0]
        options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "state_indices": state_batch_indices}
        return ssd_step(state, x, dt[..., 0], A[..., 0, 0], B, C, D, z, **options)
    return selective_scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices=state_batch_indices)


def _constant(t: Tensor | None, *dims: int) -> bool:
    """Whether a tensor repeats one number along these dimensions."""
    return t is None or all(t.stride(dim) == 0 for dim in dims)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain torch: `seqkern.reference.selective_scan_step`."""
    return reference.selective_scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
