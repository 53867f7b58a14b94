"""The Mamba-2 part of seqkern.compat.mamba_ssm against what that package documents, written out in float64 torch."""

import math
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import seqkern.nn
from seqkern.compat.mamba_ssm import (
    LayerNormGated,
    Mamba2,
    MambaChunkScanCombinedFn,
    MambaSplitConv1dScanCombinedFn,
    RMSNorm,
    RMSNormGated,
    gated_rms_norm_ref,
    layer_norm_fn,
    layer_norm_linear_fn,
    layernorm_fn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rms_norm_fn,
    rmsnorm_fn,
    selective_state_update,
)

B, L, H, P, G, N = 2, 9, 4, 3, 2, 5
WIDE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def gradients(outputs, tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(outputs, tensors, [torch.randn(t.shape, dtype=t.dtype) for t in outputs])


def scan(x, dt, A, B_, C, D=None, z=None, dt_bias=None, state=None, softplus=False, limit=(0.0, math.inf)):
    """One sequence, token by token: x, z (L, H, P), dt (L, H), B, C (L, G, N), state (H, P, N) -> (y, state)."""
    state = x.new_zeros(H, P, N) if state is None else state
    ys = []
    for t in range(len(x)):
        step = dt[t] if dt_bias is None else dt[t] + dt_bias
        step = torch.log(1 + torch.exp(step)) if softplus else step
        step = torch.minimum(torch.maximum(step, torch.tensor(limit[0])), torch.tensor(limit[1]))
        b, c = (m[t].repeat_interleave(H // G, dim=0) for m in (B_, C))
        state = torch.exp(step * A)[:, None, None] * state + (step[:, None] * x[t])[..., None] * b[:, None]
        y = torch.einsum("hpn,hn->hp", state, c)
        y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x[t]
        ys.append(y if z is None else y * z[t] * torch.sigmoid(z[t]))
    return (torch.stack(ys) if ys else torch.zeros_like(x)), state


def scan_inputs(optional=True, channels=False, dtype=WIDE):
    """x, dt, A, B, C, and as a dict D, z, dt_bias, initial_states; all require a gradient."""

    def leaf(*shape, data=True):
        return torch.randn(*shape, dtype=WIDE).to(dtype if data else WIDE).requires_grad_()

    x, dt, B_, C = leaf(B, L, H, P), leaf(B, L, H), leaf(B, L, G, N), leaf(B, L, G, N)
    A = (-torch.rand(H, dtype=WIDE)).requires_grad_()
    if not optional:
        return (x, dt, A, B_, C), {}
    D = leaf(*((H, P) if channels else (H,)), data=False)
    others = {"z": leaf(B, L, H, P), "dt_bias": leaf(H, data=False), "initial_states": leaf(B, H, P, N, data=False)}
    return (x, dt, A, B_, C), {"D": D, **others}


def rows(args, b, begin=0, end=L):
    x, dt, A, B_, C = args
    return (x[b, begin:end], dt[b, begin:end], A, B_[b, begin:end], C[b, begin:end])


def tail(options, b, begin=0, end=L):
    """D, z, dt_bias of `scan`."""
    z = options.get("z")
    return options.get("D"), None if z is None else z[b, begin:end], options.get("dt_bias")


@pytest.mark.parametrize(
    ("optional", "channels", "limit"),
    [(False, False, (0.0, math.inf)), (True, False, (0.3, 1.2)), (True, True, (0.0, 2.0))],
)
def test_chunk_scan(optional, channels, limit):
    args, options = scan_inputs(optional, channels)
    states = options.get("initial_states", [None] * B)
    kinds = {"dt_softplus": optional, "dt_limit": limit}
    y, final = mamba_chunk_scan_combined(*args, 64, **options, **kinds, return_final_states=True)
    wanted = [scan(*rows(args, b), *tail(options, b), states[b], optional, limit) for b in range(B)]
    wanted_y, wanted_final = (torch.stack(t) for t in zip(*wanted, strict=True))
    close(y, wanted_y)
    close(final, wanted_final)
    assert torch.equal(mamba_chunk_scan_combined(*args, 64, **options, **kinds), y)
    positional = [options.get(name) for name in ("D", "z", "dt_bias", "initial_states")]
    assert torch.equal(MambaChunkScanCombinedFn.apply(*args, 64, *positional, None, None, *kinds.values()), y)
    tensors = [*args, *options.values()]
    for actual, expected in zip(
        gradients([y, final], tensors), gradients([wanted_y, wanted_final], tensors), strict=True
    ):
        close(actual, expected)


def test_chunk_scan_of_sequences():
    """seq_idx: the initial states enter the first sequence of each row, the final ones follow the last."""
    args, options = scan_inputs()
    seq_idx = torch.tensor([[4, 4, 4, 7, 7, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, -1, -1]], dtype=torch.int32)
    y, final = mamba_chunk_scan_combined(*args, 64, **options, seq_idx=seq_idx, return_final_states=True)
    for b, bounds in enumerate([[0, 3, 5, 9], [0, 7]]):
        state = options["initial_states"][b]
        for begin, end in pairwise(bounds):
            wanted, last = scan(*rows(args, b, begin, end), *tail(options, b, begin, end), state)
            close(y[b, begin:end], wanted)
            state = None
        close(final[b], last)
    assert not y[1, 7:].any()


@pytest.mark.parametrize("bounds", [[0, 3, 3, 9], [0, 4, 9, 9], [0, 0, 9]])
def test_chunk_scan_returns_states_of_sequences(bounds):
    (x, dt, A, B_, C), options = scan_inputs()
    args = (x[:1], dt[:1], A, B_[:1], C[:1])
    options = {name: t[:1] if name in ("z", "initial_states") else t for name, t in options.items()}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    kinds = {"cu_seqlens": cu_seqlens, "return_varlen_states": True}
    y, final, states = mamba_chunk_scan_combined(*args, 64, **options, **kinds, return_final_states=True)
    first, wanted, wanted_states = options["initial_states"][0], [], []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        out, last = scan(*rows(args, 0, begin, end), *tail(options, 0, begin, end), None if n else first)
        wanted.append(out)
        wanted_states.append(last)
    wanted, wanted_states = torch.cat(wanted)[None], torch.stack(wanted_states)
    last = max(n for n, (begin, end) in enumerate(pairwise(bounds)) if begin < end)
    close(y, wanted)
    close(states, wanted_states)
    close(final, wanted_states[last][None])
    again = mamba_chunk_scan_combined(*args, 64, **options, **kinds)
    assert torch.equal(again[0], y) and torch.equal(again[1], states) and len(again) == 2
    tensors = [x, dt, A, B_, C, options["D"]]
    for actual, expected in zip(
        gradients([y, states], tensors), gradients([wanted, wanted_states], tensors), strict=True
    ):
        close(actual, expected)
    assert mamba_chunk_scan_combined(*args, 64, cu_seqlens=cu_seqlens).shape == y.shape
    with pytest.raises(RuntimeError, match="return_varlen_states needs cu_seqlens"):
        mamba_chunk_scan_combined(*args, 64, return_varlen_states=True)


@torch.no_grad()
def test_chunk_scan_takes_groups_in_another_dtype():
    args, options = scan_inputs(dtype=torch.bfloat16)
    x, *others = args
    y = mamba_chunk_scan_combined(x, *(t.float() for t in others), 64, **options)
    assert y.dtype == torch.bfloat16
    args, options = [t.double() for t in args], {name: t.double() for name, t in options.items()}
    wanted = [scan(*rows(args, b), *tail(options, b), options["initial_states"][b])[0] for b in range(B)]
    error = (y.double() - torch.stack(wanted)).abs().max()
    assert error < 0.02 * torch.stack(wanted).abs().max()


def rms_groups(x, group_size, eps):
    groups = x.unflatten(-1, (-1, group_size))
    return (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def convolved(xBC, weight, bias, activation, bounds):
    """(B, L, C), each part of the rows on its own."""
    width = weight.shape[1]
    out = []
    for begin, end in pairwise(bounds):
        history = F.pad(xBC[:, begin:end].mT, (width - 1, 0))
        out.append(F.conv1d(history, weight[:, None], bias, groups=len(weight)).mT)
    out = torch.cat(out, dim=1)
    return F.silu(out) if activation else out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"M": 6, "norm": True, "projection": True, "states": True},
        {"norm": True, "norm_before_gate": False, "limit": (0.2, 1.0), "channels": True, "projection": True},
        {"activation": None, "M": 2, "bias": False, "states": True},
    ],
    ids=lambda kind: "-".join(kind) or "plain",
)
def test_split_conv1d_scan(kind, packed):
    M, channels, activation = kind.get("M", 0), kind.get("channels", False), kind.get("activation", "silu")
    inner, conv_dim, limit = H * P, H * P + 2 * G * N, kind.get("limit", (0.0, math.inf))
    before = kind.get("norm_before_gate", True)

    def leaf(wanted, *shape):
        return torch.randn(*shape, dtype=WIDE).requires_grad_() if wanted else None

    has_bias = kind.get("bias", True)
    zxbcdt, weight, bias = (
        leaf(True, B, L, 2 * M + inner + conv_dim + H),
        leaf(True, conv_dim, 4),
        leaf(has_bias, conv_dim),
    )
    dt_bias, D = leaf(True, H), leaf(True, *((H, P) if channels else (H,)))
    A = (-torch.rand(H, dtype=WIDE)).requires_grad_()
    norm, states = leaf(kind.get("norm"), inner), leaf(kind.get("states"), B, H, P, N)
    projection, out_bias = leaf(kind.get("projection"), 7, M + inner), leaf(kind.get("projection"), 7)
    bounds = [0, 4, L] if packed else [0, L]
    seq_idx = torch.tensor([[0] * 4 + [1] * (L - 4)] * B, dtype=torch.int32) if packed else None

    args = (zxbcdt, weight, bias, dt_bias, A, D, 64, states, seq_idx, limit, True, activation, norm, 1e-5)
    args = (*args, projection, out_bias, None if channels else P, G, before)
    y, final = mamba_split_conv1d_scan_combined(*args)
    assert torch.equal(MambaSplitConv1dScanCombinedFn.apply(*args)[0], y)
    assert torch.equal(mamba_split_conv1d_scan_combined(*args[:10], False, *args[11:]), y)

    gate, unit, z, xBC, dt = zxbcdt.split([M, M, inner, conv_dim, H], dim=-1)
    x, B_, C = convolved(xBC, weight, bias, activation, bounds).split([inner, G * N, G * N], dim=-1)
    x, B_, C = x.unflatten(-1, (H, P)), B_.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    outs, lasts = [], []
    for b in range(B):
        pieces, state = [], None if states is None else states[b]
        for begin, end in pairwise(bounds):
            token = rows((x, dt, A, B_, C), b, begin, end)
            out, last = scan(*token, D, None, dt_bias, state, True, limit)
            pieces.append(out)
            state = None
        outs.append(torch.cat(pieces))
        lasts.append(last)
    wanted = torch.stack(outs).flatten(-2)
    if norm is None:
        wanted = wanted * F.silu(z)
    elif before:
        wanted = rms_groups(wanted, inner // G, 1e-5) * norm * F.silu(z)
    else:
        wanted = rms_groups(wanted * F.silu(z), inner // G, 1e-5) * norm
    wanted = torch.cat([F.silu(gate) * unit, wanted], dim=-1)
    wanted = wanted if projection is None else wanted @ projection.mT + out_bias
    close(y, wanted)
    close(final, torch.stack(lasts))

    tensors = [t for t in (zxbcdt, weight, bias, dt_bias, A, D, states, norm, projection, out_bias) if t is not None]
    expected = gradients([wanted, torch.stack(lasts)], tensors)
    for actual, value in zip(gradients([y, final], tensors), expected, strict=True):
        close(actual, value)
    if not channels:
        with pytest.raises(RuntimeError, match="needs headdim"):
            mamba_split_conv1d_scan_combined(*args[:6], 64)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_gated_norms(gated, group_size, before):
    D = 12
    x, z = (torch.randn(3, 5, D, dtype=WIDE, requires_grad=True) for _ in "xz")
    weight, bias = (torch.randn(D, dtype=WIDE, requires_grad=True) for _ in "wb")
    z = z if gated else None
    gate = F.silu(z) if gated else torch.ones(D, dtype=WIDE)
    inside, outside = (1, gate) if before else (gate, 1)
    options = {"z": z, "eps": 1e-3, "group_size": group_size, "norm_before_gate": before}
    wanted = (rms_groups(x * inside, group_size or D, 1e-3) * weight + bias) * outside
    y = rmsnorm_fn(x, weight, bias, **options)
    close(y, wanted)
    assert torch.equal(gated_rms_norm_ref(x, weight, bias, **options), y)
    tensors = [x, weight, bias, *([z] if gated else [])]
    for actual, expected in zip(gradients([y], tensors), gradients([wanted], tensors), strict=True):
        close(actual, expected)

    groups = (x * inside).unflatten(-1, (-1, group_size or D))
    centred = F.layer_norm(groups, groups.shape[-1:], eps=1e-3).flatten(-2)
    close(layernorm_fn(x, weight, bias, **options), (centred * weight + bias) * outside)
    assert torch.equal(layernorm_fn(x, weight, bias, **options, is_rms_norm=True), y)

    half = rmsnorm_fn(x.bfloat16(), weight, None, z)
    assert half.dtype == torch.bfloat16
    layer = RMSNormGated(D, 1e-3, group_size, before, dtype=WIDE)
    close(layer(x, z), rms_groups(x * inside, group_size or D, 1e-3) * outside)
    assert layer.state_dict().keys() == {"weight"}
    layer = LayerNormGated(D, 1e-3, group_size, before, dtype=WIDE)
    close(layer(x, z), centred * outside)
    assert layer.state_dict().keys() == {"weight", "bias"}


def test_norms_of_a_residual_stream():
    D = 6
    x, x1, residual = (torch.randn(3, 5, D, dtype=WIDE) for _ in range(3))
    weight, bias, weight1, bias1 = torch.randn(4, D, dtype=WIDE)
    scale = torch.rand(3, 5, dtype=WIDE)
    total = x * scale[..., None] + x1 + residual
    y, y1, kept = layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, 1e-3, rowscale=scale, prenorm=True)
    close(kept, total)
    close(y, F.layer_norm(total, (D,), weight, bias, 1e-3))
    close(y1, F.layer_norm(total, (D,), weight1, bias1, 1e-3))

    y, kept = rms_norm_fn(x.bfloat16(), weight, None, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    assert rms_norm_fn(x.bfloat16(), weight, None, prenorm=True)[1].dtype == torch.bfloat16
    assert rms_norm_fn(x.bfloat16(), weight, None, residual.float(), prenorm=True)[1].dtype == torch.float32
    close(rms_norm_fn(x, weight, bias, eps=1e-3), rms_groups(x, D, 1e-3) * weight + bias)

    y, mask, none = layer_norm_fn(x, weight, bias, dropout_p=0.5, return_dropout_mask=True)
    close(y, F.layer_norm(2 * x * mask, (D,), weight, bias, 1e-6))
    assert none is None and 0 < mask.sum() < mask.numel()

    linear = torch.randn(4, D, dtype=WIDE)
    y, kept = layer_norm_linear_fn(x, weight, bias, linear, None, residual, 1e-3, prenorm=True, is_rms_norm=True)
    close(y, (rms_groups(x + residual, D, 1e-3) * weight + bias) @ linear.mT)
    close(kept, x + residual)

    layer = RMSNorm(D, 1e-3, dropout_p=0.5, dtype=WIDE).eval()
    y, kept = layer(x, residual, prenorm=True)
    close(y, rms_groups(x + residual, D, 1e-3))
    close(kept, x + residual)
    assert (layer.train()(x) == 0).any() and layer.state_dict().keys() == {"weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_selective_state_update_knows_mamba2(tied, monkeypatch):
    """With one dt, A and bias for each head the step of ssd serves; values are in test_compat_mamba_ssm.py."""
    from seqkern.compat import mamba_ssm

    calls = []
    for name in ("ssd_step", "selective_scan_step"):
        step = getattr(mamba_ssm, name)
        monkeypatch.setattr(mamba_ssm, name, lambda *a, step=step, name=name, **o: calls.append(name) or step(*a, **o))

    def per_head(t):
        return t if tied else t.clone()

    state, x, z = torch.randn(B, H, P, N), *torch.randn(2, B, H, P)
    dt, bias = torch.rand(B, H, 1).expand(B, H, P), torch.rand(H, 1).expand(H, P)
    A, D = (-torch.rand(H, 1, 1)).expand(H, P, N), torch.rand(H, P)
    B_, C = torch.randn(2, B, G, N)
    once = state.clone()
    y = selective_state_update(once, x, per_head(dt), A, B_, C, D, z, bias, True)
    again = state.clone()
    close(y, selective_state_update(again, x, dt.clone(), A.clone(), B_, C, D, z, bias.clone(), True))
    close(once, again)
    assert calls == ["ssd_step" if tied else "selective_scan_step", "selective_scan_step"]


def layer_of(**options):
    layer = Mamba2(8, d_state=N, headdim=4, layer_idx=3, dtype=WIDE, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def test_mamba2_is_made_like_the_original():
    sizes = (64, 16, 3, 0.2, 3, 32, 128, 2, (2, 4), True, True, True, 0.01, 0.2, 0.02, (0.0, 1.0), True, False)
    layer = Mamba2(*sizes, 128, False, 7, None, False, "cpu", torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.state_dict().items()}
    assert shapes == {
        **{"dt_bias": (4,), "A_log": (4,), "D": (128,), "norm.weight": (128,), "conv1d.weight": (192, 1, 3)},
        **{"in_proj.weight": (2 * 192 + 64 + 4, 64), "in_proj.bias": (452,)},
        **{"out_proj.weight": (64, 192), "out_proj.bias": (64,)},
    }
    assert (layer.d_model, layer.d_inner, layer.d_ssm, layer.nheads, layer.headdim) == (64, 192, 128, 4, 32)
    assert (layer.d_state, layer.d_conv, layer.ngroups, layer.layer_idx, layer.chunk_size) == (16, 3, 2, 7, 128)
    assert layer.D_has_hdim and layer.norm.norm_before_gate and layer.norm.group_size == 64 and layer.norm.eps == 1e-5
    assert layer.dt_limit == (0.0, 1.0) and not layer.use_mem_eff_path and layer.activation == "silu"
    assert layer.A_log.exp().min() >= 1.9999 and layer.A_log.exp().max() <= 4.0001
    # Code that builds on the layer calls its parts.
    x = torch.randn(2, 192, 6)
    torch.testing.assert_close(
        layer.act(layer.conv1d(x)[..., :6]), seqkern.causal_conv1d(x, layer.conv1d.weight[:, 0], None, "silu")
    )
    with pytest.raises(ValueError, match="Mamba2: process_group must be None"):
        Mamba2(64, process_group=object())


@pytest.mark.parametrize("options", [{}, {"rmsnorm": False, "ngroups": 2, "D_has_hdim": True, "bias": True}], ids=str)
def test_mamba2(options):
    """Forward, and the same in pieces: some tokens at once, then one after another through a cache."""
    layer = layer_of(**options)
    x = torch.randn(B, L, 8, dtype=WIDE)
    y = layer(x)
    D = layer.D.unflatten(0, (4, 4)) if layer.D_has_hdim else layer.D
    norm = {"rmsnorm_weight": layer.norm.weight, "rmsnorm_eps": 1e-5} if layer.rmsnorm else {}
    conv = (layer.conv1d.weight[:, 0], layer.conv1d.bias, layer.dt_bias, -layer.A_log.exp(), D)
    out = {"outproj_weight": layer.out_proj.weight, "outproj_bias": layer.out_proj.bias, "norm_before_gate": False}
    kinds = {"headdim": 4, "ngroups": layer.ngroups, **out, **norm}
    close(y, mamba_split_conv1d_scan_combined(layer.in_proj(x), *conv, 64, **kinds))
    close(layer(x.flatten(0, 1), seqlen=L), y.flatten(0, 1))

    for first in (1, 2, 7):
        cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        pieces = [layer(x[:, :first], inference_params=cache)]
        conv_state, ssm_state = cache.key_value_memory_dict[3]
        assert conv_state.shape == (B, layer.conv1d.in_channels, 4) and ssm_state.shape == (B, 4, 4, N)
        assert conv_state.stride(1) == 1  # channels are contiguous
        for t in range(first, L):
            cache.seqlen_offset = t
            pieces.append(layer(x[:, t : t + 1], inference_params=cache))
        close(torch.cat(pieces, dim=1), y)
        assert cache.key_value_memory_dict[3][0] is conv_state  # in place

    states = layer.allocate_inference_cache(B, 100)
    assert [s.dtype for s in states] == [WIDE] * 2 and not any(s.any() for s in states)
    outputs = []
    for t in range(L):
        out, conv_state, ssm_state = layer.step(x[:, t : t + 1], *states)
        assert conv_state is states[0] and ssm_state is states[1]
        outputs.append(out)
    close(torch.cat(outputs, dim=1), y)
    assert layer.allocate_inference_cache(1, 1, torch.bfloat16)[1].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="layer_idx"):
        Mamba2(8, headdim=4)(x, inference_params=SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}))


def test_mamba2_of_sequences():
    layer, bounds = layer_of(), [0, 4, L]
    x = torch.randn(B, L, 8, dtype=WIDE)
    wanted = torch.cat([layer(x[:, begin:end]) for begin, end in pairwise(bounds)], dim=1)
    seq_idx = torch.tensor([[0] * 4 + [1] * (L - 4)] * B, dtype=torch.int32)
    close(layer(x, seq_idx=seq_idx), wanted)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    close(layer(x[:1], seq_idx=seq_idx[:1], cu_seqlens=cu_seqlens, inference_params=cache), wanted[:1])
    token = torch.randn(2, 1, 8, dtype=WIDE)
    cache.seqlen_offset = 1
    step = layer(token, inference_params=cache)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        alone = layer(torch.cat([x[:1, begin:end], token[n : n + 1]], dim=1))
        close(step[n], alone[0, -1:])


def test_state_dict_is_that_of_the_layer_in_nn():
    layer, other = Mamba2(8, headdim=4), seqkern.nn.Mamba2(8, headdim=4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(B, L, 8)
    assert torch.equal(layer(x), other(x))


def python(code):
    """The words that a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_names_of_the_package():
    code = """
import seqkern.compat
seqkern.compat.install(force=True)
from mamba_ssm import Mamba2
from mamba_ssm.modules.mamba2 import Mamba2 as same, RMSNormGated
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, LayerNorm, rmsnorm_fn, layernorm_fn, rms_norm_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm as plain, layer_norm_fn, rms_norm_fn, layer_norm_linear_fn
import mamba_ssm
print(Mamba2 is same, RMSNorm is RMSNormGated, RMSNorm is not plain, mamba_ssm.__version__ < "2.3.1")
print(isinstance(Mamba2(8, headdim=4).norm, RMSNorm))
for missing in ("from mamba_ssm import Mamba3", "from mamba_ssm.ops.triton.mamba3 import mamba3_siso_combined"):
    try:
        exec(missing)
    except ImportError as error:
        print("ImportError")
"""
    assert python(code) == ["True"] * 5 + ["ImportError"] * 2
