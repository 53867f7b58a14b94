"""elementwise_rnn against torch.nn and the published equations, its solvers on recurrences that resist them, and what
is particular to it."""

import math
import warnings

import pytest
import torch

import seqkern
from seqkern import reference
from seqkern._load import library
from seqkern._sequences import previous
from seqkern.ops._elementwise_rnn import CELLS

SOLVERS = ["newton", "shooting"]


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw(cell, B, L, D, scale=0.8, dtype=torch.float64):
    """(x, weights, a state)"""
    sizes = CELLS[cell]
    state = [rand(B, D, dtype=dtype, seed=10 + i) for i in range(len(sizes.published))]
    if cell == "slstm":
        state[2] = state[2].abs() + 0.3
    return rand(B, L, sizes.gates, D, dtype=dtype), scale * rand(sizes.weights, D, dtype=dtype, seed=1), tuple(state)


def tokens(many, few):
    """How long a sequence may be: emulated kernels are slow."""
    return many if library.ops is torch.ops.seqkern else few


def gradients(function, tensors):
    """(outputs, gradients of the tensors) of a function of tensors that returns a tensor or a tuple of them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [rand(*o.shape, seed=90 + i).to(o) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def bitwise(actual, expected):
    return torch.equal(actual.nan_to_num(nan=7.25), expected.nan_to_num(nan=7.25)) and torch.equal(
        actual.isnan(), expected.isnan()
    )


# Independent oracles.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["gru", "indrnn", "elman"])
def test_layers_of_torch(cell, reverse, device):
    """With recurrent matrices that are diagonal. The z of torch's GRU is 1 - z."""
    B, L, D = 2, 37, 5
    x, weights, (h0,) = draw(cell, B, L, D)
    layer = {
        "gru": lambda: torch.nn.GRU(3 * D, D, bias=False, batch_first=True),
        "indrnn": lambda: torch.nn.RNN(D, D, bias=False, batch_first=True, nonlinearity="relu"),
        "elman": lambda: torch.nn.RNN(D, D, bias=False, batch_first=True),
    }[cell]().double()
    order, signs = ([1, 0, 2], torch.tensor([1.0, -1.0, 1.0])) if cell == "gru" else ([0], torch.ones(1))

    def by_torch(x, weights, h0):
        gates = (x.flip(1) if reverse else x)[:, :, order] * signs[:, None]
        recurrent = (weights[order] * signs[:, None])[:, :, None] * torch.eye(D)
        parameters = {"weight_ih_l0": torch.eye(gates[0, 0].numel()), "weight_hh_l0": recurrent.flatten(0, 1)}
        parameters = {name: value.double() for name, value in parameters.items()}
        h, last = torch.func.functional_call(layer, parameters, (gates.flatten(2).double(), h0[None]))
        return h.flip(1) if reverse else h, last[0]

    def ours(x, weights, h0):
        h, (last,) = seqkern.elementwise_rnn(x, weights, (h0,), cell=cell, reverse=reverse, return_final_state=True)
        return h, last

    actual, expected = (gradients(function, [x, weights, h0]) for function in (ours, by_torch))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def published_lstm(x, w, h, c):
    """Danieli et al. 2025."""
    outputs = []
    for f, g, o in (gates.unbind(1) for gates in x.unbind(1)):
        f, g = torch.sigmoid(w[0] * h + w[3] * c + f), torch.tanh(w[1] * h + g)
        c = f * c + (1 - f) * g
        h = torch.sigmoid(w[2] * h + w[4] * c + o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, c


def published_slstm(x, w, h, c, n, m):
    """Beck et al. 2024, equations 8 to 18."""
    outputs = []
    for gates in x.unbind(1):
        i, f, z, o = (w * h[:, None] + gates).unbind(1)
        top = torch.maximum(torch.nn.functional.logsigmoid(f) + m, i).detach()
        forget, enter = torch.exp(torch.nn.functional.logsigmoid(f) + m - top), torch.exp(i - top)
        c, n, m = forget * c + enter * torch.tanh(z), forget * n + enter, top
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, c / n, m + n.log()


@pytest.mark.parametrize("gates", [1, 40, 1000])
@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_published_equations(cell, gates, device):
    """Input gates whose exponentials overflow included: only ratios count."""
    x, weights, state = draw(cell, 2, 60, 3)
    x = x.clone()
    x[:, :, :2] *= gates

    def ours(x, weights, *state):
        h, final = seqkern.elementwise_rnn(x, weights, state, cell=cell, return_final_state=True)
        return h, final[0], final[1], *final[3:]

    theirs = {"lstm": published_lstm, "slstm": published_slstm}[cell]
    actual, expected = (gradients(function, [x, weights, *state]) for function in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_an_empty_slstm_state(device):
    """n = 0 is empty whatever else it holds; a token of weight zero leaves it so, and the final state says so."""
    x, weights, (h, _, _, _) = draw("slstm", 1, 6, 2)
    empty = (h, torch.full_like(h, 5), torch.zeros_like(h), torch.full_like(h, 3))
    expected, _ = seqkern.elementwise_rnn(x, weights, cell="slstm", return_final_state=True)
    outputs, grads = gradients(
        lambda *s: seqkern.elementwise_rnn(x, weights, s, cell="slstm"), [torch.zeros_like(h), *empty[1:]]
    )
    assert torch.equal(outputs[0], expected)
    assert not any(grad.any() for grad in grads[1:]) and grads[0].all()
    state = [part.clone() for part in (torch.zeros_like(h), *empty[1:])]
    torch.testing.assert_close(seqkern.elementwise_rnn_step(state, x[:, 0], weights, cell="slstm"), expected[:, 0])

    nothing = x.clone()
    nothing[:, :3, 0] = -math.inf
    skipped, final = seqkern.elementwise_rnn(nothing[:, :3], weights, cell="slstm", return_final_state=True)
    for part, value in zip(final, (0, 0, 0, -math.inf), strict=True):
        assert torch.equal(part, torch.full_like(part, value))
    assert not skipped.any()
    h, _ = seqkern.elementwise_rnn(nothing, weights, cell="slstm", return_final_state=True)
    torch.testing.assert_close(h[:, 3:], seqkern.elementwise_rnn(x[:, 3:], weights, cell="slstm"))


# Whole numbers: with these x no sum is negative, and every product of Jacobians is 1 or -1.


def counting(bounds, seed=0):
    """(x, weights, h, dh, dx) of a pack, for a = 1 and a = -1, all of them whole."""
    generator = torch.Generator().manual_seed(seed)
    L, a = int(bounds[-1]), torch.tensor([1, -1])
    h, dh = (torch.randint(low, 4, (1, L, 2), generator=generator) for low in (1, -3))
    x = h - a * previous(h, None, None, bounds, None, False)
    position = torch.arange(L) - bounds[:-1].repeat_interleave(bounds.diff())
    sign = torch.stack([torch.ones_like(position), 1 - 2 * (position % 2)], dim=1)
    total = torch.nn.functional.pad((sign * dh[0]).cumsum(0), (0, 0, 1, 0))
    dx = sign * (total[bounds[1:]].repeat_interleave(bounds.diff(), dim=0) - total[:-1])
    return x[:, :, None].float(), a[None].float(), h.float(), dh.float(), dx[None, :, None].float()


def test_jacobians_of_one_and_minus_one(device):
    """Exactly, for every length to 4096."""
    lengths = tokens(range(4097), [*range(36), 127, 128, 129, 300, 513])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, weights, h, dh, dx = counting(bounds)
    x.requires_grad_()
    for solver in ("serial", *SOLVERS):
        actual = seqkern.elementwise_rnn(x, weights, cell="indrnn", solver=solver, cu_seqlens=bounds)
        assert torch.equal(actual, h)
    assert torch.equal(torch.autograd.grad(actual, x, dh)[0], dx)


# Solvers.

# (cell, size of the weights, size of x, bias of the gate that keeps the past)
HOSTILE = [
    *((cell, scale, 1, 0) for cell in ("gru", "lstm", "slstm", "elman") for scale in (1, 2, 4)),
    *((cell, 1, 1, bias) for cell in ("gru", "lstm", "slstm") for bias in (4, 6)),
    *((cell, 1, 20, 0) for cell in ("gru", "lstm", "slstm", "elman")),
    ("indrnn", 0.5, 1, 0),
    ("indrnn", 1, 1, 0),  # half of the channels grow beyond every number
    ("elman", 4, 1e-3, 0),  # two stable states; between them products of slopes overflow
]
KEEPS = {"gru": (0, -1), "lstm": (0, 1), "slstm": (1, 1)}  # the gate, and the sign with which it keeps


def hostile(cell, scale, size, bias, L, D=48):
    x, weights, state = draw(cell, 1, L, D, scale, dtype=torch.float32)
    x = x * size
    if bias:
        gate, sign = KEEPS[cell]
        x[:, :, gate] += sign * bias
    return x, weights, state


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("of", HOSTILE, ids=str)
def test_every_answer_is_that_of_the_recurrence(of, solver, device):
    """Within atol of the serial one, or the same bits, and the statistics say which."""
    cell = of[0]
    x, weights, state = hostile(*of, L=tokens(16384, 900), D=tokens(48, 6))
    options = {"cell": cell, "return_final_state": True, "return_stats": True}
    expected, final, none = seqkern.elementwise_rnn(x, weights, state, solver="serial", **options)
    assert not any(part.any() for part in none)
    h, last, stats = seqkern.elementwise_rnn(x, weights, state, solver=solver, **options)
    assert [part.dtype for part in stats] == [torch.int32, torch.float32, torch.bool]
    assert all(part.shape == (1, x.shape[3]) for part in stats)
    assert stats.sweeps.min() >= 1 and stats.sweeps.max() <= (4 if solver == "shooting" else 10)

    repaired = stats.repaired[0]
    for mine, theirs in zip((h, *last), (expected, *final), strict=True):
        assert bitwise(mine[..., repaired], theirs[..., repaired])
        error = (mine - theirs).abs().masked_fill(mine == theirs, 0)[..., ~repaired]  # both may be infinite
        assert (error <= 1e-5 * theirs.abs().clamp(min=1)[..., ~repaired]).all()
    easy = solver == "shooting" and cell not in ("indrnn", "elman") and of[1:] == (1, 1, 0)
    assert not easy or repaired.double().mean() < 0.1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_smaller_atol_leaves_smaller_errors(cell, solver, device):
    x, weights, state = draw(cell, 2, tokens(2000, 200), 9, 0.5, dtype=torch.float32)
    expected = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver="serial")
    for atol in (1e-2, 1e-4, 1e-6):
        h, stats = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver=solver, atol=atol, return_stats=True)
        assert (h - expected).abs().max() <= atol
        assert (stats.repaired | (stats.estimate <= atol)).all()
    bits, stats = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver=solver, atol=0.0, return_stats=True)
    assert torch.equal(bits, expected) or not stats.repaired.all()
    assert torch.equal(bits[:, :, stats.repaired.all(0)], expected[:, :, stats.repaired.all(0)])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_solvers_with_packs_and_resets(cell, solver, device):
    """Gradients as well: those of the recurrence at the states that were found."""
    L = tokens(1500, 260)
    x, weights, _ = draw(cell, 1, L, 5, 0.5, dtype=torch.float32)
    bounds = torch.tensor([0, 0, 1, L // 3, L // 3 + 100, L])
    _, _, state = draw(cell, 5, 1, 5, dtype=torch.float32)
    reset = torch.rand(1, L, generator=torch.Generator().manual_seed(0)) < 0.01
    for reverse in (False, True):

        def call(x, weights, *state, solver=solver, reverse=reverse):
            options = {"reset": reset, "cu_seqlens": bounds, "reverse": reverse, "return_final_state": True}
            h, final = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver=solver, **options)
            return h, *final

        def serial(*tensors, call=call):
            return call(*tensors, solver="serial")

        for actual, expected in zip(
            gradients(call, [x, weights, *state]), gradients(serial, [x, weights, *state]), strict=True
        ):
            for mine, theirs in zip(actual, expected, strict=True):
                assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_invariance_is_serial(cell, device):
    x, weights, state = draw(cell, 2, 200, 3, 2.0, dtype=torch.float32)
    expected = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver="serial")
    with seqkern.batch_invariant():
        for solver in ("auto", *SOLVERS):
            h, stats = seqkern.elementwise_rnn(x, weights, state, cell=cell, solver=solver, return_stats=True)
            assert torch.equal(h, expected) and not any(part.any() for part in stats)


