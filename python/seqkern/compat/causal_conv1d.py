"""The functions of the package causal_conv1d, as compositions of seqkern's operators and torch.

Names, argument orders, layouts and dtypes of results are those of causal_conv1d 1.7. Beyond it: CPU, float64, any width
up to 64, both memory orders with every option, `seq_idx` together with states, second derivatives. The differences:

- `seq_idx`: a sequence is a run of one id. There, an id that comes back within W - 1 tokens continues its sequence.
- Bad arguments raise seqkern's errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._load import library
from ..ops.causal_conv1d import _is_silu, causal_conv1d

VERSION = "1.7.0"  # of the interface; read by code that looks for causal_conv1d.__version__
MODULES = {
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
    "causal_conv1d.cpp_functions": (
        "causal_conv1d_bwd_function",
        "causal_conv1d_fwd_function",
        "causal_conv1d_update_function",
    ),
}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`seqkern.causal_conv1d`, differentiable in every tensor argument. Autocast does not cast here.

    Args:
        x: (B, D, L).
        weight: (D, W). bias: (D,).
        seq_idx: (B, L) int32, -1 is padding.
        initial_states: (B, D, W - 1). A row that begins with padding does not read its state.
        return_final_states: return (y, final_states).
        final_states_out: (B, D, W - 1), also receives the final states (their values, no gradient).
        activation: None, "silu" or "swish".

    Returns:
        y like x, or (y, final_states): (B, D, W - 1) in x's dtype with channels contiguous.
    """
    with torch.autocast(x.device.type, enabled=False):
        outputs = causal_conv1d(
            x,
            weight,
            bias,
            activation,
            initial_state=_entering(initial_states, seq_idx),
            return_final_state=return_final_states,
            seq_idx=seq_idx,
        )
    if not return_final_states:
        return outputs
    y, final_state = outputs
    if final_states_out is not None:
        final_states_out.detach().copy_(final_state.detach())
    return y, _channels_contiguous(final_state, x.dtype)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`seqkern.causal_conv1d_step`; no gradient, also where parameters require one.

    Args:
        x: (B, D) or (B, D, T).
        conv_state: (R, D, state_len), state_len >= W - 1, updated in place.
        weight: (D, W). bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: (B,): conv_state is a circular buffer, whose column t % state_len holds token t, and the first
            token of x is number cache_seqlens. None: the newest token is in the last column.
        conv_state_indices: (B,): the row of conv_state for each row of x; negative rows are skipped.

    Returns:
        y like x.
    """
    silu = _is_silu("causal_conv1d_update", activation)
    tokens = x[..., None] if x.dim() == 2 else x
    y = causal_conv1d_update_function(tokens, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last tokens of each sequence of a pack, zeros in front of shorter ones.

    Args:
        x: (total tokens, D).
        cu_seqlens: (N + 1,) sequence boundaries.

    Returns:
        (N, D, state_len) with channels contiguous, in x's dtype.
    """
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = end + torch.arange(-state_len, 0, device=x.device)  # (N, state_len)
    if x.shape[0] == 0:
        return x.new_zeros(*token.shape, x.shape[1]).mT
    return x[token.clamp_min(0)].masked_fill((token < begin)[..., None], 0).mT


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """y; final_states_out is written in place."""
    state = _entering(initial_states, seq_idx)
    wants_state = final_states_out is not None
    outputs = library.ops.causal_conv1d_fwd(
        x, weight, bias, state, None, seq_idx, silu_activation, 1, False, wants_state
    )
    if wants_state:
        final_states_out.copy_(outputs[1])
    return outputs[0]


@torch.no_grad()
def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_states); a given dx is written in place, which costs a copy."""
    if return_dinitial_states and initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1)
    state = _entering(initial_states, seq_idx)
    computed_dx, dweight, *rest = library.ops.causal_conv1d_bwd(
        dout, dfinal_states, x, weight, bias, state, None, seq_idx, silu_activation, 1, False
    )
    dx = computed_dx if dx is None else dx.copy_(computed_dx)
    dbias = None if bias is None else rest[0]
    dinitial_states = None
    if return_dinitial_states:
        dinitial_states = _channels_contiguous(_entering(rest[-1], seq_idx), x.dtype)
    return dx, dweight, dbias, dinitial_states


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` for x: (B, D, T), every argument given."""
    if cache_seqlens is None:
        return library.ops.causal_conv1d_step(x, conv_state, weight, bias, conv_state_indices, silu_activation, 1)

    (B, D, T), W, (R, _, state_len), device = x.shape, weight.shape[1], conv_state.shape, x.device
    if state_len < W - 1 or (conv_state_indices is None and R != B):
        raise RuntimeError(
            f"causal_conv1d_update: conv_state must be (B={B}, D={D}, state_len) with state_len >= W-1={W - 1}, "
            f"got {tuple(conv_state.shape)}; pass conv_state_indices to pick rows"
        )
    first = cache_seqlens.long()[:, None]
    row = torch.arange(B, device=device) if conv_state_indices is None else conv_state_indices.long()
    kept = row >= 0

    past = (first + torch.arange(1 - W, 0, device=device)) % state_len  # (B, W - 1) columns
    state = conv_state[row.clamp_min(0)[:, None], :, past].mT  # (B, D, W - 1)
    (y,) = library.ops.causal_conv1d_fwd(x, weight, bias, state, None, None, silu_activation, 1, False, False)

    # A skipped row repeats the write of a kept one, or writes what is there already if none is kept: no row is written
    # with two values, and the host never waits for the indices.
    source = torch.where(kept, torch.arange(B, device=device), kept.int().argmax()) if B else row
    columns = (first + torch.arange(max(T - state_len, 0), T, device=device))[source] % state_len  # (B, written tokens)
    place = (row[source].clamp_min(0)[:, None], slice(None), columns)
    tokens = x[source, :, max(T - state_len, 0) :].mT.to(conv_state.dtype)  # (B, written tokens, D)
    conv_state[place] = torch.where(kept[source][:, None, None], tokens, conv_state[place])
    return y.masked_fill_(~kept[:, None, None], 0)


def _entering(states: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """The states with zeros for rows that begin with padding."""
    if states is None or seq_idx is None or seq_idx.shape[1] == 0:
        return states
    return states.masked_fill(seq_idx[:, :1, None] < 0, 0)


def _channels_contiguous(states: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the states (B, D, W - 1) in memory order (B, W - 1, D)."""
    return states.mT.to(dtype, memory_format=torch.contiguous_format, copy=True).mT
