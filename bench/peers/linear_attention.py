"""Competitors of linear_attention, ssd, mlstm and their steps."""

import importlib

import torch
import torch.nn.functional as F

from peers import Missing, Peer, compiled, functions_of_sdist, installed

FORWARD = frozenset({"forward"})
SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})
CHUNK = 64

# ---- plain PyTorch: the chunk form as batched products, and loops over tokens


def chunked(q, k, v, log_decay):
    """One decay per token. q, k (B, L, H, K), v (B, L, HV, V), log_decay (B, L, HV)."""
    dtype = v.dtype
    B, L, H, K = q.shape
    R, V = v.shape[2] // H, v.shape[3]
    n = L // CHUNK
    q, k = (t.unflatten(1, (n, CHUNK)).transpose(2, 3) for t in (q * K**-0.5, k))  # (B, n, H, C, K)
    v = v.unflatten(1, (n, CHUNK)).unflatten(3, (H, R)).permute(0, 1, 3, 4, 2, 5)  # (B, n, H, R, C, V)
    c = log_decay.unflatten(1, (n, CHUNK)).unflatten(3, (H, R)).permute(0, 1, 3, 4, 2).cumsum(-1)  # (B, n, H, R, C)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(later, -torch.inf).exp()
    o = ((q @ k.mT)[:, :, :, None] * decay).to(dtype) @ v

    rest = (c[..., -1:] - c).exp()[..., None]
    added = k.mT @ (v * rest).to(dtype).movedim(3, 4).flatten(-2)  # (B, n, H, K, R V)
    kept = c[..., -1].exp().repeat_interleave(V, -1)[..., None, :]
    states = [torch.zeros_like(added[:, 0], dtype=torch.float32)]
    for a, s in zip(kept.unbind(1), added.unbind(1), strict=True):
        states.append(a * states[-1] + s)
    before = q @ torch.stack(states[:-1], 1).to(dtype)  # (B, n, H, C, R V)
    o = o + before.unflatten(-1, (R, V)).movedim(4, 3) * c.exp()[..., None]
    return o.permute(0, 1, 4, 2, 3, 5).reshape(B, L, H * R, V).to(dtype)


def chunked_ssd(x, dt, A, B, C):
    scale = C.shape[-1] ** 0.5
    return chunked(C * scale, B, (x * dt[..., None]).to(x.dtype), dt * A)


def chunked_ssd_whole(x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    y = chunked_ssd(x, F.softplus(dt + dt_bias), A, B, C)
    return (y + D[:, None] * x).to(x.dtype) * F.silu(z)


def loop(q, k, v, log_decay):
    dtype, scale = v.dtype, q.shape[-1] ** -0.5
    decay = log_decay.exp()[..., None] if log_decay.dim() == 4 else log_decay.exp()[..., None, None]
    tokens = (t.float().unbind(1) for t in (q * scale, k, v, decay))
    S, os = 0, []
    for q_t, k_t, v_t, a_t in zip(*tokens, strict=True):
        S = a_t * S + k_t[..., None] * v_t[..., None, :]
        os.append((q_t[..., None, :] @ S)[..., 0, :])
    return torch.stack(os, dim=1).to(dtype)


def quadratic_mlstm(q, k, v, i, f):
    """All pairs of tokens at once, in the scale of each row's largest weight."""
    dtype, K, L = v.dtype, q.shape[-1], q.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    c = F.logsigmoid(f).transpose(1, 2).cumsum(-1)
    weight = c[..., :, None] - c[..., None, :] + i.transpose(1, 2)[..., None, :]
    later = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    weight = weight.masked_fill(later, -torch.inf)
    m = weight.amax(-1, keepdim=True)
    scores = (q @ k.mT).float() * K**-0.5 * (weight - m).exp()
    scores = scores / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-m).exp())
    return (scores.to(dtype) @ v).transpose(1, 2)


def step(state, q, k, v, log_decay):
    state.mul_(log_decay.exp()[..., None, None]).addcmul_(k[..., None].float(), v[..., None, :].float())
    return (q.float()[..., None, :] @ state)[..., 0, :].mul(q.shape[-1] ** -0.5).to(v.dtype)


def ssd_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    dt = F.softplus(dt + dt_bias)
    entering = (x * dt[..., None])[..., None].float()
    state.mul_(torch.exp(dt * A)[..., None, None]).addcmul_(entering, B[:, :, None].float())
    y = (state @ C.float()[..., None])[..., 0] + D[:, None] * x
    return (y * F.silu(z)).to(x.dtype)


# ---- other projects


