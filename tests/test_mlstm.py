"""mlstm against the recurrence of its paper without the stabilising scale, gradients of all inputs and states included,
and at the ends of the range of its gates."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import seqkern
from seqkern import reference

INF = math.inf
NAMES = ("q", "k", "v", "i", "f")


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B=2, L=150, H=2, HV=4, K=6, V=5):
    """q, k, v, i, f in float64; 150 tokens are two chunks and a part of one."""
    q, k, v = rand(B, L, H, K, seed=1), rand(B, L, H, K, seed=2), rand(B, L, HV, V, seed=3)
    return q, k, v, rand(B, L, HV, seed=4), rand(B, L, HV, seed=5) + 2


def states(B=2, HV=4, K=6, V=5):
    return rand(B, HV, K, V, seed=6), rand(B, HV, K, seed=7), rand(B, HV, seed=8)


def paper(q, k, v, i, f, C=None, n=None, *, scale=None):
    """[2405.04517, equations 19 to 27], with scale in the place of the keys' 1 / sqrt(d) and without the output gate:
    (h, C, n), none of them in another scale."""
    B, L, HV, V = v.shape
    K = q.shape[-1]
    scale = K**-0.5 if scale is None else scale
    q, k = (t.repeat_interleave(HV // t.shape[2], dim=2) for t in (q, k))
    C = torch.zeros(B, HV, K, V, dtype=q.dtype) if C is None else C
    n = torch.zeros(B, HV, K, dtype=q.dtype) if n is None else n
    outputs = []
    for t in range(L):
        i_t, f_t = i[:, t].exp(), f[:, t].sigmoid()
        C = f_t[..., None, None] * C + i_t[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = f_t[..., None] * n + i_t[..., None] * k[:, t]
        divisor = (scale * (n * q[:, t]).sum(-1)).abs().clamp(min=1)
        outputs.append(scale * (q[:, t, :, None] @ C)[:, :, 0] / divisor[..., None])
    return torch.stack(outputs, 1), C, n


def unscaled(function, q, k, v, i, f, state=None, **options):
    """(o, C, n) of an mlstm, its final state and gradients in the scale 1."""
    o, (C, n, m) = function(q, k, v, i, f, initial_state=state, return_final_state=True, eps=0.0, **options)
    return o, C * m.exp()[..., None, None], n * m.exp()[..., None]


def gradients(outputs, leaves):
    cotangents = [rand(*t.shape, seed=10 + i).to(t) for i, t in enumerate(outputs)]
    return torch.autograd.grad(outputs, leaves, cotangents)


def leaves_of(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_same(actual, expected, tolerance=1e-10):
    for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{i}: {text}")


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_recurrence_of_the_paper(scale):
    """Values, and the gradients of q, k, v and both gates."""
    mine, theirs = leaves_of(*inputs()), leaves_of(*inputs())
    actual, expected = unscaled(seqkern.mlstm, *mine, scale=scale), paper(*theirs, scale=scale)
    assert_same(actual, expected)
    assert_same(gradients(actual, mine), gradients(expected, theirs))


def test_states_of_the_paper():
    """The same from a state and into one, whose gradients are those of C = exp(m) C' and n = exp(m) n'."""
    given = (*inputs(), *states())
    mine, theirs = leaves_of(*given), leaves_of(*given)
    actual = unscaled(seqkern.mlstm, *mine[:5], tuple(mine[5:]))
    C, n, m = theirs[5:]
    expected = paper(*theirs[:5], C * m.exp()[..., None, None], n * m.exp()[..., None])
    assert_same(actual, expected)
    assert_same(gradients(actual, mine), gradients(expected, theirs))


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_gradients_are_those_of_the_forward(eps):
    """By differences, of every input and every part of the state, the maximum included."""
    given = leaves_of(*inputs(1, 3, 1, 2, 2, 2), *states(1, 2, 2, 2))

    def call(*tensors):
        o, state = seqkern.mlstm(*tensors[:5], initial_state=tensors[5:], return_final_state=True, eps=eps)
        return o, *state

    assert gradcheck(call, given)


def test_on_every_device(device):
    """Two chunks of one head, from a state."""
    given = (*inputs(1, 70, 1, 1, 4, 3), *states(1, 1, 4, 3))
    mine, theirs = leaves_of(*(t.to(device) for t in given)), leaves_of(*given)
    results = []
    for function, leaves in ((seqkern.mlstm, mine), (reference.mlstm, theirs)):
        o, state = function(*leaves[:5], initial_state=tuple(leaves[5:]), return_final_state=True)
        results.append([t.cpu() for t in (o, *state, *gradients([o, *state], leaves))])
    assert_same(*results)


# Gates at the ends of their range.


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_gates_of_any_size(size, shift):
    """In float32, beside the reference in float64."""
    q, k, v, i, f = (t.float() for t in inputs(1, 150, 1, 2))
    i, f = size * (i + shift), size * f
    mine, theirs = leaves_of(q, k, v, i, f), leaves_of(*(t.double() for t in (q, k, v, i, f)))
    o, exact = seqkern.mlstm(*mine), reference.mlstm(*theirs)
    torch.testing.assert_close(o.double(), exact, rtol=0, atol=1e-4 * exact.abs().max().item() + 1e-30)
    assert all(grad.isfinite().all() for grad in gradients([o], mine))


def test_without_an_input_nothing_is_seen(device):
    """All input gates -inf: outputs and gradients are zero, and the state stays empty."""
    q, k, v, i, f = inputs(1, 9, 1, 2)
    given = leaves_of(*(t.to(device) for t in (q, k, v, torch.full_like(i, -INF), f)))
    o, (C, n, m) = seqkern.mlstm(*given, return_final_state=True)
    assert (o == 0).all() and (C == 0).all() and (n == 0).all() and (m == -INF).all()
    grads = torch.autograd.grad([o, C, n, m], given, [torch.ones_like(t) for t in (o, C, n, m)])
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("left_out", ["first", "middle", "last", "every other"])
def test_input_gates_of_minus_infinity_leave_tokens_out(left_out):
    """Such tokens only forget and read: C and n are those of an input of zero."""
    L = 150
    kept = torch.ones(L, dtype=torch.bool)
    kept[
        {"first": slice(0, 70), "middle": slice(60, 66), "last": slice(140, L), "every other": slice(1, L, 2)}[left_out]
    ] = 0
    q, k, v, i, f = inputs(1, L, 1, 2)
    masked = i.masked_fill(~kept[:, None], -INF)
    mine, theirs = leaves_of(q, k, v, masked, f), leaves_of(q, k * kept[:, None, None], v, i, f)
    actual, expected = unscaled(seqkern.mlstm, *mine), paper(*theirs)
    assert_same(actual, expected)
    grads = gradients(actual, mine)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[3][:, ~kept] == 0).all() and (grads[1][:, ~kept] == 0).all()


def test_forget_gates_of_minus_infinity_are_resets():
    """As if the sequence began there."""
    cuts = [0, 5, 63, 64, 65, 129, 150]
    q, k, v, i, f = inputs(1, 150, 1, 2)
    reset = f.clone()
    reset[:, cuts[1:-1]] = -INF
    mine, theirs = leaves_of(q, k, v, i, reset), leaves_of(q, k, v, i, f)
    actual, expected = [seqkern.mlstm(*mine)], [seqkern.mlstm(*theirs, cu_seqlens=torch.tensor(cuts))]
    assert_same(actual, expected)
    *grads, df = gradients(actual, mine)
    *expected_grads, expected_df = gradients(expected, theirs)
    assert_same(grads, expected_grads)
    expected_df[:, cuts[:-1]] = df[:, 0] = 0
    assert_same([df], [expected_df])


@pytest.mark.parametrize("last", [0, 40, 69])
def test_without_an_input_a_reset_leaves_an_empty_state(last, device):
    """From token `last` on nothing is kept and nothing comes: C, n and m are those of no token, and no gradient of the
    final state gets past."""
    given = (*inputs(1, 70, 1, 1, 4, 3), *states(1, 1, 4, 3))
    given[3][:, last:], given[4][:, last] = -INF, -INF
    mine, theirs = leaves_of(*(t.to(device) for t in given)), leaves_of(*given)
    results = []
    for function, leaves in ((seqkern.mlstm, mine), (reference.mlstm, theirs)):
        o, state = function(*leaves[:5], initial_state=tuple(leaves[5:]), return_final_state=True)
        results.append([t.cpu() for t in (o, *state, *gradients([o, *state], leaves))])
    C, n, m = results[0][1:4]
    assert (C == 0).all() and (n == 0).all() and (m == -INF).all()
    assert_same(*results)


# States.


@pytest.mark.parametrize("garbage", [0.0, 7.0, INF, math.nan])
def test_an_empty_state_is_no_state(garbage):
    """Whatever C and n are where m is -inf; gradients of all three are zero."""
    given = inputs(1, 70, 1, 2)
    state = [torch.full_like(t, garbage) for t in states(1, 2)]
    state[2].fill_(-INF)
    leaves = leaves_of(*state)
    o, final = seqkern.mlstm(*given, initial_state=tuple(leaves), return_final_state=True)
    expected, expected_final = seqkern.mlstm(*given, return_final_state=True)
    assert torch.equal(o, expected) and all(map(torch.equal, final, expected_final))
    assert all((grad == 0).all() for grad in gradients([o, *final], leaves))
    moved = [part.clone() for part in state]
    first = seqkern.mlstm_step(tuple(moved), *(t[:, 0] for t in given))
    torch.testing.assert_close(first, expected[:, 0])


def test_the_scale_of_a_state_is_free():
    """(C, n, m) and (C exp(-c), n exp(-c), m + c) are the same state."""
    given, (C, n, m) = inputs(), states()
    for c in (-50.0, -1.0, 3.0, 50.0):
        moved = (C * math.exp(-c), n * math.exp(-c), m + c)
        actual, expected = (seqkern.mlstm(*given, initial_state=state, eps=0.0) for state in (moved, (C, n, m)))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_the_last_maximum():
    """m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), equation 15 of the paper; a tie is the state's."""
    q, k, v, i, f = inputs()
    m = rand(2, 4, seed=8)
    expected = m.clone()
    for t in range(150):
        expected = torch.maximum(torch.nn.functional.logsigmoid(f[:, t]) + expected, i[:, t])
    _, state = seqkern.mlstm(q, k, v, i, f, initial_state=(*states()[:2], m), return_final_state=True)
    torch.testing.assert_close(state[2], expected, rtol=1e-13, atol=1e-13)

    q, k, v, _, _ = inputs(1, 1, 1, 1)
    m, i, f = torch.zeros(1, 1).double().requires_grad_(), torch.zeros(1, 1, 1).double().requires_grad_(), INF
    state = (torch.zeros(1, 1, 6, 5).double(), torch.zeros(1, 1, 6).double(), m)
    _, (_, _, last) = seqkern.mlstm(q, k, v, i, torch.full_like(i, f), initial_state=state, return_final_state=True)
    assert [grad.item() for grad in torch.autograd.grad(last.sum(), [m, i])] == [1, 0]


