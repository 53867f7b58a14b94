"""The layers on linear_scan and softmax_scan: against their papers' equations, token by token, and themselves."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from layers import DIM, B, L, map_parts, parts, small, some_state

import seqkern.nn
from seqkern.nn.s5 import hippo_pairs

# ---- every layer as its paper has it: (layer, x (B, L, dim), state) -> (y, state), one token after another


def loop(token, x, state):
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = token(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def g(x):
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def mingru(layer, x, h):
    def token(x_t, h):
        z = torch.sigmoid(layer.linear_z(x_t))
        h = (1 - z) * h + z * g(layer.linear_h(x_t))
        return h, h

    return loop(token, x, h)


def minlstm(layer, x, h):
    def token(x_t, h):
        f, i = torch.sigmoid(layer.linear_f(x_t)), torch.sigmoid(layer.linear_i(x_t))
        h = f / (f + i) * h + i / (f + i) * g(layer.linear_h(x_t))
        return h, h

    return loop(token, x, h)


def lru(layer, x, h):
    size, phase = torch.exp(-layer.nu_log.exp()), layer.theta_log.exp()
    cos, sin, gamma = size * phase.cos(), size * phase.sin(), layer.gamma_log.exp()

    def token(x_t, h):
        re, im = h.real, h.imag
        re, im = (
            cos * re - sin * im + gamma * (x_t @ layer.B_re.mT),
            cos * im + sin * re + gamma * (x_t @ layer.B_im.mT),
        )
        return re @ layer.C_re.mT - im @ layer.C_im.mT + layer.D * x_t, torch.complex(re, im)

    return loop(token, x, h)


def rglru(layer, x, h):
    def gate(module, x_t):
        return torch.sigmoid(x_t @ torch.block_diag(*module.w) + module.b.flatten())

    def token(x_t, h):
        r, i = gate(layer.a_gate, x_t), gate(layer.input_gate, x_t)
        a = torch.sigmoid(-layer.a_param) ** (8 * r)
        h = a * h + torch.sqrt(1 - a**2) * (i * x_t)
        return h, h

    return loop(token, x, h)


def s5(layer, x, h):
    Lambda = torch.complex(layer.Lambda_re, layer.Lambda_im)
    decay = torch.exp(Lambda * layer.log_step[:, 0].exp())
    enter = ((decay - 1) / Lambda)[:, None] * torch.complex(*layer.B.unbind(-1))
    C = torch.complex(*layer.C.unbind(-1))

    def token(x_t, h):
        h = decay * h + x_t.to(h.dtype) @ enter.mT
        return 2 * (h @ C.mT).real + layer.D * x_t, h

    return loop(token, x, h)


def hgrn(layer, x, h):
    bound = layer.lower_bound

    def token(x_t, h):
        size = bound + (1 - bound) * torch.sigmoid(layer.lambda_proj(x_t))
        c = F.silu(layer.input_proj(x_t))
        if layer.has_complex_state:
            h = size * torch.exp(1j * layer.theta[0]) * h + (1 - size) * torch.complex(c[:, 0::2], c[:, 1::2])
            feature = torch.cat([h.real, h.imag], dim=1)
        else:
            feature = h = size * h + (1 - size) * c
        return layer.out_proj(layer.norm(feature) * F.silu(layer.gate(x_t))), h

    return loop(token, x, h)


def aaren(layer, x, state):
    """Attention over all tokens so far; the state is one more token, of score m + log(n) and value w / n."""
    H, K = layer.num_heads, layer.dim // layer.num_heads
    query, keys, values = layer.q_proj(layer.query), layer.k_proj(x), layer.v_proj(x)
    scores = (query * keys).unflatten(-1, (H, K)).sum(-1) / math.sqrt(K)
    m, n, w = state
    values = values.unflatten(-1, (H, K))
    first, before = torch.where(n > 0, m + n.log(), m), torch.where(n[..., None] > 0, w / n[..., None], w)
    all_scores, all_values = torch.cat([first[:, None], scores], dim=1), torch.cat([before[:, None], values], dim=1)
    outputs = []
    for t in range(1, x.shape[1] + 1):
        weights = all_scores[:, : t + 1].softmax(dim=1)
        outputs.append(layer.out_proj((weights[..., None] * all_values[:, : t + 1]).sum(1).flatten(1)))
    top = torch.maximum(m, scores.max(dim=1).values)
    old, weights = torch.exp(m - top), torch.exp(scores - top[:, None])
    state = top, old * n + weights.sum(1), old[..., None] * w + (weights[..., None] * values).sum(1)
    return torch.stack(outputs, dim=1), state


LAYERS = {
    "MinGRU": (lambda **f: seqkern.nn.MinGRU(DIM, 16, **f), mingru),
    "MinLSTM": (lambda **f: seqkern.nn.MinLSTM(DIM, bias=False, **f), minlstm),
    "LRU": (lambda **f: seqkern.nn.LRU(DIM, 10, r_min=0.5, r_max=0.99, **f), lru),
    "RGLRU": (lambda **f: seqkern.nn.RGLRU(DIM, 3, **f), rglru),
    "S5": (lambda **f: seqkern.nn.S5(DIM, 16, blocks=2, dt_min=0.05, dt_max=0.5, **f), s5),
    "HGRN": (lambda **f: seqkern.nn.HGRN(DIM, lower_bound=0.3, **f), hgrn),
    "HGRN-real": (lambda **f: seqkern.nn.HGRN(DIM, complex=False, bias=False, **f), hgrn),
    "Aaren": (lambda **f: seqkern.nn.Aaren(DIM, 3, **f), aaren),
}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, device="cpu", dtype=torch.float32):
    return small(LAYERS[name][0], device, dtype)


def gradients(outputs, layer, *others):
    torch.manual_seed(1)
    cotangents = [torch.randn_like(output) for output in outputs]
    return torch.autograd.grad(outputs, [*layer.parameters(), *others], cotangents)


# ---- against the papers


def test_computes_the_published_layer(device, name):
    layer, x = make(name, device, torch.float64)
    state = map_parts(torch.Tensor.requires_grad_, some_state(layer, B))
    x.requires_grad_()
    y, last = layer(x, state, return_state=True)
    wanted, wanted_last = LAYERS[name][1](layer, x, state)
    torch.testing.assert_close([y, *parts(last)], [wanted, *parts(wanted_last)])
    others = [x, *parts(state)]
    grads = gradients([y, *parts(last)], layer, *others)
    wanted_grads = gradients([wanted, *parts(wanted_last)], layer, *others)
    names = [*dict(layer.named_parameters()), "x", *[f"state {i}" for i in range(len(parts(state)))]]
    for what, grad, wanted_grad in zip(names, grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, msg=lambda text, what=what: f"{what}: {text}")
        assert grad.abs().max() > 0, what


def test_begins_with_nothing(name):
    layer, x = make(name, dtype=torch.float64)
    zeros = layer.zero_state(B)
    y, state = layer(x, return_state=True)
    torch.testing.assert_close((y, state), LAYERS[name][1](layer, x, zeros))
    for first, last in zip(parts(zeros), parts(state), strict=True):
        assert first.shape == last.shape and first.dtype == last.dtype


def log_space_form(log_decay, log_value, log_h):
    """h of the papers' parallel form: sums of logarithms along time, with the state before the first token in front."""
    decays = F.pad(log_decay.cumsum(1), (0, 0, 1, 0))
    log_values = torch.cat([log_h[:, None], log_value], dim=1)
    return (decays + torch.logcumsumexp(log_values - decays, dim=1)).exp()[:, 1:]


