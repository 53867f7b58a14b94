"""softmax_scan against quadratic attention, at the ends of the range of scores, and what is particular to it."""

import math

import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern import reference

INF = math.inf


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(s, v):
    """Every token's softmax over itself and those before it, by PyTorch: one query of 1 for keys that are scores."""
    keys, values = s.mT[..., None], v.transpose(1, 2)  # (B, H, L, 1), (B, H, L, V)
    return F.scaled_dot_product_attention(torch.ones_like(keys), keys, values, is_causal=True, scale=1.0).transpose(
        1, 2
    )


def derivatives(function, s, v, **options):
    """o and the gradients of s and v, for a random gradient of o."""
    leaves = [t.detach().clone().requires_grad_() for t in (s, v)]
    o = function(*leaves, **options)
    ds, dv = torch.autograd.grad(o, leaves, rand(*o.shape, seed=9).to(o))
    return {"o": o.detach(), "ds": ds, "dv": dv}


@pytest.mark.parametrize("L", [1, 2, 33, 400])
def test_quadratic_attention(L, device):
    s, v = 3 * rand(2, L, 3, seed=1).to(device), rand(2, L, 3, 7, seed=2).to(device)
    actual, expected = derivatives(seqkern.softmax_scan, s, v), derivatives(attention, s, v)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


SHAPES = {
    "noise": lambda t: rand(*t.shape, seed=3),
    "rising": lambda t: t - 0.5,
    "falling": lambda t: 0.5 - t,
    "constant": torch.ones_like,
    "alternating": lambda t: torch.where(torch.arange(t.shape[1])[:, None] % 2 == 0, t, -t),
    "one high": lambda t: torch.where((t > 0.3) & (t < 0.31), 1.0, -1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_scores_of_any_size(size, shape, device):
    """Whatever the scores, nothing overflows, and gradients are right."""
    time = torch.linspace(0, 1, 150, dtype=torch.float64)[None, :, None].expand(2, 150, 2)
    s = (size * SHAPES[shape](time)).float().to(device)
    v = rand(2, 150, 2, 5, dtype=torch.float32, seed=4).to(device)
    actual, exact = derivatives(seqkern.softmax_scan, s, v), derivatives(attention, s.double(), v.double())
    largest = {name: tensor.abs().max().item() for name, tensor in exact.items()}
    largest["ds"] = v.abs().max().item() * largest["dv"]  # of the terms, which cancel where one token has all weight
    for name in exact:
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=0, atol=1e-6 * largest[name], msg=name)


# For 3000 tokens, the largest error of o, relative to its largest value.
WINDOW = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", WINDOW, ids=str)
def test_errors_do_not_grow_with_time(dtype):
    s, v = rand(1, 3000, 2, dtype=dtype, seed=1), 1 + rand(1, 3000, 2, 4, dtype=dtype, seed=2)
    exact = attention(s.double(), v.double())
    error = (seqkern.softmax_scan(s, v).double() - exact).abs().max() / exact.abs().max()
    assert error < WINDOW[dtype]


# Scores of -inf, and states without tokens.


def test_without_a_score_nothing_is_seen(device):
    """All -inf: outputs and gradients are zero, and the state stays empty."""
    s, v = torch.full((2, 9, 3), -INF, device=device).requires_grad_(), rand(2, 9, 3, 4).to(device).requires_grad_()
    o, (m, n, w) = seqkern.softmax_scan(s, v, return_final_state=True)
    assert (o == 0).all() and (m == -INF).all() and (n == 0).all() and (w == 0).all()
    grads = torch.autograd.grad([o, m, n, w], [s, v], [torch.ones_like(t) for t in (o, m, n, w)])
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("left_out", ["first", "middle", "last", "every other"])
def test_scores_of_minus_infinity_leave_tokens_out(left_out, device):
    """As if they were not there: o stays, and neither their score nor their value has a gradient."""
    L = 20
    kept = torch.ones(L, dtype=torch.bool)
    kept[
        {"first": slice(0, 6), "middle": slice(5, 9), "last": slice(14, L), "every other": slice(1, L, 2)}[left_out]
    ] = 0
    s, v = rand(2, L, 3, seed=1).to(device), rand(2, L, 3, 4, seed=2).to(device)
    masked = s.masked_fill(~kept.to(device)[:, None], -INF)
    leaves = [t.clone().requires_grad_() for t in (masked, v)]
    o, state = seqkern.softmax_scan(*leaves, return_final_state=True)
    fewer = [t[:, kept].clone().requires_grad_() for t in (s, v)]
    short_o, short_state = seqkern.softmax_scan(*fewer, return_final_state=True)

    latest = kept.cumsum(0) - 1  # the last token that counts, at every token
    expected = short_o[:, latest.clamp(min=0)] * (latest >= 0).to(device)[:, None, None]
    for mine, theirs in zip([o, *state], [expected, *short_state], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    outputs, cotangents = (o, *state), [rand(*t.shape, seed=5).to(t) for t in (o, *state)]
    actual = torch.autograd.grad(outputs, leaves, cotangents)
    wanted = torch.autograd.grad((expected, *short_state), fewer, cotangents)
    for mine, theirs in zip(actual, wanted, strict=True):
        assert (mine[:, ~kept] == 0).all()
        torch.testing.assert_close(mine[:, kept], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [0.0, 7.0, INF, math.nan])
def test_an_empty_state_is_no_state(garbage, device):
    """Whatever n and w are where m is -inf; their gradients are zero."""
    s, v = rand(2, 9, 3, seed=1).to(device), rand(2, 9, 3, 4, seed=2).to(device)
    shapes = {"m": (2, 3), "n": (2, 3), "w": (2, 3, 4)}
    values = {"m": -INF, "n": garbage, "w": garbage}
    state = [torch.full(shapes[name], values[name], device=device).requires_grad_() for name in shapes]
    o, final = seqkern.softmax_scan(s, v, state, return_final_state=True)
    expected, expected_final = seqkern.softmax_scan(s, v, return_final_state=True)
    assert torch.equal(o, expected) and all(map(torch.equal, final, expected_final))
    grads = torch.autograd.grad([o, *final], state, [torch.ones_like(t) for t in (o, *final)])
    assert all((grad == 0).all() for grad in grads)

    moved = [part.detach().clone() for part in state]
    assert torch.equal(seqkern.softmax_scan_step(moved, s[:, 0].float(), v[:, 0].float()), v[:, 0].float())
    assert torch.equal(moved[0], s[:, 0].float()) and (moved[1] == 1).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_higher_derivatives_where_nothing_is_seen(reverse, packed, device):
    """Forwards and twice backwards, with scores of -inf and an empty state full of NaN."""
    s, v = rand(2, 6, 3, seed=1), rand(2, 6, 3, 4, seed=2)
    s[0, :3, 0] = s[1, 4:, 1] = s[:, 2:4, 2] = -INF
    state = [rand(2, 3, seed=3), 1 + rand(2, 3, seed=4).abs(), rand(2, 3, 4, seed=5)]
    state[0][:, 1], state[1][:, 1], state[2][:, 1] = -INF, math.nan, math.nan
    tensors = [t.to(device) for t in (s, v, *state)]
    ids = torch.tensor([[-1, 0, 0, 0, 3, 3], [1, 1, 1, 1, -1, -1]], dtype=torch.int32, device=device)
    options = {"reverse": reverse, "seq_idx": ids if packed else None}

    def derivatives(function):
        def call(s, v, *state):
            o, (m, n, w) = function(s, v, state, return_final_state=True, **options)
            return o, m.masked_fill(m == -INF, 0), n, w

        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = sum(t.square().sum() for t in call(*leaves))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves)
        along = tuple(rand(*t.shape, seed=6 + i).to(t) for i, t in enumerate(tensors))
        _, forward = torch.func.jvp(call, tuple(tensors), along)
        return {"first": first, "second": second, "forward": forward}

    actual, expected = derivatives(seqkern.softmax_scan), derivatives(reference.softmax_scan)
    for kind in expected:
        for mine, theirs in zip(actual[kind], expected[kind], strict=True):
            assert theirs.isfinite().all()
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=kind)