@pytest.mark.parametrize("reverse", [False, True])
def test_split_anywhere(reverse):
    given = inputs()
    options = {"reverse": reverse, "return_final_state": True}
    o, state = seqkern.mlstm(*given, **options)
    for cut in (0, 1, 63, 64, 65, 149, 150):
        carried, pieces = None, []
        for part in (slice(cut, 150), slice(0, cut)) if reverse else (slice(0, cut), slice(cut, 150)):
            piece, carried = seqkern.mlstm(*(t[:, part] for t in given), initial_state=carried, **options)
            pieces.append(piece)
        assert_same([torch.cat(pieces[::-1] if reverse else pieces, 1), *carried], [o, *state])


# For 3000 tokens, the largest error of o, relative to its largest value.
WINDOW = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", WINDOW, ids=str)
def test_errors_do_not_grow_with_time(dtype):
    q, k, v, i, f = inputs(1, 3000, 1, 1, 4, 3)
    q, k, v = q.abs().to(dtype), k.abs().to(dtype), v.to(dtype)
    with torch.no_grad():
        exact = reference.mlstm(q.double(), k.double(), v.double(), i, f)
        error = (seqkern.mlstm(q, k, v, i, f).double() - exact).abs().max() / exact.abs().max()
    assert error < WINDOW[dtype]