def log_g(x):
    return torch.where(x >= 0, (x.relu() + 0.5).log(), -F.softplus(-x))


def test_minimal_layers_equal_the_published_parallel_form():
    """With a state before the first token, which the two published forms of these layers take differently."""
    torch.manual_seed(0)
    before = torch.randn(B, DIM, dtype=torch.float64)  # the parallel form begins with g of this
    layer, x = make("MinLSTM", dtype=torch.float64)
    ratio = F.softplus(-layer.linear_f(x)) - F.softplus(-layer.linear_i(x))
    values = -F.softplus(-ratio) + log_g(layer.linear_h(x))
    torch.testing.assert_close(layer(x, g(before)), log_space_form(-F.softplus(ratio), values, log_g(before)))

    layer = seqkern.nn.MinGRU(DIM, dtype=torch.float64)
    z = layer.linear_z(x)
    values = -F.softplus(-z) + log_g(layer.linear_h(x))
    torch.testing.assert_close(layer(x, g(before)), log_space_form(-F.softplus(z), values, log_g(before)))


def test_minimal_layers_survive_closed_and_open_gates():
    for name in ("MinGRU", "MinLSTM"):
        layer, x = make(name)
        x = (1000 * x).requires_grad_()
        y = layer(x)
        assert y.isfinite().all() and (y >= 0).all()
        assert all(grad.isfinite().all() for grad in gradients([y], layer, x))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 5 needs Python 3.11")
