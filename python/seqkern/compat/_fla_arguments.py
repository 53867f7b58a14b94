"""Arguments and results that the functions of fla have in common."""

from __future__ import annotations

from torch import Tensor

States = tuple[Tensor, Tensor | None]


def sequence_options(scale, initial_state, output_final_state, cu_seqlens, v_first=False, reverse=False) -> dict:
    """seqkern's keywords; with v_first states are given as (N, H, V, K)."""
    if v_first and initial_state is not None:
        initial_state = initial_state.mT
    packing = {"cu_seqlens": cu_seqlens, "reverse": reverse}
    return {"scale": scale, "initial_state": initial_state, "return_final_state": output_final_state, **packing}


def pair(outputs, v_first: bool = False):
    """(o, final state or None)."""
    if isinstance(outputs, Tensor):
        return outputs, None
    o, state = outputs
    return o, state.mT if v_first else state


def check_arguments(name: str, kwargs: dict, state_v_first: bool = False) -> bool:
    """Whether values come first in states, by either name; arguments that fla has given up raise what it raises."""
    if "head_first" in kwargs:
        raise DeprecationWarning(f"{name}: there is no head_first; tensors are (B, T, H, ...)")
    if not kwargs.get("transpose_state_layout"):
        return state_v_first
    if state_v_first:
        raise ValueError(f"{name}: transpose_state_layout is the old name of state_v_first; give one of them")
    return True
