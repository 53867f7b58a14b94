"""Sequences made of the tokens that go the same way."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def pack_by_route(x: Tensor, route: Tensor, num_routes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the tokens of each batch row by the routes that they take, in the order of time, without host
    synchronisation.

    A token takes several routes, and is in the pack as often: what a layer with several memories, of which every token
    reads and writes a few, gives to an operator with ``cu_seqlens`` (Mixture-of-Memories [2502.13685]). An operator's
    states are then those of the memories, (B * num_routes, ...).

    Args:
        x: (B, L, ...), what belongs to a token, of any dtype.
        route: (B, L, R), int32 or int64, from 0 to num_routes - 1.
        num_routes: of each batch row.

    Returns:
        packed (1, B * L * R, ...): the tokens of row 0's route 0, those of its route 1, and so on, then those of row 1.
        cu_seqlens (B * num_routes + 1,), int64: where each of these begins. Routes may be empty.
        order (B * L * R,), int64: packed token i is entry order[i] of route.flatten(), and so of everything that
            belongs to a token and a route: ``weight.flatten()[order]``. Of what belongs to a token alone it is entry
            ``order // R``. Back to (B, L, R, ...), a permutation that repeats bitwise:
            ``torch.empty_like(o[0]).index_copy(0, order, o[0]).unflatten(0, route.shape)``.

    Raises:
        RuntimeError: a shape or dtype that does not fit. Values of route are checked on the CPU, and on CUDA where
            SEQKERN_CHECK=1 is set; else they are clamped there.

    Example:
        >>> import torch, seqkern
        >>> x, route = torch.arange(4)[None], torch.tensor([[[0, 1], [2, 0], [2, 1], [1, 2]]])
        >>> packed, cu_seqlens, order = seqkern.pack_by_route(x, route, 3)
        >>> packed, cu_seqlens
        (tensor([[0, 1, 0, 2, 3, 1, 2, 3]]), tensor([0, 2, 5, 8]))
        >>> torch.empty_like(packed[0]).index_copy(0, order, packed[0]).unflatten(0, route.shape)
        tensor([[[0, 0],
                 [1, 1],
                 [2, 2],
                 [3, 3]]])
    """
    if route.dim() != 3 or x.shape[:2] != route.shape[:2]:
        shapes = f"{tuple(x.shape)} and {tuple(route.shape)}"
        raise RuntimeError(f"pack_by_route: x and route must be (B, L, ...) and (B, L, R), got {shapes}")
    if route.dtype not in (torch.int32, torch.int64):
        dtype = str(route.dtype).removeprefix("torch.")
        raise RuntimeError(f"pack_by_route: route must be int32 or int64, got {dtype}")
    if x.device != route.device:
        raise RuntimeError(f"pack_by_route: route must be on the device of x; move it with .to({x.device})")
    if _checks_values(route) and route.numel() and not 0 <= route.min() <= route.max() < num_routes:
        raise RuntimeError(
            f"pack_by_route: route must be from 0 to num_routes - 1 = {num_routes - 1}, got {route.min()} to "
            f"{route.max()}"
        )
    B, _, R = route.shape
    rows = num_routes * torch.arange(B, device=route.device)
    sequences = (route.clamp(0, num_routes - 1) + rows[:, None, None]).flatten()
    ordered, order = sequences.sort(stable=True)
    cu_seqlens = torch.searchsorted(ordered, torch.arange(B * num_routes + 1, device=route.device))
    return x.flatten(0, 1)[order // max(R, 1)][None], cu_seqlens, order


def _checks_values(route: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return route.device.type == "cpu" or os.environ.get("SEQKERN_CHECK") == "1"