@pytest.mark.parametrize("resets", [False, True], ids=["no resets", "resets"])
def test_rglru_equals_that_of_transformers(resets):
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    layer, x = make("RGLRU")
    layer.scale_resets = False
    theirs = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=DIM, num_attention_heads=3))
    names = {"a_param": "recurrent_param"} | {
        f"{ours}.{short}": f"{name}_{long}"
        for ours, name in {"input_gate": "input_gate", "a_gate": "recurrent_gate"}.items()
        for short, long in {"w": "weight", "b": "bias"}.items()
    }
    theirs.load_state_dict({names[key]: value for key, value in layer.state_dict().items()})
    positions = torch.arange(L).remainder(4).expand(B, L) if resets else torch.arange(1, L + 1).expand(B, L)
    y = layer(x, reset=positions == 0)
    torch.testing.assert_close(y, theirs(x, positions))


def test_rglru_gradient_is_finite_where_a_gate_is_closed():
    layer, x = make("RGLRU")
    with torch.no_grad():
        layer.a_gate.b.fill_(-1000)  # r = 0, a = 1: the square root of zero
    x.requires_grad_()
    y, state = layer(x, torch.ones(B, DIM), return_state=True)
    torch.testing.assert_close(y, torch.ones_like(y))
    assert all(grad.isfinite().all() for grad in gradients([y, state], layer, x))


