r"""The delta rule: a matrix of keys and values that every token reads, corrects and reads again.

Equations (the tags stand beside the code in csrc/delta_rule), for each value head, with keys k_t of size K and values
v_t of size V; the README there derives the chunk form:

    [norm]    where asked for, q and k are divided by sqrt(sum of squares + 1e-6)
    [decay]   S'_t = diag(exp g_t) S_{t-1}
    [erase]   u_t = beta_t (v_t - S'_t^T e_t), e_t = k_t where no erase key is given
    [write]   S_t = S'_t + k_t u_t^T
    [read]    o_t = scale S_t^T q_t

Kernels go by chunks of tokens. With c_i the sum of g up to token i of a chunk, c_C that of the whole and S the state
before it:

    [scores]  A_ij = sum_k e_ik k_jk exp(c_ik - c_jk) for j < i, P_ij = sum_k q_ik k_jk exp(c_ik - c_jk) for j <= i
    [solve]   (I + diag(beta) A) u = r, r_i = beta_i (v_i - S^T (exp(c_i) * e_i))
    [chunk]   o_i = scale (sum_j P_ij u_j + S^T (exp(c_i) * q_i))
    [carry]   S' = diag(exp c_C) S + sum_j (exp(c_C - c_j) * k_j) u_j^T

and backwards, with dS the gradient that reaches the end of the chunk and dn_i = scale do_i:

    [du]      du_j = sum_i P_ij dn_i + dS^T (exp(c_C - c_j) * k_j)
    [dsolve]  (I + diag(beta) A)^T w = du, b_i = beta_i w_i, dv_i = b_i
    [dbeta]   dbeta_i = w_i . u_i / beta_i, without the division
    [dscores] dP_ij = dn_i . u_j for j <= i, dA_ij = -b_i . u_j for j < i
    [dq]      dq_i = sum_j dP_ij (exp(c_i - c_j) * k_j) + exp(c_i) * (S dn_i)
    [de]      de_i = sum_j dA_ij (exp(c_i - c_j) * k_j) - exp(c_i) * (S b_i), a part of dk_i where e is k
    [dk]      dk_j = sum_i exp(c_i - c_j) * (dP_ij q_i + dA_ij e_i) + exp(c_C - c_j) * (dS u_j)
    [dcarry]  dS_before = diag(exp c_C) dS + sum_i (exp(c_i) * q_i) dn_i^T - sum_i (exp(c_i) * e_i) b_i^T
    [ddecay]  dg_t = sum over i >= t > j of P_ij dP_ij + A_ij dA_ij, and what passes t from S to o and u, from k to S'
              and from S to S'
    [dnorm]   with x' = r x the normalized, dx = r (dx' - x' (x' . dx'))
"""

from __future__ import annotations

from torch import Tensor

from .._recurrence import default_scale
from .._torch import autocast_operands, forbid_grad
from ._delta_rule import Options, attend, attend_step, plain, plain_step, register

