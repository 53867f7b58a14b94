"""selective_scan against linear filters and loops by other hands, and what is particular to it."""

import itertools

import numpy
import pytest
import scipy.signal
import torch

import seqkern
from seqkern import reference
from seqkern._load import library
from seqkern.ops import _selective_scan as plain
from seqkern.testing import assert_close
from seqkern.testing.operators import SELECTIVE_SCAN


def rand(*shape, dtype=torch.float64, seed=0):
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=drawn).to(dtype)


def arguments(B=2, D=4, L=9, N=3, G=2, dtype=torch.float64, is_complex=False):
    """Every tensor of a call, B and C variable."""
    number = dtype.to_complex() if is_complex else dtype
    return {
        "u": rand(B, D, L, dtype=dtype, seed=1),
        "delta": rand(B, D, L, dtype=dtype, seed=2).abs() / 2,
        "A": -rand(D, N, dtype=dtype, seed=3).abs() + (1j * rand(D, N, dtype=dtype, seed=4) if is_complex else 0),
        "B": rand(B, G, N, L, dtype=number, seed=5),
        "C": rand(B, G, N, L, dtype=number, seed=6),
        "D": rand(D, dtype=dtype, seed=7),
        "z": rand(B, D, L, dtype=dtype, seed=8),
        "delta_bias": rand(D, dtype=dtype, seed=9).abs() / 9,
        "initial_state": rand(B, D, N, dtype=number, seed=10),
    }


