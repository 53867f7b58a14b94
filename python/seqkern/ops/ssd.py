"""The state space dual of Mamba-2: linear attention (linear_attention.py has the equations) whose decays and weights
come from step sizes."""

from __future__ import annotations

import math

from torch import Tensor

from .._torch import autocast_operands, forbid_grad
from . import _linear_attention_plain as plain
from ._linear_attention import attend, attend_step, joined, parts_of
from ._linear_attention_plain import DELTA, Options

__all__ = ["reference", "reference_step", "ssd", "ssd_step"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The selective state space model of Mamba-2 [2405.21060, sections 2.4 and 6].

    .. math::
        \Delta_t = \mathrm{clamp}(\mathrm{softplus}(dt_t + dt\_bias)), \quad
        h_t = e^{\Delta_t A} \, h_{t-1} + \Delta_t \, x_t B_t^\top, \quad
        y_t = (h_t C_t + D x_t) \, \mathrm{silu}(z_t)

    Args:
        x: (B, L, H, P), float32, bfloat16, float16 or float64. Of x, z, B and C any strides; copied where the last
            dimension is not contiguous.
        dt: (B, L, H), the step sizes, in a dtype of their own.
        A: (H,), at most 0 where step sizes are positive; larger values have no defined result.
        B, C: (B, L, G, N), in the dtype of x. H is a multiple of G: group g is for heads g H/G to (g + 1) H/G - 1.
        D: (H,) or (H, P), or None: y gets D x.
        z: (B, L, H, P) or None: y is multiplied by silu(z).
        dt_bias: (H,) or None: is added to dt.
        dt_softplus: dt goes through softplus (after the bias).
        dt_limit: (low, high), what step sizes are clamped to, last of all.
        initial_state: (S, H, P, N); None is zeros. S is B, or the number of sequences in cu_seqlens.
        return_final_state: also return the state after the last token.
        cu_seqlens: (S + 1,) int32 or int64: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one.
        seq_idx: (B, L) int32: in each row every maximal run of one id is a sequence, ids below 0 are padding with zero
            output and zero gradient. The initial state enters the row's first sequence, the final state follows its
            last token that is not padding. Not together with cu_seqlens.
        reverse: run from the last token to the first; the state enters at token L - 1.

    Returns:
        y (B, L, H, P) in the dtype of x; with return_final_state, (y, state), the state (S, H, P, N) in float32
        (float64 for float64 x).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, named with what was expected. Values of cu_seqlens are
            checked on the CPU, and on CUDA where SEQKERN_CHECK=1 is set; else they are clamped there.
        ValueError: a dt_limit that is not two numbers in order.

    Repeatability, rounding of half precision, and NaN are as in `seqkern.linear_attention`. Under autocast x, B and C
    are cast, dt, A, D, z, dt_bias and states never.

    Memory: nothing is kept for the backward besides the inputs, and with z the output before its gate. Second
    derivatives and forward mode are as in `seqkern.linear_attention`.

    Example:
        >>> import torch, seqkern
        >>> x, dt, A = torch.randn(2, 16, 4, 8), torch.rand(2, 16, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 16, 1, 5), torch.randn(2, 16, 1, 5)
        >>> y, state = seqkern.ssd(x, dt, A, B, C, return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 16, 4, 8]), torch.Size([2, 4, 8, 5]))
    """
    x, B, C = autocast_operands(x, B, C)
    tensors = (C, B, x, dt, None, A, dt_bias, None, D, z, *parts_of("ssd", "initial_state", initial_state, "h"))
    options = _options("ssd", dt_softplus, dt_limit, reverse)
    return joined(attend(tensors, (cu_seqlens, seq_idx), options, return_final_state))


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token of a running `ssd`: moves the state on in place and returns the token's output.

    Args:
        state: (R, H, P, N), any strides, any floating dtype, updated in place.
        x, z: (B, H, P).
        dt: (B, H).
        B, C: (B, G, N), in the dtype of x.
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        state_indices: (B,) int32 or int64: the row of state of each row of x. Negative rows are skipped: their output
            is zero and no state changes. No row may be named twice. None: row b for b, and R = B.

    Returns:
        y in the shape and dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an input that requires a gradient in grad mode.
        ValueError: a dt_limit that is not two numbers in order.

    Example:
        >>> import torch, seqkern
        >>> x, dt, A = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 5, 1, 3), torch.randn(2, 5, 1, 3)
        >>> first = (t[:, :4] for t in (x, dt)), (t[:, :4] for t in (B, C))
        >>> y, state = seqkern.ssd(*first[0], A, *first[1], return_final_state=True)
        >>> last = seqkern.ssd_step(state, x[:, 4], dt[:, 4], A, B[:, 4], C[:, 4])
        >>> torch.allclose(last, seqkern.ssd(x, dt, A, B, C)[:, 4], atol=1e-5)
        True
    """
    x, B, C = autocast_operands(x, B, C)
    forbid_grad("ssd_step", state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    parts = parts_of("ssd_step", "state", state, "h")[:1]
    tensors = (C, B, x, dt, None, A, dt_bias, None, D, z)
    return attend_step(parts, tensors, _options("ssd_step", dt_softplus, dt_limit), state_indices)


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd` in plain torch, token by token, in the widest dtype of its arguments."""
    tensors = (C, B, x, dt, None, A, dt_bias, None, D, z, initial_state, None, None)
    options = _options("ssd", dt_softplus, dt_limit, reverse)
    return joined(plain.attend(tensors, (cu_seqlens, seq_idx), options, return_final_state))


def reference_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state_indices: Tensor | None = None,
) -> Tensor:
    """`ssd_step` in plain torch."""
    tensors = (C, B, x, dt, None, A, dt_bias, None, D, z)
    return plain.attend_step((state,), tensors, _options("ssd_step", dt_softplus, dt_limit), state_indices)


def _options(op: str, dt_softplus: bool, dt_limit: tuple[float, float], reverse: bool = False) -> Options:
    try:
        low, high = map(float, dt_limit)
        in_order = low <= high
    except (TypeError, ValueError):
        in_order = False
    if not in_order:
        raise ValueError(f"{op}: dt_limit must be two numbers (low, high) with low <= high, got {dt_limit!r}")
    return Options(DELTA, softplus=dt_softplus, low=low, high=high, value_major=True, reverse=reverse)