__all__ = ["delta_rule", "delta_rule_step", "reference", "reference_step", "register"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase_key: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    qk_l2norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The delta rule as a recurrence in time, with decays: DeltaNet [2406.06484] without, Gated DeltaNet [2412.06464]
    with one for each token, Kimi Delta Attention [2510.26692] with one for each token and key.

    .. math::
        S'_t = \mathrm{diag}(e^{g_t}) \, S_{t-1}, \qquad
        S_t = S'_t + k_t \, \beta_t \, (v_t - S_t'^\top e_t)^\top, \qquad
        o_t = scale \; S_t^\top q_t

    for every value head, with g the log decays and e the erase keys, which are k unless they are given. Where k has
    length 1, ``beta`` of 1 replaces what is stored under k by v, 2 reflects the state: with beta above 1 transitions
    have negative eigenvalues.

    Args:
        q: (B, L, H, K), in the dtype of v.
        k: (B, L, H, K), in the dtype of v. The state stays bounded where beta |k|^2 is at most 2.
        v: (B, L, HV, V), float32, bfloat16, float16 or float64. HV is a multiple of H: key head h serves value heads
            h HV/H to (h + 1) HV/H - 1. Of q, k, erase_key and v any strides; copied where the last dimension is not
            contiguous.
        beta: (B, L, HV), meant for 0 to 2; any finite value is what the equations say. In a dtype of its own.
        log_decay: at most 0, -inf forgets everything; larger values have no defined result. None (no decay),
            (B, L, HV) one for each token, or (B, L, HV, K) one for each key. In a dtype of its own.
        erase_key: (B, L, H, K), in the dtype of v, used as it is; None is k, normalized where k is.
        scale: of the outputs, K^-0.5 if None.
        initial_state: (N, HV, K, V), in a dtype of its own; None is zeros. N is B, or the number of sequences in
            cu_seqlens.
        return_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        reverse: run from the last token to the first; the state enters at token L - 1.
        qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) first.

    Returns:
        o (B, L, HV, V) in the dtype of v; with return_final_state, (o, state), the state in float32 (float64 for
        float64 v).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.

    States and sums are float32 (float64 for float64 v) in a fixed order and without atomics, and so are the triangular
    systems of chunks: results and gradients repeat bitwise. Operands of matrix products of bfloat16 data, u among them,
    may be rounded to bfloat16. With `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed;
    without it a plan may cut time to keep the machine busy. A NaN reaches the outputs of its chunk of 64 tokens and
    later ones of its sequence and head, nothing else. Under autocast q, k, v and erase_key are cast, beta, decays and
    states never.

    Several updates of one token (DeltaProduct) are as many tokens: repeat q, put the decay on the first of them, keep
    the last output.

    Memory: besides the inputs, u (B, L, HV, V) is kept for the backward, in the dtype of v (float32 for float16 v).
    Second derivatives and forward mode are exact and slower, in plain torch operations, 32 tokens at a time: some ten
    tensors (B, 32, HV, K, V), and for second derivatives two states for every 32 tokens. Derivatives beyond the second
    keep the intermediate values of all tokens.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 6, 4)
        >>> beta, log_decay = 2 * torch.rand(2, 16, 6), -torch.rand(2, 16, 6)
        >>> o, state = seqkern.delta_rule(q, k, v, beta, log_decay=log_decay, qk_l2norm=True, return_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([2, 16, 6, 4]), torch.Size([2, 6, 8, 4]))
    """
    v, q, k, erase_key = _operands(v, q, k, erase_key)
    options = Options(qk_l2norm, default_scale(q) if scale is None else scale, reverse)
    outputs = attend((q, k, erase_key, v, beta, log_decay, initial_state), cu_seqlens, options, return_final_state)
    return outputs if return_final_state else outputs[0]


def delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase_key: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running delta rule: moves the state on in place and returns the token's output.

    Args:
        state: (R, HV, K, V), any strides, any floating dtype, updated in place.
        q, k: (B, H, K), in the dtype of v.
        v: (B, HV, V).
        beta: (B, HV).
        log_decay: None, (B, HV) or (B, HV, K).
        erase_key: (B, H, K), in the dtype of v; None is k.
        scale, qk_l2norm: as in `delta_rule`.
        state_indices: (B,) int32 or int64: the row of state of each row of v. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        o in the shape and dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 4)
        >>> beta, options = torch.rand(2, 5, 3), {"qk_l2norm": True}
        >>> _, state = seqkern.delta_rule(
        ...     q[:, :4], k[:, :4], v[:, :4], beta[:, :4], return_final_state=True, **options
        ... )
        >>> last = seqkern.delta_rule_step(state, q[:, 4], k[:, 4], v[:, 4], beta[:, 4], **options)
        >>> torch.allclose(last, seqkern.delta_rule(q, k, v, beta, **options)[:, 4], atol=1e-5)
        True
    """
    v, q, k, erase_key = _operands(v, q, k, erase_key)
    tensors = {"q": q, "k": k, "erase_key": erase_key, "v": v, "beta": beta, "log_decay": log_decay}
    forbid_grad("delta_rule_step", state=state, **tensors)
    options = Options(qk_l2norm, default_scale(q) if scale is None else scale)
    return attend_step(state, tuple(tensors.values()), options, state_indices)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase_key: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    qk_l2norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`delta_rule` in plain torch, token by token, in the widest dtype of its arguments."""
    options = Options(qk_l2norm, default_scale(q) if scale is None else scale, reverse)
    outputs = plain((q, k, erase_key, v, beta, log_decay, initial_state), cu_seqlens, options, return_final_state)
    return outputs if return_final_state else outputs[0]


def reference_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase_key: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`delta_rule_step` in plain torch."""
    options = Options(qk_l2norm, default_scale(q) if scale is None else scale)
    return plain_step(state, (q, k, erase_key, v, beta, log_decay), options, state_indices)


def _operands(v, q, k, erase_key):
    """Those of matrix products, as autocast wants them."""
    if erase_key is None:
        return *autocast_operands(v, q, k), None
    return autocast_operands(v, q, k, erase_key)