def gradients(function, tensors, cotangents=None, **options):
    """([y, last_state], gradients by name), for random cotangents where none are given."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves, return_last_state=True, **options)
    cotangents = cotangents or [
        rand(*output.shape, dtype=output.dtype, seed=20 + i) for i, output in enumerate(outputs)
    ]
    cotangents = [cotangent.to(output) for cotangent, output in zip(cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return list(outputs), dict(zip(leaves, grads, strict=True))


# Independent oracles.


@pytest.mark.parametrize("transition", ["exp", "two_exp_minus_one"])
@pytest.mark.parametrize("L", [1, 2, 31, 33, 400])
def test_lfilter_of_scipy(L, transition, device):
    """With constant delta, A, B and C each state is a filter of one pole, and the gradient of u is it backwards."""
    D, N = 3, 5
    A, B, C, h0 = -rand(D, N, seed=1).abs(), rand(D, N, seed=2), rand(D, N, seed=3), rand(1, D, N, seed=4)
    u, dy, step = rand(1, D, L, seed=5), rand(1, D, L, seed=6), rand(D, seed=7).abs()
    pole = (step[:, None] * A).exp() if transition == "exp" else 2 * (step[:, None] * A).exp() - 1
    gain = step[:, None] * B * C

    leaf = u.to(device).clone().requires_grad_()
    delta = step[None, :, None].expand(1, D, L).to(device)
    parameters = [t.to(device) for t in (A, B, C)]
    options = {"initial_state": h0.to(device), "transition": transition}
    y, last = seqkern.selective_scan(leaf, delta, *parameters, return_last_state=True, **options)
    (du,) = torch.autograd.grad(y, leaf, dy.to(device))
    for d in range(D):
        expected_y, expected_du = numpy.zeros(L), numpy.zeros(L)
        for n in range(N):
            denominator = [1, -pole[d, n].item()]
            memory = [pole[d, n].item() * h0[0, d, n].item()]
            h, after = scipy.signal.lfilter([(step[d] * B[d, n]).item()], denominator, u[0, d], zi=memory)
            expected_y += C[d, n].item() * h
            expected_du += gain[d, n].item() * scipy.signal.lfilter([1], denominator, dy[0, d].flip(0))[::-1]
            assert abs(after[0] - pole[d, n].item() * last[0, d, n].item()) < 1e-10
        numpy.testing.assert_allclose(y[0, d].detach().cpu(), expected_y, rtol=1e-10, atol=1e-10)
        numpy.testing.assert_allclose(du[0, d].cpu(), expected_du, rtol=1e-10, atol=1e-10)


def loop(u, delta, A, B, C, D, z, delta_bias, initial_state, reverse, two_exp):
    """The definition, number by number, in numpy."""
    batch, channels, L = u.shape
    y, state = numpy.zeros(u.shape), initial_state.copy()
    share = channels // B.shape[1]
    times = range(L)[::-1] if reverse else range(L)
    for b, d, t in itertools.product(range(batch), range(channels), times):
        step = numpy.log1p(numpy.exp(delta[b, d, t] + delta_bias[d]))
        decay = numpy.exp(step * A[d])
        decay = 2 * decay - 1 if two_exp else decay
        state[b, d] = decay * state[b, d] + step * u[b, d, t] * B[b, d // share, :, t]
        out = sum(C[b, d // share, :, t] * state[b, d])
        out = (2 * out.real if numpy.iscomplexobj(A) else out) + D[d] * u[b, d, t]
        y[b, d, t] = out * z[b, d, t] / (1 + numpy.exp(-z[b, d, t]))
    return y, state


@pytest.mark.parametrize("two_exp", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
def test_loop_of_numpy(is_complex, reverse, two_exp, device):
    tensors = arguments(is_complex=is_complex)
    expected = loop(**{name: tensor.numpy() for name, tensor in tensors.items()}, reverse=reverse, two_exp=two_exp)
    actual = seqkern.selective_scan(
        **{name: tensor.to(device) for name, tensor in tensors.items()},
        delta_softplus=True,
        return_last_state=True,
        reverse=reverse,
        transition="two_exp_minus_one" if two_exp else "exp",
    )
    for mine, theirs in zip(actual, expected, strict=True):
        numpy.testing.assert_allclose(mine.cpu(), theirs, rtol=1e-11, atol=1e-11)


# Exact values.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transition", ["exp", "two_exp_minus_one"])
def test_without_decay_it_is_a_sum(transition, dtype, device):
    """exp(0) is 1: states of A = 0 are cumulative sums, exact in whole numbers."""
    u = torch.randint(-9, 10, (2, 5, 300), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    A, ones = torch.zeros(5, 3, device=device, dtype=dtype), torch.ones(5, 3, device=device, dtype=dtype)
    y = seqkern.selective_scan(u, torch.ones_like(u), A, ones, ones, transition=transition)
    assert torch.equal(y, 3 * u.cumsum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_step_keeps_the_state(dtype, device):
    """delta = 0, whatever A is."""
    A = torch.tensor([[-1e30, -3.0, 1e-3, 5.0, 1e30]], device=device, dtype=dtype).expand(7, 5)
    state = rand(2, 7, 5, dtype=dtype).to(device)
    u, C = rand(2, 7, 40, dtype=dtype).to(device), torch.ones(7, 5, device=device, dtype=dtype)
    options = {"initial_state": state, "return_last_state": True}
    for transition in ("exp", "two_exp_minus_one"):
        _, last = seqkern.selective_scan(u, torch.zeros_like(u), A, C, C, transition=transition, **options)
        assert torch.equal(last, state)


def test_negative_eigenvalues_count_modulo_two(device):
    """Where exp(delta A) is 0, 2 exp(delta A) - 1 is exactly -1, and where delta is 0 exactly 1: the state's sign is a
    parity."""
    bits = torch.randint(0, 2, (3, 1, 500), generator=torch.Generator().manual_seed(0)).to(device, torch.float32)
    A, B, C = (torch.full((1, 1), value, device=device) for value in (-1e4, 0.0, 1.0))
    y = seqkern.selective_scan(
        torch.zeros_like(bits), bits, A, B, C, initial_state=torch.ones(3, 1, 1, device=device),
        transition="two_exp_minus_one",
    )  # fmt: skip
    assert torch.equal(y, 1 - 2 * (bits.cumsum(-1) % 2))


@pytest.mark.parametrize("transition, decay", [("exp", 1e-3), ("two_exp_minus_one", 5e-4)])
def test_long_memories_are_unbiased(transition, decay, device):
    """5000 factors of nearly 1: their errors average out, a bias of the exponential would not."""
    L = 5000
    delta = (0.5 + torch.rand(1, 33, L, generator=torch.Generator().manual_seed(0))).to(device)
    A = torch.full((33, 2), -decay, device=device)
    zeros, ones = torch.zeros(33, 2, device=device), torch.ones(33, 2, device=device)
    state = torch.ones(1, 33, 2, device=device)
    options = {"initial_state": state, "return_last_state": True, "transition": transition}
    _, last = seqkern.selective_scan(torch.zeros_like(delta), delta, A, zeros, ones, **options)
    exponent = -decay * delta.double()
    factors = exponent.exp() if transition == "exp" else 2 * exponent.exp() - 1
    expected = factors.prod(-1)[..., None].expand_as(last)
    torch.testing.assert_close(last.double(), expected, rtol=3e-5, atol=0)


@pytest.mark.parametrize("value", [-1e4, -200.0, -80.0, -20.0, -1e-3, 0.0, 19.9, 20.1, 90.0, 1e4])
def test_softplus_and_silu_at_their_ends(value, device):
    tensors = arguments(dtype=torch.float32)
    tensors |= {"A": tensors["A"] / (1 + abs(value)), "z": torch.full_like(tensors["z"], value)}
    tensors |= {"delta": torch.full_like(tensors["delta"], value)}
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    actual = gradients(seqkern.selective_scan, on_device, delta_softplus=True)
    exact, single = (
        gradients(reference.selective_scan, {n: t.to(dtype) for n, t in tensors.items()}, delta_softplus=True)
        for dtype in (torch.float64, torch.float32)
    )
    for mine, theirs, plainly in zip(actual[0], exact[0], single[0], strict=True):
        assert_close(mine, theirs, plainly)
    assert_close(actual[1], exact[1], single[1])


@pytest.mark.parametrize("transition", ["exp", "two_exp_minus_one"])
@pytest.mark.parametrize("exponent", [1.0, 60.0, 88.0, 89.0, 200.0, float("inf"), float("-inf"), float("nan")])
def test_exponents_of_any_sign_and_size(exponent, transition, device):
    """Growing states overflow when they should, and not before."""
    u, delta = torch.ones(1, 9, 3, device=device), torch.ones(1, 9, 3, device=device)
    delta[..., 1] = exponent
    A, B = torch.ones(9, 2, device=device), torch.ones(9, 2, device=device)
    actual = seqkern.selective_scan(u, delta, A, B, B, return_last_state=True, transition=transition)
    expected = reference.selective_scan(u, delta, A, B, B, return_last_state=True, transition=transition)
    for mine, theirs in zip(actual, expected, strict=True):
        finite = theirs.isfinite()
        torch.testing.assert_close(mine[finite], theirs[finite], rtol=1e-4, atol=1e-4)
        assert not mine[~finite].isfinite().any()


# Forms of the arguments.


def test_projections_say_the_same_in_every_form(device):
    """Constant B and C as variable ones, with a group for every channel; one group with and without its dimension."""
    tensors = {name: tensor.to(device) for name, tensor in arguments(G=1).items()}
    B, D, L = tensors["u"].shape
    flat = tensors | {"B": tensors["B"][:, 0], "C": tensors["C"][:, 0]}
    y, grads = gradients(seqkern.selective_scan, tensors)
    other, others = gradients(seqkern.selective_scan, flat)
    assert all(map(torch.equal, y, other))
    assert all(torch.equal(grads[name].reshape(others[name].shape), others[name]) for name in grads)

    constant = {"B": tensors["B"][0, 0, :, :1].mT.repeat(D, 1) * rand(D, 3, seed=30).to(device)}
    constant["C"] = rand(D, 3, seed=31).to(device)
    variable = {name: t[None, :, :, None].expand(B, D, 3, L) for name, t in constant.items()}
    y, grads = gradients(seqkern.selective_scan, tensors | constant)
    other, others = gradients(seqkern.selective_scan, tensors | variable)
    torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
    for name in grads:
        summed = others[name].sum((0, 3)) if name in constant else others[name]
        torch.testing.assert_close(grads[name], summed, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_interleaved_pairs_are_complex_numbers(G, dtype, device):
    """Bitwise, gradients too; with one group also without its dimension."""
    tensors = {name: tensor.to(device) for name, tensor in arguments(G=G, dtype=dtype, is_complex=True).items()}

    def interleaved(t):
        return torch.view_as_real(t).flatten(-2)

    pairs = tensors | {name: interleaved(tensors[name]) for name in "BC"}
    forms = [pairs]
    if G == 1:
        forms += [{name: t[:, 0] if name in "BC" else t for name, t in form.items()} for form in (tensors, pairs)]
    y, grads = gradients(seqkern.selective_scan, tensors)
    assert y[1].dtype == dtype.to_complex()
    for form in forms:
        other, others = gradients(seqkern.selective_scan, form)
        assert all(map(torch.equal, y, other))
        for name in grads:
            mine = grads[name] if others[name].is_complex() or name not in "BC" else interleaved(grads[name])
            assert torch.equal(mine.reshape(others[name].shape), others[name]), name


def test_conjugate_views_of_complex_tensors(device):
    tensors = {name: tensor.to(device) for name, tensor in arguments(is_complex=True).items()}
    lazy = {name: tensor.conj() if tensor.is_complex() else tensor for name, tensor in tensors.items()}
    resolved = {name: tensor.resolve_conj() for name, tensor in lazy.items()}
    assert torch.equal(seqkern.selective_scan(**lazy), seqkern.selective_scan(**resolved))


def test_real_numbers_in_complex_form(device):
    """A real recurrence in complex numbers has twice its output, and its gradients follow torch's convention."""
    tensors = {name: tensor.to(device) for name, tensor in arguments(is_complex=True).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("D", "z")}
    parts = {name: t.real.clone() if t.is_complex() else t for name, t in tensors.items()}
    embedded = {name: t + 0j if tensors[name].is_complex() else t for name, t in parts.items()}
    y, last = seqkern.selective_scan(**parts, return_last_state=True)
    other, other_last = seqkern.selective_scan(**embedded, return_last_state=True)
    torch.testing.assert_close(2 * y, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last + 0j, other_last, rtol=1e-12, atol=1e-12)


