r"""Linear attention with decays: a matrix of keys and values that every token adds to and reads.

Equations (the tags stand beside the code in csrc/linear_attention), for each value head, with keys k_t of size K and
values v_t of size V; the README there derives the chunk form:

    [gate]    g_t, w_t: log decay and weight of a token; here w = 1
    [state]   S_t = diag(exp g_t) S_{t-1} + w_t k_t v_t^T
    [sum]     z_t = exp(g_t) z_{t-1} + w_t k_t
    [read]    n_t = scale S_t^T q_t, or n_t = scale (S_{t-1}^T q_t + (q_t . (bonus * k_t)) v_t)
    [norm]    d_t = 1, or z_t . q_t + eps, or max(|scale z_t . q_t|, exp(-m_t)) + eps
    [out]     o_t = n_t / d_t
    [skip]    y_t = (o_t + D v_t) silu(gate_t)

Kernels go by chunks of tokens. With c_i the sum of g up to token i of a chunk and r_i = c_i (c_{i-1} where the previous
state is read), S the state before the chunk and c_C the sum of the whole:

    [scores]  P_ij = w_j sum_k q_ik k_jk exp(r_ik - c_jk) for j <= i
    [chunk]   n_i = scale (sum_j P_ij v_j + (exp(r_i) * q_i)^T S)
    [carry]   S' = diag(exp c_C) S + sum_j w_j (exp(c_C - c_j) * k_j) v_j^T

and backwards, with dS the gradient that reaches the end of the chunk:

    [dout]    do_i = dy_i silu(gate_i), dn_i = scale do_i / d_i, de_i that of z_i . q_i
    [dscores] dP_ij = dn_i . v_j + de_i
    [dq]      dq_i = sum_j w_j dP_ij (exp(r_i - c_j) * k_j) + exp(r_i) * (S dn_i + de_i z)
    [dk]      dk_j = w_j (sum_i dP_ij (exp(r_i - c_j) * q_i) + exp(c_C - c_j) * (dS v_j + dz))
    [dv]      dv_j = sum_i P_ij dn_i + w_j dS^T (exp(c_C - c_j) * k_j) + D do_j
    [dcarry]  dS_before = diag(exp c_C) dS + sum_i (exp(r_i) * q_i) dn_i^T
    [dweight] dw_j = k_j . dk_j / w_j, without the division
    [ddecay]  dg_t = sum over i >= t > j of P_ij dP_ij, and what passes t from S to o, from k to S' and from S to S'
    [dgates]  of decays and weights, the gradients of what they are made of
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._recurrence import default_scale
from .._torch import autocast_operands, forbid_grad
from . import _linear_attention_plain as plain
from ._linear_attention import attend, attend_step, joined, parts_of, register
from ._linear_attention_plain import KEY, NONE, SUM, TOKEN, UNNORMALIZED, Options

__all__ = [
    "gla",
    "linear_attention",
    "linear_attention_step",
    "reference",
    "reference_step",
    "register",
    "retention",
    "rwkv6",
]

State = Tensor | tuple[Tensor, Tensor]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    normalize: bool = False,
    read: str = "current",
    bonus: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    r"""Attention without softmax, as a recurrence in time [2006.16236, equations 16 to 20], with decays [2312.06635].

    .. math::
        S_t = \mathrm{diag}(e^{g_t}) \, S_{t-1} + k_t v_t^\top, \qquad
        o_t = scale \; S_t^\top q_t

    for every value head, with g the log decays. With ``normalize``, :math:`z_t = e^{g_t} z_{t-1} + k_t` and
    :math:`o_t = S_t^\top q_t / (z_t \cdot q_t + eps)`. With ``read="previous"`` [2404.05892, section 4.2],
    :math:`o_t = scale \, (S_{t-1}^\top q_t + (q_t \cdot (bonus * k_t)) \, v_t)`, and z is read likewise.

    Args:
        q: (B, L, H, K), in the dtype of v.
        k: (B, L, H, K), in the dtype of v.
        v: (B, L, HV, V), float32, bfloat16, float16 or float64. HV is a multiple of H: key head h serves value heads
            h HV/H to (h + 1) HV/H - 1. Of q, k and v any strides; copied where the last dimension is not contiguous.
        log_decay: at most 0, -inf forgets everything; larger values have no defined result. None (no decay), (HV,) one
            for each head, (B, L, HV) one for each token, or (B, L, HV, K) one for each key. In a dtype of its own.
        scale: of the outputs, K^-0.5 if None. No effect with normalize.
        initial_state: S (N, HV, K, V), or with normalize (S, z) with z (N, HV, K), in dtypes of their own; None is
            zeros. N is B, or the number of sequences in cu_seqlens.
        return_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        reverse: run from the last token to the first; the state enters at token L - 1.
        normalize: divide by the sum of the weights. Meant for q and k that are not negative.
        read: "current" or "previous", the state that q_t reads.
        bonus: (H, K), only with read="previous": what token t itself adds to its output; None adds nothing.
        eps: is added to the divisor.

    Returns:
        o (B, L, HV, V) in the dtype of v; with return_final_state, (o, state), the state, or both its parts, in float32
        (float64 for float64 v).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.
        ValueError: an unknown read; a bonus without read="previous".

    States and sums are float32 (float64 for float64 v) in a fixed order and without atomics: results and gradients
    repeat bitwise. Operands of matrix products of bfloat16 and float16 data may be rounded to such a dtype. With
    `seqkern.batch_invariant` a sequence gives the same bits alone, batched or packed; without it a plan may cut time to
    keep the machine busy. A NaN reaches the outputs of its chunk of 64 tokens and later ones of its sequence and head,
    nothing else. Under autocast q, k and v are cast, decays, bonus and states never.

    Memory: nothing is kept for the backward besides the inputs, and with normalize o and 4 bytes for each token and
    head (8 for float64 v). Second derivatives and forward mode are exact and slower, in plain torch operations, 32
    tokens at a time: some ten tensors (B, 32, HV, K, V), and for second derivatives two states for every 32 tokens.
    Derivatives beyond the second keep the intermediate values of all tokens.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 6, 4)
        >>> log_decay = -torch.rand(2, 16, 6)
        >>> o, state = seqkern.linear_attention(q, k, v, log_decay, return_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([2, 16, 6, 4]), torch.Size([2, 6, 8, 4]))
    """
    v, q, k = autocast_operands(v, q, k)
    options = _options("linear_attention", q, log_decay, 4, scale, normalize, read, bonus, eps, reverse)
    state = parts_of("linear_attention", "initial_state", initial_state, "Sz" if normalize else "S")
    tensors = (q, k, v, log_decay, None, None, None, bonus, None, None, *state)
    return joined(attend(tensors, (cu_seqlens, None), options, return_final_state))


def linear_attention_step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    read: str = "current",
    bonus: Tensor | None = None,
    eps: float = 1e-6,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running linear attention: moves the state on in place and returns the token's output.

    Args:
        state: S (R, HV, K, V), or with normalize (S, z) with z (R, HV, K), any strides, any floating dtypes, updated in
            place.
        q, k: (B, H, K), in the dtype of v.
        v: (B, HV, V).
        log_decay: None, (HV,), (B, HV) or (B, HV, K).
        scale, normalize, read, bonus, eps: as in `linear_attention`.
        state_indices: (B,) int32 or int64: the row of state of each row of v. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        o in the shape and dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: an unknown read; a bonus without read="previous".

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 4)
        >>> o, state = seqkern.linear_attention(q[:, :4], k[:, :4], v[:, :4], return_final_state=True)
        >>> last = seqkern.linear_attention_step(state, q[:, 4], k[:, 4], v[:, 4])
        >>> torch.allclose(last, seqkern.linear_attention(q, k, v)[:, 4], atol=1e-5)
        True
    """
    op = "linear_attention_step"
    v, q, k = autocast_operands(v, q, k)
    options = _options(op, q, log_decay, 3, scale, normalize, read, bonus, eps)
    parts = parts_of(op, "state", state, "Sz" if normalize else "S")[: 1 + normalize]
    named = {"state's S": parts[0], "state's z": parts[1]} if normalize else {"state": state}
    forbid_grad(op, **named, q=q, k=k, v=v, log_decay=log_decay, bonus=bonus)
    tensors = (q, k, v, log_decay, None, None, None, bonus, None, None)
    return attend_step(parts, tensors, options, state_indices)


