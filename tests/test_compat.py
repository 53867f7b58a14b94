"""seqkern.compat against what the packages it stands in for document, written out here in plain torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from seqkern.compat.causal_conv1d import (
    causal_conv1d_bwd_function,
    causal_conv1d_fn,
    causal_conv1d_fwd_function,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

B, D, L = 3, 24, 19
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def close(actual, expected, factor=1.0):
    assert actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=8 * eps * factor, atol=8 * eps * factor)


def conv(history, weight, bias, activation):
    """The outputs of the last history.shape[-1] - (W - 1) tokens, in float64."""
    y = F.conv1d(
        history.double(), weight.double()[:, None], None if bias is None else bias.double(), groups=len(weight)
    )
    return y if activation is None else F.silu(y)


def rand(*shape, dtype, channels_contiguous=False):
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return x.mT.contiguous().mT if channels_contiguous else x


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("channels_contiguous", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [2, 4])
def test_fn(W, dtype, activation, channels_contiguous):
    x = rand(B, D, L, dtype=dtype, channels_contiguous=channels_contiguous)
    weight, bias, state = rand(D, W, dtype=dtype), rand(D, dtype=dtype), rand(B, D, W - 1, dtype=dtype)
    out = torch.empty(B, W - 1, D, dtype=dtype).mT

    y, final = causal_conv1d_fn(x, weight, bias, None, state, True, out, activation)
    history = torch.cat([state, x], dim=2)
    close(y, conv(history, weight, bias, activation))
    assert y.stride() == x.stride()
    assert final.dtype == dtype and final.stride(1) == 1
    assert torch.equal(final, history[..., L:]) and torch.equal(out, final)

    close(causal_conv1d_fn(x, weight), conv(F.pad(x, (W - 1, 0)), weight, None, None))
    assert torch.equal(causal_conv1d_fwd_function(x, weight, bias, None, state, None, activation is not None), y)


def segments(x, weight, bias, activation, seq_idx, state):
    """Each run of one id on its own; the first of a row continues its state if no padding comes before it."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for b, ids in enumerate(seq_idx.tolist()):
        begin = 0
        while begin < len(ids):
            end = begin + 1
            while end < len(ids) and ids[end] == ids[begin]:
                end += 1
            if ids[begin] >= 0:
                past = state[b] if begin == 0 else torch.zeros_like(state[b])
                y[b, :, begin:end] = conv(torch.cat([past, x[b, :, begin:end]], 1)[None], weight, bias, activation)[0]
            begin = end
    return y


@pytest.mark.parametrize("activation", [None, "swish"])
def test_fn_with_seq_idx_and_states(activation):
    seq_idx = torch.tensor([[0] * 5 + [1] * 14, [-1] * 3 + [4] * 12 + [-1] * 4, [2] * 19], dtype=torch.int32)
    x, weight = rand(B, D, L, dtype=torch.float64), rand(D, 4, dtype=torch.float64)
    bias, state = rand(D, dtype=torch.float64), rand(B, D, 3, dtype=torch.float64)
    arguments = [t.requires_grad_() for t in (x, weight, bias, state)]

    y, final = causal_conv1d_fn(x, weight, bias, seq_idx, state, True, activation=activation)
    expected = segments(x, weight, bias, activation, seq_idx, state)
    close(y, expected)
    last = torch.stack([x[0, :, -3:], x[1, :, 12:15], x[2, :, -3:]])
    assert torch.equal(final, last)

    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    grads = torch.autograd.grad([y, final], arguments, [dy, dfinal])
    for actual, wanted in zip(grads, torch.autograd.grad([expected, last], arguments, [dy, dfinal]), strict=True):
        close(actual, wanted, factor=100)
    assert not grads[3][1].any()  # behind padding