def test_gradcheck_of_complex_tensors():
    tensors = arguments(B=1, D=2, L=3, N=2, G=1, is_complex=True)

    def call(*args):
        named = dict(zip(tensors, args, strict=True))
        return seqkern.selective_scan(**named, delta_softplus=True, return_last_state=True)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(call, leaves)


def test_every_tensor_has_a_dtype_of_its_own(device):
    dtypes = dict(
        u=torch.bfloat16, delta=torch.float32, A=torch.float64, B=torch.float16, C=torch.bfloat16, D=torch.float16,
        z=torch.float64, delta_bias=torch.bfloat16, initial_state=torch.float16,
    )  # fmt: skip
    tensors = {name: tensor.to(device, dtypes[name]) for name, tensor in arguments().items()}
    cotangents = [rand(2, 4, 9, seed=20).bfloat16(), rand(2, 4, 3, seed=21).float()]
    (y, last), grads = gradients(seqkern.selective_scan, tensors, cotangents)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    exact, single = (
        gradients(reference.selective_scan, {name: t.to(dtype) for name, t in tensors.items()}, cotangents)
        for dtype in (torch.float64, torch.float32)
    )
    assert {name: grad.dtype for name, grad in grads.items()} == dtypes
    assert_close({"y": y}, {"y": exact[0][0]}, {"y": single[0][0]})
    assert_close({"y": y} | grads, {"y": exact[0][0]} | exact[1], {"y": single[0][0]} | single[1])


