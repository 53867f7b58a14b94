"""The delta rules of fla: DeltaNet, Gated DeltaNet and Kimi Delta Attention, as `seqkern.delta_rule`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.delta_rule import delta_rule, delta_rule_step
from ._fla_arguments import States, check_arguments, pair, sequence_options


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs,
) -> States:
    """`seqkern.delta_rule` without decay.

    Args:
        q, k: (B, T, H, K). v: (B, T, HV, V).
        beta: (B, T, HV).
        initial_state: (N, HV, K, V).
        use_qk_l2norm_in_kernel: the operator's qk_l2norm.
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    check_arguments("chunk_delta_rule", kwargs)
    return _delta_rule(
        q, k, v, beta, None, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> States:
    """`chunk_delta_rule`; beta is 1 where it is None."""
    return _delta_rule(
        q, k, v, beta, None, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs,
) -> States:
    """`seqkern.delta_rule` with a decay for each token and head. The decay comes before beta, here and in fla.

    Args:
        q, k: (B, T, H, K). v: (B, T, HV, V).
        g: (B, T, HV) log decays; with use_gate_in_kernel=True they are -exp(A_log) softplus(g + dt_bias), A_log and
            dt_bias (HV,).
        beta: (B, T, HV); with use_beta_sigmoid_in_kernel its sigmoid, with allow_neg_eigval twice that.
        initial_state: (N, HV, K, V), or with state_v_first (N, HV, V, K), as the final one.
        use_qk_l2norm_in_kernel: the operator's qk_l2norm.
        cu_seqlens: (N + 1,): sequences in a batch of one.
        cp_context: None.
    """
    name = "chunk_gated_delta_rule"
    v_first = check_arguments(name, kwargs, state_v_first)
    _check_context(name, cp_context)
    g = _gate(name, g, kwargs.get("use_gate_in_kernel", False), kwargs.get("A_log"), kwargs.get("dt_bias"))
    beta = _beta(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _delta_rule(
        q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, v_first
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_gated_delta_rule` with log decays of heads, of keys gk (B, T, HV, K) and of values gv (B, T, HV, V), which
    add up; beta is 1 where it is None."""
    name = "fused_recurrent_gated_delta_rule"
    v_first = check_arguments(name, kwargs, state_v_first)
    g = _gate(name, g, use_gate_in_kernel, A_log, dt_bias)
    if gk is not None:
        g = gk if g is None else gk + g[..., None]
    beta = _beta(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options = scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, v_first
    if gv is None:
        return _delta_rule(q, k, v, beta, g, *options)
    return _with_decays_of_values(q, k, v, beta, g, gv, *options)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs,
) -> States:
    """`seqkern.delta_rule` with a decay for each token and key. The decay comes before beta, here and in fla.

    Args:
        q, k: (B, T, H, K). v: (B, T, HV, V).
        g: (B, T, HV, K) log decays; with use_gate_in_kernel they are -exp(A_log) softplus(g + dt_bias), or with a
            lower_bound lower_bound sigmoid(exp(A_log) (g + dt_bias)), with A_log of HV and dt_bias of HV K elements.
        beta: (B, T, HV); with use_beta_sigmoid_in_kernel its sigmoid, with allow_neg_eigval twice that.
        initial_state: (N, HV, K, V), or with state_v_first (N, HV, V, K), as the final one.
        use_qk_l2norm_in_kernel: the operator's qk_l2norm.
        return_intermediate_states, cp_context: False and None.
        cu_seqlens: (N + 1,): sequences in a batch of one.
    """
    v_first = check_arguments("chunk_kda", kwargs, state_v_first)
    _check_context("chunk_kda", cp_context)
    if return_intermediate_states:
        raise NotImplementedError("chunk_kda: return_intermediate_states must be False: no state is kept")
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        raise ValueError("chunk_kda: safe_gate with use_gate_in_kernel needs a lower_bound")
    g = _gate("chunk_kda", g, use_gate_in_kernel, kwargs.get("A_log"), kwargs.get("dt_bias"), lower_bound)
    beta = _beta("chunk_kda", beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _delta_rule(
        q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, v_first
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> States:
    """`chunk_kda`."""
    v_first = check_arguments("fused_recurrent_kda", kwargs, state_v_first)
    g = _gate("fused_recurrent_kda", g, use_gate_in_kernel, A_log, dt_bias, lower_bound)
    beta = _beta("fused_recurrent_kda", beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _delta_rule(
        q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, v_first
    )


def _delta_rule(
    q, k, v, beta, g, scale, initial_state, output_final_state, normalize, cu_seqlens, v_first=False
) -> States:
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    if v.shape[1] == 1 and cu_seqlens is None and initial_state is not None:
        tensors = [t for t in (q, k, v, beta, g, initial_state) if t is not None]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return _token(q, k, v, beta, g, scale, initial_state, output_final_state, normalize, v_first)
    options = sequence_options(scale, initial_state, output_final_state, cu_seqlens, v_first)
    return pair(delta_rule(q, k, v, beta, log_decay=g, qk_l2norm=normalize, **options), v_first)


def _token(q, k, v, beta, g, scale, initial_state, output_final_state, normalize, v_first) -> States:
    """One token behind a state, which is left as it is."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    state = initial_state.to(dtype, copy=True)
    q, k, v, beta = (t[:, 0] for t in (q, k, v, beta))
    decay = None if g is None else g[:, 0]
    o = delta_rule_step(
        state.mT if v_first else state, q, k, v, beta, log_decay=decay, scale=scale, qk_l2norm=normalize
    )
    return o[:, None], state if output_final_state else None


def _with_decays_of_values(
    q, k, v, beta, g, gv, scale, initial_state, output_final_state, normalize, cu_seqlens, v_first
) -> States:
    """Every value is a value head of its own, of size 1, whose state is (N, HV V, K, 1)."""
    HV, V = v.shape[2:]
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    if g is not None and g.dim() == 4:
        decay = (g[..., None, :] + gv[..., None]).flatten(2, 3)
    else:
        decay = (gv if g is None else gv + g[..., None]).flatten(2)
    if initial_state is not None:
        rows = initial_state if v_first else initial_state.mT  # (N, HV, V, K)
        initial_state = rows.flatten(1, 2)[..., None]
    values, betas = v.flatten(2)[..., None], beta.repeat_interleave(V, dim=2)
    options = sequence_options(scale, initial_state, output_final_state, cu_seqlens)
    o, state = pair(delta_rule(q, k, values, betas, log_decay=decay, qk_l2norm=normalize, **options))
    if state is not None:
        state = state.squeeze(-1).unflatten(1, (HV, V))
        state = state if v_first else state.mT
    return o.reshape(v.shape), state


def _gate(name, g, in_kernel, A_log, dt_bias, lower_bound=None):
    """Log decays, (B, T, HV) or (B, T, HV, K)."""
    if not in_kernel:
        return g
    if A_log is None or g is None:
        raise ValueError(f"{name}: use_gate_in_kernel needs g and A_log")
    of_head = g.shape[2:]
    rate = A_log.float().exp().reshape(-1, *[1] * (len(of_head) - 1))
    g = g.float() if dt_bias is None else g.float() + dt_bias.float().reshape(of_head)
    return -rate * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)


def _beta(name, beta, sigmoid, twice):
    if twice and not sigmoid:
        raise ValueError(f"{name}: allow_neg_eigval needs use_beta_sigmoid_in_kernel")
    if beta is None or not sigmoid:
        return beta
    return beta.sigmoid() * 2 if twice else beta.sigmoid()


def _check_context(name: str, cp_context) -> None:
    if cp_context is not None:
        raise NotImplementedError(f"{name}: cp_context must be None: a sequence is on one device")
