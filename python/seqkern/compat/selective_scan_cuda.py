"""The extension module selective_scan_cuda of mamba_ssm, for code that calls its two functions, mamba_ssm among them.

Arguments and results are those of mamba_ssm 2.3, on any device and in any dtype of `seqkern.selective_scan`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import accumulator
from ..ops.selective_scan import selective_scan

VERSION = "2.3.2"  # of the interface
MODULES = {"selective_scan_cuda": ("bwd", "fwd")}
_TOKENS = 2048  # between the states in x


@torch.no_grad()
def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out, x], with z [out, x, out_z]: before the gate, and after it.

    x: (B, D, ceil(L / 2048), 2 N): pairs of the product of all decays so far and the state, after every 2048 tokens and
    after the last.
    """
    wide, L = accumulator(u.dtype), u.shape[2]
    outs, pairs, state = [], [], None
    time = u.new_zeros(u.shape[:2], dtype=wide)  # (B, D), the sum of delta so far
    for begin in range(0, max(L, 1), _TOKENS):
        tokens = slice(begin, begin + _TOKENS)
        step = delta[..., tokens].to(wide)
        step = step if delta_bias is None else step + delta_bias[:, None]
        step = F.softplus(step) if delta_softplus else step
        time = time + step.sum(-1)
        projections = (_cut(B, A, tokens), _cut(C, A, tokens))
        args = (u[..., tokens].to(wide), step, A, *projections, D, None, None, False, True)
        out, state = selective_scan(*args, initial_state=state)
        outs.append(out)
        pairs.append(torch.stack([torch.exp(time[..., None] * A), state], dim=-1).flatten(-2))
    out = torch.cat(outs, dim=-1)
    gated = [] if z is None else [(out * F.silu(z.to(wide))).to(u.dtype)]
    return [out.to(u.dtype), torch.stack(pairs, dim=2), *gated]


def _cut(projection: Tensor, A: Tensor, tokens: slice) -> Tensor:
    """B or C of these tokens: (D, N), the same for all, or (B, G, N, L), with complex A (B, G, N, 2 L)."""
    if projection.dim() == 2:
        return projection
    parts = 2 if A.is_complex() else 1
    return projection[..., parts * tokens.start : parts * tokens.stop]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], with z also dz, and with recompute_out_z also out_z.

    x and out are not needed: the forward is run again. A given dz is written in place, which costs a copy.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, delta_bias)]
    with torch.enable_grad():
        y = selective_scan(*leaves, delta_softplus)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dout))
    *grads, computed_dz, ddelta_bias = (None if leaf is None else next(grads) for leaf in leaves)
    results = [*grads, ddelta_bias]
    if z is not None:
        results.append(computed_dz if dz is None else dz.copy_(computed_dz))
    return [*results, y.detach()] if recompute_out_z else results