@pytest.mark.parametrize("orders", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("B, D, L", [(2, 6, 7), (1, 1, 7), (2, 6, 1), (1, 1, 1)])
def test_memory_orders_of_outputs(B, D, L, orders, device):
    """y and each gradient lie as their tensors do: u, delta and z need not agree."""
    tensors = {name: tensor.to(device) for name, tensor in arguments(B, D, L, G=1).items()}
    expected = gradients(seqkern.selective_scan, tensors)
    for name, channels_first in zip(("u", "delta", "z"), orders, strict=True):
        if channels_first:
            tensors[name] = tensors[name].mT.contiguous().mT
    y, grads = gradients(seqkern.selective_scan, tensors)
    torch.testing.assert_close((y, grads), expected, rtol=1e-12, atol=1e-12)
    if D > 1 and L > 1:
        assert y[0].stride() == tensors["u"].stride()
        assert all(grads[name].stride() == tensors[name].stride() for name in ("u", "delta", "z"))


def test_other_complex_arguments_are_refused():
    tensors = arguments(is_complex=True)
    for name, bad in [("B", tensors["B"].real[0, 0, :, :4].mT), ("initial_state", tensors["initial_state"].real)]:
        with pytest.raises(RuntimeError, match=f"^selective_scan: {name} must be complex where A is, got float64"):
            seqkern.selective_scan(**(tensors | {name: bad}))
    with pytest.raises(RuntimeError, match=r"^selective_scan: C must be \(B=2, G, N=3, 2L=18\), got \(2, 2, 3, 9\)"):
        seqkern.selective_scan(**(tensors | {"C": tensors["C"].real}))
    with pytest.raises(RuntimeError, match=r"^selective_scan: B must be float32, .* got "):
        seqkern.selective_scan(**(tensors | {"A": tensors["A"].real}))

    state, token = tensors.pop("initial_state"), {}
    for name, tensor in tensors.items():
        token[name] = tensor[..., 0] if name in ("u", "delta", "z", "B", "C") else tensor
    for name, bad in [("state", state.real), ("C", token["C"].real)]:
        with pytest.raises(RuntimeError, match=f"^selective_scan_step: {name} must be complex where A is, got float64"):
            seqkern.selective_scan_step(**({"state": state} | token | {name: bad}))


# Sizes.


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("N", [2, 7, 8, 17, 32, 100, 256, 300])
def test_state_sizes(N, is_complex, device):
    tensors = {name: t.to(device) for name, t in arguments(1, 3, 5, N, 1, torch.float32, is_complex).items()}
    wide = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in tensors.items()}
    (y, last), grads = gradients(seqkern.selective_scan, tensors)
    (exact_y, exact_last), exact_grads = gradients(reference.selective_scan, wide)
    for actual, expected in [(y, exact_y), (last, exact_last), *zip(grads.values(), exact_grads.values(), strict=True)]:
        torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)