def retention(
    q: Tensor, k: Tensor, v: Tensor, *, gamma: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, State]:
    r"""The retention of RetNet [2307.08621, equations 5 to 8]: linear attention with a constant decay for each head.

    .. math::
        S_t = \gamma \, S_{t-1} + k_t v_t^\top, \qquad o_t = scale \; S_t^\top q_t

    Args:
        q, k, v: as in `linear_attention`.
        gamma: (HV,), between 0 and 1; None is 1 - 2^(-5 - h) for head h.
        options: the keyword options of `linear_attention`.

    The step is `linear_attention_step` with ``log_decay=gamma.log()``.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 4)
        >>> seqkern.retention(q, k, v).shape
        torch.Size([2, 16, 3, 4])
    """
    log_decay = _log_gamma(v.shape[2], v.device) if gamma is None else gamma.log()
    return linear_attention(q, k, v, log_decay, **options)


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Tensor | tuple[Tensor, State]:
    r"""Gated linear attention [2312.06635, equation 3]: linear attention with a decay for each token and key.

    Args:
        q, k, v: as in `linear_attention`.
        log_decay: (B, L, HV, K), at most 0; any value is exact.
        options: the keyword options of `linear_attention`.

    The step is `linear_attention_step`.

    Raises:
        RuntimeError: a log_decay of another shape; whatever `linear_attention` raises.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 4)
        >>> seqkern.gla(q, k, v, -torch.rand(2, 16, 3, 8)).shape
        torch.Size([2, 16, 3, 4])
    """
    if log_decay.dim() != 4:
        raise RuntimeError(f"gla: log_decay must be (B, L, HV, K), got {tuple(log_decay.shape)}")
    return linear_attention(q, k, v, log_decay, **options)


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, *, scale: float = 1.0, **options: Any
) -> Tensor | tuple[Tensor, State]:
    r"""The time mixing of RWKV-6 [2404.05892, equations 17 and 18]: a token reads the state before it, and itself.

    .. math::
        S_t = \mathrm{diag}(e^{g_t}) \, S_{t-1} + k_t v_t^\top, \qquad
        o_t = scale \, (S_{t-1}^\top r_t + (r_t \cdot (bonus * k_t)) \, v_t)

    Args:
        r, k, v: as q, k and v in `linear_attention`.
        log_decay: (B, L, HV, K), at most 0; in the paper -exp of what its network gives.
        bonus: (H, K), the paper's u.
        scale: of the outputs.
        options: the keyword options of `linear_attention`, but for read.

    The step is `linear_attention_step` with ``read="previous"``, the bonus and the scale.

    Example:
        >>> import torch, seqkern
        >>> r, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 4)
        >>> seqkern.rwkv6(r, k, v, -torch.rand(2, 16, 3, 8), torch.randn(3, 8)).shape
        torch.Size([2, 16, 3, 4])
    """
    return linear_attention(r, k, v, log_decay, scale=scale, read="previous", bonus=bonus, **options)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    normalize: bool = False,
    read: str = "current",
    bonus: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    """`linear_attention` in plain torch, token by token, in the widest dtype of its arguments."""
    options = _options("linear_attention", q, log_decay, 4, scale, normalize, read, bonus, eps, reverse)
    state = parts_of("linear_attention", "initial_state", initial_state, "Sz" if normalize else "S")
    tensors = (q, k, v, log_decay, None, None, None, bonus, None, None, *state)
    return joined(plain.attend(tensors, (cu_seqlens, None), options, return_final_state))