def test_s5_begins_as_the_dense_hippo_system():
    """In the basis of the HiPPO matrix's normal part: x' = N x + B u with a matrix exponential, and y = C x."""
    torch.manual_seed(0)
    P = 8
    layer = seqkern.nn.S5(DIM, P, dt_min=0.2, dt_max=0.2, dtype=torch.float64)
    n = torch.arange(P, dtype=torch.float64)
    hippo = -(torch.outer(2 * n + 1, 2 * n + 1).sqrt().tril(-1) + torch.diag(n + 1))
    normal = hippo + torch.outer((n + 0.5).sqrt(), (n + 0.5).sqrt())
    torch.testing.assert_close(normal @ normal.mT, normal.mT @ normal)

    _, V = hippo_pairs(P)
    torch.testing.assert_close(V.mH @ V, torch.eye(P // 2, dtype=V.dtype))
    torch.testing.assert_close(2 * (V * torch.complex(layer.Lambda_re, layer.Lambda_im) @ V.mH).real, normal)
    dense_B = 2 * (V @ torch.view_as_complex(layer.B.detach())).real
    dense_C = 2 * (torch.view_as_complex(layer.C.detach()) @ V.mH).real
    decay = torch.matrix_exp(0.2 * normal)
    enter = torch.linalg.solve(normal, (decay - torch.eye(P, dtype=decay.dtype)) @ dense_B)

    def token(x_t, state):
        state = state @ decay.mT + x_t @ enter.mT
        return state @ dense_C.mT + layer.D * x_t, state

    x = torch.randn(B, 40, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x), loop(token, x, torch.zeros(B, P, dtype=x.dtype))[0])


def test_hgrn_lower_bounds_are_shared():
    bounds = seqkern.nn.HGRNLowerBounds(3, DIM)
    with torch.no_grad():
        bounds.gamma.copy_(torch.randn(3, DIM))
    shares = bounds.gamma.softmax(0)
    torch.testing.assert_close(bounds(), torch.stack([0 * shares[0], shares[1], shares[1] + shares[2]]))

    layers = torch.nn.ModuleList(seqkern.nn.HGRN(DIM, lower_bound=bounds, layer=k) for k in range(3))
    x = torch.randn(B, L, DIM)
    for layer, bound in zip(layers, bounds(), strict=True):
        constant = seqkern.nn.HGRN(DIM)
        constant.load_state_dict(layer.state_dict(), strict=False)
        constant.lower_bound = bound
        torch.testing.assert_close(layer(x), hgrn(constant, x, constant.zero_state(B))[0])
    layers[2](x).sum().backward()
    assert (bounds.gamma.grad != 0).all()
    assert sum(parameter is bounds.gamma for parameter in layers.parameters()) == 1


# ---- against themselves


def test_steps_equal_the_whole(device, name):
    layer, x = make(name, device)
    before = some_state(layer, B)
    whole, last = layer(x, before, return_state=True)
    state = map_parts(torch.clone, before)
    with torch.no_grad():
        steps = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_parts_equal_the_whole(name):
    """The state carries values and gradients from one part to the next; a part may be empty."""
    layer, x = make(name)
    state, ys = None, []
    for part in x.split([1, 6, 0, 4], dim=1):
        y, state = layer(part, state, reset=torch.zeros(part.shape[:2], dtype=torch.bool), return_state=True)
        ys.append(y)
    whole, last = layer(x, return_state=True)
    outputs, expected = [torch.cat(ys, dim=1), *parts(state)], [whole, *parts(last)]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(outputs, layer), gradients(expected, layer), rtol=1e-4, atol=1e-4)


def test_packed_equals_separate(device, name):
    layer, x = make(name, device)
    bounds = [0, 4, 4, 11]
    initial = some_state(layer, 3)
    y, state = layer(x[:1], initial, cu_seqlens=torch.tensor(bounds, device=device), return_state=True)
    for n, (begin, end) in enumerate(pairwise(bounds)):
        own = map_parts(lambda rows, n=n: rows[n : n + 1], initial)
        alone, own_state = layer(x[:1, begin:end], own, return_state=True)
        torch.testing.assert_close(y[:, begin:end], alone)
        torch.testing.assert_close(map_parts(lambda rows, n=n: rows[n : n + 1], state), own_state)

    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1], [2] * 11], dtype=torch.int32, device=device)
    y, state = layer(x, seq_idx=seq_idx, return_state=True)
    first, (second, own_state) = layer(x[:1, :4]), layer(x[:1, 4:9], return_state=True)
    torch.testing.assert_close(y[:1, :9], torch.cat([first, second], dim=1))
    torch.testing.assert_close(y[1:], layer(x[1:]))
    torch.testing.assert_close(map_parts(lambda rows: rows[:1], state), own_state)


