"""rnn against torch.nn and the published equations, its random numbers, and what is particular to it."""

import inspect
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import seqkern
from seqkern import reference
from seqkern._load import library
from seqkern.ops._rnn import CELLS, philox
from seqkern.testing import assert_close

DRAWS = {"zoneout": 0.3, "recurrent_dropout": 0.4, "seed": 5}


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw(cell, B, L, H, P, Q=None, N=None, dtype=torch.float64):
    """The tensors of a call by name, with proj if there is Q, and a state of N rows, B of them if not told."""
    G, N = CELLS[cell].gates, B if N is None else N
    outputs = P if Q is None else Q
    tensors = {
        "x": rand(B, L, H, G, P, dtype=dtype),
        "R": rand(H, G, P, outputs, dtype=dtype, seed=1) * 0.8 * max(outputs, 1) ** -0.5,
        "bias": rand(H, G, P, dtype=dtype, seed=2) / 2,
    }
    if Q is not None:
        tensors["proj"] = rand(H, Q, P, dtype=dtype, seed=3) * P**-0.5
    for i, name in enumerate(CELLS[cell].published):
        tensors[name] = rand(N, H, outputs if name == "h" else P, dtype=dtype, seed=10 + i)
    if cell == "slstm":
        tensors["n"] = tensors["n"].abs() + 0.3
    return tensors


def call(tensors, function=None, **options):
    """(h, the parts of the final state) of a call by tensors of these names."""
    tensors = dict(tensors)
    state = tuple(tensors.pop(name) for name in "hcnm" if name in tensors)
    options |= {"initial_state": state or None, "return_final_state": True}
    h, final = (function or seqkern.rnn)(**tensors, **options)
    return h, *final