def reference_step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    read: str = "current",
    bonus: Tensor | None = None,
    eps: float = 1e-6,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`linear_attention_step` in plain torch."""
    options = _options("linear_attention_step", q, log_decay, 3, scale, normalize, read, bonus, eps)
    parts = parts_of("linear_attention_step", "state", state, "Sz" if normalize else "S")[: 1 + normalize]
    tensors = (q, k, v, log_decay, None, None, None, bonus, None, None)
    return plain.attend_step(parts, tensors, options, state_indices)


def _options(op, q, log_decay, per_key_dims, scale, normalize, read, bonus, eps, reverse=False) -> Options:
    if read not in ("current", "previous"):
        raise ValueError(f'{op}: read must be "current" or "previous", got {read!r}')
    if bonus is not None and read == "current":
        raise ValueError(f'{op}: bonus needs read="previous", got read="current"')
    form = NONE if log_decay is None else KEY if log_decay.dim() == per_key_dims else TOKEN
    return Options(
        form,
        SUM if normalize else UNNORMALIZED,
        read_previous=read == "previous",
        scale=default_scale(q) if scale is None else scale,
        eps=eps,
        reverse=reverse,
    )


def _log_gamma(HV: int, device: torch.device) -> Tensor:
    """(HV,): the logarithms of 1 - 2^(-5 - h)."""
    if torch.compiler.is_compiling():
        return _new_log_gamma(HV, device)
    return _kept_log_gamma(HV, device)


def _new_log_gamma(HV: int, device: torch.device) -> Tensor:
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(HV, dtype=torch.float32, device=device)))


@functools.lru_cache(maxsize=64)
def _kept_log_gamma(HV: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _new_log_gamma(HV, device)