@pytest.mark.parametrize("solver", ["serial", *SOLVERS])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_channel(cell, solver, device):
    """And in its row, and behind it, up to a reset; other channels are solved as if it were not there."""
    L, at = tokens(600, 200), 70
    x, weights, state = draw(cell, 2, L, 4, 0.5, dtype=torch.float32)
    reset = torch.zeros(2, L, dtype=torch.bool)
    reset[:, L - 20] = True

    def call(x):
        options = {"cell": cell, "solver": solver, "reset": reset, "return_stats": True}
        return seqkern.elementwise_rnn(x, weights, state, **options)

    (h, clean), (sick, stats) = call(x), call(x.index_put(tuple(torch.tensor([0, at, 0, 1])), torch.tensor(math.nan)))
    reached = torch.zeros_like(h, dtype=torch.bool)
    reached[0, at : L - 20, 1] = True
    assert torch.equal(sick.isnan(), reached)
    hit = torch.tensor([[False, True, False, False], [False] * 4])
    assert torch.equal(sick.transpose(1, 2)[~hit], h.transpose(1, 2)[~hit])
    assert torch.equal(stats.repaired, clean.repaired | hit) or solver == "serial"
    torch.testing.assert_close(sick[~reached], h[~reached], rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cell", CELLS)
def test_repaired_channels_are_serial(cell, solver, device):
    """To the last bit, with what the forward keeps for the backward."""
    x, weights, state = draw(cell, 2, tokens(2000, 900), 5, 0.9, dtype=torch.float32)
    options = {"cell": cell, "max_sweeps": 1, "atol": 0.0}

    def by(solver):
        def call(x, weights, *state):
            h, final = seqkern.elementwise_rnn(x, weights, state, solver=solver, return_final_state=True, **options)
            return h, *final

        outputs, grads = gradients(call, [x, weights, *state])
        return outputs + grads

    _, stats = seqkern.elementwise_rnn(x, weights, state, solver=solver, return_stats=True, **options)
    repaired = stats.repaired.all(0)
    assert repaired.any()
    for mine, theirs in zip(by(solver), by("serial"), strict=True):
        assert torch.equal(mine[..., repaired], theirs[..., repaired])


def test_what_becomes_of_failures(device):
    x, weights, _ = hostile("elman", 4, 1e-3, 0, L=300, D=4)
    options = {"cell": "elman", "solver": "newton", "max_sweeps": 1, "atol": 0.0}
    expected = seqkern.elementwise_rnn(x, weights, cell="elman", solver="serial")
    assert torch.equal(seqkern.elementwise_rnn(x, weights, **options), expected)
    with pytest.raises(
        RuntimeError, match=r"^elementwise_rnn: \d of 4 channels .* above atol, .* use solver=\"serial\""
    ):
        seqkern.elementwise_rnn(x, weights, on_fail="raise", **options)
    with pytest.warns(RuntimeWarning, match="^elementwise_rnn: .* token by token"):
        h, stats = seqkern.elementwise_rnn(x, weights, on_fail="warn", return_stats=True, **options)
    assert torch.equal(h, expected) and stats.repaired.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = seqkern.elementwise_rnn(x, weights, cell="elman", solver="serial", on_fail="raise")
        assert torch.equal(quiet, expected)


# Resets.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_begins_a_sequence(cell, reverse, device):
    """Bitwise, gradients included, whatever stood before it."""
    L, at = 45, (17, 18, 40)
    x, weights, state = draw(cell, 1, L, 3, dtype=torch.float32)
    reset, bounds = torch.zeros(1, L, dtype=torch.bool), torch.tensor([0, *at, L])
    reset[0, [t - 1 if reverse else t for t in at]] = True
    empty = [torch.zeros(4, 3) for _ in state]
    if cell == "slstm":
        empty[3] -= math.inf
    first = -1 if reverse else 0
    states = [part.index_put((torch.tensor(first),), given[0]) for part, given in zip(empty, state, strict=True)]

    def with_resets(x, *state):
        return seqkern.elementwise_rnn(x, weights, state, cell=cell, reset=reset, reverse=reverse)

    def packed(x, *states):
        return seqkern.elementwise_rnn(x, weights, states, cell=cell, cu_seqlens=bounds, reverse=reverse)

    (h,), (dx, *dstate) = gradients(with_resets, [x, *state])
    (expected,), (expected_dx, *expected_dstate) = gradients(packed, [x, *states])
    assert torch.equal(h, expected) and torch.equal(dx, expected_dx)
    assert all(torch.equal(mine[0], theirs[first]) for mine, theirs in zip(dstate, expected_dstate, strict=True))


def test_vmap_over_resets():
    x, weights, _ = draw("lstm", 2, 7, 3)
    reset = torch.rand(4, 2, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    mapped = torch.func.vmap(lambda reset: seqkern.elementwise_rnn(x, weights, cell="lstm", reset=reset))(reset)
    expected = torch.stack([seqkern.elementwise_rnn(x, weights, cell="lstm", reset=r) for r in reset])
    assert torch.equal(mapped, expected)


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
    x, weights, _ = draw("lstm", 2, 20, 3)
    calls = record_calls(lambda: seqkern.elementwise_rnn(x, weights, cell="lstm"))
    assert len(calls["elementwise_rnn_fwd"][1]) == 1
    for needed in (False, True):
        h = seqkern.elementwise_rnn(x.requires_grad_(), weights.requires_grad_(needed), cell="lstm")
        assert len(record_calls(h.sum().backward)["elementwise_rnn_bwd"][1]) == 1 + needed


def test_every_option_compiles():
    x, weights, state = draw("slstm", 2, 30, 3)
    reset = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.2

    def call(x, weights, *state):
        options = {"cell": "slstm", "reset": reset, "solver": "shooting", "atol": 1e-9, "reverse": True}
        h, final, stats = seqkern.elementwise_rnn(
            x, weights, state, return_final_state=True, return_stats=True, **options
        )
        return h * (1 - stats.repaired.double())[:, None], *final

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, [x, weights, *state]), gradients(call, [x, weights, *state]))
    torch._dynamo.reset()


def test_the_reference_takes_every_option():
    x, weights, _ = draw("gru", 2, 5, 3, dtype=torch.bfloat16)
    options = {"solver": "newton", "atol": 1e-3, "max_sweeps": 2, "on_fail": "raise", "return_final_state": True}
    h, (last,), stats = reference.elementwise_rnn(x, weights, return_stats=True, **options)
    assert h.dtype == torch.bfloat16 and last.dtype == torch.float32 and not any(part.any() for part in stats)
