"""The layers on elementwise_rnn: against their papers' equations, token by token, against themselves, and on parity."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import DIM, B, L, small, some_state

import seqkern.nn

HIDDEN = 10

# ---- every cell as its paper has it: (gates of a token, each (B, hidden), recurrent weights, state) -> state


def gru(x, a, state):
    (h,), (x_z, x_r, x_n), (a_z, a_r, a_n) = state, x, a
    z, r = torch.sigmoid(a_z * h + x_z), torch.sigmoid(a_r * h + x_r)
    n = torch.tanh(a_n * h * r + x_n)
    return ((1 - z) * h + z * n,)


def lstm(x, a, state):
    (h, c), (x_f, x_g, x_o), (a_f, a_g, a_o, c_f, c_o) = state, x, a
    f, g = torch.sigmoid(a_f * h + c_f * c + x_f), torch.tanh(a_g * h + x_g)
    c = f * c + (1 - f) * g
    o = torch.sigmoid(a_o * h + c_o * c + x_o)
    return o * torch.tanh(c), c


def slstm(x, a, state):
    """Without a scale: exp(m) is multiplied in."""
    h, c, n, m = state
    q_i, q_f, q_z, q_o = (a_k * h + x_k for a_k, x_k in zip(a, x, strict=True))
    i, f, z, o = q_i.exp(), torch.sigmoid(q_f), torch.tanh(q_z), torch.sigmoid(q_o)
    c, n = f * m.exp() * c + i * z, f * m.exp() * n + i
    return o * c / n, c, n, torch.zeros_like(m)


def indrnn(x, a, state):
    return (torch.relu(a[0] * state[0] + x[0]),)


def elman(x, a, state):
    return (torch.tanh(a[0] * state[0] + x[0]),)


LAYERS = {
    "ParaGRU": (lambda **f: seqkern.nn.ParaGRU(DIM, HIDDEN, **f), gru),
    "ParaLSTM": (lambda **f: seqkern.nn.ParaLSTM(DIM, HIDDEN, **f), lstm),
    "SLSTMDiag": (lambda **f: seqkern.nn.SLSTMDiag(DIM, HIDDEN, **f), slstm),
    "IndRNN": (lambda **f: seqkern.nn.IndRNN(DIM, HIDDEN, **f), indrnn),
    "IndRNN-tanh": (lambda **f: seqkern.nn.IndRNN(DIM, HIDDEN, activation="tanh", **f), elman),
}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, device="cpu", dtype=torch.float32):
    return small(LAYERS[name][0], device, dtype)


def loop(name, layer, x, state):
    outputs = []
    for x_t in layer.in_proj(x).unbind(1):
        state = LAYERS[name][1](x_t.chunk(layer.gates, dim=-1), layer.recurrent, state)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


def meaning(state):
    """The numbers that a state stands for: those of an sLSTM may have any scale."""
    h, *memory = state
    if len(memory) < 3:
        return list(state)
    c, n, m = memory
    return [h, c / n, m + n.log()]


def assert_same(actual, wanted, **tolerances):
    """Of (y, state)."""
    torch.testing.assert_close([actual[0], *meaning(actual[1])], [wanted[0], *meaning(wanted[1])], **tolerances)


def gradients(outputs, layer, *others):
    torch.manual_seed(1)
    numbers = [outputs[0], *meaning(outputs[1])]
    cotangents = [torch.randn_like(number) for number in numbers]
    return torch.autograd.grad(numbers, [*layer.parameters(), *others], cotangents)


# ---- against the papers


def test_computes_the_published_layer(device, name):
    layer, x = make(name, device, torch.float64)
    state = some_state(layer, B)
    if len(state) == 4:  # another scale
        state = state[0], 3 * state[1], 3 * state[2], state[3] - 0.5
    for part in (x, *state):
        part.requires_grad_()
    outputs, wanted = layer(x, state, return_state=True), loop(name, layer, x, state)
    assert_same(outputs, wanted)
    names = [*dict(layer.named_parameters()), "x", *[f"state {i}" for i in range(len(state))]]
    all_gradients = (gradients(results, layer, x, *state) for results in (outputs, wanted))
    for what, grad, wanted_grad in zip(names, *all_gradients, strict=True):
        torch.testing.assert_close(grad, wanted_grad, msg=lambda text, what=what: f"{what}: {text}")
        assert grad.abs().max() > 0, what


def test_begins_with_nothing(name):
    layer, x = make(name, dtype=torch.float64)
    zeros = layer.zero_state(B)
    y, state = layer(x, return_state=True)
    assert_same((y, state), loop(name, layer, x, zeros))
    assert_same((y, state), layer(x, zeros, return_state=True))
    for first, last in zip(zeros, state, strict=True):
        assert first.shape == last.shape and first.dtype == last.dtype


# ---- against themselves


def test_steps_equal_the_whole(device, name):
    layer, x = make(name, device)
    before = some_state(layer, B)
    whole = layer(x, before, return_state=True)
    state = tuple(map(torch.clone, before))
    with torch.no_grad():
        steps = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], dim=1)
    assert_same((steps, state), whole, rtol=1e-4, atol=1e-5)


def test_parts_equal_the_whole(name):
    """The state carries values and gradients from one part to the next; a part may be empty."""
    layer, x = make(name, dtype=torch.float64)
    state, ys = None, []
    for part in x.split([1, 6, 0, 4], dim=1):
        y, state = layer(part, state, return_state=True)
        ys.append(y)
    outputs, whole = (torch.cat(ys, dim=1), state), layer(x, return_state=True)
    assert_same(outputs, whole)
    torch.testing.assert_close(gradients(outputs, layer), gradients(whole, layer))


def test_packed_and_reset_equal_separate(device, name):
    """Nothing passes a boundary or a reset: no state, were it NaN, and no gradient."""
    layer, x = make(name, device)
    x = x[:1].requires_grad_()
    before = some_state(layer, 3)
    for part in before:
        part[2] = torch.nan
    reset = torch.zeros(1, L, dtype=torch.bool, device=device)
    reset[0, [2, 6]] = True  # within the first sequence, and where the third begins; the second is empty
    packing = {"reset": reset, "cu_seqlens": torch.tensor([0, 6, 6, 11], device=device)}
    y, state = layer(x, before, **packing, return_state=True)

    own = tuple(part[:1] for part in before)
    alone = [layer(x[:, :2], own), layer(x[:, 2:6], return_state=True), layer(x[:, 6:], return_state=True)]
    wanted = torch.cat([alone[0], alone[1][0], alone[2][0]], dim=1)
    used = [tuple(part[[0, 2]] for part in state), tuple(map(torch.cat, zip(alone[1][1], alone[2][1], strict=True)))]
    assert_same((y, used[0]), (wanted, used[1]), rtol=1e-4, atol=1e-5)
    assert_same((y, tuple(part[1:2] for part in state)), (y, tuple(part[1:2] for part in before)))
    grads, wanted_grads = gradients((y, used[0]), layer, x), gradients((wanted, used[1]), layer, x)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-3, atol=1e-4)

    moving = tuple(part[2:].clone() for part in before)
    with torch.no_grad():
        steps = [layer.step(x[:, t], moving, reset=reset[:, t]) for t in range(6, L)]
    torch.testing.assert_close(torch.stack(steps, dim=1), y[:, 6:].detach(), rtol=1e-4, atol=1e-5)


# ---- how they begin


def has_deviation(parameter, deviation):
    parameter, count = parameter.detach().double(), parameter.numel()
    assert parameter.mean().abs() < 4 * deviation / math.sqrt(count)
    assert abs(parameter.std() / deviation - 1) < 4 / math.sqrt(2 * count)


def shapes_of(layer):
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("name, weights", [("ParaGRU", 3), ("ParaLSTM", 5)])
def test_para_initial_values(name, weights):
    torch.manual_seed(0)
    layer = getattr(seqkern.nn, name)(32, 1024)
    assert shapes_of(layer) == {
        **{"in_proj.weight": (3 * 1024, 32), "in_proj.bias": (3 * 1024,)},
        **{"recurrent": (weights, 1024)},
    }
    bound = math.sqrt(6 / (32 + 1024))
    assert 0.99 * bound < layer.in_proj.weight.abs().max() <= bound
    has_deviation(layer.in_proj.weight, bound / math.sqrt(3))
    has_deviation(layer.recurrent, 2 / math.sqrt(5 * 1024))
    torch.testing.assert_close(layer.in_proj.bias[:1024], torch.linspace(0, -1, 1024))
    assert not layer.in_proj.bias[1024:].any()


def test_slstm_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.SLSTMDiag(32, 5, layer=1, depth=3)
    assert shapes_of(layer) == {"in_proj.weight": (20, 32), "in_proj.bias": (20,), "recurrent": (4, 5)}
    has_deviation(seqkern.nn.SLSTMDiag(32, 1024).in_proj.weight, math.sqrt(2 / 160))
    i, f, z, o = layer.in_proj.bias.chunk(4)
    torch.testing.assert_close(f, 5 - 12 * torch.tensor([0, 0.25, 0.5, 0.75, 1]) ** 0.95)
    assert not any(part.any() for part in (i, z, o, layer.recurrent))
    assert seqkern.nn.SLSTMDiag(8, 1).in_proj.bias.tolist() == [0, 5, 0, 0]


def test_indrnn_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.IndRNN(8, 4096, length=10)
    assert shapes_of(layer) == {"in_proj.weight": (4096, 8), "in_proj.bias": (4096,), "recurrent": (1, 4096)}
    bound = 2**0.1
    assert layer.recurrent.min() >= 0 and 0.99 * bound < layer.recurrent.max() <= bound
    has_deviation(layer.recurrent - bound / 2, bound / math.sqrt(12))
    assert layer.recurrent._no_weight_decay
    with torch.no_grad():
        layer.recurrent[0, :2] = torch.tensor([-3.0, 3.0])
    layer.constrain()
    torch.testing.assert_close(layer.recurrent[0, :2], torch.tensor([-bound, bound]))
    with pytest.raises(ValueError, match="IndRNN: activation must be 'relu' or 'tanh', got 'gelu'"):
        seqkern.nn.IndRNN(8, activation="gelu")


# ---- dtypes and torch's ways to call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(name, dtype):
    """Half precision is for data and projections: recurrent weights and states stay in float32."""
    layer, x = make(name, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y, state = layer(x, return_state=True)
    with torch.no_grad():
        step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == dtype and layer.in_proj.weight.dtype == dtype
    assert {part.dtype for part in (*state, *layer.zero_state(B), layer.recurrent)} == {wide}
    wanted, _ = loop(name, layer.double(), x.double(), layer.zero_state(B))
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype, 1e-5)
    for result, exact in ((y, wanted), (step, wanted[:, 0])):
        assert (result.double() - exact).abs().max() < tolerance * wanted.abs().max()


def test_autocast(name):
    layer, x = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    expected, expected_state = layer(x, return_state=True)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert (step - y[:, 0]).abs().max() < 0.03 * expected.abs().max()
    grads = gradients((y.float(), state), layer), gradients((expected, expected_state), layer)
    for grad, wanted in zip(*grads, strict=True):
        assert grad.dtype == torch.float32 and (grad - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_compiles_without_a_break(name):
    layer, x = make(name)
    torch._dynamo.reset()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 5] = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, wanted = (call(x, reset=reset, return_state=True) for call in (compiled, layer))
    assert_same(outputs, wanted)
    torch.testing.assert_close(gradients(outputs, layer), gradients(wanted, layer), rtol=1e-4, atol=1e-5)

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    moved, plain = (tuple(part.detach().clone() for part in wanted[1]) for _ in range(2))
    with torch.no_grad():
        outputs = step(x[:, 0], moved, reset=reset[:, 5]), layer.step(x[:, 0], plain, reset=reset[:, 5])
    assert_same((outputs[0], moved), (outputs[1], plain))


# ---- on a task that no linear recurrence with decays between 0 and 1 can do


def parity_strings(batch, length):
    bits = torch.randint(2, (batch, length))
    return F.one_hot(bits, 2).float(), bits.cumsum(dim=1) % 2


@pytest.mark.parametrize("name", ["ParaGRU", "ParaLSTM"])
def test_learns_parity(one_thread, name):
    """From where it begins, on strings that grow to 40 bits; it then knows the parity of 400."""
    torch.manual_seed(0)
    layer, head = getattr(seqkern.nn, name)(2, 32), torch.nn.Linear(32, 2)
    parameters = [*layer.parameters(), *head.parameters()]
    steps, rate = 400, 0.03
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        bits, parity = parity_strings(64, min(40, 2 + step // 8))
        loss = F.cross_entropy(head(layer(bits)).flatten(0, 1), parity.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    bits, parity = parity_strings(1000, 400)
    with torch.no_grad():
        right = (head(layer(bits)).argmax(dim=-1) == parity).float().mean(dim=0)
    assert right[39] > 0.99 and right[399] >= 0.95