def test_channels_of_every_remainder(device):
    """D around the sizes of vectors and warps, in both memory orders."""
    for D in (*range(1, 19), 31, 33, 63, 65):
        tensors = {name: t.to(device) for name, t in arguments(1, D, 3, 2, 1, torch.float32).items()}
        expected = gradients(reference.selective_scan, {name: t.double() for name, t in tensors.items()})
        for transposed in (False, True):
            if transposed:
                tensors |= {name: tensors[name].mT.contiguous().mT for name in ("u", "delta", "z")}
            y, grads = gradients(seqkern.selective_scan, tensors)
            for mine, theirs in zip([*y, *grads.values()], [*expected[0], *expected[1].values()], strict=True):
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_a_million_tokens():
    """Against scipy, forward and backward, with a memory of about a thousand tokens."""
    L, D, N = 1_000_000, 2, 2
    u, dy = rand(1, D, L, dtype=torch.float32, seed=1).requires_grad_(), rand(1, D, L, dtype=torch.float32, seed=2)
    A = torch.tensor([[-1e-3, -1e-2], [-2e-3, -1.0]])
    ones = torch.ones(D, N)
    y = seqkern.selective_scan(u, torch.ones(1, D, L), A, ones, ones)
    (du,) = torch.autograd.grad(y, u, dy)
    for actual, signal, order in ((y.detach(), u.detach(), 1), (du, dy, -1)):
        for d in range(D):
            series = signal[0, d].double().numpy()[::order]
            poles = numpy.exp(A[d].double().numpy())
            expected = sum(scipy.signal.lfilter([1], [1, -pole], series) for pole in poles)[::order]
            numpy.testing.assert_allclose(actual[0, d].numpy(), expected, atol=1e-3 * abs(expected).max(), rtol=0)


