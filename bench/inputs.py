"""What the rows of several operators are made of."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

PIECE = 64  # tokens of a reference between two checkpoints


def normal(device: str) -> Callable[..., torch.Tensor]:
    """Normal numbers of any size, the same ones from every new generator."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *size: torch.randn(size, generator=generator, device=device)


def by_pieces(function: Callable, over_time: tuple[str, ...]) -> Callable:
    """A function of seqkern.reference, which keeps a state for every token, on PIECE tokens at a time."""

    def reference(**inputs):
        names = [name for name in over_time if name in inputs]
        rest = {name: value for name, value in inputs.items() if name not in names}
        ys, state = [], None
        for piece in zip(*(inputs[name].split(PIECE, dim=1) for name in names), strict=True):
            tokens = dict(zip(names, piece, strict=True))
            y, state = checkpoint(
                function, **tokens, **rest, initial_state=state, return_final_state=True, use_reentrant=False
            )
            ys.append(y)
        return torch.cat(ys, dim=1)

    return reference
