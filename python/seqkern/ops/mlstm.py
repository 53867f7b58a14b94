"""The matrix memory of xLSTM: linear attention (linear_attention.py has the equations) with exponential input gates,
sigmoid forget gates and a normalizer, in a scale that keeps its numbers small.

What linear_attention calls S and z are C and n here, both in the scale exp(m): the states of the paper's equations 19
and 20 are exp(m) C and exp(m) n.
"""

from __future__ import annotations

from torch import Tensor

from .._recurrence import default_scale
from .._torch import autocast_operands, forbid_grad
from . import _linear_attention_plain as plain
from ._linear_attention import attend, attend_step, joined, parts_of
from ._linear_attention_plain import EXP, MAX, Options

__all__ = ["mlstm", "mlstm_step", "reference", "reference_step"]

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    r"""The mLSTM cell of xLSTM [2405.04517, equations 19 to 27].

    .. math::
        C_t = \sigma(f_t) \, C_{t-1} + e^{i_t} k_t v_t^\top, \quad
        n_t = \sigma(f_t) \, n_{t-1} + e^{i_t} k_t, \quad
        o_t = \frac{scale \; C_t^\top q_t}{\max(|scale \; n_t \cdot q_t|, 1)}

    computed with the running maximum :math:`m_t = \max(\log \sigma(f_t) + m_{t-1}, i_t)` [equations 15 to 17 there] and
    with C and n divided by exp(m), which changes no value, so that input gates may be of any size. The paper scales k
    by K^-0.5; here ``scale`` does, which is the same.

    Args:
        q, k: (B, L, H, K), in the dtype of v.
        v: (B, L, HV, V), float32, bfloat16, float16 or float64. HV is a multiple of H: key head h serves value heads
            h HV/H to (h + 1) HV/H - 1. Of q, k and v any strides; copied where the last dimension is not contiguous.
        i: (B, L, HV), input gates before their exp, in a dtype of their own. -inf leaves a token out.
        f: (B, L, HV), forget gates before their sigmoid, likewise. -inf forgets everything.
        scale: K^-0.5 if None.
        initial_state: (C, n, m) of shapes (N, HV, K, V), (N, HV, K) and (N, HV), as a call returned it; None is the
            empty state C = 0, n = 0, m = -inf, and so is every head with m = -inf. N is B, or the number of sequences
            in cu_seqlens.
        return_final_state: also return the state after the last token.
        cu_seqlens: (N + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        reverse: run from the last token to the first; the state enters at token L - 1.
        eps: is added to the divisor in the scale exp(m): to the larger of |scale n_t . q_t| and exp(-m_t). May be 0.

    Returns:
        o (B, L, HV, V) in the dtype of v, zero while the state is empty; with return_final_state, (o, (C, n, m)), the
        state in float32 (float64 for float64 v).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.

    Gradients are those of this function, normalizer, maximum and states included. Where f_t and the state before make
    as large a maximum as i_t, its gradient goes to them. Repeatability, rounding of half precision, and NaN are as in
    `seqkern.linear_attention`. Under autocast q, k and v are cast, gates and states never.

    Memory: o is kept for the backward, and 8 bytes for each token and head (16 for float64 v). Second derivatives and
    forward mode are as in `seqkern.linear_attention`.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 8), torch.randn(2, 16, 3, 4)
        >>> i, f = torch.randn(2, 16, 3), torch.randn(2, 16, 3)
        >>> o, (C, n, m) = seqkern.mlstm(q, k, v, i, f, return_final_state=True)
        >>> o.shape, C.shape, n.shape, m.shape
        (torch.Size([2, 16, 3, 4]), torch.Size([2, 3, 8, 4]), torch.Size([2, 3, 8]), torch.Size([2, 3]))
    """
    v, q, k = autocast_operands(v, q, k)
    state = parts_of("mlstm", "initial_state", initial_state, "Cnm")
    tensors = (q, k, v, f, i, None, None, None, None, None, *state)
    return joined(attend(tensors, (cu_seqlens, None), _options(q, scale, eps, reverse), return_final_state))


def mlstm_step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running `mlstm`: moves the state on in place and returns the token's output.

    Args:
        state: (C, n, m) of shapes (R, HV, K, V), (R, HV, K) and (R, HV), any strides, any floating dtypes, updated in
            place. A head with m = -inf is empty, whatever its C and n.
        q, k: (B, H, K), in the dtype of v.
        v: (B, HV, V).
        i, f: (B, HV).
        scale, eps: as in `mlstm`.
        state_indices: (B,) int32 or int64: the row of state of each row of v. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        o in the shape and dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.

    Example:
        >>> import torch, seqkern
        >>> q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 4)
        >>> i, f = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
        >>> o, state = seqkern.mlstm(*(t[:, :4] for t in (q, k, v, i, f)), return_final_state=True)
        >>> last = seqkern.mlstm_step(state, *(t[:, 4] for t in (q, k, v, i, f)))
        >>> torch.allclose(last, seqkern.mlstm(q, k, v, i, f)[:, 4], atol=1e-5)
        True
    """
    C, n, m = parts = parts_of("mlstm_step", "state", state, "Cnm")
    v, q, k = autocast_operands(v, q, k)
    forbid_grad("mlstm_step", **{"state's C": C, "state's n": n, "state's m": m}, q=q, k=k, v=v, i=i, f=f)
    tensors = (q, k, v, f, i, None, None, None, None, None)
    return attend_step(parts, tensors, _options(q, scale, eps), state_indices)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, State]:
    """`mlstm` in plain torch, token by token, in the widest dtype of its arguments."""
    state = parts_of("mlstm", "initial_state", initial_state, "Cnm")
    tensors = (q, k, v, f, i, None, None, None, None, None, *state)
    return joined(plain.attend(tensors, (cu_seqlens, None), _options(q, scale, eps, reverse), return_final_state))


def reference_step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`mlstm_step` in plain torch."""
    tensors = (q, k, v, f, i, None, None, None, None, None)
    return plain.attend_step(tuple(state), tensors, _options(q, scale, eps), state_indices)


def _options(q: Tensor, scale: float | None, eps: float, reverse: bool = False) -> Options:
    return Options(EXP, MAX, scale=default_scale(q) if scale is None else scale, eps=eps, reverse=reverse)