def results(tensors, function=None, **options):
    """Outputs and gradients by name, of a call or of a function of such tensors that returns a tuple."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(leaves, function, **options) if options or function is None else function(leaves)
    cotangents = [rand(*o.shape, seed=90 + i).to(o) for i, o in enumerate(outputs)]
    kept = [i for i, o in enumerate(outputs) if o.requires_grad]
    grads = torch.autograd.grad(
        [outputs[i] for i in kept],
        list(leaves.values()),
        [cotangents[i] for i in kept],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def tokens(many, few):
    """How long a sequence may be: emulated kernels are slow."""
    return many if library.ops is torch.ops.seqkern else few


def assert_bitwise(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name].nan_to_num(nan=7.25), expected[name].nan_to_num(nan=7.25)), name
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


def resets(B, L):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(0)) < 0.2


# Independent oracles.


def by_torch(tensors, cell, reverse=False):
    """Layers of torch.nn, one for each head, that read the gates as they are."""
    x, R, bias, proj = (tensors.get(name) for name in ("x", "R", "bias", "proj"))
    (_, _, H, G, P), outputs = x.shape, []
    for head in range(H):
        options = {"batch_first": True, "dtype": x.dtype}
        layer = {
            "lstm": lambda: torch.nn.LSTM(G * P, P, proj_size=0 if proj is None else proj.shape[1], **options),  # noqa: B023
            "gru": lambda: torch.nn.GRU(G * P, P, **options),  # noqa: B023
            "elman_tanh": lambda: torch.nn.RNN(P, P, **options),  # noqa: B023
            "elman_relu": lambda: torch.nn.RNN(P, P, nonlinearity="relu", **options),  # noqa: B023
        }[cell]()
        parameters = {"weight_ih_l0": torch.eye(G * P, dtype=x.dtype), "weight_hh_l0": R[head].flatten(0, 1)}
        parameters |= {"bias_ih_l0": torch.zeros(G * P, dtype=x.dtype), "bias_hh_l0": bias[head].flatten()}
        if proj is not None:
            parameters["weight_hr_l0"] = proj[head]
        state = tuple(tensors[name][None, :, head] for name in CELLS[cell].published)
        gates = x[:, :, head].flatten(2)
        h, last = torch.func.functional_call(
            layer, parameters, (gates.flip(1) if reverse else gates, state if cell == "lstm" else state[0])
        )
        outputs.append((h.flip(1) if reverse else h, *(part[0] for part in (last if cell == "lstm" else (last,)))))
    h, *final = zip(*outputs, strict=True)
    return torch.stack(h, dim=2), *(torch.stack(part, dim=1) for part in final)


OF_TORCH = [("lstm", None), ("lstm", 3), ("gru", None), ("elman_tanh", None), ("elman_relu", None)]  # 3: its proj_size


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell, Q", OF_TORCH)
def test_layers_of_torch(cell, Q, reverse, device):
    tensors = draw(cell, 2, tokens(37, 6), 2, 5, Q)
    expected = results(tensors, lambda leaves: by_torch(leaves, cell, reverse))
    actual = results(tensors, cell=cell, reverse=reverse)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def published_slstm(tensors):
    """Beck et al. 2024, equations 8 to 18."""
    x, R, bias, proj, h, c, n, m = (tensors.get(name) for name in ("x", "R", "bias", "proj", *"hcnm"))
    outputs = []
    for gates in x.unbind(1):
        i, f, z, o = (gates + torch.einsum("hgpq,bhq->bhgp", R, h) + bias).unbind(2)
        top = torch.maximum(torch.nn.functional.logsigmoid(f) + m, i).detach()
        forget, enter = torch.exp(torch.nn.functional.logsigmoid(f) + m - top), torch.exp(i - top)
        c, n, m = forget * c + enter * torch.tanh(z), forget * n + enter, top
        h = torch.sigmoid(o) * c / n
        h = h if proj is None else torch.einsum("hqp,bhp->bhq", proj, h)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, c / n, m + n.log()


@pytest.mark.parametrize("gates", [1, 40, 1000])
@pytest.mark.parametrize("Q", [None, 3])
def test_published_slstm(Q, gates, device, one_thread):
    """Input gates whose exponentials overflow included: only ratios count."""
    tensors = draw("slstm", 2, tokens(60, 6), 2, 5, Q)
    tensors["x"][:, :, :, :2] *= gates

    def ours(leaves):
        h, *final = call(leaves, cell="slstm")
        return h, final[0], final[1], final[3]

    torch.testing.assert_close(results(tensors, ours), results(tensors, published_slstm), rtol=1e-9, atol=1e-9)


def test_an_empty_slstm_state(device):
    """n = 0 is empty whatever else it holds; a token of weight zero leaves it so, and the final state says so."""
    tensors = draw("slstm", 1, 6, 1, 2)
    x, weights = tensors["x"], {name: tensors[name] for name in ("R", "bias")}
    zeros = torch.zeros(1, 1, 2, dtype=torch.float64)
    full = {"h": zeros, "c": zeros + 5, "n": zeros, "m": zeros + 3}
    expected, *_ = call({"x": x} | weights, cell="slstm")
    actual = results({"x": x} | weights | full, cell="slstm")
    assert torch.equal(actual["output 0"], expected)
    assert actual["dh"].all() and not any(actual[f"d{name}"].any() for name in "cnm")
    state = [part.clone() for part in full.values()]
    torch.testing.assert_close(seqkern.rnn_step(state, x[:, 0], **weights, cell="slstm"), expected[:, 0])

    nothing = x.clone()
    nothing[:, :3, :, 0] = -math.inf
    skipped, *final = call({"x": nothing[:, :3]} | weights, cell="slstm")
    assert not skipped.any()
    for part, value in zip(final, (0, 0, 0, -math.inf), strict=True):
        assert torch.equal(part, torch.full_like(part, value))
    behind, *_ = call({"x": nothing} | weights, cell="slstm")
    torch.testing.assert_close(behind[:, 3:], call({"x": x[:, 3:]} | weights, cell="slstm")[0])


# Long sequences, in every dtype and size.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm", "elman_tanh"])
def test_long_sequences(cell, dtype, tolerance, device, one_thread):
    """Of the float64 recurrence on the same numbers, which are at most 1 large; gradients relative to the largest."""

    def oracle(tensors):
        return published_slstm(tensors) if cell == "slstm" else by_torch(tensors, cell)

    tensors = draw(cell, 1, tokens(16384, 20), 1, 16, dtype=dtype)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        assert (call(tensors, cell=cell)[0].double() - oracle(wide)[0]).abs().max() <= tolerance

    tensors, wide = ({n: t[:, :2000] if n == "x" else t for n, t in given.items()} for given in (tensors, wide))
    actual = results(tensors, lambda leaves: call(leaves, cell=cell)[:1])
    for name, exact in results(wide, lambda leaves: oracle(leaves)[:1]).items():
        if name != "dm":  # the oracle's scale is a constant
            assert (actual[name].double() - exact).abs().max() <= tolerance * exact.abs().max(), name


# B, H, P, Q
SIZES = [(1, 1, 1, None), (5, 2, 7, None), (17, 1, 16, None), (9, 1, 24, None), (3, 3, 33, 12), (2, 1, 65, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell, size", [*(("lstm", size) for size in SIZES), *(("gru", size) for size in SIZES[:4])])
def test_sizes(cell, size, dtype, device):
    """Rows, heads and units that fill no tile and no vector, or more than one."""
    B, H, P, Q = size
    tensors = draw(cell, B, tokens(9, 2), H, P, Q, dtype=dtype)
    wide, plain = ({n: t.to(d) for n, t in tensors.items()} for d in (torch.float64, torch.float32))
    exact, plain = (results(t, reference.rnn, cell=cell) for t in (wide, plain))
    actual = results(tensors, cell=cell)
    coarse = {} if dtype == torch.float32 else dict.fromkeys(actual, 1.0)
    assert_close(actual, exact, plain, coarse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_threads_change_nothing(cell, dtype):
    """One row whose units are divided, bitwise, gradients of weights included."""
    tensors, threads = draw(cell, 1, 30, 1, 150, dtype=dtype), torch.get_num_threads()
    try:
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(results(tensors, cell=cell))
    finally:
        torch.set_num_threads(threads)
    assert_bitwise(seen[1], seen[0])
    assert_bitwise(seen[2], seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance_reaches_the_weights(dtype, device, batch_invariant):
    """A sequence gives their gradients the same bits in a batch and in a pack, and the right ones."""
    L = tokens(50, 6)
    tensors = draw("lstm", 1, L, 2, 6, Q=3, dtype=dtype)
    alone = results(tensors, cell="lstm")
    assert_bitwise(results(tensors, cell="lstm", cu_seqlens=torch.tensor([0, L])), alone)
    exact, plain = (
        results({name: t.to(wide) for name, t in tensors.items()}, reference.rnn, cell="lstm")
        for wide in (torch.float64, torch.float32)
    )
    assert_close(alone, exact, plain, {} if dtype == torch.float32 else dict.fromkeys(alone, 1.0))


# Random numbers.


def test_philox():
    """The known answers of its authors."""
    for value, third, expected in [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 2**32 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]:
        number = torch.tensor(value)
        assert tuple(philox(number, number, number, third).tolist()) == expected


def counting(B, L, P):
    """(x, R) with which a token without a past gives its place in time, from 1 on."""
    x = torch.arange(1.0, L + 1).reshape(1, L, 1, 1, 1).expand(B, L, 1, 1, P)
    return x, torch.zeros(1, 1, P, P)


@pytest.mark.parametrize("reverse", [False, True])
def test_zoneout_keeps_elements(reverse, device):
    B, L, P = 2, tokens(400, 30), 11
    x, R = counting(B, L, P)
    x = x.flip(1) if reverse else x
    options = {"cell": "elman_relu", "zoneout": 0.3, "reverse": reverse}
    h = seqkern.rnn(x, R, seed=1, **options)
    assert torch.equal(h, seqkern.rnn(x, R, seed=1, **options))
    assert torch.equal(h, seqkern.rnn(x, R, seed=torch.tensor(1, device=x.device), **options))
    assert not torch.equal(h, seqkern.rnn(x, R, seed=2, **options))
    h = (h.flip(1) if reverse else h)[:, :, 0]
    now = torch.arange(1.0, L + 1)[None, :, None]
    before = torch.nn.functional.pad(h, (0, 0, 1, 0))[:, :-1]
    kept = h == before
    assert (kept | (h == now)).all()
    assert abs(kept.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / kept.numel())

    mixed, expected = seqkern.rnn(x, R, training=False, **options)[:, :, 0], torch.zeros(B, P)
    for t in range(L):
        expected = 0.3 * expected + 0.7 * (t + 1)
        torch.testing.assert_close(mixed[:, L - 1 - t if reverse else t], expected)


def test_dropout_drops_throughout_a_sequence(device):
    """Of rows and packed sequences, whatever their place; the others are divided by what is left."""
    N, L, P = 6, 4, tokens(500, 40)
    R = torch.zeros(1, 1, P, P).diagonal_scatter(torch.ones(1, 1, P), dim1=2, dim2=3)
    options = {"cell": "elman_relu", "recurrent_dropout": 0.25, "seed": 3}
    h = seqkern.rnn(torch.ones(N, L, 1, 1, P), R, **options)
    dropped = h[:, -1, 0] == 1
    expected = torch.ones(N, P)
    for t in range(L):
        torch.testing.assert_close(h[:, t, 0], expected)
        expected = 1 + expected.masked_fill(dropped, 0) / 0.75
    assert abs(dropped.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / dropped.numel())
    assert not torch.equal(dropped[0], dropped[1])
    bounds = torch.arange(0, N * L + 1, L)
    packed = seqkern.rnn(torch.ones(1, N * L, 1, 1, P), R, cu_seqlens=bounds, **options)
    torch.testing.assert_close(packed.unflatten(1, (N, L))[0], h)
    whole = torch.ones(1, 3, 1, 1, P)
    assert torch.equal(seqkern.rnn(whole, R, training=False, **options)[:, 2], 3 * whole[:, 2, :, 0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_random_numbers_are_those_of_the_reference(cell, packed, device):
    """And the backward makes them again: gradients as well, with resets, backwards, and with every other option."""
    Q, L = None if cell == "gru" else 3, tokens(40, 9)
    tensors = draw(cell, 1 if packed else 3, L, 2, 5, Q, N=4 if packed else 3)
    bounds = torch.tensor([0, 4, 4, 7, L]) if packed else None
    for reverse in (False, True):
        options = DRAWS | {"cell": cell, "reverse": reverse, "cu_seqlens": bounds, "grad_clip": 0.5}
        options["reset"] = resets(1 if packed else 3, L)
        actual, expected = results(tensors, **options), results(tensors, reference.rnn, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def flat(tensors, **options):
    """(a function of the tensors alone that returns a tuple, these)"""
    names = list(tensors)

    def function(*values):
        outputs = call(dict(zip(names, values, strict=True)), **options)
        return tuple(output for output in outputs if output.requires_grad or options["cell"] != "slstm")

    return function, tuple(tensor.clone().requires_grad_() for tensor in tensors.values())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_derivatives_with_random_numbers(cell, device):
    function, tensors = flat(draw(cell, 1, 3, 1, 2), cell=cell, **DRAWS)
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


def test_a_seed_of_its_own():
    """None draws one from torch's generator."""
    tensors = draw("gru", 2, 9, 1, 4)

    def drawn():
        torch.manual_seed(0)
        return [call(tensors, cell="gru", zoneout=0.5) for _ in range(2)]

    first, again = drawn(), drawn()
    assert not torch.equal(first[0][0], first[1][0])
    assert all(torch.equal(mine[0], theirs[0]) for mine, theirs in zip(first, again, strict=True))


