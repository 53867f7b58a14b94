"""seqkern.compat.mamba_ssm against what that package documents, written out here in plain float64 torch."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern.compat import selective_scan_cuda
from seqkern.compat.mamba_ssm import (
    Mamba,
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

B, D, N, L = 2, 6, 3, 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance=None):
    """Within `tolerance` of the largest expected value; without one, within rounding of the actual dtype."""
    assert actual.shape == expected.shape
    tolerance = tolerance or 16 * torch.finfo(actual.dtype).eps
    wide = torch.complex128 if actual.is_complex() else torch.float64
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.to(wide) / scale, expected.to(wide) / scale, rtol=0, atol=tolerance)


def leaves(tensors, dtype=None):
    """Copies that require a gradient, in float64 (complex128) or dtype; None stays."""
    copies = []
    for t in tensors:
        if t is not None:
            wide = torch.complex128 if t.is_complex() else torch.float64
            t = t.detach().to(wide if dtype is None else dtype).requires_grad_()
        copies.append(t)
    return copies


def gradients(outputs, tensors, cotangents):
    outputs, cotangents = (list(t) if isinstance(t, tuple) else [t] for t in (outputs, cotangents))
    return torch.autograd.grad(outputs, [t for t in tensors if t is not None], cotangents)


def projection(t, A, b, d, time):
    """B or C of one token and channel: (N,)."""
    if t.dim() == 2:
        return t[d]
    t = t[b] if t.dim() == 3 else t[b, d * t.shape[1] // A.shape[0]]  # (N, L), or (N, 2 L) pairs along time
    return torch.complex(t[:, 2 * time], t[:, 2 * time + 1]) if A.is_complex() else t[:, time]


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Token by token and channel by channel: (y, last_state)."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = torch.log(1 + torch.exp(delta)) if delta_softplus else delta
    y, last = torch.zeros_like(u), torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype)
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            h = torch.zeros_like(A[d])
            for t in range(u.shape[2]):
                h = torch.exp(delta[b, d, t] * A[d]) * h + delta[b, d, t] * u[b, d, t] * projection(B, A, b, d, t)
                out = (projection(C, A, b, d, t) * h).sum()
                out = 2 * out.real if A.is_complex() else out
                out = out if D is None else out + D[d] * u[b, d, t]
                y = y.index_put((torch.tensor(b), torch.tensor(d), torch.tensor(t)), out)
            last = last.index_put((torch.tensor(b), torch.tensor(d)), h)
    return y if z is None else y * z * torch.sigmoid(z), last


KINDS = ["constant", "variable", "grouped"]


def scan_inputs(kind_B, kind_C, *, complex_A=False, optional=True, dtype=torch.float64):
    """u, delta, A, B, C, D, z, delta_bias. What follows the token is in dtype, parameters are at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    parameter = wide.to_complex() if complex_A else wide
    time = 2 * L if complex_A else L

    def of(kind):
        if kind == "constant":
            return torch.randn(D, N, dtype=parameter)
        return torch.randn(*((B, N, time) if kind == "variable" else (B, 2, N, time)), dtype=wide).to(dtype)

    u, z = (torch.randn(B, D, L, dtype=wide).to(dtype) for _ in "uz")
    delta = (0.5 * torch.rand(B, D, L, dtype=wide)).to(dtype)
    A = -torch.rand(D, N, dtype=parameter)
    if not optional:
        return u, delta, A, of(kind_B), of(kind_C), None, None, None
    return u, delta, A, of(kind_B), of(kind_C), torch.randn(D, dtype=wide), z, torch.rand(D, dtype=wide)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("kind_C", KINDS)
