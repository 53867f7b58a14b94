"""The linear attention and the delta rules of the package fla (flash-linear-attention), as `seqkern.linear_attention`
and `seqkern.delta_rule`.

Names, argument orders and layouts are those of fla 0.5.2: tensors are (B, T, H, ...), states (N, H, K, V), decays are
logarithms, scale is K^-0.5 where it is None, and every function returns (o, final state or None). Beyond it: CPU,
float64, key heads that serve several value heads, initial states in any dtype, decays of -inf, `reverse` and
`state_v_first` wherever they are documented below, second derivatives. The differences:

- chunk_, fused_chunk_, fused_recurrent_ and parallel_ name one computation, by chunks. What says how to compute and not
  what changes nothing: `chunk_size`, `cu_seqlens_cpu`.
- The normalised linear attention returns None instead of (None, z) where no final state is asked for, and z in float32.
- `fused_chunk_gla` works. `output_attentions` raises a NotImplementedError: no attention matrix is made.
- Decays of values (`gv` of `fused_recurrent_gla` and `fused_recurrent_gated_delta_rule`) cost a head for each value:
  right, and slow.
- Gates and sigmoids that fla computes "in kernel" are plain torch here. `safe_gate` and `disable_recompute` change
  nothing, `cp_context` and `return_intermediate_states` raise a NotImplementedError.
- `fused_recurrent_gated_delta_rule` has a backward. One token behind a state, without gradients, is a step.
- Bad arguments raise seqkern's errors.

The other functions of fla, its layers and models are not here: importing them raises an ImportError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear_attention import linear_attention, retention
from ._fla_arguments import States, check_arguments, pair, sequence_options
from ._fla_delta import (  # noqa: F401
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)

VERSION = "0.5.2"
_KINDS = {
    "delta_rule": ("chunk", "fused_recurrent"),
    "gated_delta_rule": ("chunk", "fused_recurrent"),
    "gla": ("chunk", "fused_chunk", "fused_recurrent"),
    "kda": ("chunk", "fused_recurrent"),
    "lightning_attn": ("chunk", "fused_recurrent"),
    "linear_attn": ("chunk", "fused_chunk", "fused_recurrent"),
    "retention": ("chunk", "fused_chunk", "fused_recurrent", "parallel"),
    "rwkv6": ("chunk", "fused_recurrent"),
    "simple_gla": ("chunk", "fused_chunk", "fused_recurrent", "parallel"),
}
MODULES = {
    "fla": (),
    "fla.ops": tuple(f"{kind}_{name}" for name, kinds in _KINDS.items() for kind in kinds),
    **{f"fla.ops.{name}": tuple(f"{kind}_{name}" for kind in kinds) for name, kinds in _KINDS.items()},
    **{f"fla.ops.{name}.{kind}": (f"{kind}_{name}",) for name, kinds in _KINDS.items() for kind in kinds},
}


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """Linear attention without decay; with normalize divided by z . q (scale included) + 1e-10, z the sum of the keys.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V).
        initial_state: (N, H, K, V), or with normalize (that, z) with z (N, 1, H, K), or the first alone.
        cu_seqlens: (N + 1,): sequences in a batch of one.

    Returns:
        (o, None), or with output_final_state (o, the state as it is given).
    """
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens)


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """`chunk_linear_attn`."""
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, False, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """`chunk_linear_attn` in either direction, by default without a divisor."""
    return _linear_attn(q, k, v, scale, initial_state, output_final_state, reverse, normalize, cu_seqlens)


def _linear_attn(q, k, v, scale, initial_state, output_final_state, reverse, normalize, cu_seqlens):
    options = {"return_final_state": output_final_state, "cu_seqlens": cu_seqlens, "reverse": reverse}
    if not normalize:
        return pair(linear_attention(q, k, v, scale=scale, initial_state=initial_state, **options))
    if initial_state is not None:
        S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
        initial_state = S, S.new_zeros(S.shape[:3]) if z is None else z.squeeze(1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options |= {"normalize": True, "eps": 1e-10 / scale, "initial_state": initial_state}  # the scales cancel otherwise
    o, state = pair(linear_attention(q, k, v, **options))
    return o, None if state is None else (state[0], state[1][:, None])


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> States:
    """Linear attention with a decay for each token and head.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V).
        g: (B, T, H) log decays. g_gamma: (H,) constant ones; both add up.
        initial_state: (N, H, K, V), or with state_v_first (N, H, V, K), as the final one.
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    check_arguments("chunk_simple_gla", kwargs)
    return _attend(q, k, v, _both(g, g_gamma), scale, initial_state, output_final_state, cu_seqlens, state_v_first)


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> States:
    """`chunk_simple_gla`."""
    return _attend(q, k, v, _both(g, g_gamma), scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_simple_gla` in either direction."""
    v_first = check_arguments("fused_recurrent_simple_gla", kwargs, state_v_first)
    decay = _both(g, g_gamma)
    return _attend(q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens, v_first, reverse)


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_simple_gla` without states: (o, None)."""
    check_arguments("parallel_simple_gla", kwargs)
    _check_attentions("parallel_simple_gla", output_attentions)
    return _attend(q, k, v, g, scale, None, False, cu_seqlens)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`seqkern.retention`: head h decays by 1 - 2^(-5-h).

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V).
        initial_state: (N, H, K, V).
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    check_arguments("chunk_retention", kwargs)
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_retention`."""
    check_arguments("fused_chunk_retention", kwargs)
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_retention` in either direction; with state_v_first states are (N, H, V, K)."""
    v_first = check_arguments("fused_recurrent_retention", kwargs, state_v_first)
    return _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, v_first, reverse)


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_retention` without states: (o, None)."""
    check_arguments("parallel_retention", kwargs)
    _check_attentions("parallel_retention", output_attentions)
    return _retention(q, k, v, scale, None, False, cu_seqlens)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """Linear attention whose head h has the log decay -8 h / H (1 - layer_idx / num_layers).

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V).
        initial_state: (N, H, K, V).
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    check_arguments("chunk_lightning_attn", kwargs)
    decay = _lightning(v, layer_idx, num_layers)
    return _attend(q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_lightning_attn` in either direction."""
    check_arguments("fused_recurrent_lightning_attn", kwargs)
    decay = _lightning(v, layer_idx, num_layers)
    return _attend(q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens, reverse=reverse)


def _lightning(v: Tensor, layer_idx: int, num_layers: int) -> Tensor:
    H = v.shape[2]
    return torch.arange(H, dtype=torch.float32, device=v.device) * (-8 / H * (1 - layer_idx / num_layers))


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> States:
    """`seqkern.gla`: linear attention with a decay for each token and key.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V).
        g: (B, T, H, K) log decays.
        initial_state: (N, H, K, V), or with state_v_first (N, H, V, K), as the final one.
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    return _attend(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, state_v_first)


def fused_chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> States:
    """`chunk_gla`."""
    return _attend(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_gla` in either direction, with log decays of keys gk (B, T, H, K), of values gv (B, T, H, V), or both."""
    v_first = check_arguments("fused_recurrent_gla", kwargs, state_v_first)
    if gv is None:
        return _attend(q, k, v, gk, scale, initial_state, output_final_state, cu_seqlens, v_first, reverse)
    # Every value is a value head of its own, of size 1, whose state is (N, H V, K, 1).
    decay = gv.flatten(2) if gk is None else (gk[..., None, :] + gv[..., None]).flatten(2, 3)
    if initial_state is not None:
        rows = initial_state if v_first else initial_state.mT  # (N, H, V, K)
        initial_state = rows.flatten(1, 2)[..., None]
    o, state = _attend(
        q, k, v.flatten(2)[..., None], decay, scale, initial_state, output_final_state, cu_seqlens, reverse=reverse
    )
    if state is not None:
        state = state.squeeze(-1).unflatten(1, v.shape[2:])
        state = state if v_first else state.mT
    return o.reshape(v.shape), state


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> States:
    """`seqkern.rwkv6`, with scale K^-0.5 where it is None.

    Args:
        r, k: (B, T, H, K). v: (B, T, H, V).
        w: (B, T, H, K) log decays.
        u: (H, K), the bonus.
        initial_state: (N, H, K, V).
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    check_arguments("chunk_rwkv6", kwargs)
    bonus = {"read": "previous", "bonus": u}
    return _attend(r, k, v, w, scale, initial_state, output_final_state, cu_seqlens, **bonus)


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_rwkv6` in either direction."""
    check_arguments("fused_recurrent_rwkv6", kwargs)
    bonus = {"read": "previous", "bonus": u}
    return _attend(r, k, v, w, scale, initial_state, output_final_state, cu_seqlens, reverse=reverse, **bonus)


def _attend(
    q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens, v_first=False, reverse=False, **read
) -> States:
    options = sequence_options(scale, initial_state, output_final_state, cu_seqlens, v_first, reverse)
    return pair(linear_attention(q, k, v, decay, **options, **read), v_first)


def _retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, v_first=False, reverse=False) -> States:
    options = sequence_options(scale, initial_state, output_final_state, cu_seqlens, v_first, reverse)
    return pair(retention(q, k, v, **options), v_first)


def _both(g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    """The decay of both, (B, T, H) or (H,)."""
    return g_gamma if g is None else g if g_gamma is None else g + g_gamma


def _check_attentions(name: str, output_attentions: bool) -> None:
    if output_attentions:
        raise NotImplementedError(f"{name}: output_attentions must be False: no attention matrix is made")