@pytest.mark.parametrize("bad", [INF, math.nan])
@pytest.mark.parametrize("name", ["s", "v"])
def test_infinities_stay_in_their_head(name, bad, device):
    """And show from their token on; bitwise, gradients too."""
    B, L, H, V, t = 2, 40, 3, 4, 23
    with seqkern.batch_invariant():
        clean = {"s": rand(B, L, H, seed=1).float().to(device), "v": rand(B, L, H, V, seed=2).float().to(device)}
        sick = {key: tensor.clone() for key, tensor in clean.items()}
        sick[name][1, t, 1] = bad
        expected, actual = (derivatives(seqkern.softmax_scan, **tensors) for tensors in (clean, sick))
    other = torch.ones(B, H, dtype=torch.bool, device=device)
    other[1, 1] = False
    for key in expected:
        rows = (values.transpose(1, 2)[other] for values in (actual[key], expected[key]))
        assert torch.equal(*rows), key
    assert torch.equal(actual["o"][1, :t, 1], expected["o"][1, :t, 1])
    assert not actual["o"][1, t:, 1].isfinite().any()


# States.


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_maximum_is_the_largest_score(reverse, device):
    """Exactly, in every dtype of the scores, with and without a state."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        s, v = 5 * rand(3, 50, 4, dtype=dtype, seed=1).to(device), rand(3, 50, 4, 2, dtype=torch.float64).to(device)
        options = {"reverse": reverse, "return_final_state": True}
        _, state = seqkern.softmax_scan(s, v, **options)
        assert torch.equal(state[0], s.amax(1).double())
        m = rand(3, 4, seed=5).to(device) * 10
        _, state = seqkern.softmax_scan(s, v, (m, *state[1:]), **options)
        assert torch.equal(state[0], torch.maximum(m, s.amax(1).double()))


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 33, 64, 99, 100])
def test_split_anywhere(cut, device):
    s, v = 3 * rand(2, 100, 3, dtype=torch.float32).to(device), rand(2, 100, 3, 5, dtype=torch.float32).to(device)
    o, state = seqkern.softmax_scan(s, v, return_final_state=True)
    first, carried = seqkern.softmax_scan(s[:, :cut], v[:, :cut], return_final_state=True)
    second, carried = seqkern.softmax_scan(s[:, cut:], v[:, cut:], carried, return_final_state=True)
    assert torch.equal(carried[0], state[0])
    for mine, theirs in zip([torch.cat([first, second], 1), *carried], [o, *state], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_the_scale_of_a_state_is_free(device):
    """(m, n, w) and (m + c, n exp(-c), w exp(-c)) are the same state."""
    s, v = rand(2, 9, 3, seed=1).to(device), rand(2, 9, 3, 4, seed=2).to(device)
    _, (m, n, w) = seqkern.softmax_scan(s, v, return_final_state=True)
    for c in (-50.0, -1.0, 3.0, 50.0):
        moved = (m + c, n * math.exp(-c), w * math.exp(-c))
        actual, expected = seqkern.softmax_scan(s, v, moved), seqkern.softmax_scan(s, v, (m, n, w))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_maxima_gets_the_gradient(device):
    s = torch.tensor([1.0, 4.0, 2.0, 4.0, 4.0], device=device).reshape(1, 5, 1).requires_grad_()
    v = rand(1, 5, 1, 3, dtype=torch.float32).to(device)
    _, (m, *_) = seqkern.softmax_scan(s, v, return_final_state=True)
    assert torch.autograd.grad(m.sum(), s)[0].flatten().tolist() == [0, 1, 0, 0, 0]
    for start, of_state, of_scores in [(4.0, 1, [0, 0, 0, 0, 0]), (3.0, 0, [0, 1, 0, 0, 0]), (9.0, 1, [0, 0, 0, 0, 0])]:
        m0 = torch.full((1, 1), start, device=device).requires_grad_()
        state = (m0, torch.ones(1, 1, device=device), torch.ones(1, 1, 3, device=device))
        _, (m, *_) = seqkern.softmax_scan(s, v, state, return_final_state=True)
        ds, dm0 = torch.autograd.grad(m.sum(), [s, m0])
        assert ds.flatten().tolist() == of_scores and dm0.item() == of_state


def test_every_tensor_has_a_dtype_of_its_own(device):
    s, v = rand(2, 9, 3, seed=1).half().to(device), rand(2, 9, 3, 4, seed=2).bfloat16().to(device)
    state = rand(2, 3, seed=3).float(), 1 + rand(2, 3, seed=4).abs().bfloat16(), rand(2, 3, 4, seed=5)
    state = tuple(part.to(device).requires_grad_() for part in state)
    leaves = [s.requires_grad_(), v.requires_grad_(), *state]
    o, final = seqkern.softmax_scan(s, v, state, return_final_state=True)
    assert o.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in final)
    grads = torch.autograd.grad([o, *final], leaves, [torch.ones_like(t) for t in (o, *final)])
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    exact = reference.softmax_scan(s.double(), v.double(), [part.double() for part in state], return_final_state=True)
    torch.testing.assert_close(o.double(), exact[0], rtol=4e-3, atol=4e-3)
    for mine, theirs in zip(final, exact[1], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


# Identities.


def test_it_is_a_linear_scan_in_log_space(device):
    """With l the running log of the sum of exp(s), o_t = exp(l_{t-1} - l_t) o_{t-1} + exp(s_t - l_t) v_t."""
    B, L, H, V = 2, 70, 3, 4
    s, v = 3 * rand(B, L, H, seed=1).to(device), rand(B, L, H, V, seed=2).to(device)
    l = s.logcumsumexp(1)
    decay = F.pad(l[:, :-1], (0, 0, 1, 0), value=-INF) - l
    by_heads = [t.transpose(1, 2).flatten(0, 1) for t in (decay[..., None], (s - l).exp()[..., None] * v)]
    scanned = seqkern.linear_scan(*by_heads, log_space=True).unflatten(0, (B, H)).transpose(1, 2)
    torch.testing.assert_close(scanned, seqkern.softmax_scan(s, v), rtol=1e-12, atol=1e-12)


def test_reversed_and_packed_attention(device):
    """Windows of attention by other means: every sequence alone, from its end."""
    s, v = rand(1, 60, 2, seed=1).to(device), rand(1, 60, 2, 3, seed=2).to(device)
    bounds = torch.tensor([0, 13, 13, 47, 60], device=device)
    o = seqkern.softmax_scan(s, v, cu_seqlens=bounds, reverse=True)
    parts = [
        attention(s[:, begin:end].flip(1), v[:, begin:end].flip(1)).flip(1)
        for begin, end in [(0, 13), (13, 47), (47, 60)]
    ]
    torch.testing.assert_close(o, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)
