"""causal_conv1d against convolutions by other hands, and what is particular to it."""

import numpy
import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern.testing.operators import CAUSAL_CONV1D


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def depthwise(x, weight, bias, activation, dilation):
    """torch's convolution, padded in front."""
    padded = F.pad(x, ((weight.shape[1] - 1) * dilation, 0))
    y = F.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=x.shape[1])
    return F.silu(y) if activation else y


@pytest.mark.parametrize("L", [1, 2, 3, 127, 129, 1000])
@pytest.mark.parametrize("W, dilation", [(1, 1), (2, 1), (3, 4), (4, 1), (7, 2), (64, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv1d_of_torch(L, W, dilation, activation, device):
    x, weight, bias = rand(2, 5, L).to(device), rand(5, W, seed=1).to(device), rand(5, seed=2).to(device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected = depthwise(x, weight, bias, activation, dilation)
    dy = rand(2, 5, L, seed=3).to(device)
    actual = seqkern.causal_conv1d(x, weight, bias, activation, dilation=dilation)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad(y, leaves, dy) for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("W", [1, 4, 9, 64])
def test_convolve_of_numpy(W, device):
    """A filter with impulse response weight reversed in time; with a state, the tail of a longer convolution."""
    x, weight, state = rand(1, 3, 50), rand(3, W, seed=1), rand(1, 3, W - 1, seed=2)
    y = seqkern.causal_conv1d(x.to(device), weight.to(device), initial_state=state.to(device)).cpu()
    for d in range(3):
        signal = numpy.concatenate([state[0, d].numpy(), x[0, d].numpy()])
        expected = numpy.convolve(signal, weight[d].flip(0).numpy())[W - 1 : len(signal)]
        numpy.testing.assert_allclose(y[0, d].numpy(), expected, rtol=1e-11, atol=1e-11)


def test_an_impulse_returns_the_weights(device):
    """Exactly: the last column meets the current token, the one before it the previous token."""
    x = torch.zeros(1, 1, 9, device=device)
    x[..., 2] = 1
    weight = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    assert seqkern.causal_conv1d(x, weight)[0, 0].tolist() == [0, 0, 3, 2, 1, 0, 0, 0, 0]
    assert seqkern.causal_conv1d(x, weight, dilation=2)[0, 0].tolist() == [0, 0, 3, 0, 2, 0, 1, 0, 0]
    assert seqkern.causal_conv1d(x, weight, reverse=True)[0, 0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("L", [0, 1, 2, 3, 9])
def test_states_are_copies_of_tokens(dtype, L, device):
    """Not a bit is lost, on the way through a sequence shorter than the state or out of a longer one."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    x, state = rand(2, 3, L, dtype=dtype).to(device), rand(2, 3, 3, dtype=accumulator, seed=1).to(device)
    weight = rand(3, 4, dtype=dtype).to(device)
    history = torch.cat([state, x.to(accumulator)], dim=-1)
    final = seqkern.causal_conv1d(x, weight, initial_state=state, return_final_state=True)[1]
    assert torch.equal(final, history[..., L:])
    # In reverse the state's columns are in the order in which time passes: the last one is next to the sequence.
    final = seqkern.causal_conv1d(x, weight, initial_state=state, return_final_state=True, reverse=True)[1]
    assert torch.equal(final, torch.cat([state, x.to(accumulator).flip(-1)], dim=-1)[..., L:])


def test_swish_is_silu(device):
    x, weight = rand(1, 2, 8).to(device), rand(2, 4).to(device)
    assert torch.equal(*(seqkern.causal_conv1d(x, weight, None, name) for name in ("silu", "swish")))
    states = [rand(1, 2, 3).to(device) for _ in range(2)]
    ys = [
        seqkern.causal_conv1d_step(x[..., 0], state, weight, None, name)
        for state, name in zip(states, ("silu", "swish"), strict=True)
    ]
    assert torch.equal(*ys) and torch.equal(*states)


@pytest.mark.parametrize("value", [-1e4, -200.0, -90.0, -30.0, 0.0, 30.0, 200.0, 1e4])
def test_silu_at_its_ends(value, device):
    """Where exp overflows silu is 0 or the identity, and so are its derivatives."""
    x = torch.full((1, 2, 3), value, device=device, requires_grad=True)
    y = seqkern.causal_conv1d(x, torch.ones(2, 1, device=device), activation="silu")
    exact = x.detach().double().requires_grad_()
    expected = F.silu(exact)
    # e^x from 2^(x log2(e)): the product is rounded, so |x| units in the last place.
    torch.testing.assert_close(y.double(), expected, rtol=(4 + abs(value)) * 2**-23, atol=1e-30)
    grads = [torch.autograd.grad(output.sum(), leaf)[0].double() for output, leaf in ((y, x), (expected, exact))]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("B, D, L", [(2, 6, 7), (1, 1, 7), (2, 6, 1), (1, 3, 1), (2, 1, 1)])
def test_the_output_has_the_memory_order_of_x(B, D, L, channels_first, device):
    x = rand(B, D, L).to(device)
    if channels_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    y = seqkern.causal_conv1d(x, rand(D, 4).to(device))
    (dx,) = torch.autograd.grad(y.sum(), x)
    for tensor in (y, dx):
        assert tensor.is_contiguous() or tensor.transpose(1, 2).is_contiguous()
        if D > 1 and L > 1:
            assert tensor.stride() == x.stride()


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_steps_of_several_tokens_and_longer_states(T, extra, dilation, device):
    """T tokens at once are T steps, and a state with more columns keeps more tokens and gives the same outputs."""
    W, dtype = 4, torch.float32
    S = (W - 1) * dilation
    weight, bias = rand(3, W, dtype=dtype).to(device), rand(3, dtype=dtype).to(device)
    x, state = rand(2, 3, T, dtype=dtype, seed=1).to(device), rand(2, 3, S + extra, dtype=dtype, seed=2).to(device)
    history = torch.cat([state, x], dim=-1)
    options = {"bias": bias, "activation": "silu", "dilation": dilation}

    whole = seqkern.causal_conv1d(x, weight, initial_state=state[..., extra:].contiguous(), **options)
    at_once, one_by_one = state.clone(), state.clone()
    y = seqkern.causal_conv1d_step(x, at_once, weight, **options)
    torch.testing.assert_close(y, whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(at_once, history[..., T:])
    for t in range(T):
        y_t = seqkern.causal_conv1d_step(x[..., t], one_by_one, weight, **options)
        assert y_t.shape == (2, 3) and torch.equal(y_t, y[..., t])
    assert torch.equal(one_by_one, at_once)


def test_widths_up_to_64(device):
    """Every width, of which some have their own code."""
    for W in range(1, 65):
        x, weight, bias = rand(1, 3, 10).to(device), rand(3, W, seed=1).to(device), rand(3, seed=2).to(device)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y, expected = seqkern.causal_conv1d(x, weight, bias), depthwise(x, weight, bias, None, 1)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(output.square().sum(), (x, weight)) for output in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_channels_of_every_remainder(device):
    """D and L around the sizes of vectors, in both memory orders."""
    for size in range(1, 36):
        for x in (rand(1, size, 5, dtype=torch.float32), rand(1, 5, size, dtype=torch.float32)):
            for order in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                order, weight = order.to(device), rand(x.shape[1], 4, dtype=torch.float32).to(device)
                padded = F.pad(order.double(), (3, 0))
                L = order.shape[2]
                expected = sum(weight[:, j : j + 1].double() * padded[..., j : j + L] for j in range(4))
                y = seqkern.causal_conv1d(order, weight)
                torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_weight_gradients_over_many_tokens(device):
    """Sums over 10,000 tokens in float32 lose no more than a few digits, in any data type."""
    L = 10_000
    x, dy = rand(1, 2, L, dtype=torch.float32).to(device), rand(1, 2, L, dtype=torch.float32, seed=1).to(device)
    weight = rand(2, 4, dtype=torch.float32).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        data, cotangent = x.to(dtype), dy.to(dtype)
        leaf, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
        (actual,) = torch.autograd.grad(seqkern.causal_conv1d(data, leaf), leaf, cotangent)
        (expected,) = torch.autograd.grad(depthwise(data.double(), exact, None, None, 1), exact, cotangent.double())
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * L**0.5)


def test_nan_in_an_unused_place_of_a_longer_state_stays_there(device):
    state = torch.full((1, 2, 7), float("nan"), device=device)
    state[..., 4:] = 1
    y = seqkern.causal_conv1d_step(torch.ones(1, 2, device=device), state, torch.ones(2, 4, device=device))
    assert torch.equal(y, torch.full_like(y, 4)) and torch.equal(state[..., 3:], torch.ones_like(state[..., 3:]))


def test_the_table_names_this_operator():
    assert CAUSAL_CONV1D.function is seqkern.causal_conv1d and CAUSAL_CONV1D.step is seqkern.causal_conv1d_step
    assert CAUSAL_CONV1D.reference is seqkern.reference.causal_conv1d