def test_vmap_of_random_numbers():
    """Every element of the map is what the call alone gives; without a seed torch asks what is meant."""
    tensors = draw("lstm", 2, 6, 2, 3)
    xs = torch.stack([tensors["x"], tensors["x"] + 1])
    for seed in (7, torch.tensor([3, 4])):
        fixed = not isinstance(seed, torch.Tensor)

        def one(x, seed):
            return seqkern.rnn(x, tensors["R"], **DRAWS | {"seed": seed})

        mapped = torch.func.vmap(one, in_dims=(0, None if fixed else 0))(xs, seed)
        assert torch.equal(mapped, torch.stack([one(x, seed if fixed else seed[i]) for i, x in enumerate(xs)]))
    drawn = torch.func.vmap(lambda x: seqkern.rnn(x, tensors["R"], zoneout=0.5), randomness="different")(
        xs[:1].expand_as(xs)
    )
    assert not torch.equal(*drawn)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: seqkern.rnn(x, tensors["R"], zoneout=0.5))(xs)


# grad_clip.


def with_hooks(tensors, cell, limit, zoneout):
    """A loop over tokens that clamps what flows back into h."""
    x, R, bias, proj = (tensors.get(name) for name in ("x", "R", "bias", "proj"))
    parts, outputs = [tensors[name] for name in CELLS[cell].published], []
    h, c = parts[0], parts[1:]
    for t in range(x.shape[1]):
        before = h.clone()
        before.register_hook(lambda grad: grad.clamp(-limit, limit))
        u = torch.einsum("hgpq,bhq->bhgp", R, before) + bias
        m, c = CELLS[cell].step(x[:, t].unbind(2), u.unbind(2), before, c)
        m = m if proj is None else torch.einsum("hqp,bhp->bhq", proj, m)
        h = zoneout * before + (1 - zoneout) * m
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, *c