def minimal_ssd():
    """The mamba repository's minimal SSD at its best chunk, with one group of B and C for all heads."""
    einops = installed("einops")
    namespace = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    names = ("segsum", "ssd_minimal_discrete")
    _, function = functions_of_sdist("mamba_ssm/modules/ssd_minimal.py", names, namespace)

    def ssd(x, dt, A, B, C):
        heads = (-1, -1, x.shape[2], -1)
        inputs = ((x * dt[..., None]).to(x.dtype), (dt * A).to(x.dtype), B.expand(heads), C.expand(heads))
        return function(*inputs, CHUNK)[0]

    return ssd


def transformers_ssd():
    function = _of_mamba2("mamba2_chunk_scan")
    return lambda x, dt, A, B, C: function(x, dt, A, B, C, CHUNK).to(x.dtype)


def transformers_ssd_whole():
    function = _of_mamba2("mamba2_chunk_scan")

    def ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        y = function(x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
        return (y * F.silu(z)).to(x.dtype)

    return ssd


def transformers_ssd_step():
    function = _of_mamba2("mamba2_selective_state_update")

    def step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        channels = x.shape[1:]
        A, D, dt_bias = A[:, None, None].expand(*channels, 1), D[:, None], dt_bias[:, None].expand(channels)
        dt = dt[..., None].expand(x.shape)
        return function(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z)

    return step


def _of_mamba2(name):
    function = getattr(installed("transformers.models.mamba2.modeling_mamba2"), name, None)
    if function is None:
        raise Missing("this version of transformers has no function of that name")
    return function


def mamba_ssm():
    function = installed("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x, dt, A, B, C: function(x, dt, A, B, C, 256)


def mamba_ssm_whole():
    function = installed("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        return function(x, dt, A, B, C, 256, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)

    return ssd


def _fla_naive(path, name):
    """A plain torch reference of fla-core's source distribution: the installed package needs a GPU to be imported."""

    def load():
        namespace = {"torch": torch, "F": F, "rearrange": installed("einops").rearrange}
        (function,) = functions_of_sdist(f"fla/ops/{path}/naive.py", (name,), namespace)
        return lambda q, k, v, log_decay: function(q, k, v, log_decay)[0].to(v.dtype)

    return load


def _fla(module, name):
    def load():
        function = getattr(importlib.import_module(installed(f"fla.ops.{module}").__name__), name)
        return lambda q, k, v, log_decay: function(q, k, v, log_decay)[0]

    return load


CUDA = frozenset({"cuda"})
CPU = frozenset({"cpu"})
SSD, WHOLE = frozenset({"ssd"}), frozenset({"ssd", "whole"})
TOKEN, KEY, MLSTM = frozenset({"per token"}), frozenset({"per key"}), frozenset({"mlstm"})

PEERS = (
    Peer("torch", lambda: chunked_ssd, SEQUENCES, options=SSD),
    Peer("torch", lambda: chunked_ssd_whole, SEQUENCES, options=WHOLE),
    Peer("torch", lambda: chunked, SEQUENCES, options=TOKEN),
    Peer("torch", lambda: quadratic_mlstm, SEQUENCES, options=MLSTM, devices=CPU),
    Peer("torch", lambda: step, STEP, options=TOKEN),
    Peer("torch", lambda: ssd_step, STEP, options=SSD),
    Peer("loop", lambda: loop, SEQUENCES, options=TOKEN, slow=True),
    Peer("loop", lambda: loop, SEQUENCES, options=KEY),
    Peer("compiled", compiled(chunked_ssd), SEQUENCES, options=SSD, compiles=True),
    Peer("compiled", compiled(chunked_ssd_whole), SEQUENCES, options=WHOLE, compiles=True),
    Peer("compiled", compiled(chunked), SEQUENCES, options=TOKEN, compiles=True),
    Peer("compiled", compiled(step), STEP, options=TOKEN, compiles=True),
    Peer("compiled", compiled(ssd_step), STEP, options=SSD, compiles=True),
    Peer("minimal SSD", minimal_ssd, SEQUENCES, options=SSD),
    Peer("transformers", transformers_ssd, SEQUENCES, options=SSD),
    Peer("transformers", transformers_ssd_whole, SEQUENCES, options=WHOLE),
    Peer("transformers", transformers_ssd_step, STEP, options=SSD),
    Peer("mamba-ssm", mamba_ssm, SEQUENCES, options=SSD, devices=CUDA),
    Peer("mamba-ssm", mamba_ssm_whole, SEQUENCES, options=WHOLE, devices=CUDA),
    Peer("fla naive", _fla_naive("simple_gla", "naive_chunk_simple_gla"), SEQUENCES, options=TOKEN),
    Peer("fla naive", _fla_naive("gla", "naive_recurrent_gla"), SEQUENCES, options=KEY, slow=True),
    Peer("fla", _fla("simple_gla", "chunk_simple_gla"), SEQUENCES, options=TOKEN, devices=CUDA),
    Peer("fla", _fla("gla", "chunk_gla"), SEQUENCES, options=KEY, devices=CUDA),
)
