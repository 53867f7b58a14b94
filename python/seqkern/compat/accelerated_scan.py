"""The functions of the package accelerated_scan: `seqkern.linear_scan` in the layout (B, C, T).

Names, argument orders and layouts are those of accelerated_scan 0.3, and of `accelerated_scan.triton`, as `scalar` was
called before. Beyond it: CPU, float64, any length everywhere, carries in float32 for 16-bit data, gates and tokens of
different dtypes, gates of size 1 in some dimensions, second derivatives. The differences:

- Time is the last dimension here and channels are in seqkern: gates and tokens are copied into the order (B, T, C) and
  the result back. Code that has its data as (B, T, C) saves that by calling `seqkern.linear_scan`. On a CPU nothing is
  copied where gates and tokens have one shape: there every channel is scanned as a sequence of one channel.
- `complex.scan` takes real gates too.
- `split`, `merge` and `scan1` of `ref`, and the Triton kernels, are not here.
- Bad arguments raise seqkern's errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from ..ops.linear_scan import linear_scan

VERSION = "0.3.1"  # of the interface
MODULES = {
    "accelerated_scan": (),
    "accelerated_scan.complex": {"Scan": "Scan", "scan": "scan_inputs"},
    "accelerated_scan.ref": {"scan": "scan_ref"},
    "accelerated_scan.scalar": {"Scan": "Scan", "scan": "scan_inputs"},
    "accelerated_scan.triton": ("Scan", "scan"),
    "accelerated_scan.warp": ("Scan", "scan", "scan_forward", "warpscan_backward", "warpscan_forward"),
}


def scan(gates: Tensor, tokens: Tensor) -> Tensor:
    """x_t = gates_t x_{t-1} + tokens_t, differentiable in both.

    Args:
        gates, tokens: (B, C, T), real or complex.

    Returns:
        x (B, C, T), contiguous, in the dtype of tokens, or complex where gates are.
    """
    return scan_forward(gates, tokens)


def scan_inputs(forget: Tensor, inputs: Tensor) -> Tensor:
    """`scan` as the modules scalar and complex call its arguments."""
    return scan_forward(forget, inputs)


def scan_forward(gates: Tensor, tokens: Tensor, reverse: bool = False) -> Tensor:
    """`scan` in one direction or the other; reversed it starts at the last token."""
    if tokens.device.type == "cpu" and tokens.dim() == 3 and gates.shape == tokens.shape:
        channels = (t.flatten(0, 1)[..., None] for t in (gates, tokens))  # (B C, T, 1)
        return linear_scan(*channels, reverse=reverse)[..., 0].unflatten(0, tokens.shape[:2])
    # Copied here rather than by the operator, which would keep the originals for the backward and copy them again.
    x = linear_scan(gates.mT.contiguous(), tokens.mT.contiguous(), reverse=reverse)
    return x.mT.contiguous()


def scan_ref(
    gates: Tensor,
    tokens: Tensor,
    mul: Callable = torch.mul,
    add: Callable = torch.add,
    zeros_like: Callable = torch.zeros_like,
    ones_like: Callable = torch.ones_like,
    reverse: bool = False,
) -> Tensor:
    """`scan`; with other operations than torch's a loop over time, which starts from zeros_like.

    ones_like is not used.
    """
    if mul is torch.mul and add is torch.add:
        return scan_forward(gates, tokens, reverse)
    order = -1 if reverse else 1
    x, xs = zeros_like(tokens[..., :1]), []
    for gate, token in list(zip(gates.split(1, -1), tokens.split(1, -1), strict=True))[::order]:
        x = add(mul(x, gate), token)
        xs.append(x)
    return torch.cat(xs[::order], dim=-1) if xs else tokens.clone()


class Scan:
    """For code that calls ``Scan.apply``."""

    apply = staticmethod(scan)


@torch.no_grad()
def warpscan_forward(gates: Tensor, tokens: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """`scan_forward` into out, without a gradient."""
    return out.copy_(scan_forward(gates, tokens, reverse))


@torch.no_grad()
def warpscan_backward(gates: Tensor, output: Tensor, output_grad: Tensor, gates_grad: Tensor, tokens_grad: Tensor):
    """The gradients of `scan`, whose result was output, into the last two arguments."""
    options = (None, None, None, None, False, False, False, not settings.batch_invariant)
    db, da = library.ops.linear_scan_bwd(output_grad.mT, None, gates.mT, output.mT, *options)
    gates_grad.copy_(da.mT)
    tokens_grad.copy_(db.mT)
