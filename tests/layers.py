"""What the tests of seqkern.nn's layers share: small layers, and states of one part or several."""

import torch

B, L, DIM = 2, 11, 12


def small(construct, device="cpu", dtype=torch.float32):
    """A layer whose parameters are all other than where they begin, and (B, L, DIM) tokens."""
    torch.manual_seed(0)
    layer = construct(device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(B, L, DIM, dtype=dtype, device=device)


def some_state(layer, rows):
    """As tokens before have left it: no part is zero."""
    before = torch.randn(rows, 5, DIM, dtype=next(layer.parameters()).dtype, device=next(layer.parameters()).device)
    with torch.no_grad():
        return layer(before, return_state=True)[1]


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def map_parts(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
