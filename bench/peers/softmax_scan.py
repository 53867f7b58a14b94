"""Competitors of softmax_scan and softmax_scan_step."""

import torch
import torch.nn.functional as F
from torch._higher_order_ops.associative_scan import associative_scan

from peers import Peer, compiled

FORWARD = frozenset({"forward"})
SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})


def sums(s, v):
    """Cumulative sums in the scale of the largest score, in which early ones vanish where scores spread far."""
    largest = s.amax(1, keepdim=True)
    s = (s - largest).float()
    weighted = (s.exp()[..., None] * v).cumsum(1)
    return (weighted * torch.exp(-s.logcumsumexp(1))[..., None]).to(v.dtype)


def sums_each(cu_seqlens, s, v):
    """A pack, one sequence after another."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([sums(*pieces) for pieces in zip(s.split(lengths, 1), v.split(lengths, 1), strict=True)], dim=1)


def loop(s, v):
    """As the equations stand: stable, and one token at a time."""
    s, dtype = s.float(), v.dtype
    m, n, w = torch.full_like(s[:, 0], -torch.inf), 0, 0
    os = []
    for s_t, v_t in zip(s.unbind(1), v.float().unbind(1), strict=True):
        m, n, w = _token(m, n, w, s_t, v_t)
        os.append(w / n[..., None])
    return torch.stack(os, dim=1).to(dtype)


def _token(m, n, w, s, v):
    largest = torch.maximum(m, s)
    kept, weight = torch.exp(m - largest), torch.exp(s - largest)
    return largest, kept * n + weight, kept[..., None] * w + weight[..., None] * v


def associative(s, v):
    """The stable sums by the parallel scan that torch has under development."""
    s = s.float()[..., None].expand(v.shape)
    mode = "pointwise" if s.is_cuda else "generic"
    _, n, w = associative_scan(_combine, (s, torch.ones_like(s), v.float()), dim=1, combine_mode=mode)
    return (w / n).to(v.dtype)


def _combine(left, right):
    m = torch.maximum(left[0], right[0])
    kept, weight = torch.exp(left[0] - m), torch.exp(right[0] - m)
    return m, kept * left[1] + weight * right[1], kept * left[2] + weight * right[2]


def attention(s, v):
    """Causal attention with scores that do not depend on the query: quadratic in L. Zeros up to V: its fast kernels
    want keys of the size of values."""
    keys = F.pad(s.mT[..., None], (0, v.shape[-1] - 1))
    queries = F.pad(torch.ones_like(keys[..., :1]), (0, v.shape[-1] - 1))
    return F.scaled_dot_product_attention(queries, keys, v.transpose(1, 2), is_causal=True, scale=1.0).transpose(1, 2)


def step(m, n, w, s, v):
    largest, total, weighted = _token(m, n, w, s, v)
    m.copy_(largest), n.copy_(total), w.copy_(weighted)
    return (weighted / total[..., None]).to(v.dtype)


def _long(row):
    return "quadratic in L, so in the short rows only" if row.shape[1] > 2048 else ""


PACK = frozenset({"cu_seqlens"})

PEERS = (
    Peer("torch", lambda: sums, SEQUENCES),
    Peer("torch", lambda: sums_each, SEQUENCES, options=PACK),
    Peer("torch", lambda: step, STEP),
    Peer("compiled", compiled(sums), SEQUENCES, compiles=True),
    Peer("compiled", compiled(step), STEP, compiles=True),
    Peer("loop", lambda: loop, SEQUENCES, slow=True),
    Peer("associative_scan compiled", compiled(associative), SEQUENCES, compiles=True),
    Peer("attention", lambda: attention, SEQUENCES, unfit=_long),
)