def test_a_hundred_thousand_channels():
    tensors = arguments(B=1, D=100_000, L=3, N=2, G=1, dtype=torch.float32)
    y, grads = gradients(seqkern.selective_scan, tensors)
    exact_y, exact_grads = gradients(reference.selective_scan, {name: t.double() for name, t in tensors.items()})
    for actual, expected in [*zip(y, exact_y, strict=True), *zip(grads.values(), exact_grads.values(), strict=True)]:
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * scale)


def test_parameter_gradients_over_many_tokens(device):
    """Sums over thousands of tokens in float32 lose no more than a few digits, in any data type."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: t.to(dtype) for name, t in arguments(B=1, D=2, L=3000, N=2, G=1, dtype=torch.float32).items()}
        tensors |= {"B": rand(2, 2, dtype=dtype, seed=40), "C": rand(2, 2, dtype=dtype, seed=41)}
        wide = {name: t if name in ("u", "delta", "z") else t.float() for name, t in tensors.items()}
        _, grads = gradients(seqkern.selective_scan, {name: t.to(device) for name, t in wide.items()})
        _, exact = gradients(reference.selective_scan, {name: t.double() for name, t in tensors.items()})
        for name in ("A", "B", "C", "D", "delta_bias"):
            scale = exact[name].abs().max().item()
            limit = (1e-5 if dtype == torch.float32 else 2e-2) * scale
            torch.testing.assert_close(grads[name].cpu().double(), exact[name], rtol=0, atol=limit, msg=name)


# The step.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("H, P, G", [(4, 3, 1), (4, 1, 2), (3, 5, 3), (2, 33, 1)])
def test_step_with_heads(H, P, G, dtype, device):
    """The same as without, heads and their channels in one dimension and a group repeated for each channel of it."""
    B, N = 2, 3
    state, A = rand(B, H, P, N).to(device, torch.float32), -rand(H, P, N, seed=1).abs().to(device, torch.float32)
    u, delta, z = (rand(B, H, P, seed=seed).to(device, dtype) for seed in (2, 3, 4))
    D, bias = (rand(H, P, seed=seed).to(device, torch.float32) for seed in (5, 6))
    Bt, Ct = (rand(B, G, N, seed=seed).to(device, dtype) for seed in (7, 8))
    flat = state.flatten(1, 2).clone()
    y = seqkern.selective_scan_step(state, u, delta, A, Bt, Ct, D, z, bias, True)
    tokens = [t.flatten(1) for t in (u, delta)]
    projections = [t.repeat_interleave(H * P // G, dim=1) for t in (Bt, Ct)]
    others = [D.flatten(), z.flatten(1), bias.flatten()]
    expected = seqkern.selective_scan_step(flat, *tokens, A.flatten(0, 1), *projections, *others, True)
    assert y.shape == u.shape and y.dtype == dtype
    torch.testing.assert_close(y.flatten(1), expected)
    torch.testing.assert_close(state.flatten(1, 2), flat)


def test_step_with_heads_in_a_pool(device):
    pool = torch.full((5, 2, 3, 4), float("nan"), device=device)
    pool[3] = 1
    u = rand(2, 2, 3, dtype=torch.float32).to(device)
    A, Bt = torch.zeros(2, 3, 4, device=device), torch.ones(2, 4, device=device)
    indices = torch.tensor([3, -1], device=device)
    y = seqkern.selective_scan_step(pool, u, torch.ones_like(u), A, Bt, Bt, state_indices=indices)
    torch.testing.assert_close(pool[3], (1 + u[0, ..., None]).expand(2, 3, 4))
    torch.testing.assert_close(y[0], 4 * (1 + u[0]))
    assert torch.equal(y[1], torch.zeros_like(y[1])) and pool[[0, 1, 2, 4]].isnan().all()


def test_complex_steps_with_heads(device):
    H, P, N = 2, 3, 4
    state, A = rand(2, H, P, N, dtype=torch.complex64), -rand(H, P, N, dtype=torch.complex64, seed=1)
    u, delta = rand(2, H, P, dtype=torch.float32, seed=2), rand(2, H, P, dtype=torch.float32, seed=3).abs()
    Bt, Ct = (rand(2, 1, N, dtype=torch.complex64, seed=seed) for seed in (4, 5))
    mine = state.clone().to(device)
    y = seqkern.selective_scan_step(mine, *(t.to(device) for t in (u, delta, A, Bt, Ct)))
    expected = reference.selective_scan_step(state, u, delta, A, Bt, Ct)
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(mine.cpu(), state)


# Derivatives of higher order.


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packing", ["none", "cu_seqlens", "seq_idx"])
def test_second_derivatives_across_chunks(packing, reverse, is_complex, monkeypatch):
    """They are computed some tokens at a time, which changes nothing."""
    monkeypatch.setattr(plain, "CHUNK", 3)
    tensors = arguments(B=1 if packing == "cu_seqlens" else 2, L=8, is_complex=is_complex)
    options = {"reverse": reverse, "delta_softplus": True, "return_last_state": True}
    if packing == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 1, 1, 8])
        tensors["initial_state"] = tensors["initial_state"].repeat(3, 1, 1)
    elif packing == "seq_idx":
        options["seq_idx"] = torch.tensor([[-1, 0, 0, 0, 0, 2, 2, -1], [-1] * 8], dtype=torch.int32)

    def second(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        outputs = function(**dict(zip(tensors, leaves, strict=True)), **options)
        loss = sum(output.abs().square().sum() for output in outputs)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return grads, torch.autograd.grad(sum(grad.abs().square().sum() for grad in grads), leaves)

    for actual, expected in zip(second(seqkern.selective_scan), second(reference.selective_scan), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_third_derivative_by_autograd():
    tensors = arguments(B=1, D=2, L=4)

    def third(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        grads = leaves
        value = function(**dict(zip(tensors, leaves, strict=True))).pow(3).sum()
        for order in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=order < 2)
            value = sum(grad.pow(3).sum() for grad in grads)
        return grads

    torch.testing.assert_close(third(seqkern.selective_scan), third(reference.selective_scan), rtol=1e-9, atol=1e-9)


# What is asked of the operator.


class Asked(Exception):
    pass


def asked(monkeypatch, **options):
    """The last arguments of the forward: split_time, return_last_state, keep_checkpoints."""

    class Namespace:
        @staticmethod
        def selective_scan_fwd(*args):
            raise Asked(args[-3:])

    monkeypatch.setattr(library, "ops", Namespace)
    with pytest.raises(Asked) as raised:
        seqkern.selective_scan(**arguments(), **options)
    return raised.value.args[0]


def test_states_are_kept_only_for_a_gradient(monkeypatch):
    assert asked(monkeypatch) == (True, False, False)
    with torch.autograd.forward_ad.dual_level():
        assert asked(monkeypatch) == (True, False, True)


def test_batch_invariant_does_not_split_time(monkeypatch):
    with seqkern.batch_invariant():
        assert asked(monkeypatch, return_last_state=True) == (False, True, False)


def test_a_gradient_without_kept_states_raises(monkeypatch):
    tensors = arguments()
    leaf = tensors.pop("u").requires_grad_()
    given = [tensors.get(name) for name in ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")]
    options = (None, None, False, False, False, True, False, False)
    (y,) = torch.ops.seqkern.selective_scan_fwd(leaf, *given, *options)
    with pytest.raises(RuntimeError, match="needs keep_checkpoints=True"):
        y.sum().backward()


@pytest.mark.parametrize("form", ["complex", "interleaved"])
def test_complex_numbers_compile(form):
    tensors = arguments(is_complex=True)
    if form == "interleaved":
        tensors |= {name: torch.view_as_real(tensors[name]).flatten(-2) for name in "BC"}
    function = torch.compile(seqkern.selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(function, tensors), gradients(seqkern.selective_scan, tensors))
    torch._dynamo.reset()


def test_the_table_names_this_operator():
    assert SELECTIVE_SCAN.name == "selective_scan" and SELECTIVE_SCAN.arguments.keys() == arguments().keys()