def test_resets_equal_separate_sequences(device, name):
    """Nothing passes a reset: no state, were it NaN, and no gradient."""
    layer, x = make(name, device)
    reset = torch.zeros(B, L, dtype=torch.bool, device=device)
    reset[0, [0, 5]] = reset[1, 10] = True
    before = some_state(layer, B)
    for part in parts(before):
        part[0] = torch.nan
    x.requires_grad_()
    y, state = layer(x, before, reset=reset, return_state=True)
    row = map_parts(lambda rows: rows[1:], before)
    first, (second, own_state) = layer(x[:1, :5]), layer(x[:1, 5:], return_state=True)
    third, (fourth, other_state) = layer(x[1:, :10], row), layer(x[1:, 10:], return_state=True)
    wanted = torch.cat([torch.cat([first, second], dim=1), torch.cat([third, fourth], dim=1)])
    wanted_state = [torch.cat(rows) for rows in zip(parts(own_state), parts(other_state), strict=True)]
    torch.testing.assert_close([y, *parts(state)], [wanted, *wanted_state], rtol=1e-4, atol=1e-5)
    grads = gradients([y, *parts(state)], layer, x)
    torch.testing.assert_close(grads, gradients([wanted, *wanted_state], layer, x), rtol=1e-3, atol=1e-4)

    moving = map_parts(torch.clone, before)
    with torch.no_grad():
        steps = torch.stack([layer.step(x[:, t], moving, reset=reset[:, t]) for t in range(L)], dim=1)
    torch.testing.assert_close(steps, y.detach(), rtol=1e-4, atol=1e-5)

    seq_idx = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, 1, 1, -1, 3], [2] * 11], dtype=torch.int32, device=device)
    reset = torch.zeros(B, L, dtype=torch.bool, device=device)
    reset[0, [1, 6]] = reset[1, 3] = True
    before = some_state(layer, B)
    y, state = layer(x, before, reset=reset, seq_idx=seq_idx, return_state=True)
    first = [layer(x[:1, begin:end]) for begin, end in pairwise([1, 4, 6, 9])]
    last, own_state = layer(x[:1, 10:], return_state=True)
    own = map_parts(lambda rows: rows[1:], before)
    torch.testing.assert_close(y[:1, 1:9], torch.cat(first, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:1, 10:], last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(map_parts(lambda rows: rows[:1], state), own_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1:], torch.cat([layer(x[1:, :3], own), layer(x[1:, 3:])], dim=1), rtol=1e-4, atol=1e-5)


def test_rglru_may_leave_resets_unscaled():
    layer, x = make("RGLRU")
    layer.scale_resets = False
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[:, [0, 4]] = True
    y = layer(x, reset=reset)
    entering = torch.sigmoid(layer.input_gate(x)) * x
    torch.testing.assert_close(y[:, [0, 4]], entering[:, [0, 4]])
    with torch.no_grad():
        step = layer.step(x[:, 0], layer.zero_state(B), reset=reset[:, 0])
    torch.testing.assert_close(step, y[:, 0])


# ---- parameters


def uniformity(numbers, low, high):
    """The distance of Kolmogorov and Smirnov from the uniform distribution between low and high."""
    numbers = numbers.detach().double().flatten().sort().values
    assert numbers[0] >= low - 1e-6 and numbers[-1] <= high + 1e-6
    return ((numbers - low) / (high - low) - torch.linspace(0, 1, len(numbers))).abs().max()


N = 4096
CLOSE = 1.63 / math.sqrt(N)  # what 1 % of samples of N numbers exceed


def has_variance(parameter, variance):
    parameter = parameter.detach().double()
    count = parameter.numel()
    assert parameter.mean().abs() < 4 * math.sqrt(variance / count)
    assert abs(parameter.var() / variance - 1) < 4 * math.sqrt(2 / count)


def test_initial_values_of_lru():
    torch.manual_seed(0)
    layer = seqkern.nn.LRU(8, N, r_min=0.8, r_max=0.99, max_phase=1.0)
    size = torch.exp(-layer.nu_log.double().exp())
    assert uniformity(size**2, 0.64, 0.99**2) < CLOSE  # uniform in area
    assert uniformity(layer.theta_log.exp(), 0, 1) < CLOSE
    torch.testing.assert_close(layer.gamma_log.double().exp(), torch.sqrt(1 - size**2), rtol=1e-5, atol=1e-6)
    for parameter, variance in {layer.B_re: 1 / 16, layer.B_im: 1 / 16, layer.C_re: 1 / N, layer.C_im: 1 / N}.items():
        has_variance(parameter, variance)
    has_variance(seqkern.nn.LRU(N, 2).D, 1)
    assert uniformity(seqkern.nn.LRU(1, N).theta_log.exp(), 0, 2 * math.pi) < CLOSE


