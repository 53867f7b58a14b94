"""The layers of the package mamba_ssm: seqkern.nn's with the constructors, caches and steps of mamba_ssm's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..nn.mamba import Mamba as _Mamba
from ..nn.mamba2 import Mamba2 as _Mamba2


class _Cached:
    """A layer of seqkern.nn that keeps its states in inference_params.key_value_memory_dict[layer_idx].

    There they are a pair of tensors: the latest d_conv inputs of the convolution, (B, channels, d_conv), of which the
    oldest is never read and may be 0, and the state of the scan.
    """

    layer_idx: int | None

    def _forward_cached(self, hidden_states: Tensor, states: tuple[Tensor, Tensor], **packing) -> Tensor:
        """Several tokens from nothing, after which the states are those behind them."""
        y, last = super().forward(hidden_states, return_state=True, **packing)
        with torch.no_grad():
            (conv_state, ssm_state), (latest, last_state) = states, last
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
        conv_state, ssm_state = (t.to(dtype or weight.dtype) for t in self.zero_state(batch_size))
        return conv_state.new_zeros(batch_size, self.d_conv, conv_state.shape[1]).mT, ssm_state

    def _get_states_from_cache(
        self, inference_params, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise RuntimeError(f"{type(self).__name__}: a cache needs layer_idx, got None; give each layer its number")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(batch_size, max_seqlen=0)
        elif initialize_states:
            for state in caches[self.layer_idx]:
                state.zero_()
        return caches[self.layer_idx]


class Mamba(_Cached, _Mamba):
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
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, *states)[0]
        return self._forward_cached(hidden_states, states)


class Mamba2(_Cached, _Mamba2):
    """`seqkern.nn.Mamba2` with the constructor, the cache and the step of mamba_ssm's; state_dicts are the same.

    A cache is as that of `Mamba`, its second tensor (B, heads, headdim, d_state). Layers that are split over several
    devices (process_group) are not here.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group=None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if process_group is not None:
            raise ValueError(
                f"Mamba2: process_group must be None, got {process_group}; run the whole layer on a device"
            )
        sizes = (d_model, d_state, d_conv, conv_init, expand, headdim, d_ssm, ngroups)
        kinds = (A_init_range, D_has_hdim, rmsnorm, norm_before_gate)
        super().__init__(*sizes, *kinds, dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias, device, dtype)
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
        # What code around the layer looks for.
        self.activation, self.act = "silu", nn.SiLU()
        self.conv1d.padding = (d_conv - 1,)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params=None,
    ) -> Tensor:
        """(B, L, d_model) -> the same; with inference_params the layer's cache moves on.

        Args:
            u: (B, L, d_model), or with seqlen = L (B L, d_model).
            seq_idx, cu_seqlens: sequences in a row, as in `seqkern.ssd`; where both are given cu_seqlens counts, and a
                cache has a row for each of its sequences.

        After the first tokens (inference_params.seqlen_offset > 0) L is 1, and there are no gradients.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        packing = {"seq_idx": seq_idx} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        if inference_params is None:
            y = super().forward(x, **packing)
        else:
            rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            states = self._get_states_from_cache(inference_params, rows)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
            y = self._forward_cached(x, states, **packing)
        return y if seqlen is None else y.flatten(0, 1)