@pytest.mark.parametrize("kind_B", KINDS)
def test_selective_scan(kind_B, kind_C, complex_A, optional):
    tensors = leaves(scan_inputs(kind_B, kind_C, complex_A=complex_A, optional=optional))
    y, last_state = selective_scan_fn(*tensors, optional, True)
    expected = scan(*tensors, optional)
    close(y, expected[0])
    close(last_state, expected[1])
    assert torch.equal(selective_scan_fn(*tensors, delta_softplus=optional), y)
    assert torch.equal(SelectiveScanFn.apply(*tensors, optional), y)

    cotangents = torch.randn_like(y), torch.randn_like(last_state)
    wanted = gradients(expected, tensors, cotangents)
    for actual, of in zip(gradients((y, last_state), tensors, cotangents), wanted, strict=True):
        close(actual, of, 1e-12)

    ref = selective_scan_ref(*tensors, optional, True)
    close(ref[0], expected[0])
    close(ref[1], expected[1])


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selective_scan_dtypes(dtype, complex_A, function):
    tensors = scan_inputs("variable", "grouped", complex_A=complex_A, dtype=dtype)
    y, last_state = function(*tensors, True, True)
    assert y.dtype == dtype
    assert last_state.dtype == (torch.complex64 if complex_A else torch.float32)
    expected, expected_state = scan(*leaves(tensors), True)
    close(y, expected)
    close(last_state, expected_state, 1e-5)


def rms(x, weight):
    return x if weight is None else weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def inner(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, bias, B_bias, C_bias, *norms):
    """mamba_inner_fn, with pairs of complex B and C put along time by hand."""
    W, R = conv_weight.shape[-1], dt_proj.shape[1]
    width = A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz.chunk(2, dim=1)
    u = F.silu(F.conv1d(F.pad(x, (W - 1, 0)), conv_weight, conv_bias, groups=x.shape[1]))
    selected = torch.einsum("bdl,rd->blr", u, x_proj)

    def over_time(columns, bias, norm):
        columns = rms(columns if bias is None else columns + bias, norm)  # (B, L, width)
        if not A.is_complex():
            return columns.transpose(1, 2)
        pairs = torch.stack([columns[..., 0::2], columns[..., 1::2]], dim=2)  # (B, L, 2, N)
        return pairs.flatten(1, 2).transpose(1, 2)  # (B, N, 2 L)

    B = over_time(selected[..., R : R + width], B_bias, norms[0]) if B is None else B
    C = over_time(selected[..., selected.shape[-1] - width :], C_bias, norms[1]) if C is None else C
    delta = rms(torch.einsum("blr,dr->bld", selected[..., :R], dt_proj), norms[2])
    y = scan(u, delta.transpose(1, 2), A, B, C, D, z, bias, True)[0]
    out = torch.einsum("bdl,ed->ble", y, out_proj)
    return out if out_bias is None else out + out_bias


def inner_inputs(*, complex_A=False, constant=False, optional=False, norms=False, channels_contiguous=True):
    """The tensors of mamba_inner_fn up to C_proj_bias, then the three norms' weights."""
    R, E, wide = 2, 5, torch.float64
    parameter = wide.to_complex() if complex_A else wide
    width = 2 * N if complex_A else N
    xz = torch.randn(B, L, 2 * D, dtype=wide).mT if channels_contiguous else torch.randn(B, 2 * D, L, dtype=wide)
    rows = R + (0 if constant else 2 * width)
    weights = (torch.randn(rows, D, dtype=wide), torch.randn(D, R, dtype=wide), torch.randn(E, D, dtype=wide))
    A = -torch.rand(D, N, dtype=parameter)
    B_C = [torch.randn(D, N, dtype=parameter) if constant else None for _ in "BC"]

    def maybe(wanted, *shape):
        return torch.randn(*shape, dtype=wide) if wanted else None

    return (
        *(xz, torch.randn(D, 1, 4, dtype=wide), maybe(optional, D), *weights, maybe(optional, E), A, *B_C),
        *(maybe(optional, D), maybe(optional, D), maybe(optional, width), maybe(optional, width)),
        *(maybe(norms, width), maybe(norms, width), maybe(norms, D)),
    )


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"channels_contiguous": False},
        {"optional": True},
        {"norms": True},
        {"complex_A": True, "optional": True, "norms": True},
        {"constant": True},
        {"constant": True, "complex_A": True},
    ],
    ids=lambda kind: "-".join(kind) or "plain",
)
def test_mamba_inner(kind):
    tensors = leaves(inner_inputs(**kind))
    *args, b_rms, c_rms, dt_rms = tensors
    norms = {"b_rms_weight": b_rms, "c_rms_weight": c_rms, "dt_rms_weight": dt_rms, "b_c_dt_rms_eps": 1e-5}
    y = mamba_inner_fn(*args, **norms)
    expected = inner(*tensors)
    close(y, expected, 1e-13)
    assert torch.equal(MambaInnerFn.apply(*args, True, 1, b_rms, c_rms, dt_rms, 1e-5), y)
    if not kind.get("norms"):
        close(mamba_inner_ref(*args), expected, 1e-13)

    dy = torch.randn_like(y)
    used = [t for t in tensors if t is not None]
    for actual, wanted in zip(gradients(y, used, dy), gradients(expected, used, dy), strict=True):
        close(actual, wanted, 1e-12)