def test_initial_values_of_rglru():
    torch.manual_seed(0)
    layer = seqkern.nn.RGLRU(N, 256, w_init_variance_scale=0.5)
    assert uniformity(torch.sigmoid(-layer.a_param.double()) ** 8, 0.9, 0.999) < CLOSE
    for gate in (layer.a_gate, layer.input_gate):
        has_variance(gate.w, 0.5 / 16)
        assert not gate.b.any()


def test_initial_values_of_s5():
    torch.manual_seed(0)
    layer = seqkern.nn.S5(64, 512, blocks=4, dt_min=0.002, dt_max=0.05)
    steps = torch.cat([seqkern.nn.S5(1, 64, dt_min=0.002, dt_max=0.05).log_step for _ in range(N // 32)])
    assert uniformity(steps, math.log(0.002), math.log(0.05)) < CLOSE
    assert torch.equal(layer.Lambda_re, torch.full((256,), -0.5))
    imaginary = layer.Lambda_im.view(4, 64)
    assert (imaginary < 0).all() and torch.equal(imaginary, imaginary[:1].expand(4, 64))
    # An orthonormal basis keeps the variance: 1 / 512 for the two parts of B together, and for each part of C.
    has_variance(layer.B, 1 / 512 / 2)
    has_variance(layer.C, 1 / 512)
    has_variance(seqkern.nn.S5(N, 2).D, 1)


def test_s5_may_be_kept_stable():
    layer = seqkern.nn.S5(DIM, 8, clip_eigs=True)
    with torch.no_grad():
        layer.Lambda_re.fill_(1.0)
    x = torch.zeros(1, 5, DIM)
    _, state = layer(x, torch.ones(1, 4, dtype=torch.complex64), return_state=True)
    sizes = torch.exp(-1e-4 * 5 * layer.log_step[:, 0].exp())
    torch.testing.assert_close(state[0].abs(), sizes)


def test_initial_values_of_hgrn_and_aaren():
    torch.manual_seed(0)
    theta = seqkern.nn.HGRN(8).theta
    torch.testing.assert_close(theta, torch.tensor([10000 ** (-k / 4) for k in range(8)]).view(1, 1, 8))
    assert torch.equal(seqkern.nn.HGRNLowerBounds(3, 4).gamma, torch.ones(3, 4))

    layer = seqkern.nn.Aaren(256, 4)
    has_variance(seqkern.nn.Aaren(N).query, 1)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        bound = math.sqrt(6 / 512)
        assert 0.99 * bound < projection.weight.abs().max() <= bound
        has_variance(projection.weight, bound**2 / 3)
        assert projection.bias is None or not projection.bias.any()


SHAPES = {
    "MinGRU": {"linear_z.weight": (16, DIM), "linear_z.bias": (16,)}
    | {"linear_h.weight": (16, DIM), "linear_h.bias": (16,)},
    "MinLSTM": {f"linear_{gate}.weight": (DIM, DIM) for gate in "fih"},
    "LRU": {"B_re": (10, DIM), "B_im": (10, DIM), "C_re": (DIM, 10), "C_im": (DIM, 10), "D": (DIM,)}
    | {f"{letter}_log": (10,) for letter in ("nu", "theta", "gamma")},
    "RGLRU": {"a_param": (DIM,)}
    | {f"{gate}_gate.{kind}": (3, 4, 4)[: 2 + (kind == "w")] for gate in ("a", "input") for kind in "wb"},
    "S5": {"Lambda_re": (8,), "Lambda_im": (8,), "B": (8, DIM, 2), "C": (DIM, 8, 2), "D": (DIM,), "log_step": (8, 1)},
    "HGRN-real": {f"{name}.weight": (DIM, DIM) for name in ("input_proj", "lambda_proj", "gate", "out_proj")}
    | {"norm.weight": (DIM,), "norm.bias": (DIM,)},
    "HGRN": {"theta": (1, 1, DIM), "norm.weight": (2 * DIM,), "norm.bias": (2 * DIM,)}
    | {"input_proj.weight": (2 * DIM, DIM), "input_proj.bias": (2 * DIM,), "out_proj.weight": (DIM, 2 * DIM)}
    | {"gate.weight": (2 * DIM, DIM), "gate.bias": (2 * DIM,), "out_proj.bias": (DIM,)}
    | {"lambda_proj.weight": (DIM, DIM), "lambda_proj.bias": (DIM,)},
    "Aaren": {f"{name}_proj.weight": (DIM, DIM) for name in ("q", "k", "v", "out")}
    | {f"{name}_proj.bias": (DIM,) for name in ("q", "v", "out")}
    | {"query": (DIM,)},
}


def test_state_dict(name):
    """Names and shapes as published; what was saved computes the same again."""
    layer, x = make(name)
    assert {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()} == SHAPES[name]
    other = LAYERS[name][0]()
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other.reset_parameters()
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(name, dtype):
    """Half precision is for data and projections: what makes decays, and states, stay in float32."""
    layer = LAYERS[name][0](dtype=dtype)
    x = torch.randn(B, 3, DIM, dtype=dtype)
    y, state = layer(x, return_state=True)
    with torch.no_grad():
        step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == dtype
    precision = torch.promote_types(dtype, torch.float32)
    assert {part.real.dtype for part in (*parts(state), *parts(layer.zero_state(2)))} == {precision}
    kept = {"nu_log", "theta_log", "gamma_log", "D", "a_param", "Lambda_re", "Lambda_im", "log_step", "theta"}
    for key, parameter in layer.named_parameters():
        assert parameter.dtype == (precision if key in kept else dtype), key
    wanted, _ = LAYERS[name][1](layer.double(), x.double(), layer.zero_state(B))
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype, 1e-5)
    assert (y.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_autocast(device, name):
    layer, x = make(name, device)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype and {part.real.dtype for part in parts(state)} == {torch.float32}
    expected = layer(x)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert (step - y[:, 0]).abs().max() < 0.03 * expected.abs().max()
    for grad, wanted in zip(gradients([y.float()], layer), gradients([expected], layer), strict=True):
        assert grad.dtype == torch.float32 and (grad - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_compiles_without_a_break(name):
    layer, x = make(name)
    torch._dynamo.reset()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 5] = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, state = compiled(x, reset=reset, return_state=True)
    expected, expected_state = layer(x, reset=reset, return_state=True)
    outputs, wanted = [y, *parts(state)], [expected, *parts(expected_state)]
    torch.testing.assert_close(outputs, wanted)
    torch.testing.assert_close(gradients(outputs, layer), gradients(wanted, layer), rtol=1e-4, atol=1e-5)

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        moved, plain = (map_parts(lambda part: part.detach().clone(), expected_state) for _ in range(2))
        torch.testing.assert_close(step(x[:, 0], moved), layer.step(x[:, 0], plain))
    torch.testing.assert_close(moved, plain)


@pytest.mark.parametrize(
    "make_layer, message",
    [
        (lambda: seqkern.nn.LRU(8, 4, r_min=0.9, r_max=0.5), "LRU: r_min and r_max must satisfy .* got 0.9 and 0.5"),
        (lambda: seqkern.nn.RGLRU(10, 4), "RGLRU: dim must be a multiple of num_heads=4, got 10"),
        (lambda: seqkern.nn.S5(8, 6, blocks=2), r"S5: d_state must be a multiple of 2 \* blocks = 4, got 6"),
        (lambda: seqkern.nn.HGRN(8, lower_bound=1.0), "HGRN: lower_bound must be at least 0 and below 1, got 1.0"),
        (lambda: seqkern.nn.Aaren(10, 4), "Aaren: dim must be a multiple of num_heads=4, got 10"),
    ],
    ids=["LRU", "RGLRU", "S5", "HGRN", "Aaren"],
)
def test_refuses_sizes_that_do_not_fit(make_layer, message):
    with pytest.raises(ValueError, match=message):
        make_layer()


def test_aaren_refuses_resets_in_a_pack():
    layer, x = make("Aaren")
    with pytest.raises(ValueError, match="Aaren: reset and cu_seqlens do not go together"):
        layer(x[:1], reset=torch.zeros(1, L, dtype=torch.bool), cu_seqlens=torch.tensor([0, L]))
