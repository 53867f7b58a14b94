"""The layers of seqkern.nn around linear attention: against their papers, token by token, and against themselves."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from layers import DIM, B, map_parts, parts, small, some_state
from torch.profiler import ProfilerActivity, profile

import seqkern.nn

# ---- the papers' layers, one token after another


def loop(token, x, state):
    """token: (x_t, state) -> (y_t, state)."""
    outputs = []
    for x_t in x.unbind(1):
        y, state = token(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def convolved(conv1d, taps, value):
    """(what the convolution gives, after SiLU, its last inputs)."""
    taps = torch.cat([taps, value[..., None]], dim=-1)
    conv = (taps * conv1d.weight[:, 0]).sum(-1)
    return F.silu(conv if conv1d.bias is None else conv + conv1d.bias), taps[..., 1:]


def rms(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def standardized(x, eps):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def mamba2(layer, x, state):
    H, P, G, N = layer.nheads, layer.headdim, layer.ngroups, layer.d_state
    A, D, mlp = -layer.A_log.exp(), layer.D.reshape(H, -1), layer.d_inner - H * P

    def normed(y, z):
        y = rms((y if layer.norm_before_gate else y * F.silu(z)).unflatten(1, (G, -1)), layer.norm.eps).flatten(1)
        y = y * layer.norm.weight
        return y * F.silu(z) if layer.norm_before_gate else y

    def token(x_t, state):
        taps, h = state
        gate, unit, z, value, dt = layer.in_proj(x_t).split([mlp, mlp, H * P, H * P + 2 * G * N, H], dim=-1)
        mixed, taps = convolved(layer.conv1d, taps, value)
        u, b, c = mixed.split([H * P, G * N, G * N], dim=-1)
        u, b, c = u.view(-1, H, P), *(t.view(-1, G, N).repeat_interleave(H // G, dim=1) for t in (b, c))
        dt = torch.log(1 + torch.exp(dt + layer.dt_bias)).clamp(*layer.dt_limit)
        h = torch.exp(dt * A)[..., None, None] * h + (dt[..., None] * u)[..., None] * b[:, :, None]
        y = ((h * c[:, :, None]).sum(-1) + D * u).flatten(1)
        y = normed(y, z) if layer.rmsnorm else y * F.silu(z)
        return layer.out_proj(torch.cat([F.silu(gate) * unit, y], dim=1)), (taps, h)

    return loop(token, x, state)


def heads(layer, t):
    return t.unflatten(-1, (layer.num_heads, -1))


def gla(layer, x, S):
    scale = layer.key_size**-0.5

    def token(x_t, S):
        q, k, v = (heads(layer, module(x_t)) for module in (layer.q_proj, layer.k_proj, layer.v_proj))
        alpha = heads(layer, torch.sigmoid(layer.gk_proj[1](layer.gk_proj[0](x_t))) ** (1 / layer.gate_normalizer))
        S = alpha[..., None] * S + k[..., None] * v[..., None, :]
        o = rms(scale * (q[..., None] * S).sum(-2), 1e-5) * layer.g_norm_swish_gate.weight
        return layer.o_proj((o * F.silu(heads(layer, layer.g_proj(x_t)))).flatten(1)), S

    return loop(token, x, S)


def delta(layer, x, state):
    """Gated DeltaNet and KDA."""
    H, HV, K = layer.num_heads, layer.num_v_heads, layer.key_size
    per_key = isinstance(layer, seqkern.nn.KDA)

    def token(x_t, state):
        taps, S = state
        sizes = [H * K, H * K, taps.shape[1] - 2 * H * K]
        projections, convs = (
            (layer.q_proj, layer.k_proj, layer.v_proj),
            (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d),
        )
        both = zip(convs, taps.split(sizes, dim=1), projections, strict=True)
        (q, k, v), taps = zip(*(convolved(conv, own, project(x_t)) for conv, own, project in both), strict=True)
        q, k = (t.view(-1, H, K) / torch.sqrt(t.view(-1, H, K).square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        q, k = (t.repeat_interleave(HV // H, dim=1) for t in (q, k))
        v = v.view(-1, HV, layer.value_size)
        beta = (2 if layer.allow_neg_eigval else 1) * torch.sigmoid(layer.b_proj(x_t))
        a = layer.f_proj[1](layer.f_proj[0](x_t)) if per_key else layer.a_proj(x_t)
        dt = torch.log(1 + torch.exp(a + layer.dt_bias)).view(-1, HV, K if per_key else 1)
        S = torch.exp(-layer.A_log.exp()[:, None] * dt)[..., None] * S
        S = S + k[..., None] * (beta[..., None] * (v - (k[..., None] * S).sum(-2)))[..., None, :]
        o = rms((q[..., None] * S).sum(-2) / math.sqrt(K), 1e-5) * layer.o_norm.weight
        if per_key:
            o = o * torch.sigmoid(layer.g_proj[1](layer.g_proj[0](x_t))).view(o.shape)
        elif layer.g_proj is not None:
            o = o * F.silu(layer.g_proj(x_t)).view(o.shape)
        return layer.o_proj(o.flatten(1)), (torch.cat(taps, dim=1), S)

    return loop(token, x, state)


def retnet(layer, x, state):
    K, gamma = layer.key_size, 1 - 2.0 ** (-5 - torch.arange(layer.num_heads, dtype=x.dtype))
    theta = layer.base ** -torch.linspace(0, 1, K // 2, dtype=x.dtype)

    def turned(t, n):
        """Each row by its own matrix of rotations."""
        rows = [[[a.cos(), -a.sin()], [a.sin(), a.cos()]] for a in (n[:, None] * theta).flatten()]
        blocks = torch.tensor(rows, dtype=x.dtype).unflatten(0, (-1, K // 2))
        turns = torch.stack([torch.block_diag(*row) for row in blocks])
        return torch.einsum("bij,bhj->bhi", turns, t)

    def token(x_t, state):
        S, n = state
        q, k, v = (heads(layer, module(x_t)) for module in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = turned(q, n) / math.sqrt(K), turned(k, n)
        S = gamma[:, None, None] * S + k[..., None] * v[..., None, :]
        o = standardized((q[..., None] * S).sum(-2), layer.eps).flatten(1)
        return layer.out_proj(o * F.silu(layer.g_proj(x_t))), (S, n + 1)

    return loop(token, x, state)


def mlstm(layer, x, state):
    """With memories as they are; those of the states are exp(-m) times as large."""
    taps, C, n, m = state
    unit = m.exp()
    Q, K, V = (torch.block_diag(*blocks) for blocks in (layer.q_proj, layer.k_proj, layer.v_proj))

    def token(x_t, state):
        taps, C, n, m = state
        u, z = layer.proj_up(x_t).split(layer.inner, dim=-1)
        c, taps = convolved(layer.conv1d, taps, u)
        q, k, v = c @ Q.mT, c @ K.mT, u @ V.mT
        i, f = (gate(torch.cat([q, k, v], dim=1)) for gate in (layer.igate, layer.fgate))
        q, k, v = (heads(layer, t) for t in (q / math.sqrt(layer.head_size), k, v))
        C = torch.sigmoid(f)[..., None, None] * C + i.exp()[..., None, None] * k[..., None] * v[..., None, :]
        n = torch.sigmoid(f)[..., None] * n + i.exp()[..., None] * k
        m = torch.maximum(torch.log(torch.sigmoid(f)) + m, i)
        divisor = (
            torch.maximum((n * q).sum(-1).abs(), torch.ones(())) + 1e-6 * m.exp()
        )  # the last term: see `seqkern.mlstm`
        h = (q[..., None] * C).sum(-2) / divisor[..., None]
        h = standardized(h, layer.eps).flatten(1) * layer.norm
        return layer.proj_down((h + layer.skip * c) * F.silu(z)), (taps, C, n, m)

    y, (taps, C, n, m) = loop(token, x, (taps, unit[..., None, None] * C, unit[..., None] * n, m))
    return y, (taps, C / m.exp()[..., None, None], n / m.exp()[..., None], m)


SMALL = {"d_state": 5, "d_conv": 3, "headdim": 4, "dt_max": 1.0}
OTHER = {"ngroups": 2, "headdim": 6, "D_has_hdim": True, "norm_before_gate": True, "dt_limit": (0.02, 0.9)}
GROUPED = {"head_size": 4, "num_v_heads": 4, "expand_v": 1.5, "conv_bias": True, "allow_neg_eigval": True}
LAYERS = {
    "Mamba2": (lambda **f: seqkern.nn.Mamba2(DIM, **SMALL, **f), mamba2),
    "Mamba2-groups": (lambda **f: seqkern.nn.Mamba2(DIM, **SMALL | OTHER, conv_bias=False, bias=True, **f), mamba2),
    "Mamba2-mlp": (lambda **f: seqkern.nn.Mamba2(DIM, **SMALL, d_ssm=16, rmsnorm=False, **f), mamba2),
    "GLA": (lambda **f: seqkern.nn.GLA(DIM, 2, expand_v=2, gate_rank=5, gate_normalizer=3, **f), gla),
    "GatedDeltaNet": (lambda **f: seqkern.nn.GatedDeltaNet(DIM, 2, d_conv=3, **f), delta),
    "GatedDeltaNet-grouped": (lambda **f: seqkern.nn.GatedDeltaNet(DIM, 2, **GROUPED, use_gate=False, **f), delta),
    "KDA": (lambda **f: seqkern.nn.KDA(DIM, 2, **GROUPED, **f), delta),
    "RetNet": (lambda **f: seqkern.nn.RetNet(DIM, 3, base=50, **f), retnet),
    "MLSTM": (lambda **f: seqkern.nn.MLSTM(DIM, 3, **f), mlstm),
    "MLSTM-blocks": (lambda **f: seqkern.nn.MLSTM(DIM, 2, expand=1, block_size=3, conv_bias=False, **f), mlstm),
}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, device="cpu", dtype=torch.float32):
    return small(LAYERS[name][0], device, dtype)


def real(tensors):
    """Without positions."""
    return [t for t in tensors if t.is_floating_point()]


def gradients(outputs, layer, *others):
    torch.manual_seed(1)
    outputs = real(outputs)
    cotangents = [torch.randn_like(output) for output in outputs]
    return torch.autograd.grad(outputs, [*layer.parameters(), *others], cotangents)


# ---- against the papers


def test_computes_the_published_layer(device, name):
    layer, x = make(name, device, torch.float64)
    state = map_parts(lambda t: t.requires_grad_() if t.is_floating_point() else t, some_state(layer, B))
    x.requires_grad_()
    y, last = layer(x, state, return_state=True)
    wanted, wanted_last = LAYERS[name][1](layer, x, state)
    torch.testing.assert_close([y, *parts(last)], [wanted, *parts(wanted_last)])
    others = [x, *real(parts(state))]
    grads = gradients([y, *parts(last)], layer, *others)
    wanted_grads = gradients([wanted, *parts(wanted_last)], layer, *others)
    names = [*dict(layer.named_parameters()), "x", *[f"state {i}" for i in range(len(others) - 1)]]
    for what, grad, wanted_grad in zip(names, grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, msg=lambda text, what=what: f"{what}: {text}")
        assert grad.abs().max() > 0, what


def test_begins_with_nothing(name):
    layer, x = make(name, dtype=torch.float64)
    zeros = layer.zero_state(B)
    y, state = layer(x, return_state=True)
    torch.testing.assert_close((y, state), LAYERS[name][1](layer, x, zeros))
    torch.testing.assert_close(layer(x, zeros), y)
    for first, last in zip(parts(zeros), parts(state), strict=True):
        assert first.shape == last.shape and first.dtype == last.dtype


# ---- against themselves


def test_steps_equal_the_whole(device, name):
    layer, x = make(name, device)
    before = some_state(layer, B)
    whole, last = layer(x, before, return_state=True)
    state = map_parts(torch.clone, before)
    with torch.no_grad():
        steps = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_parts_equal_the_whole(name):
    """The state carries values and gradients from one part to the next; a part may be empty."""
    layer, x = make(name, dtype=torch.float64)
    state, ys = None, []
    for part in x.split([1, 6, 0, 4], dim=1):
        y, state = layer(part, state, return_state=True)
        ys.append(y)
    whole, last = layer(x, return_state=True)
    outputs, expected = [torch.cat(ys, dim=1), *parts(state)], [whole, *parts(last)]
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, layer), gradients(expected, layer))


def test_packed_equals_separate(device, name):
    layer, x = make(name, device)
    bounds = [0, 4, 4, 11]
    initial = some_state(layer, 3)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    y, state = layer(x[:1], initial, cu_seqlens=cu_seqlens, return_state=True)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        own = map_parts(lambda rows, n=n: rows[n : n + 1], initial)
        alone, own_state = layer(x[:1, begin:end], own, return_state=True)
        torch.testing.assert_close(y[:, begin:end], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(map_parts(lambda rows, n=n: rows[n : n + 1], state), own_state, rtol=1e-4, atol=1e-4)
    y = layer(x[:1], cu_seqlens=cu_seqlens)
    alone = [layer(x[:1, begin:end]) for begin, end in pairwise(bounds)]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_mamba2_keeps_sequences_of_seq_idx_apart(device):
    layer, x = make("Mamba2", device)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1], [2] * 11], dtype=torch.int32, device=device)
    y, state = layer(x, seq_idx=seq_idx, return_state=True)
    first, (second, own_state) = layer(x[:1, :4]), layer(x[:1, 4:9], return_state=True)
    torch.testing.assert_close(y[:1, :9], torch.cat([first, second], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1:], layer(x[1:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(map_parts(lambda rows: rows[:1], state), own_state, rtol=1e-4, atol=1e-5)


def test_retnet_depends_on_distances_only():
    """Whatever position its first token has: queries and keys turn together."""
    layer, x = make("RetNet", dtype=torch.float64)
    S, _ = layer.zero_state(B)
    far = layer(x, (S, torch.tensor([1_000_000, 7])), return_state=True)
    torch.testing.assert_close(far[0], layer(x), rtol=1e-6, atol=1e-6)
    assert far[1][1].tolist() == [1_000_011, 18]


# ---- how they begin


def shapes_of(layer):
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def test_mamba2_has_the_parameters_of_mamba_ssm():
    layer = seqkern.nn.Mamba2(16, d_state=8, headdim=4, ngroups=2)
    shapes = {
        **{"dt_bias": (8,), "A_log": (8,), "D": (8,), "in_proj.weight": (2 * 32 + 2 * 16 + 8, 16)},
        **{"conv1d.weight": (64, 1, 4), "conv1d.bias": (64,), "norm.weight": (32,), "out_proj.weight": (16, 32)},
    }
    assert shapes_of(layer) == shapes
    other = seqkern.nn.Mamba2(16, d_state=8, headdim=4, D_has_hdim=True, rmsnorm=False, bias=True, conv_bias=False)
    gone, new = {"conv1d.bias", "norm.weight"}, {"in_proj.bias", "out_proj.bias"}
    assert shapes_of(other).keys() == shapes.keys() - gone | new and other.D.shape == (32,)
    assert all(p._no_weight_decay for p in (layer.dt_bias, layer.A_log, layer.D))
    for wrong in ({"headdim": 5}, {"headdim": 4, "ngroups": 3}, {"headdim": 4, "d_ssm": 64}):
        with pytest.raises(ValueError, match="Mamba2: d_ssm must be a multiple of headdim"):
            seqkern.nn.Mamba2(16, **wrong)
    with pytest.raises(ValueError, match="Mamba2: A_init_range"):
        seqkern.nn.Mamba2(16, headdim=4, A_init_range=(0, 1))


def uniform(values, low, high):
    """Kolmogorov and Smirnov: whether these many numbers lie evenly between the two."""
    share = ((values.flatten() - low) / (high - low)).sort().values
    return (share - torch.linspace(0, 1, len(share))).abs().max() < 1.6 / math.sqrt(len(share))


def test_mamba2_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.Mamba2(512, headdim=1, dt_min=0.002, dt_max=0.05, conv_init=0.3)
    dt = F.softplus(layer.dt_bias)
    assert uniform(dt.log(), math.log(0.002), math.log(0.05)) and uniform(layer.A_log.exp(), 1, 16)
    assert uniform(layer.conv1d.weight, -0.3, 0.3) and torch.equal(layer.D, torch.ones(1024))
    assert torch.equal(layer.norm.weight, torch.ones(1024)) and layer.norm.group_size == 1024
    floor = seqkern.nn.Mamba2(16, headdim=1, dt_max=0.002, dt_init_floor=0.01)
    torch.testing.assert_close(F.softplus(floor.dt_bias), torch.full((32,), 0.01))


def test_gla_has_the_parameters_of_fla():
    torch.manual_seed(0)
    layer = seqkern.nn.GLA(64, num_heads=4)
    assert shapes_of(layer) == {
        **{"q_proj.weight": (32, 64), "k_proj.weight": (32, 64), "v_proj.weight": (64, 64), "g_proj.weight": (64, 64)},
        **{"gk_proj.0.weight": (16, 64), "gk_proj.1.weight": (32, 16), "gk_proj.1.bias": (32,)},
        **{"g_norm_swish_gate.weight": (16,), "o_proj.weight": (64, 64)},
    }
    bound = 2**-2.5 * math.sqrt(6 / (64 + 32))
    assert uniform(layer.q_proj.weight, -bound, bound) and uniform(layer.k_proj.weight, -bound, bound)
    with pytest.raises(ValueError, match="GLA: expand_k"):
        seqkern.nn.GLA(64, num_heads=5)


def test_delta_layers_have_the_parameters_of_fla():
    torch.manual_seed(0)
    both = {
        **{"q_proj.weight": (64, 32), "k_proj.weight": (64, 32), "v_proj.weight": (256, 32), "b_proj.weight": (4, 32)},
        **{"q_conv1d.weight": (64, 1, 4), "k_conv1d.weight": (64, 1, 4), "v_conv1d.weight": (256, 1, 4)},
        **{"A_log": (4,), "o_norm.weight": (64,), "o_proj.weight": (32, 256)},
    }
    sizes = {"num_heads": 2, "head_size": 32, "num_v_heads": 4}
    layer = seqkern.nn.GatedDeltaNet(32, **sizes)
    assert shapes_of(layer) == both | {"dt_bias": (4,), "a_proj.weight": (4, 32), "g_proj.weight": (256, 32)}
    kda = seqkern.nn.KDA(32, **sizes, expand_v=2)
    assert shapes_of(kda) == both | {
        **{"dt_bias": (4 * 32,), "f_proj.0.weight": (64, 32), "f_proj.1.weight": (128, 64)},
        **{"g_proj.0.weight": (64, 32), "g_proj.1.weight": (256, 64), "g_proj.1.bias": (256,)},
    }
    for layer, rate in ((seqkern.nn.GatedDeltaNet(512, 512), 0), (seqkern.nn.KDA(512, 512), 1)):
        assert uniform(layer.A_log.exp(), rate, 16) and layer.A_log.isfinite().all()
        assert uniform(F.softplus(layer.dt_bias).log(), math.log(0.001), math.log(0.1))
        assert layer.A_log._no_weight_decay and layer.dt_bias._no_weight_decay
        name = type(layer).__name__
        with pytest.raises(ValueError, match=f"{name}: dim must be a multiple of num_heads=5, got 32"):
            type(layer)(32, 5)
        with pytest.raises(ValueError, match=f"{name}: num_v_heads must be a multiple of num_heads=2, got 3"):
            type(layer)(32, 2, num_v_heads=3)
        with pytest.raises(ValueError, match=f"{name}: expand_v times the size of a head must be whole"):
            type(layer)(32, 2, expand_v=1.3)


def test_retnet_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.RetNet(64, num_heads=4)
    names = {f"{name}_proj.weight" for name in ("q", "k", "v", "g", "out")}
    assert shapes_of(layer).keys() == names and layer.v_proj.weight.shape == (128, 64)
    bound = math.sqrt(6 / (64 + 128))
    assert uniform(layer.v_proj.weight, -(2**-2.5) * bound, 2**-2.5 * bound)
    assert uniform(layer.out_proj.weight, -bound, bound)
    with pytest.raises(ValueError, match="RetNet: dim=64 must be a multiple of 2 num_heads = 6"):
        seqkern.nn.RetNet(64, num_heads=3)


def test_mlstm_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.MLSTM(64, num_heads=4, depth=2)
    assert shapes_of(layer) == {
        **{"proj_up.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,)},
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), (32, 4, 4)),
        **{"igate.weight": (4, 384), "igate.bias": (4,), "fgate.weight": (4, 384), "fgate.bias": (4,)},
        **{"norm": (128,), "skip": (128,), "proj_down.weight": (64, 128)},
    }
    torch.testing.assert_close(layer.fgate.bias, torch.tensor([3.0, 4, 5, 6]))
    assert not layer.fgate.weight.any() and not layer.igate.weight.any() and layer.igate.bias.abs().max() < 0.4
    assert torch.equal(layer.norm, torch.ones(128)) and torch.equal(layer.skip, torch.ones(128))
    for weight, std in ((layer.proj_up.weight, math.sqrt(2 / 320)), (layer.proj_down.weight, 1 / 8)):
        assert abs(weight.std() / std - 1) < 0.05
    with pytest.raises(ValueError, match="MLSTM: expand"):
        seqkern.nn.MLSTM(64, num_heads=3)


# ---- dtypes and torch's ways to call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(name, dtype):
    """Half precision is for data and projections: states stay in float32."""
    layer, x = make(name, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y, state = layer(x, return_state=True)
    with torch.no_grad():
        step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == dtype
    assert {t.dtype for t in real([*parts(state), *parts(layer.zero_state(B))])} == {wide}
    if name.startswith("Mamba2"):
        assert {t.dtype for t in (layer.A_log, layer.D, layer.dt_bias)} == {wide}
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(step, y[:, 0], rtol=tolerance, atol=tolerance)


def test_autocast(name):
    layer, x = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == torch.bfloat16 and {t.dtype for t in real(parts(state))} == {torch.float32}
    expected = layer(x)
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    assert (step - y[:, 0]).abs().max() < 0.05 * expected.abs().max()
    for grad, wanted in zip(gradients([y.float()], layer), gradients([expected], layer), strict=True):
        assert grad.dtype == torch.float32 and (grad - wanted).abs().max() < 0.15 * wanted.abs().max()


def test_compiles_without_a_break(name):
    layer, x = make(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, state = compiled(x, return_state=True)
    expected, expected_state = layer(x, return_state=True)
    outputs, wanted = [y, *parts(state)], [expected, *parts(expected_state)]
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(outputs, layer), gradients(wanted, layer), rtol=1e-4, atol=1e-4)

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        moved, state = (map_parts(lambda t: t.detach().clone(), expected_state) for _ in range(2))
        torch.testing.assert_close(step(x[:, 0], moved), layer.step(x[:, 0], state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, state, rtol=1e-4, atol=1e-5)


def test_mamba2_copies_nothing():
    """Between the projections activations stay as they lie."""
    layer, x = make("Mamba2")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(x)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::cat"}
    assert not [e.name for e in profiler.events() if e.name in copies and e.input_shapes[0]]  # numbers do not count