@pytest.mark.parametrize("return_dinitial_states", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bwd_function(dtype, return_dinitial_states):
    x, weight, bias = rand(B, D, L, dtype=dtype), rand(D, 4, dtype=dtype), rand(D, dtype=dtype)
    state, dout, dfinal = rand(B, D, 3, dtype=dtype), rand(B, D, L, dtype=dtype), rand(B, D, 3, dtype=dtype)
    into = torch.empty(B, D + 5, L, dtype=dtype)[:, :D]
    dx, dweight, dbias, dstate = causal_conv1d_bwd_function(
        x, weight, bias, dout, None, state, dfinal, into, return_dinitial_states, True
    )
    assert dx.data_ptr() == into.data_ptr()

    leaves = [t.double().requires_grad_() for t in (x, weight, bias, state)]
    history = torch.cat([leaves[3], leaves[0]], dim=2)
    outputs = [conv(history, leaves[1], leaves[2], "silu"), history[..., L:]]
    expected = torch.autograd.grad(outputs, leaves, [dout.double(), dfinal.double()])
    scale = [max(1.0, e.abs().max().item()) for e in expected]
    for actual, wanted, s in zip((dx, dweight, dbias), expected, scale, strict=False):
        close(actual / s, wanted / s, factor=4)
    if return_dinitial_states:
        assert dstate.dtype == dtype and dstate.stride(1) == 1
        close(dstate / scale[3], expected[3] / scale[3], factor=4)
        without = causal_conv1d_bwd_function(x, weight, None, dout, None, None, None, None, True, False)
        assert without[2] is None and without[3].shape == (B, D, 3)
    else:
        assert dstate is None


def update(x, state, weight, bias, activation, cache_seqlens, rows):
    """Each row's state put in the order of time, convolved with its new tokens, and put back."""
    x = x[..., None] if x.dim() == 2 else x
    T, state_len, y = x.shape[2], state.shape[2], torch.zeros_like(x, dtype=torch.float64)
    for b, row in enumerate(rows):
        if row >= 0:
            first = 0 if cache_seqlens is None else int(cache_seqlens[b])
            last = 0 if cache_seqlens is None else first + T
            history = torch.cat([state[row].roll(-first, dims=1), x[b]], dim=1)
            y[b] = conv(history[None], weight, bias, activation)[0, :, -T:]
            state[row] = history[:, -state_len:].roll(last, dims=1)
    return y


@pytest.mark.parametrize("rows", [None, [5, 0, 3], [5, -1, 0], [-1, -1, -1]])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("T", "state_len"), [(None, 3), (None, 7), (1, 4), (5, 9), (5, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update(dtype, T, state_len, circular, rows):
    x = rand(*((B, D) if T is None else (B, D, T)), dtype=dtype)
    weight, bias = rand(D, 4, dtype=dtype).requires_grad_(), rand(D, dtype=dtype)
    state = rand(B if rows is None else 7, D, state_len, dtype=dtype, channels_contiguous=True)
    cache_seqlens = torch.tensor([0, 5, 1021], dtype=torch.int32) if circular else None
    indices = None if rows is None else torch.tensor(rows, dtype=torch.int32)

    expected_state = state.clone()
    expected = update(x, expected_state, weight.detach(), bias, "silu", cache_seqlens, rows or range(B))
    y = causal_conv1d_update(x, state, weight, bias, "silu", cache_seqlens, indices)
    assert torch.equal(state, expected_state)
    assert not y.requires_grad
    close(y, expected[..., 0] if T is None else expected)


@pytest.mark.parametrize("state_len", [2, 3])
def test_update_with_a_wrong_circular_state_raises(state_len):
    x, weight, state = torch.randn(B, D), torch.randn(D, 4), torch.zeros(B + (state_len == 3), D, state_len)
    with pytest.raises(RuntimeError, match=r"causal_conv1d_update: conv_state must be \(B=3, D=24, state_len\)"):
        causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(B, dtype=torch.int32))


@pytest.mark.parametrize("state_len", [0, 1, 4])
def test_varlen_states(state_len):
    x, bounds = torch.randn(L, D), [0, 2, 2, 9, L]
    states = causal_conv1d_varlen_states(x, torch.tensor(bounds, dtype=torch.int32), state_len)
    for n, state in enumerate(states):
        tokens = x[bounds[n] : bounds[n + 1]].T
        assert torch.equal(state, F.pad(tokens, (state_len, 0))[:, tokens.shape[1] :])
    assert states.stride(1) == 1
    assert causal_conv1d_varlen_states(x[:0], torch.zeros(3, dtype=torch.int32), state_len).shape == (2, D, state_len)


def test_autocast_does_not_cast():
    x, weight = torch.randn(B, D, L), torch.randn(D, 4)
    expected = causal_conv1d_fn(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(causal_conv1d_fn(x, weight), expected)


def python(code):
    """The words that a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_install_in_a_fresh_process():
    code = """
import importlib.util
import seqkern.compat
print(*seqkern.compat.install(force=True), len(seqkern.compat.install(force=True)))
import causal_conv1d
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as same
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from causal_conv1d.cpp_functions import causal_conv1d_fwd_function, causal_conv1d_bwd_function
import causal_conv1d.cpp_functions
print(causal_conv1d_fn is same is causal_conv1d.causal_conv1d_interface.causal_conv1d_fn)
print(importlib.util.find_spec("causal_conv1d").name, causal_conv1d.__version__)
seqkern.compat.uninstall()
import sys
print(any("causal_conv1d" == name.partition(".")[0] for name in sys.modules))
"""
    placed = ["accelerated_scan", "causal_conv1d", "fla", "mamba_ssm", "selective_scan_cuda"]
    assert python(code) == [*placed, "0", "True", "causal_conv1d", "1.7.0", "False"]


def test_an_installed_package_is_left_alone(tmp_path):
    (tmp_path / "causal_conv1d.py").write_text("real = True\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import seqkern.compat
print("causal_conv1d" in seqkern.compat.install())
import causal_conv1d
print(causal_conv1d.real)
with seqkern.compat.installed(force=True):
    import causal_conv1d
    print(hasattr(causal_conv1d, "real"))
import causal_conv1d
print(causal_conv1d.real)
"""
    assert python(code) == ["False", "True", "False", "True"]