def test_mamba_inner_under_autocast():
    """The convolution and the projections run in autocast's dtype; the parameters of the scan keep theirs."""
    tensors = [None if t is None else t.float() for t in inner_inputs(optional=True, norms=True)]
    xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, *rest = tensors
    *rest, b_rms, c_rms, dt_rms = rest
    norms = {"b_rms_weight": b_rms, "c_rms_weight": c_rms, "dt_rms_weight": dt_rms}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mamba_inner_fn(*tensors[:-3], **norms)
    x, z = xz.chunk(2, dim=1)
    xz = torch.cat([x.bfloat16().float(), z], dim=1)
    low = [t.bfloat16() for t in (x_proj, dt_proj, out_proj, out_bias)]
    u = seqkern.causal_conv1d(xz[:, :D].bfloat16(), conv_weight.bfloat16()[:, 0], conv_bias, "silu")
    selected = F.linear(u.mT, low[0])
    delta = rms(F.linear(selected[..., :2], low[1]).double(), dt_rms.double()).bfloat16()
    A, _, _, skip, bias, B_bias, C_bias = rest
    columns = (selected[..., 2 : 2 + N] + B_bias.bfloat16(), selected[..., -N:] + C_bias.bfloat16())
    B_C = [rms(c.double(), w.double()).bfloat16().mT for c, w in zip(columns, (b_rms, c_rms), strict=True)]
    scanned = seqkern.selective_scan(u, delta.mT, A, *B_C, skip, z, bias, True)
    assert y.dtype == torch.bfloat16
    close(y, F.linear(scanned.mT, low[2], low[3]))


