"""seqkern.nn.Mamba: against the block written out token by token, and against itself in other calls."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import seqkern.nn

TRANSITIONS = ["exp", "two_exp_minus_one"]


def make(device="cpu", dtype=torch.float32, **options):
    """A small layer whose parameters are all other than where they begin, and (2, 11, d_model) tokens."""
    torch.manual_seed(0)
    layer = seqkern.nn.Mamba(12, d_state=5, d_conv=3, dt_rank=4, dt_max=1.0, dtype=dtype, device=device, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(2, 11, 12, dtype=dtype, device=device)


def written_out(layer, x):
    """The published block, one token after another."""
    A = -layer.A_log.exp()
    a, b = {"exp": (1, 0), "two_exp_minus_one": (2, -1)}[layer.transition]
    taps = x.new_zeros(x.shape[0], layer.d_inner, layer.d_conv)
    h = x.new_zeros(x.shape[0], layer.d_inner, layer.d_state)
    outputs = []
    for x_t in x.unbind(1):
        value, z = layer.in_proj(x_t).split(layer.d_inner, dim=-1)
        taps = torch.cat([taps[..., 1:], value[..., None]], dim=-1)
        conv = (taps * layer.conv1d.weight[:, 0]).sum(-1)
        u = F.silu(conv if layer.conv1d.bias is None else conv + layer.conv1d.bias)
        low_rank, B, C = layer.x_proj(u).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
        delta = F.softplus(layer.dt_proj(low_rank))
        h = (a * torch.exp(delta[..., None] * A) + b) * h + (delta * u)[..., None] * B[:, None, :]
        outputs.append(layer.out_proj(((h * C[:, None, :]).sum(-1) + layer.D * u) * F.silu(z)))
    return torch.stack(outputs, dim=1)


def gradients(outputs, layer, *others):
    torch.manual_seed(1)
    cotangents = [torch.randn_like(output) for output in outputs]
    return torch.autograd.grad(outputs, [*layer.parameters(), *others], cotangents)


@pytest.mark.parametrize("options", [{}, {"conv_bias": False, "bias": True}], ids=str)
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_computes_the_published_block(device, transition, options):
    layer, x = make(device, torch.float64, transition=transition, **options)
    x.requires_grad_()
    y, expected = layer(x), written_out(layer, x)
    torch.testing.assert_close(y, expected)
    names = [*dict(layer.named_parameters()), "x"]
    grads, wanted_grads = gradients([y], layer, x), gradients([expected], layer, x)
    for name, grad, wanted in zip(names, grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}")
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_steps_equal_the_whole(device, transition):
    layer, x = make(device, transition=transition)
    whole, (conv_state, scan_state) = layer(x, return_state=True)
    state = layer.zero_state(len(x))
    with torch.no_grad():
        steps = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], dim=1)
    torch.testing.assert_close(steps, whole)
    torch.testing.assert_close(state[0], conv_state)
    torch.testing.assert_close(state[1], scan_state)


def test_parts_equal_the_whole(device):
    """The state carries values and gradients from one part to the next; a part may be empty."""
    layer, x = make(device)
    state, parts = None, []
    for part in x.split([1, 6, 0, 4], dim=1):
        y, state = layer(part, state, return_state=True)
        parts.append(y)
    whole, whole_state = layer(x, return_state=True)
    outputs, expected = [torch.cat(parts, dim=1), *state], [whole, *whole_state]
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, layer), gradients(expected, layer), rtol=1e-4, atol=1e-5)


def test_packed_equals_separate(device):
    layer, x = make(device)
    bounds = [0, 4, 4, 11]
    cu_seqlens = torch.tensor(bounds, device=device)
    initial = tuple(torch.randn(3, *zeros.shape[1:], device=device) for zeros in layer.zero_state(1))
    y, state = layer(x[:1], initial, cu_seqlens=cu_seqlens, return_state=True)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        own = tuple(rows[n : n + 1] for rows in initial)
        alone, own_state = layer(x[:1, begin:end], own, return_state=True)
        torch.testing.assert_close(y[:, begin:end], alone)
        torch.testing.assert_close([rows[n : n + 1] for rows in state], [*own_state])

    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1], [2] * 11], dtype=torch.int32, device=device)
    y, state = layer(x, seq_idx=seq_idx, return_state=True)
    first, (second, own_state) = layer(x[:1, :4]), layer(x[:1, 4:9], return_state=True)
    torch.testing.assert_close(y[:1, :9], torch.cat([first, second], dim=1))
    torch.testing.assert_close(y[1:], layer(x[1:]))
    assert not y[0, 9:].any()
    torch.testing.assert_close([rows[:1] for rows in state], [*own_state])


def test_parameters_have_the_names_and_shapes_of_mamba_ssm():
    shapes = {
        "in_proj.weight": (64, 16),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "x_proj.weight": (1 + 2 * 16, 32),
        "dt_proj.weight": (32, 1),
        "dt_proj.bias": (32,),
        "A_log": (32, 16),
        "D": (32,),
        "out_proj.weight": (16, 32),
    }
    assert {name: tuple(tensor.shape) for name, tensor in seqkern.nn.Mamba(16).state_dict().items()} == shapes
    with_biases = seqkern.nn.Mamba(16, bias=True, conv_bias=False).state_dict().keys()
    assert with_biases == shapes.keys() - {"conv1d.bias"} | {"in_proj.bias", "out_proj.bias"}


def test_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.Mamba(512, dt_min=0.002, dt_max=0.05)
    dt = F.softplus(layer.dt_proj.bias)
    assert dt.min() > 0.002 * 0.999 and dt.max() < 0.05 * 1.001
    share = ((dt / 0.002).log() / torch.tensor(0.05 / 0.002).log()).sort().values  # uniform between 0 and 1
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.05  # Kolmogorov and Smirnov: 1.6 / sqrt(1024)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    assert torch.equal(layer.D, torch.ones(1024))
    bound = 32**-0.5  # dt_rank is 512 / 16
    assert 0.99 * bound < layer.dt_proj.weight.abs().max() <= bound and layer.dt_proj.weight.mean().abs() < 0.01

    constant = seqkern.nn.Mamba(512, dt_init="constant", dt_scale=3.0, dt_max=0.002, dt_init_floor=0.01)
    torch.testing.assert_close(constant.dt_proj.weight, torch.full((1024, 32), 3 * bound))
    torch.testing.assert_close(F.softplus(constant.dt_proj.bias), torch.full((1024,), 0.01))
    with pytest.raises(ValueError, match="Mamba: dt_init must be"):
        seqkern.nn.Mamba(8, dt_init="zeros")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    """Half precision is for data and projections: the scan's parameters and the states stay in float32."""
    layer = seqkern.nn.Mamba(8, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y, state = layer(torch.randn(2, 3, 8, dtype=dtype), return_state=True)
    assert y.dtype == dtype == layer.dt_proj.bias.dtype
    assert {t.dtype for t in (layer.A_log, layer.D, *state, *layer.zero_state(2))} == {wide}


def test_autocast(device):
    layer, x = make(device)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            step = layer.step(x[:, 0], layer.zero_state(len(x)))
    assert y.dtype == step.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    expected = layer(x)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert (step - y[:, 0]).abs().max() < 0.03 * expected.abs().max()
    for grad, wanted in zip(gradients([y.float()], layer), gradients([expected], layer), strict=True):
        assert grad.dtype == torch.float32 and (grad - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_compiles_without_a_break():
    layer, x = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, state = compiled(x, return_state=True)
    expected, expected_state = layer(x, return_state=True)
    torch.testing.assert_close([y, *state], [expected, *expected_state])
    grads, wanted = gradients([y, *state], layer), gradients([expected, *expected_state], layer)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        moved = tuple(part.clone() for part in expected_state)
        torch.testing.assert_close(step(x[:, 0], moved), layer.step(x[:, 0], expected_state))
    torch.testing.assert_close(moved, expected_state)


def test_copies_nothing():
    """Between the projections activations stay as they lie; the gradients of what was split are joined once."""

    def operators(run):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        return [event.name for event in profiler.events()]

    layer, x = make()
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}
    outputs = []
    assert not copies & set(operators(lambda: outputs.append(layer(x))))
    backward = operators(lambda: gradients(outputs, layer))
    assert not copies & set(backward) and backward.count("aten::cat") == 2
