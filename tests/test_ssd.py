"""ssd against its dense matrix, against selective_scan, and at the limits of its step sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

import seqkern

INF = math.inf


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B=2, L=150, H=4, G=2, P=5, N=6):
    """x, dt, A, B, C in float64; 150 tokens are two chunks and a part of one."""
    x, dt, A = rand(B, L, H, P, seed=1), 0.2 * rand(B, L, H, seed=2).abs(), -rand(H, seed=3).abs()
    return x, dt, A, rand(B, L, G, N, seed=4), rand(B, L, G, N, seed=5)


def semiseparable(x, dt, A, B, C, D=None, z=None, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF)):
    """y = M x with M_ij = C_i^T A_i .. A_{j+1} B_j for i >= j [2405.21060, equation 3]."""
    H, L = x.shape[2], x.shape[1]
    B, C = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    sums = (dt * A).cumsum(1)
    seen = torch.ones(L, L, dtype=torch.bool).tril()[None, :, :, None]
    decay = (sums[:, :, None] - sums[:, None]).masked_fill(~seen, -INF).exp()
    M = torch.einsum("bihn,bjhn,bijh,bjh->bijh", C, B, decay, dt)
    y = torch.einsum("bijh,bjhp->bihp", M, x)
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z)


def derivatives(function, tensors, **options):
    """The output, and the gradients of all tensors for a random gradient of it."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), rand(*y.shape, seed=9))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(actual, expected, tolerance=1e-11):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


OPTIONS = {
    "plain": {},
    "skip": {"D": rand(4, seed=6)},
    "skip of every channel, gate": {"D": rand(4, 5, seed=6), "z": rand(2, 150, 4, 5, seed=7)},
    "softplus": {"dt_bias": rand(4, seed=8), "dt_softplus": True},
    "limits": {
        "dt_bias": rand(4, seed=8),
        "dt_softplus": True,
        "dt_limit": (0.5, 1.0),
        "z": rand(2, 150, 4, 5, seed=7),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_dense_matrix(options):
    given = dict(zip(("x", "dt", "A", "B", "C"), inputs(), strict=True)) | OPTIONS[options]
    settings = {name: given.pop(name) for name in ("dt_softplus", "dt_limit") if name in given}
    assert_same(derivatives(seqkern.ssd, given, **settings), derivatives(semiseparable, given, **settings))


def test_the_dense_matrix_on_every_device(device):
    """Two chunks of one head."""
    names, tensors = ("x", "dt", "A", "B", "C", "D", "z"), inputs(1, 70, 1, 1, 3, 4)
    given = dict(zip(names, (*tensors, rand(1, seed=6), rand(1, 70, 1, 3, seed=7)), strict=True))
    actual = derivatives(seqkern.ssd, {name: t.to(device) for name, t in given.items()})
    assert_same({name: t.cpu() for name, t in actual.items()}, derivatives(semiseparable, given))


def test_it_is_a_selective_scan_with_one_decay_per_head():
    x, dt, A, B, C = inputs()
    D, z, bias = rand(4, seed=6), rand(2, 150, 4, 5, seed=7), rand(4, seed=8)
    options = {"dt_bias": bias, "dt_softplus": True, "return_final_state": True}
    y, state = seqkern.ssd(x, dt, A, B, C, D, z, **options)

    def channels(t):
        return t.repeat_interleave(5, dim=-1)

    flat = [t.flatten(2).mT for t in (x, channels(dt), z)]
    grouped = [t.movedim(1, -1) for t in (B, C)]
    expected, last = seqkern.selective_scan(
        flat[0], flat[1], channels(A)[:, None].expand(20, 6), *grouped, channels(D), flat[2], channels(bias), True, True
    )
    torch.testing.assert_close(y, expected.mT.unflatten(2, (4, 5)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last.unflatten(1, (4, 5)), rtol=1e-12, atol=1e-12)


def test_a_step_size_of_zero_changes_nothing():
    """A token with dt = 0 reads the state and leaves it."""
    x, dt, A, B, C = inputs()
    kept = rand(150, seed=6) > 0
    dt[:, ~kept] = 0
    y, state = seqkern.ssd(x, dt, A, B, C, return_final_state=True)
    fewer, fewer_state = seqkern.ssd(*(t[:, kept] for t in (x, dt)), A, B[:, kept], C[:, kept], return_final_state=True)
    torch.testing.assert_close(y[:, kept], fewer, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, fewer_state, rtol=1e-12, atol=1e-12)


def test_step_sizes_outside_the_limits_have_no_gradient():
    names = ("x", "dt", "A", "B", "C")
    given = dict(zip(names, inputs(), strict=True))
    grads = derivatives(seqkern.ssd, given, dt_limit=(0.1, 0.3))
    outside = (given["dt"] < 0.1) | (given["dt"] > 0.3)
    assert outside.any() and not outside.all()
    assert (grads["ddt"][outside] == 0).all() and (grads["ddt"][~outside] != 0).all()


def test_large_step_sizes_forget():
    """Decays that underflow are exact resets, without NaN, gradients included."""
    given = dict(zip(("x", "dt", "A", "B", "C"), (t.float() for t in inputs()), strict=True))
    given["dt"][:, [5, 63, 64, 100]] = 1e6
    grads = derivatives(seqkern.ssd, given)
    assert all(t.isfinite().all() for t in grads.values())
    alone = {name: (t[:, 64:100] if t.dim() > 1 else t).double() for name, t in given.items()}
    exact = derivatives(semiseparable, alone)["y"]
    torch.testing.assert_close(grads["y"][:, 64:100].double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("reverse", [False, True])
def test_split_anywhere(reverse):
    x, dt, A, B, C = inputs()
    options = {"reverse": reverse, "return_final_state": True}
    y, state = seqkern.ssd(x, dt, A, B, C, **options)
    for cut in (0, 1, 63, 64, 65, 149, 150):
        carried, pieces = None, []
        for part in (slice(cut, 150), slice(0, cut)) if reverse else (slice(0, cut), slice(cut, 150)):
            tokens = [t[:, part] for t in (x, dt, B, C)]
            piece, carried = seqkern.ssd(*tokens[:2], A, *tokens[2:], initial_state=carried, **options)
            pieces.append(piece)
        joined = torch.cat(pieces[::-1] if reverse else pieces, 1)
        torch.testing.assert_close(joined, y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(carried, state, rtol=1e-11, atol=1e-11)


# For 3000 tokens, the largest error of y, relative to its largest value.
WINDOW = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", WINDOW, ids=str)
def test_errors_do_not_grow_with_time(dtype):
    x, dt, A, B, C = inputs(1, 3000, 1, 1)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    with torch.no_grad():
        exact = seqkern.ssd(x.double(), dt, A, B.double(), C.double())
        error = (seqkern.ssd(x, dt, A, B, C).double() - exact).abs().max() / exact.abs().max()
    assert error < WINDOW[dtype]


def test_every_parameter_has_a_dtype_of_its_own():
    x, dt, A, B, C = inputs()
    given = {"x": x.bfloat16(), "dt": dt.float(), "A": A, "B": B.bfloat16(), "C": C.bfloat16()}
    given |= {
        "D": rand(4, seed=6).half(),
        "z": rand(2, 150, 4, 5, seed=7).float(),
        "dt_bias": rand(4, seed=8).bfloat16(),
    }
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    y, state = seqkern.ssd(**leaves, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    grads = torch.autograd.grad([y, state], list(leaves.values()), [torch.ones_like(y), torch.ones_like(state)])
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves.values()]