def update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, rows=None):
    """One token of every row with heads (R, H, P, N), head by head."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for b, row in enumerate(rows or range(len(x))):
        for h in range(x.shape[1]):
            if row >= 0:
                step = dt[b, h] if dt_bias is None else dt[b, h] + dt_bias[h]
                step = torch.log(1 + torch.exp(step)) if dt_softplus else step
                g = h * B.shape[1] // x.shape[1]
                entering = (step * x[b, h])[:, None] * B[b, g]
                state[row, h] = torch.exp(step[:, None] * A[h]) * state[row, h] + entering
                y[b, h] = state[row, h] @ C[b, g] + (0 if D is None else D[h] * x[b, h])
                y[b, h] *= 1 if z is None else F.silu(z[b, h])
    return y


@pytest.mark.parametrize("rows", [None, [4, -1, 0]])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(("H", "G"), [(None, None), (4, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_state_update(dtype, H, G, optional, rows):
    """Without heads, as Mamba calls it; with heads, as Mamba-2 does: one dt, A, D and bias per head, by stride 0."""
    batch, P, heads, groups = 3, 5, H or 1, G or 1
    state = torch.randn(5 if rows else batch, heads, P, N).to(dtype)
    x, z = (torch.randn(batch, heads, P).to(dtype) for _ in "xz")
    dt = torch.rand(batch, heads, 1 if H else P).to(dtype).expand(batch, heads, P)
    A = (-torch.rand(heads, 1, 1)).expand(heads, P, N) if H else -torch.rand(heads, P, N)
    B_, C = (torch.randn(batch, groups, N).to(dtype) for _ in "BC")
    per_channel = [torch.rand(heads, 1 if H else P).expand(heads, P) for _ in ("D", "dt_bias")]
    skip, bias = per_channel if optional else (None, None)
    z = z if optional else None

    expected_state = state.double()
    wide = [None if t is None else t.double() for t in (x, dt, A, B_, C, skip, z, bias)]
    expected = update(expected_state, *wide, optional, rows)

    def without_heads(t, dim):
        return t if H or t is None else t.squeeze(dim)

    given = [without_heads(t, 1) for t in (x, dt)] + [without_heads(A, 0)] + [without_heads(t, 1) for t in (B_, C)]
    given += [without_heads(skip, 0), without_heads(z, 1), without_heads(bias, 0)]
    given[2] = given[2].clone().requires_grad_() if not H else given[2]
    running = without_heads(state.clone(), 1)
    indices = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    y = selective_state_update(running, *given, optional, state_batch_indices=indices)
    assert y.dtype == dtype and not y.requires_grad
    close(y, without_heads(expected, 1))
    close(running, without_heads(expected_state, 1))
    if rows is None:
        again = without_heads(state.clone(), 1)
        given[2] = given[2].detach()
        close(selective_state_update_ref(again, *given, optional), without_heads(expected, 1))
        close(again, running)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("kind", ["constant", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_raw_bwd(dtype, kind, complex_A):
    tensors = scan_inputs(kind, kind, complex_A=complex_A, dtype=dtype)
    *_, z, bias = tensors
    dout, dz = torch.randn(B, D, L).to(dtype), torch.empty(B, 2 * D, L, dtype=dtype)[:, D:]
    out, x, out_z = selective_scan_cuda.fwd(*tensors, True)
    grads = selective_scan_cuda.bwd(*tensors, dout, x, out, dz, True, True)
    assert grads[7].data_ptr() == dz.data_ptr()

    wide = leaves(tensors)
    expected, state = scan(*wide, True)
    close(out_z, expected)
    close(grads[8], expected)
    close(out, scan(*wide[:6], None, wide[7], True)[0])
    close(x[:, :, 0, 1::2], state, 1e-5)
    du, ddelta, dA, dB, dC, dD, dz, dbias = gradients(expected, wide, dout.double())
    for actual, wanted, of in zip(
        grads, (du, ddelta, dA, dB, dC, dD, dbias, dz), (*tensors[:6], bias, z), strict=False
    ):
        assert actual.dtype == of.dtype
        close(actual, wanted, 4 * torch.finfo(dtype).eps * 16)

    without = [*tensors[:5], None, None, None]
    assert len(selective_scan_cuda.fwd(*without, False)) == 2
    grads = selective_scan_cuda.bwd(*without, dout, None, None, None, False, False)
    assert len(grads) == 7 and grads[5] is None and grads[6] is None


@pytest.mark.parametrize("complex_A", [False, True])
def test_raw_fwd_keeps_the_state_every_2048_tokens(complex_A):
    length, parts = 4100, 2 if complex_A else 1
    u, delta = torch.randn(1, 2, length, dtype=torch.float64), 0.01 * torch.rand(1, 2, length, dtype=torch.float64)
    A = -torch.rand(2, N, dtype=torch.complex128 if complex_A else torch.float64)
    B_, C = (torch.randn(1, 1, N, parts * length, dtype=torch.float64) for _ in "BC")
    out, x = selective_scan_cuda.fwd(u, delta, A, B_, C, None, None, None, False)
    assert x.shape == (1, 2, 3, 2 * N)
    close(out, selective_scan_ref(u, delta, A, B_, C), 1e-12)
    for chunk, end in enumerate([2048, 4096, length]):
        past = (u[..., :end], delta[..., :end], A, B_[..., : parts * end], C[..., : parts * end])
        close(x[:, :, chunk, 1::2], selective_scan_ref(*past, return_last_state=True)[1], 1e-12)
        close(x[:, :, chunk, 0::2], torch.exp(delta[..., :end].sum(-1)[..., None] * A), 1e-12)


def test_mamba_is_made_like_the_original():
    layer = Mamba(64, 8, 3, 3, 5, 0.01, 0.2, "constant", 2.0, 0.02, False, True, True, 7, "cpu", torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.state_dict().items()}
    assert shapes == {
        **{"A_log": (192, 8), "D": (192,), "in_proj.weight": (384, 64), "in_proj.bias": (384,)},
        **{"conv1d.weight": (192, 1, 3), "x_proj.weight": (21, 192)},
        **{"dt_proj.weight": (192, 5), "dt_proj.bias": (192,), "out_proj.weight": (64, 192), "out_proj.bias": (64,)},
    }
    assert (layer.d_inner, layer.dt_rank, layer.d_conv, layer.d_state, layer.layer_idx) == (192, 5, 3, 8, 7)
    assert layer.use_fast_path and layer.activation == "silu"
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 9.0).expand(192, 8))
    assert torch.equal(layer.D, torch.ones(192))
    torch.testing.assert_close(layer.dt_proj.weight, torch.full((192, 5), 2 * 5**-0.5))
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.0199 < dt.min() < 0.021 and 0.15 < dt.max() < 0.2001
    assert layer.dt_proj.bias._no_reinit and layer.A_log._no_weight_decay and layer.D._no_weight_decay
    # Code that builds on the layer calls its parts.
    x = torch.randn(2, 192, 6)
    torch.testing.assert_close(
        layer.act(layer.conv1d(x)[..., :6]), seqkern.causal_conv1d(x, layer.conv1d.weight[:, 0], None, "silu")
    )

    layer = Mamba(24, dtype=torch.bfloat16)
    assert layer.dt_rank == 2 and layer.in_proj.bias is None and layer.conv1d.bias is not None
    assert layer.dt_proj.weight.abs().max() <= 2**-0.5 < layer.dt_proj.weight.abs().max() + 0.1
    assert {name for name, p in layer.named_parameters() if p.dtype == torch.float32} == {"A_log", "D"}
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(24, dt_init="zeros")


@pytest.mark.parametrize("bias", [False, True])
def test_mamba(bias):
    """Forward, and the same in pieces: some tokens at once, then one after another through a cache."""
    layer = Mamba(8, d_state=N, bias=bias, layer_idx=3, dtype=torch.float64)
    x = torch.randn(B, L, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)

    xz = layer.in_proj(x).mT
    weights = (layer.conv1d.weight, layer.conv1d.bias, layer.x_proj.weight, layer.dt_proj.weight)
    out = (layer.out_proj.weight, layer.out_proj.bias)
    expected = inner(
        *(xz, *weights, *out, -layer.A_log.exp(), None, None, layer.D, layer.dt_proj.bias, None, None, None, None, None)
    )
    close(y, expected, 1e-13)
    parameters, dy = [x, *layer.parameters()], torch.randn_like(y)
    for actual, wanted in zip(gradients(y, parameters, dy), gradients(expected, parameters, dy), strict=True):
        close(actual, wanted, 1e-12)

    for first in (1, 2, 7):
        cache = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
        pieces = [layer(x[:, :first], inference_params=cache)]
        conv_state, ssm_state = cache.key_value_memory_dict[3]
        assert conv_state.shape == (B, 16, 4) and ssm_state.shape == (B, 16, N)
        for t in range(first, L):
            cache.seqlen_offset = t
            pieces.append(layer(x[:, t : t + 1], inference_params=cache))
        close(torch.cat(pieces, dim=1), y, 1e-13)
        assert cache.key_value_memory_dict[3][0] is conv_state  # in place

    states = layer.allocate_inference_cache(B, 100)
    assert [s.dtype for s in states] == [torch.float64] * 2 and not any(s.any() for s in states)
    outputs = []
    for t in range(L):
        out, conv_state, ssm_state = layer.step(x[:, t : t + 1], *states)
        assert conv_state is states[0] and ssm_state is states[1]
        outputs.append(out)
    close(torch.cat(outputs, dim=1), y, 1e-13)
    assert layer.allocate_inference_cache(1, 1, torch.bfloat16)[1].dtype == torch.bfloat16

    with pytest.raises(RuntimeError, match="layer_idx"):
        Mamba(8)(x, inference_params=SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}))


def test_state_dict_is_that_of_the_layer_in_nn():
    layer, other = Mamba(8), seqkern.nn.Mamba(8)
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
from mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn
from mamba_ssm.modules.mamba_simple import Mamba as same
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref, selective_scan_ref
from mamba_ssm.ops.selective_scan_interface import MambaInnerFn, SelectiveScanFn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref
import mamba_ssm.ops.triton.selective_state_update as module
from selective_scan_cuda import fwd, bwd
import mamba_ssm
print(Mamba is same is mamba_ssm.modules.mamba_simple.Mamba, module.selective_state_update is selective_state_update)
seqkern.compat.uninstall()
import sys
print(any(name.partition(".")[0] in ("mamba_ssm", "selective_scan_cuda") for name in sys.modules))
"""
    assert python(code) == ["True", "True", "False"]
