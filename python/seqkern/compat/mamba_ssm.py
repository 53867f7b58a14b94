"""The Mamba-1 part of the package mamba_ssm, as compositions of seqkern's operators and torch.

Names, argument orders, layouts and dtypes of results are those of mamba_ssm 2.3. Beyond it: CPU, float64, arguments of
different dtypes, any number of channels and states, convolutions up to 64 taps, differentiable last states, second
derivatives, `None` for every optional argument of `selective_state_update`. The differences:

- Gradients of `mamba_inner_fn` pass through its RMS norms, and reach their weights.
- `mamba_inner_fn` takes `checkpoint_lvl` and `Mamba` takes `use_fast_path`, and neither changes anything: one path
  serves, and its backward recomputes the states of the scan, not the convolution.
- Bad arguments raise seqkern's errors.

Mamba-2 is not here: importing `mamba_ssm.ops.triton.ssd_combined` or `mamba_ssm.Mamba2` raises an ImportError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from .._torch import accumulator
from ..nn.mamba import Mamba as _Mamba
from ..ops.causal_conv1d import causal_conv1d
from ..ops.selective_scan import selective_scan, selective_scan_step

VERSION = "1.2.2"  # the last without Mamba-2: programs that find a later one import Mamba-2's functions unasked
MODULES = {
    "mamba_ssm": ("Mamba", "mamba_inner_fn", "selective_scan_fn"),
    "mamba_ssm.modules": (),
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
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
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
    """`seqkern.selective_scan_step`; no gradient, also where parameters require one.

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
    return selective_scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices=state_batch_indices)


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


class Mamba(_Mamba):
    """`seqkern.nn.Mamba` with the constructor, the cache and the step of mamba_ssm's; state_dicts are the same.

    A cache is a pair of tensors per layer, in inference_params.key_value_memory_dict[layer_idx]: the latest d_conv
    inputs of the convolution, (B, d_inner, d_conv), of which the oldest is never read and may be 0, and the state of
    the scan, (B, d_inner, d_state).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        steps = (dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(d_model, d_state, d_conv, expand, *steps, conv_bias, bias, device, dtype)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        # What code around the layer looks for.
        self.activation, self.act = "silu", nn.SiLU()
        self.conv1d.padding = (d_conv - 1,)
        self.dt_proj.bias._no_reinit = True

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """(B, L, d_model) -> the same; with inference_params the layer's cache moves on.

        After the first tokens (inference_params.seqlen_offset > 0) L is 1, and there are no gradients.
        """
        if inference_params is None:
            return super().forward(hidden_states)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        y, (latest, last_state) = super().forward(hidden_states, return_state=True)
        with torch.no_grad():
            conv_state[..., 0] = 0
            conv_state[..., 1:] = latest
            ssm_state.copy_(last_state)
        return y

    @torch.no_grad()
    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, d_model) -> (y of the same shape, conv_state, ssm_state); both states move on in place."""
        return super().step(hidden_states.squeeze(1), (conv_state, ssm_state)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Zeros for a cache, in the dtype of the parameters unless another is given. max_seqlen does not matter."""
        weight = self.out_proj.weight
        dtype = dtype or weight.dtype
        return (
            weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def _get_states_from_cache(self, inference_params, batch_size: int, initialize_states: bool = False):
        if self.layer_idx is None:
            raise RuntimeError("Mamba: a cache needs layer_idx, got None; give each layer its number")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, max_seqlen=0)
        elif initialize_states:
            for state in caches[self.layer_idx]:
                state.zero_()
        return caches[self.layer_idx]