@pytest.mark.parametrize("limit", [0.0, 0.2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "elman_tanh", "elman_relu"])
def test_grad_clip(cell, limit, device, one_thread):
    """Everything that a token sends back to h, before the gradient of that h as an output joins; nothing else."""
    tensors = draw(cell, 2, tokens(30, 6), 2, 5, None if cell == "gru" else 3)
    options = {"cell": cell, "zoneout": 0.3, "training": False}
    actual = results(tensors, grad_clip=limit, **options)
    expected = results(tensors, lambda leaves: with_hooks(leaves, cell, limit, 0.3))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    free = results(tensors, **options)
    assert torch.equal(actual["output 0"], free["output 0"]) and not torch.equal(actual["dx"], free["dx"])
    assert actual["dh"].abs().max() <= limit < free["dh"].abs().max()


def test_grad_clip_keeps_nan(device):
    tensors = draw("lstm", 1, 5, 1, 3)
    h = call({name: t.requires_grad_() for name, t in tensors.items()}, grad_clip=0.1)[0]
    dh = torch.zeros_like(h)
    dh[:, 3] = math.nan
    (dx,) = torch.autograd.grad(h, tensors["x"], dh)
    assert dx[:, :4].isnan().all() and not dx[:, 4].isnan().any()


def test_grad_clip_has_forward_mode_and_no_second_derivatives():
    tensors = draw("lstm", 1, 3, 1, 2)

    def of_x(x, function=None, **options):
        return call(tensors | {"x": x}, function, **options)[0].square().sum()

    x, v = tensors["x"], rand(*tensors["x"].shape, seed=7)
    for function in (None, reference.rnn):
        clipped = torch.func.jvp(lambda x, f=function: of_x(x, f, grad_clip=0.1), (x,), (v,))
        torch.testing.assert_close(clipped, torch.func.jvp(of_x, (x,), (v,)))
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(of_x(leaf, function, grad_clip=0.1), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivatives with grad_clip|once_differentiable"):
            dx.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives with grad_clip"):
        torch.func.jvp(torch.func.grad(lambda x: of_x(x, grad_clip=0.1)), (x,), (v,))


# Resets, NaN, memory order.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_begins_a_sequence(cell, reverse, device):
    """Bitwise, gradients included, whatever stood before it."""
    L, at = tokens(45, 14), tokens((17, 18, 40), (4, 5, 11))
    tensors = draw(cell, 1, L, 2, 3, dtype=torch.float32)
    reset, bounds = torch.zeros(1, L, dtype=torch.bool), torch.tensor([0, *at, L])
    reset[0, [t - 1 if reverse else t for t in at]] = True
    first, states = -1 if reverse else 0, {}
    for name in CELLS[cell].published:
        states[name] = torch.full((4, 2, 3), -math.inf if name == "m" else 0.0)
        states[name][first] = tensors[name][0]

    def outputs(**options):
        return lambda leaves: call(leaves, cell=cell, reverse=reverse, **options)[:1]

    with_resets, packed = (
        results(tensors, outputs(reset=reset)),
        results(tensors | states, outputs(cu_seqlens=bounds)),
    )
    assert_bitwise(*({name: values[name] for name in ("output 0", "dx")} for values in (with_resets, packed)))
    for name in states:
        assert torch.equal(with_resets[f"d{name}"][0], packed[f"d{name}"][first])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row_and_head(cell, reverse, device):
    """And behind it, up to a reset, forward and backward."""
    L, at = tokens(40, 12), 5
    tensors = draw(cell, 3, L, 2, 4, dtype=torch.float32)
    reset = torch.zeros(3, L, dtype=torch.bool)
    reset[:, 2 if reverse else 9] = True
    sick = tensors | {"x": tensors["x"].index_put(tuple(torch.tensor([1, at, 0, 0, 1])), torch.tensor(math.nan))}
    clean, actual = (results(t, cell=cell, reset=reset, reverse=reverse) for t in (tensors, sick))
    reached, lane = torch.zeros(3, L, 2, dtype=torch.bool), torch.zeros(3, L, 2, dtype=torch.bool)
    reached[1, slice(3, at + 1) if reverse else slice(at, 9), 0] = True
    lane[1, :, 0] = True
    h, dx = actual["output 0"], actual["dx"]
    assert torch.equal(h[~reached], clean["output 0"][~reached])
    assert torch.equal(dx[~lane], clean["dx"][~lane])
    assert h[1, at, 0].isnan().any()
    reached[1, at, 0] = False  # the unit's neighbours
    assert h[reached].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_time_may_come_first_in_memory(cell, dtype, device):
    """Results are the same bits, in the order of x."""
    tensors = draw(cell, 3, tokens(20, 5), 1, 5, dtype=dtype)
    turned = tensors | {"x": tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    leaf = turned["x"].detach().requires_grad_()
    h, *_ = call(turned | {"x": leaf}, cell=cell)
    (dx,) = torch.autograd.grad(h.square().sum(), leaf)
    assert h.transpose(0, 1).is_contiguous() and dx.transpose(0, 1).is_contiguous()
    expected = tensors["x"].detach().requires_grad_()
    h_expected, *_ = call(tensors | {"x": expected}, cell=cell)
    (dx_expected,) = torch.autograd.grad(h_expected.square().sum(), expected)
    assert torch.equal(h, h_expected) and torch.equal(dx, dx_expected)


def test_vmap_over_resets():
    tensors = draw("lstm", 2, 7, 1, 3)
    several = torch.rand(4, 2, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    mapped = torch.func.vmap(lambda reset: call(tensors, reset=reset)[0])(several)
    assert torch.equal(mapped, torch.stack([call(tensors, reset=reset)[0] for reset in several]))


# What is asked of the operators.


@pytest.fixture
def record_calls(monkeypatch):
    """A function that runs another and returns, by operator, (arguments, results)."""

    def record(run):
        namespace, calls = library.ops, {}

        class Recorder:
            def __getattr__(self, name):
                def call(*args):
                    calls[name] = args, getattr(namespace, name)(*args)
                    return calls[name][1]

                return call

        with monkeypatch.context() as patch:
            patch.setattr(library, "ops", Recorder())
            run()
        return calls

    return record


def test_what_is_not_needed_is_not_computed(record_calls):
    tensors = {name: t for name, t in draw("lstm", 2, 20, 1, 3).items() if name in ("x", "R")}
    calls = record_calls(lambda: seqkern.rnn(**tensors))
    assert len(calls["rnn_fwd"][1]) == 1
    for needed in (False, True):
        h = seqkern.rnn(tensors["x"].requires_grad_(), tensors["R"].requires_grad_(needed))
        assert len(record_calls(h.sum().backward)["rnn_bwd"][1]) == 1 + needed


def test_every_option_compiles():
    tensors = draw("slstm", 2, 30, 2, 3, 4)
    options = DRAWS | {"cell": "slstm", "reset": resets(2, 30), "reverse": True, "grad_clip": 0.1}
    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled = results(tensors, lambda leaves: function(leaves, **options))
    torch.testing.assert_close(compiled, results(tensors, **options))
    drawn = torch.compile(lambda x, R: seqkern.rnn(x, R, zoneout=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(*(drawn(tensors["x"], rand(2, 4, 3, 3)) for _ in range(2)))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["rnn", "rnn_step"])
def test_the_reference_has_the_same_signature(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(seqkern, name))
