"""Competitors of delta_rule and its step."""

import importlib

import torch

from peers import Missing, Peer, compiled, functions_of_sdist, installed

SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})
CHUNK = 64

# ---- plain PyTorch: the chunk form as batched products, a loop over tokens, and a step


def normalized(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def chunked(q, k, v, beta, log_decay, qk_l2norm):
    """One decay per token. q, k, v (B, L, H, ...), beta and log_decay (B, L, H)."""
    dtype, (B, L, H, K), V = v.dtype, q.shape, v.shape[-1]
    q, k, v, beta, g = (
        t.float().unflatten(1, (L // CHUNK, CHUNK)).transpose(2, 3) for t in (q, k, v, beta, log_decay)
    )  # (B, n, H, C, ...)
    q, k = normalized(q) * K**-0.5, normalized(k)
    c = g.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores, weights = q @ k.mT * decay, k @ k.mT * decay * beta[..., None]
    told = torch.cat([v, k * c.exp()[..., None]], -1) * beta[..., None]
    u, erased = torch.linalg.solve_triangular(weights, told, upper=False, unitriangular=True).split([V, K], -1)
    q = q * c.exp()[..., None]
    k = (k * (c[..., -1:] - c).exp()[..., None]).mT
    kept = c[..., -1].exp()[..., None, None]
    S, us, read = torch.zeros(B, H, K, V, device=q.device), [], []
    for n in range(L // CHUNK):
        us.append(u[:, n] - erased[:, n] @ S)
        read.append(q[:, n] @ S)
        S = kept[:, n] * S + k[:, n] @ us[-1]
    o = torch.stack(read, 1) + scores @ torch.stack(us, 1)
    return o.transpose(2, 3).reshape(B, L, H, V).to(dtype)


def loop(q, k, v, beta, log_decay, qk_l2norm):
    dtype, K = v.dtype, q.shape[-1]
    q, k, v, beta, decay = (t.float() for t in (q, k, v, beta, log_decay.exp()))
    tokens = (normalized(q) * K**-0.5, normalized(k), v, beta, decay[..., None] if log_decay.dim() == 4 else decay)
    S, os = k.new_zeros(*k[:, 0].shape, v.shape[-1]), []
    for q_t, k_t, v_t, beta_t, a_t in zip(*(t.unbind(1) for t in tokens), strict=True):
        S = (a_t if log_decay.dim() == 4 else a_t[..., None, None]) * S
        u = beta_t[..., None] * (v_t - (k_t[..., None, :] @ S)[..., 0, :])
        S = S + k_t[..., None] * u[..., None, :]
        os.append((q_t[..., None, :] @ S)[..., 0, :])
    return torch.stack(os, dim=1).to(dtype)


def step(state, q, k, v, beta, log_decay, qk_l2norm):
    q, k = normalized(q.float()) * q.shape[-1] ** -0.5, normalized(k.float())
    state.mul_(log_decay.exp()[..., None, None])
    u = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
    state.addcmul_(k[..., None], u[..., None, :])
    return (q[..., None, :] @ state)[..., 0, :].to(v.dtype)


# ---- other projects


def _of_qwen3_next(name):
    function = getattr(installed("transformers.models.qwen3_next.modeling_qwen3_next"), name, None)
    if function is None:
        raise Missing("this version of transformers has no function of that name")
    return function


def transformers_chunks():
    function = _of_qwen3_next("torch_chunk_gated_delta_rule")
    return lambda q, k, v, beta, log_decay, qk_l2norm: function(
        q, k, v, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=qk_l2norm
    )[0]


def transformers_step():
    function = _of_qwen3_next("torch_recurrent_gated_delta_rule")

    def step(state, q, k, v, beta, log_decay, qk_l2norm):
        tokens = (t[:, None] for t in (q, k, v, log_decay, beta))
        o, new_state = function(
            *tokens, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=qk_l2norm
        )
        state.copy_(new_state)  # as its cache does
        return o[:, 0]

    return step


def transformers_compiled_step():
    return torch.compile(transformers_step(), dynamic=False)


def fla_naive():
    """A plain torch reference of fla-core's source distribution: the installed package needs a GPU to be imported."""
    namespace = {"torch": torch, "rearrange": installed("einops").rearrange}
    (function,) = functions_of_sdist("fla/ops/kda/naive.py", ("naive_chunk_kda",), namespace)
    return lambda q, k, v, beta, log_decay, qk_l2norm: function(
        normalized(q.float()), normalized(k.float()), v, log_decay, beta
    )[0]


def _fla(module, name):
    def load():
        function = getattr(importlib.import_module(installed(f"fla.ops.{module}").__name__), name)
        return lambda q, k, v, beta, log_decay, qk_l2norm: function(
            q, k, v, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=qk_l2norm
        )[0]

    return load


CUDA = frozenset({"cuda"})
TOKEN, KEY = frozenset({"per token"}), frozenset({"per key"})

PEERS = (
    Peer("torch", lambda: chunked, SEQUENCES, options=TOKEN),
    Peer("torch", lambda: step, STEP, options=TOKEN),
    Peer("loop", lambda: loop, SEQUENCES, options=TOKEN, slow=True),
    Peer("loop", lambda: loop, SEQUENCES, options=KEY),
    Peer("compiled", compiled(chunked), SEQUENCES, options=TOKEN, compiles=True),
    Peer("compiled", compiled(step), STEP, options=TOKEN, compiles=True),
    Peer("transformers", transformers_chunks, SEQUENCES, options=TOKEN),
    Peer("transformers", transformers_step, STEP, options=TOKEN),
    Peer("transformers compiled", transformers_compiled_step, STEP, options=TOKEN, compiles=True),
    Peer("fla naive", fla_naive, SEQUENCES, options=KEY, slow=True),
    Peer("fla", _fla("gated_delta_rule", "chunk_gated_delta_rule"), SEQUENCES, options=TOKEN, devices=CUDA),
    Peer("fla", _fla("kda", "chunk_kda"), SEQUENCES, options=KEY, devices=CUDA),
)
