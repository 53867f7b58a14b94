"""linear_scan against filters, sums and scans by other hands, in whole numbers, and what is particular to it."""

import itertools
import math

import pytest
import scipy.signal
import torch
from torch._higher_order_ops.associative_scan import associative_scan
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import seqkern
from seqkern import reference
from seqkern._load import library


def rand(*shape, dtype=torch.float64, seed=0):
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=drawn).to(dtype)


def decays(*shape, dtype=torch.float64, seed=0):
    """Of size at most 1, of any sign or angle."""
    size = rand(*shape, seed=seed).cos()
    return torch.polar(size.abs(), 3 * rand(*shape, seed=seed + 1)).to(dtype) if dtype.is_complex else size.to(dtype)


def whole(*shape, seed=0, largest=3):
    """Whole numbers, of which float32 computes small sums exactly."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def signs(*shape, seed=0):
    return 2 * whole(*shape, seed=seed).gt(0).float() - 1


def chance(*shape, share=0.2, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def gradients(function, tensors, cotangents=None, **options):
    """([h, final_state], gradients of the tensors), for random cotangents where none are given."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, return_final_state=True, **options)
    cotangents = cotangents or [rand(*o.shape, dtype=o.dtype, seed=90 + i).to(o) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [output.detach() for output in outputs], list(grads)


def assert_equal(actual, expected):
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


# Independent oracles.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("L", [1, 2, 31, 33, 400])
def test_lfilter_of_scipy(L, dtype, reverse, device):
    """A constant decay is a filter of one pole; the gradient of b is it backwards, with the conjugate of the pole."""
    D = 3
    a, h0 = decays(D, dtype=dtype, seed=1), rand(1, D, dtype=dtype, seed=3)
    b, dh = rand(1, L, D, dtype=dtype, seed=4), rand(1, L, D, dtype=dtype, seed=5)

    def filtered(signal, pole, state, backwards):
        signal = signal.flip(1) if backwards else signal
        memory = (pole * state).numpy()
        columns = [
            scipy.signal.lfilter([1], [1, -pole[d].item()], signal[0, :, d].numpy(), zi=memory[0, d : d + 1])[0]
            for d in range(D)
        ]
        result = torch.stack([torch.from_numpy(column) for column in columns], dim=1)[None]
        return result.flip(1) if backwards else result

    (h, last), (_, db, _) = gradients(
        seqkern.linear_scan,
        [t.to(device) for t in (a, b, h0)],
        [dh.to(device), torch.zeros_like(h0, device=device)],
        reverse=reverse,
    )
    expected = filtered(b, a, h0, reverse)
    tolerance = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(h.cpu(), expected, **tolerance)
    torch.testing.assert_close(last.cpu(), expected[:, 0 if reverse else -1], **tolerance)
    torch.testing.assert_close(
        db.cpu(), filtered(dh, a.conj().resolve_conj(), torch.zeros_like(h0), not reverse), **tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_associative_scan_of_torch(dtype, device):
    a, b = decays(2, 133, 5, dtype=dtype), rand(2, 133, 5, dtype=dtype, seed=2)

    def combine(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    for reverse in (False, True):
        expected = associative_scan(combine, (a, b), dim=1, reverse=reverse, combine_mode="generic")[1]
        actual = seqkern.linear_scan(a.to(device), b.to(device), reverse=reverse).cpu()
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Whole numbers: nothing is rounded, so every order of additions gives the same bits.

LENGTHS = [*range(1, 67), 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000]


def exact(a, b, dh):
    """(h, da, db) for decays of 1 and -1, by sums: a_t ... a_{j+1} is the product of two signs."""
    sign = a.cumprod(1)
    h = sign * (sign * b).cumsum(1)
    db = sign * (sign * dh).flip(1).cumsum(1).flip(1)
    entering = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    return h, entering * db, db


def test_every_length_is_exact(device):
    for L in LENGTHS:
        a, b, dh = signs(2, L, 3, seed=L), whole(2, L, 3, seed=L + 1), whole(2, L, 3, seed=L + 2)
        cotangents = [dh.to(device), torch.zeros(2, 3, device=device)]
        (h, _), (da, db) = gradients(seqkern.linear_scan, [a.to(device), b.to(device)], cotangents)
        assert_equal((h.cpu(), da.cpu(), db.cpu()), exact(a, b, dh))


def test_every_length_in_a_pack_is_exact(device):
    bounds = torch.tensor([0, *LENGTHS, 0, 5]).cumsum(0)
    L = int(bounds[-1])
    a, b, dh = signs(1, L, 2), whole(1, L, 2, seed=1), whole(1, L, 2, seed=2)
    cotangents = [dh.to(device), torch.zeros(len(bounds) - 1, 2, device=device)]
    (h, _), (da, db) = gradients(
        seqkern.linear_scan, [a.to(device), b.to(device)], cotangents, cu_seqlens=bounds.to(device)
    )
    parts = [exact(*(t[:, begin:end] for t in (a, b, dh))) for begin, end in itertools.pairwise(bounds.tolist())]
    assert_equal((h.cpu(), da.cpu(), db.cpu()), [torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)])


@pytest.mark.parametrize("D", [1, 3, 8])
@pytest.mark.parametrize("L", [8191, 8192, 8193, 20_001])
def test_time_in_segments_is_exact(L, D):
    """Few channels and many tokens, which threads divide."""
    a, b, dh = signs(1, L, D), whole(1, L, D, seed=1), whole(1, L, D, seed=2)
    (h, last), (da, db) = gradients(seqkern.linear_scan, [a, b], [dh, torch.zeros(1, D)])
    assert_equal((h, da, db), exact(a, b, dh))
    assert torch.equal(last, h[:, -1])


def test_without_decay_it_is_a_sum(device):
    b = whole(2, 300, 5).to(device)
    assert torch.equal(seqkern.linear_scan(torch.ones((), device=device), b), b.cumsum(1))
    assert torch.equal(seqkern.linear_scan(torch.zeros((), device=device), b, log_space=True), b.cumsum(1))


@pytest.mark.parametrize("B, L, D", [(1, 3000, 2), (3, 300, 40), (1, 40_000, 1)])
def test_products_of_decays_that_overflow(B, L, D, device):
    """Where the states do not, nothing does: 2 ** 3000 times zero stays zero."""
    L = min(L, 3000) if library.ops is not torch.ops.seqkern else L
    b = torch.zeros(B, L, D, device=device)
    b[:, -1] = 5
    for a in (torch.full((B, L, D), 2.0, device=device), torch.tensor([2.0], device=device)):
        h, last = seqkern.linear_scan(a, b, return_final_state=True)
        assert torch.equal(h, b) and torch.equal(last, b[:, -1])
        h = seqkern.linear_scan(a, b.flip(1), reverse=True)
        assert torch.equal(h, b.flip(1))


# Decays that are constant.

FORMS = [(), (1,), (5,), (1, 5), (7, 1), (7, 5), (1, 1, 5), (2, 1, 5), (2, 7, 1), (1, 7, 5), (2, 1, 1), (2, 7, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_broadcasting_is_torch_s(form, dtype, device):
    """The same as the full a that torch expands, and the sum of its gradient."""
    a, b, state = (
        t.to(device) for t in (decays(*form, dtype=dtype), rand(2, 7, 5, dtype=dtype), rand(2, 5, dtype=dtype))
    )
    full = a.expand(b.shape).clone()
    (h, last), (da, db, dstate) = gradients(seqkern.linear_scan, [a, b, state])
    (h_full, last_full), (da_full, *others) = gradients(seqkern.linear_scan, [full, b, state])
    torch.testing.assert_close([h, last, db, dstate], [h_full, last_full, *others], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(da, da_full.sum_to_size(form), rtol=1e-12, atol=1e-12)
    assert_equal([h, db], [gradients(seqkern.linear_scan, [a.expand(b.shape), b, state])[i][i] for i in (0, 1)])


def peak_bytes(run):
    """(the most memory that was allocated at once, what the call returned)"""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, kept


@pytest.mark.parametrize("form", [(), (64,), (300, 1), (4, 1, 64), (4, 300, 1)], ids=str)
@pytest.mark.parametrize("log_space", [False, True])
def test_a_constant_decay_is_never_as_large_as_the_data(form, log_space, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    a, b = (
        -decays(*form, dtype=torch.float32).abs().requires_grad_(),
        rand(4, 300, 64, dtype=torch.float32).requires_grad_(),
    )
    forward, h = peak_bytes(lambda: seqkern.linear_scan(a, b, log_space=log_space))
    assert forward <= h.nbytes
    backward, _ = peak_bytes(lambda: torch.autograd.grad(h, (a, b), torch.ones_like(b)))
    assert backward <= 2 * b.nbytes + max(a.nbytes, b.nbytes // 10) + b.nbytes // 10  # ones, db, da and partial sums


def test_gradients_of_constant_decays_add_many_tokens(device):
    """Sums over some ten thousand products in float32, in any dtype of the data, lose a few digits at most."""
    for dtype in (torch.float32, torch.bfloat16):
        b = rand(2, 1500, 33, dtype=dtype, seed=1)
        for form in [(33,), (), (1500, 1)]:
            a = 0.9 * decays(*form, dtype=torch.float32)
            cotangents = [rand(2, 1500, 33, dtype=dtype, seed=2), torch.zeros(2, 33)]
            given = [t.to(device) for t in (a, b)], [t.to(device) for t in cotangents]
            _, (da, _) = gradients(seqkern.linear_scan, *given)
            _, (expected, _) = gradients(
                reference.linear_scan, [a.double(), b.double()], [t.double() for t in cotangents]
            )
            limit = (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max().item()
            torch.testing.assert_close(da.cpu().double(), expected, rtol=0, atol=limit)


def test_moving_average_of_mega(device):
    """Its damped exponential moving average [2209.10655, equations 2 and 3] is a scan with a constant decay, there
    computed as a long convolution."""
    B, L, D, N = 2, 200, 4, 3
    x = rand(B, L, D, seed=1)
    alpha, delta, beta, eta = (rand(D, N, seed=seed).sigmoid() for seed in range(2, 6))
    a, b = (1 - alpha * delta).flatten(), (x[..., None] * (alpha * beta)).flatten(2)
    h = seqkern.linear_scan(a.to(device), b.to(device)).cpu()
    y = (h.unflatten(2, (D, N)) * eta).sum(-1)

    powers = (1 - alpha * delta)[..., None] ** torch.arange(L)
    kernel = (alpha * beta * eta)[..., None].mul(powers).sum(1).T
    expected = torch.fft.irfft(torch.fft.rfft(x, 2 * L, dim=1) * torch.fft.rfft(kernel, 2 * L, dim=0), 2 * L, dim=1)
    torch.testing.assert_close(y, expected[:, :L], rtol=1e-11, atol=1e-11)


# Resets.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_resets_are_ends_of_sequences(dtype, reverse, device, batch_invariant):
    """Bitwise; the first state enters only where the first token is not reset."""
    L, D = 150, 5
    for first in (False, True):
        reset = chance(1, L, share=0.1)
        reset[0, -1 if reverse else 0] = first
        # The tokens at which a new sequence begins, in memory order.
        begins = [t for t in range(1, L) if reset[0, t - 1 if reverse else t]]
        bounds = torch.tensor([0, *begins, L])
        a, b, state = decays(1, L, D, dtype=dtype), rand(1, L, D, dtype=dtype, seed=1), rand(1, D, dtype=dtype, seed=2)
        states = torch.zeros(len(bounds) - 1, D, dtype=dtype)
        entered = len(states) - 1 if reverse else 0
        states[entered] = 0 if first else state[0]
        dh, dlast = rand(1, L, D, dtype=dtype, seed=3), rand(1, D, dtype=dtype, seed=4)
        dlasts = torch.zeros_like(states)
        left = 0 if reverse else len(states) - 1
        dlasts[left] = dlast[0]

        (h, last), (da, db, dstate) = gradients(
            seqkern.linear_scan,
            [t.to(device) for t in (a, b, state)],
            [dh.to(device), dlast.to(device)],
            reset=reset.to(device),
            reverse=reverse,
        )
        (h_cut, lasts), (da_cut, db_cut, dstates) = gradients(
            seqkern.linear_scan,
            [t.to(device) for t in (a, b, states)],
            [dh.to(device), dlasts.to(device)],
            cu_seqlens=bounds.to(device),
            reverse=reverse,
        )
        assert_equal((h, last[0], da, db), (h_cut, lasts[left], da_cut, db_cut))
        assert torch.equal(dstate[0], torch.zeros_like(dstate[0]) if first else dstates[entered])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_passes_a_reset(bad, reverse, device):
    """Neither states forwards nor gradients backwards, at any place of tiles and segments."""
    L, D = 300, 3
    for at in (0, 1, 15, 16, 127, 128, 299):
        reset = torch.zeros(1, L, dtype=torch.bool)
        reset[0, at] = True
        a, b, state, dh = decays(1, L, D), rand(1, L, D, seed=1), rand(1, D, seed=2), rand(1, L, D, seed=3)
        before = slice(at + 1, L) if reverse else slice(0, at)
        from_it = slice(0, at + 1) if reverse else slice(at, L)
        options = {"reset": reset.to(device), "reverse": reverse}

        def run(a, b, state, dh):
            tensors = [t.to(device) for t in (a, b, state)]
            cotangents = [dh.to(device), torch.zeros(1, D, device=device, dtype=b.dtype)]
            return gradients(seqkern.linear_scan, tensors, cotangents, **options)  # noqa: B023

        (h, last), (da, db, dstate) = run(a, b, state, dh)
        sick_b, sick_dh = b.clone(), dh.clone()
        sick_b[:, before], sick_dh[:, from_it] = bad, bad
        (h_sick, last_sick), (da_sick, db_sick, _) = run(a, sick_b, torch.full_like(state, bad), dh)
        assert_equal((h_sick[:, from_it], last_sick, da_sick[:, from_it]), (h[:, from_it], last, da[:, from_it]))
        assert torch.equal(da_sick[:, at], torch.zeros_like(da[:, at]))
        assert_equal((db_sick,), (db,))
        _, (da_sick, db_sick, dstate_sick) = run(a, b, state, sick_dh)
        assert_equal((da_sick[:, before], db_sick[:, before], dstate_sick), (da[:, before], db[:, before], dstate))


def test_the_operator_of_s5(device):
    """Resets inside an associative scan [2303.03982, equation 4]: elements (a, b, c) combine in any order."""

    def combine(earlier, later):
        (a_i, b_i, c_i), (a_j, b_j, c_j) = earlier, later
        kept = (a_j * a_i, a_j * b_i + b_j, c_i)
        return tuple(torch.where(c_j, mine, theirs) for mine, theirs in zip(later, kept, strict=True))

    a, b = decays(2, 61, 4, dtype=torch.complex128), rand(2, 61, 4, dtype=torch.complex128)
    reset = chance(2, 61)
    elements = (a, b, reset[..., None].expand(a.shape))
    _, expected, _ = associative_scan(combine, elements, dim=1, combine_mode="generic")
    actual = seqkern.linear_scan(a.to(device), b.to(device), reset=reset.to(device)).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Decays by their logarithms.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_minus_infinity_is_a_reset(dtype, device):
    """As bits; and every gradient is finite, also those of gradients."""
    a, b = -rand(2, 70, 3, dtype=dtype).abs(), rand(2, 70, 3, dtype=dtype, seed=1)
    reset = chance(2, 70)
    logs, cut = a.masked_fill(reset[..., None], -math.inf), reset.to(device)
    b, state = b.to(device), rand(2, 3, dtype=torch.float32, seed=2).to(device)
    ours = gradients(seqkern.linear_scan, [logs.to(device), b, state], log_space=True)
    theirs = gradients(seqkern.linear_scan, [a.to(device), b, state], log_space=True, reset=cut)
    for mine, expected in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert torch.equal(mine, expected) and mine.isfinite().all()
    assert (ours[1][0][cut] == 0).all()


@pytest.mark.parametrize("is_complex", [False, True])
def test_second_derivatives_at_minus_infinity(is_complex):
    a, b = -rand(2, 9, 3).abs().masked_fill(chance(2, 9, 3), math.inf), rand(2, 9, 3, seed=1)
    if is_complex:
        a, b = torch.complex(a, rand(2, 9, 3, seed=2)), torch.complex(b, rand(2, 9, 3, seed=3))

    def second(function):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        h = function(*leaves, log_space=True)
        first = torch.autograd.grad(h.abs().square().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(t.abs().square().sum() for t in first), leaves)

    for mine, theirs in zip(second(seqkern.linear_scan), second(reference.linear_scan), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        assert all(torch.view_as_real(t).isfinite().all() if t.is_complex() else t.isfinite().all() for t in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_logarithms_keep_what_decays_lose(dtype, device):
    """1 - 1e-9 is 1 in float32, its logarithm is not."""
    a = torch.full((2,), -1e-9, dtype=dtype, device=device)
    h = seqkern.linear_scan(a, torch.zeros(1, 1, 2, dtype=dtype, device=device), log_space=True)
    assert torch.equal(h, torch.zeros_like(h))
    logs = -rand(1, 500, 3, dtype=torch.float32).abs() * 1e-3
    b = rand(1, 500, 3, dtype=torch.float32, seed=1)
    actual = seqkern.linear_scan(logs.to(device), b.to(device), log_space=True).cpu()
    expected = seqkern.reference.linear_scan(logs.double(), b.double(), log_space=True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


# Complex numbers.


@pytest.mark.parametrize("L", [4999, 5000])
@pytest.mark.parametrize("log_space", [False, True])
def test_eigenvalues_near_one(L, log_space, device):
    """Long memories of every frequency in single precision. A logarithm costs a rounding of the decay, which a memory
    multiplies."""
    size, angle = 1 - 10 ** -torch.linspace(2, 6, 8, dtype=torch.float64), torch.linspace(0, math.pi, 8).double()
    a = torch.complex(size.log(), angle) if log_space else torch.polar(size, angle)
    b, dh = (rand(1, L, 8, dtype=torch.complex64, seed=seed) for seed in (1, 2))
    cotangents = [dh.to(device), torch.zeros(1, 8, dtype=torch.complex64, device=device)]
    on_device = [a.to(device, torch.complex64), b.to(device)]
    (h, _), (da, db) = gradients(seqkern.linear_scan, on_device, cotangents, log_space=log_space)
    wide = [t.to(torch.complex128) for t in (a.to(torch.complex64), b, dh)]
    pole = wide[0].exp() if log_space else wide[0]
    columns = [scipy.signal.lfilter([1], [1, -pole[d].item()], wide[1][0, :, d].numpy()) for d in range(8)]
    expected = torch.stack([torch.from_numpy(column) for column in columns], dim=1)[None]
    columns = [
        scipy.signal.lfilter([1], [1, -pole[d].item().conjugate()], wide[2][0, :, d].flip(0).numpy()) for d in range(8)
    ]
    expected_db = torch.stack([torch.from_numpy(column.copy()) for column in columns], dim=1).flip(0)[None]
    expected_da = (torch.nn.functional.pad(expected, (0, 0, 1, -1)).conj() * expected_db).sum((0, 1))
    expected_da = expected_da * pole.conj() if log_space else expected_da
    for actual, truth in [(h, expected), (db, expected_db), (da, expected_da)]:
        assert (actual.cpu() - truth).abs().max() < (1e-7 * L if log_space else 5e-5) * truth.abs().max()


DTYPES = [(torch.float32, torch.complex64), (torch.complex64, torch.float32), (torch.float64, torch.complex64)]
DTYPES += [(torch.bfloat16, torch.complex128), (torch.complex128, torch.bfloat16), (torch.complex32, torch.complex64)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_real_beside_complex(dtypes, device):
    """The real one is converted, and its gradient is real."""
    a, b = (t.to(device) for t in (decays(1, 9, 3, dtype=dtypes[0]), rand(2, 9, 3, dtype=dtypes[1], seed=1)))
    state = rand(2, 3, dtype=torch.float32, seed=2).to(device)
    (h, last), grads = gradients(seqkern.linear_scan, [a, b, state])
    assert h.dtype == dtypes[1].to_complex()
    assert last.dtype == (torch.complex128 if dtypes[1] == torch.complex128 else torch.complex64)
    assert [grad.dtype for grad in grads] == [*dtypes, torch.float32]
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b, state)]
    cotangents = [
        rand(2, 9, 3, dtype=h.dtype, seed=90).to(wide[1].dtype.to_complex()),
        rand(2, 3, dtype=last.dtype, seed=91),
    ]
    expected, expected_grads = gradients(reference.linear_scan, wide, [t.to(torch.complex128) for t in cotangents])
    for mine, theirs in zip([h, last, *grads], [*expected, *expected_grads], strict=True):
        rtol = 3e-2 if mine.dtype in (torch.bfloat16, torch.complex32) else 1e-5
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=rtol, atol=rtol)


def test_only_the_state_is_complex(device):
    a, b, state = decays(2, 9, 3), rand(2, 9, 3, seed=1), rand(2, 3, dtype=torch.complex128, seed=2)
    h = seqkern.linear_scan(a.to(device), b.to(device), state.to(device)).cpu()
    parts = [
        seqkern.linear_scan(a.to(device), t.to(device), s.to(device)).cpu()
        for t, s in [(b, state.real), (0 * b, state.imag)]
    ]
    torch.testing.assert_close(h, torch.complex(*parts), rtol=1e-14, atol=1e-14)


def test_complex_tensors_of_any_strides(device):
    """Conjugate views, gaps, odd offsets and strides, repeated numbers."""
    room = rand(4, 20, 13, dtype=torch.complex64).to(device)
    reals = torch.view_as_complex(torch.view_as_real(room).clone()[..., :6, :])
    views = [room[:2, :9, :3].conj(), room[1::2, 1:18:2, 2:12:4], room.mT[:2, :9, :3], room[:1, :9, :1].expand(2, 9, 3)]
    views.append(reals[1:3, 2:11, 1:4])
    for a in views:
        for b in views:
            state = b[:, 0]
            expected = gradients(seqkern.linear_scan, [t.resolve_conj().contiguous() for t in (a, b, state)])
            leaves = [t.detach().requires_grad_() for t in (a, b, state)]
            outputs = seqkern.linear_scan(*leaves, return_final_state=True)
            cotangents = [rand(*o.shape, dtype=o.dtype, seed=90 + i).to(o) for i, o in enumerate(outputs)]
            assert_equal((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)), (*expected[0], *expected[1]))


def test_complex_steps(device):
    state, a, b = (rand(2, 3, dtype=torch.complex64, seed=seed) for seed in range(3))
    mine = state.clone().to(device)
    h = seqkern.linear_scan_step(mine, a.to(device), b.to(device))
    torch.testing.assert_close(h.cpu(), a * state + b)
    assert torch.equal(mine, h)
    h = seqkern.linear_scan_step(mine, a.real.to(device), b.real.to(device), log_space=True)
    torch.testing.assert_close(h.cpu(), a.real.exp() * (a * state + b) + b.real)
    with pytest.raises(RuntimeError, match=r"^linear_scan_step: state must be complex .*, got float32"):
        seqkern.linear_scan_step(state.real, a.real, b)


@pytest.mark.parametrize("form", [(), (3,), (1, 3), (2, 1), (1,)], ids=str)
def test_steps_with_a_constant_decay(form, device):
    state, b, a = rand(2, 3).to(device), rand(2, 3, seed=1).to(device), decays(*form).to(device)
    expected = a * state + b
    torch.testing.assert_close(seqkern.linear_scan_step(state, a, b), expected)
    torch.testing.assert_close(state, expected)


# Scans of chosen tokens.


def test_a_scan_for_every_word(device):
    """Tokens of one id, sorted together, are a sequence: what heads that look n-grams up need is no quadratic sum."""
    B, L, D = 2, 120, 3
    ids = torch.randint(0, 9, (B, L), generator=torch.Generator().manual_seed(0))
    a, b = decays(B, L, D).abs(), rand(B, L, D, seed=1)
    order = ids.argsort(dim=1, stable=True)
    at = order[..., None].expand(B, L, D)
    a_sorted, b_sorted, ids_sorted = a.gather(1, at), b.gather(1, at), ids.gather(1, order).int()

    same = (ids[:, :, None] == ids[:, None, :]) & torch.ones(L, L).tril().bool()
    since = same.double() @ a.log()
    weights = (since[:, :, None] - since[:, None]).exp() * same[..., None]
    expected = torch.einsum("btjd,bjd->btd", weights, b)

    sorted_h = seqkern.linear_scan(a_sorted.to(device), b_sorted.to(device), seq_idx=ids_sorted.to(device)).cpu()
    torch.testing.assert_close(torch.empty_like(b).scatter(1, at, sorted_h), expected, rtol=1e-10, atol=1e-10)

    for row in range(B):
        bounds = torch.nn.functional.pad(ids[row].bincount(minlength=12).cumsum(0), (1, 0))
        tokens = (t[row : row + 1].to(device) for t in (a_sorted, b_sorted))
        sorted_h = seqkern.linear_scan(*tokens, cu_seqlens=bounds.to(device)).cpu()
        unsorted = torch.empty_like(b[row]).scatter(0, at[row], sorted_h[0])
        torch.testing.assert_close(unsorted, expected[row], rtol=1e-10, atol=1e-10)


# Sizes.


def test_a_million_tokens():
    """Against scipy, forwards and backwards, with memories of up to a thousand tokens."""
    L, D = 1_000_000, 4
    a, b, dh = (
        torch.tensor([0.999, 0.99, -0.9, 0.5]),
        rand(1, L, D, dtype=torch.float32),
        rand(1, L, D, dtype=torch.float32),
    )
    (h, _), (da, db) = gradients(seqkern.linear_scan, [a, b], [dh, torch.zeros(1, D)])
    for d in range(D):
        pole, wide_b, wide_dh = a[d].double().item(), b[0, :, d].double(), dh[0, :, d].double()
        expected = torch.from_numpy(scipy.signal.lfilter([1], [1, -pole], wide_b.numpy()))
        backwards = scipy.signal.lfilter([1], [1, -pole], wide_dh.flip(0).numpy())
        expected_db = torch.from_numpy(backwards.copy()).flip(0)
        torch.testing.assert_close(h[0, :, d].double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(
            db[0, :, d].double(), expected_db, rtol=0, atol=1e-5 * expected_db.abs().max().item()
        )
        total = expected[:-1] @ expected_db[1:]
        assert abs(da[d].double() - total) < 1e-5 * (expected[:-1].abs() @ expected_db[1:].abs())


def test_split_anywhere_where_time_is_divided():
    """The state carried from one call to the next, wherever they meet, against the whole in one call."""
    L = 20_000
    a, b, state = decays(1, L, 2), rand(1, L, 2, seed=1), rand(1, 2, seed=2)
    (h, last), grads = gradients(seqkern.linear_scan, [a, b, state])
    for cut in (1, 4096, 9999):

        def in_two(a, b, state, return_final_state, cut=cut):
            first, carried = seqkern.linear_scan(a[:, :cut], b[:, :cut], state, return_final_state=True)
            second, last = seqkern.linear_scan(a[:, cut:], b[:, cut:], carried, return_final_state=True)
            return torch.cat([first, second], dim=1), last

        outputs, others = gradients(in_two, [a, b, state])
        torch.testing.assert_close([*outputs, *others], [h, last, *grads], rtol=1e-10, atol=1e-10)


# Derivatives of higher order.


@pytest.mark.parametrize("packing", ["none", "cu_seqlens", "seq_idx"])
@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_with_resets_of_every_packing(packing, reverse):
    options = {"reverse": reverse, "return_final_state": True}
    B, N = (1, 4) if packing == "cu_seqlens" else (2, 2)
    if packing == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32)
    elif packing == "seq_idx":
        options["seq_idx"] = torch.tensor([[-1, 0, 0, 2, -1], [-1] * 5], dtype=torch.int32)
    for is_complex, form in [(False, (B, 5, 2)), (True, (5, 1))]:
        dtype = torch.complex128 if is_complex else torch.float64
        tensors = [decays(*form, dtype=dtype), rand(B, 5, 2, dtype=dtype, seed=1), rand(N, 2, dtype=dtype, seed=2)]
        reset = chance(B, 5, share=0.3, seed=3)

        def call(*tensors, reset=reset):
            return seqkern.linear_scan(*tensors, reset=reset, **options)

        leaves = [t.requires_grad_() for t in tensors]
        assert gradcheck(call, leaves, check_forward_ad=not is_complex)
        assert gradgradcheck(call, leaves)


def test_third_derivative_by_autograd():
    tensors = [decays(2, 6, 3), rand(2, 6, 3, seed=1), rand(2, 3, seed=2)]

    def third(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        value = function(*leaves).pow(3).sum()
        for order in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=order < 2)
            value = sum(grad.pow(3).sum() for grad in grads)
        return grads

    torch.testing.assert_close(third(seqkern.linear_scan), third(reference.linear_scan), rtol=1e-9, atol=1e-9)


def test_vmap_over_resets():
    """And of everything else that may differ from one element of the map to the next."""
    a, b, reset = decays(4, 1, 1, 3), rand(2, 7, 3, seed=1), chance(4, 2, 7)
    mapped = torch.func.vmap(lambda a, reset: seqkern.linear_scan(a, b, reset=reset))(a, reset)
    expected = torch.stack([seqkern.linear_scan(a[i], b, reset=reset[i]) for i in range(4)])
    torch.testing.assert_close(mapped, expected, rtol=1e-14, atol=1e-14)


# What is asked of the operators.


def test_h_is_read_only_for_a_gradient_of_a(record_calls):
    a, b = torch.rand(2, 5, 3), torch.rand(2, 5, 3, requires_grad=True)
    for needs_da in (False, True):
        h = seqkern.linear_scan(a.requires_grad_(needs_da), b)
        calls = record_calls(h.sum().backward)
        (_, _, _, h_given, *_), outputs = calls["linear_scan_bwd"]
        assert (h_given is not None) == needs_da and len(outputs) == 1 + needs_da


def test_batch_invariant_does_not_split_time(record_calls):
    def split_time():
        calls = record_calls(lambda: seqkern.linear_scan(torch.rand(1), torch.rand(1, 2, 3)))
        return calls["linear_scan_fwd"][0][-2]

    assert split_time() is True
    with seqkern.batch_invariant():
        assert split_time() is False


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_every_form_compiles(dtype):
    tensors = [decays(5, 1, dtype=dtype), rand(2, 5, 3, dtype=dtype, seed=1), rand(2, 3, dtype=dtype, seed=2)]
    options = {"reset": chance(2, 5), "log_space": True, "reverse": True}
    function = torch.compile(seqkern.linear_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(function, tensors, **options), gradients(seqkern.linear_scan, tensors, **options)
    )
    torch._dynamo.reset()
