"""Competitors of selective_scan and selective_scan_step."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from peers import Missing, Peer, compiled, functions_of_sdist, installed, module_of_sdist, of_transformers

FORWARD = frozenset({"forward"})
BOTH = frozenset({"forward+backward"})
SEQUENCES = FORWARD | BOTH
STEP = frozenset({"step"})

# ---- our own loops over time. Nothing in them has the size (B, D, L, N). States are (B, N, D): D is the longer.


def loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    h, ys = 0, []
    for a, x, b, c in _tokens(u, delta, B, C, delta_bias):
        h = torch.addcmul(torch.exp(a * A.t()) * h, x, b)
        ys.append(torch.matmul(c, h))
    return _gated(torch.stack(ys), u, D, z)


def loop_in_place(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    A = A.t().contiguous()
    h = A.new_zeros(len(u), *A.shape)
    decay = torch.empty_like(h)
    ys = A.new_empty(u.shape[2], len(u), 1, u.shape[1])
    for y, (a, x, b, c) in zip(ys.unbind(), _tokens(u, delta, B, C, delta_bias), strict=True):
        torch.mul(a, A, out=decay).exp_()
        torch.bmm(c, h.mul_(decay).addcmul_(x, b), out=y)
    return _gated(ys, u, D, z)


def loop_compiled():
    """Eight tokens at a time under torch.compile."""
    step = compiled(_tokens_at_once)()

    def loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        h, ys = A.new_zeros(len(u), A.shape[1], A.shape[0]), []
        A = A.t().contiguous()
        for pieces in _tokens(u, delta, B, C, delta_bias, split=8):
            h, y = step(h, A, *pieces)
            ys.append(y)
        return _gated(torch.cat(ys), u, D, z)

    return loop


def _tokens_at_once(h, A, *tokens):
    ys = []
    for a, x, b, c in zip(*(t.unbind() for t in tokens), strict=True):
        h = torch.exp(a * A) * h + x * b
        ys.append((c.mT * h).sum(1, keepdim=True))
    return h, torch.stack(ys)


def loop_each(cu_seqlens, **inputs):
    """A pack, one sequence after another."""
    lengths = cu_seqlens.diff().tolist()
    pieces = {name: inputs[name].split(lengths, dim=-1) for name in ("u", "delta", "z", "B", "C")}
    each = (dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True))
    return torch.cat([loop(**inputs | piece) for piece in each], dim=-1)


def _tokens(u, delta, B, C, delta_bias, split=None):
    """delta' (B, 1, D), delta' u (B, 1, D), B (B, N, 1) and C (B, 1, N) of every token, or of a few at once."""
    if B.shape[-1] != u.shape[-1]:
        B, C = (torch.view_as_complex(t.float().unflatten(-1, (-1, 2))) for t in (B, C))
    delta = F.softplus(delta + delta_bias[:, None])
    tokens = (t.movedim(-1, 0).contiguous() for t in (delta, delta * u, B, C))
    delta, x, B, C = (t if t.is_complex() else t.float() for t in tokens)
    tokens = (delta[:, :, None], x[:, :, None], B[..., None], C[:, :, None])
    return zip(*(t.split(split) if split else t.unbind() for t in tokens), strict=True)


def _gated(y, u, D, z):
    """(L, B, 1, D) -> (B, D, L)"""
    y = 2 * y.real if y.is_complex() else y
    return ((y[:, :, 0].movedim(0, -1) + D[:, None] * u) * F.silu(z)).to(u.dtype)


def associative_scan():
    """The parallel scan that torch has under development, which works compiled only."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return right[0] * left[0], right[0] * left[1] + right[1]

    def function(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        delta = F.softplus(delta + delta_bias[:, None])
        a = torch.exp(delta[..., None] * A[:, None])
        x = (delta * u)[..., None] * B.mT[:, None]
        _, h = associative_scan(combine, (a, x), dim=2, combine_mode="pointwise" if u.is_cuda else "generic")
        return ((h * C.mT[:, None]).sum(-1) + D[:, None] * u) * F.silu(z)

    return torch.compile(function, dynamic=False, fullgraph=True)


def step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    delta = F.softplus(delta + delta_bias)
    state.mul_(torch.exp(delta[..., None] * A)).addcmul_((delta * u)[..., None], B[:, None])
    y = torch.matmul(state, C[..., None].to(state.dtype))[..., 0]
    return ((y + D * u) * F.silu(z)).to(u.dtype)


# ---- other projects


def mamba_py():
    """Its block's scan, which computes in float32, and the gate around it."""
    scan = installed("mambapy.mamba").MambaBlock.selective_scan

    def function(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        dtype = u.dtype
        u, delta, B, C, z = (t.transpose(1, 2).float() for t in (u, delta, B, C, z))
        y = scan(None, u, F.softplus(delta + delta_bias), A, B, C, D)
        return (y * F.silu(z)).transpose(1, 2).to(dtype)

    return function


def _mamba_ssm_ref(path, name):
    """A plain torch reference of the source distribution: the installed package may need a GPU to be imported."""
    einops = installed("einops")
    namespace = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    return functions_of_sdist(path, (name,), namespace)[0]


def mamba_ssm_ref():
    return _mamba_ssm_ref("mamba_ssm/ops/selective_scan_interface.py", "selective_scan_ref")


def mamba_ssm_step_ref():
    function = _mamba_ssm_ref("mamba_ssm/ops/triton/selective_state_update.py", "selective_state_update_ref")
    return _as_step(function)


def _mamba_ssm(module, name):
    """A CUDA function of the installed package, or else of an unpacked source distribution, built as `build` does."""
    try:
        return getattr(installed(module), name)
    except Missing:
        return getattr(module_of_sdist(module), name)


def mamba_ssm():
    return _mamba_ssm("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def mamba_ssm_step():
    return _as_step(_mamba_ssm("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"))


def _as_step(function):
    def step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        return function(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    return step


def build(source: Path, folder: Path) -> list[str]:
    """Compiles selective_scan_cuda of mamba_ssm's unpacked source distribution, for this GPU alone."""
    from torch.utils.cpp_extension import load

    kernels = source / "csrc" / "selective_scan"
    if not kernels.is_dir():
        return []
    undefined = [f"__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS")]
    undefined += ["__CUDA_NO_BFLOAT16_CONVERSIONS__", "__CUDA_NO_BFLOAT162_OPERATORS__"]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    load(
        "selective_scan_cuda",
        [str(file) for file in sorted([*kernels.glob("*.cpp"), *kernels.glob("*.cu")])],
        extra_include_paths=[str(kernels)],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        + [f"-U{name}" for name in undefined],
        build_directory=str(folder),
    )
    return ["selective_scan_cuda"]


def transformers():
    function = of_transformers("mamba_selective_scan")

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        return function(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    return scan


def transformers_step():
    function = of_transformers("mamba_selective_state_update")

    def step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        return function(state, u, delta, A, B, C, D, delta_bias, delta_softplus, z)

    return step


# ---- who takes part where


def _quadratic(row):
    """Autograd fills a tensor (B, D, L, N) for every token that was taken out of one."""
    tokens = row.shape[2]
    return f"its backward is quadratic in L: minutes at L = {tokens}" if tokens > 256 else ""


def _long(row):
    return "a loop in Python, too slow for so many tokens" if row.shape[2] > 8192 else ""


def _one_shape(row):
    return "compiles for half a minute, so in one shape only" if row.shape[:3] != (1, 1536, 2048) else ""


CUDA = frozenset({"cuda"})
PACK = frozenset({"cu_seqlens"})
COMPLEX = frozenset({"complex"})

PEERS = (
    Peer("torch", lambda: loop_in_place, FORWARD, unfit=_long),
    Peer("torch", lambda: loop_in_place, FORWARD, options=COMPLEX),
    Peer("torch", lambda: loop, BOTH, unfit=_long),
    Peer("torch", lambda: loop, BOTH, options=COMPLEX),
    Peer("torch", lambda: loop_each, SEQUENCES, options=PACK),
    Peer("torch", lambda: step, STEP),
    Peer("compiled", loop_compiled, SEQUENCES, compiles=True, unfit=_long),
    Peer("compiled", compiled(step), STEP, compiles=True),
    Peer("associative_scan", associative_scan, SEQUENCES, compiles=True, unfit=_one_shape),
    Peer("mamba.py", mamba_py, SEQUENCES, slow=True),
    Peer("mamba-ssm ref", mamba_ssm_ref, FORWARD, slow=True),
    Peer("mamba-ssm ref", mamba_ssm_ref, FORWARD, options=COMPLEX, slow=True),
    Peer("mamba-ssm ref", mamba_ssm_ref, BOTH, slow=True, unfit=_quadratic),
    Peer("mamba-ssm ref", mamba_ssm_step_ref, STEP),
    Peer("mamba-ssm", mamba_ssm, SEQUENCES, devices=CUDA),
    Peer("mamba-ssm", mamba_ssm, SEQUENCES, options=COMPLEX, devices=CUDA),
    Peer("mamba-ssm", mamba_ssm_step, STEP, devices=CUDA),
    Peer("transformers", transformers, FORWARD, slow=True),
    Peer("transformers", transformers, BOTH, slow=True, unfit=_quadratic),
    Peer("transformers", transformers_step, STEP),
)
