"""linear_attention and its named forms against the recurrences of their papers and against quadratic attention."""

import math

import pytest
import torch

import seqkern
from seqkern import reference

INF = math.inf
DECAYS = ("none", "head", "token", "key")


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B=2, L=150, H=2, HV=4, K=6, V=5):
    """q, k, v in float64; 150 tokens are two chunks and a part of one."""
    return rand(B, L, H, K, seed=1), rand(B, L, H, K, seed=2), rand(B, L, HV, V, seed=3)


def log_decay(kind, B=2, L=150, HV=4, K=6, strength=0.3):
    shapes = {"head": (HV,), "token": (B, L, HV), "key": (B, L, HV, K)}
    return None if kind == "none" else -strength * rand(*shapes[kind], seed=4).abs()


def per_key(g, q, v):
    """Log decays as (B, L, HV, K)."""
    B, L, HV, _ = v.shape
    g = q.new_zeros(HV) if g is None else g
    return (g if g.dim() == 4 else g.expand(B, L, HV)[..., None]).expand(B, L, HV, q.shape[-1])


def grouped(x, HV):
    return x.repeat_interleave(HV // x.shape[-2], dim=-2)


def quadratic(q, k, v, g=None, *, scale=None, normalize=False, read="current", bonus=None, eps=1e-6):
    """Every score, decays between every two tokens included: no recurrence."""
    _, L, HV, _ = v.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g, q, k = per_key(g, q, v), grouped(q, HV), grouped(k, HV)
    sums = g.cumsum(1)
    queried = sums if read == "current" else sums - g
    seen = torch.ones(L, L, dtype=torch.bool, device=v.device).tril(0 if read == "current" else -1)[None, :, :, None]
    between = (queried[:, :, None] - sums[:, None]).masked_fill(~seen[..., None], -INF).exp()  # (B, L, L, HV, K)
    scores = torch.einsum("bihk,bjhk,bijhk->bijh", q, k, between)
    if bonus is not None:
        own = (q * k * grouped(bonus, HV)).sum(-1)
        scores = scores + torch.diag_embed(own.movedim(1, -1)).movedim(1, -1)
    o = torch.einsum("bijh,bjhv->bihv", scores, v)
    return o / (scores.sum(2)[..., None] + eps) if normalize else scale * o


def derivatives(function, tensors, **options):
    """The output, and the gradients of all tensors for a random gradient of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    o = function(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, rand(*o.shape, seed=9).to(o))]


def assert_same(actual, expected, tolerance=1e-11):
    for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{i}: {text}")


# Against quadratic attention.


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("read", ["current", "previous", "bonus"])
def test_quadratic_attention(kind, read):
    q, k, v = inputs()
    g = log_decay(kind)
    given = [q, k, v] if g is None else [q, k, v, g]
    options = {"read": "current" if read == "current" else "previous"}
    if read == "bonus":
        options["bonus"] = rand(2, 6, seed=5)
    assert_same(derivatives(seqkern.linear_attention, given, **options), derivatives(quadratic, given, **options))


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("read", ["current", "previous"])
def test_quadratic_attention_normalized(kind, read):
    """[2006.16236, equation 9], with features that are positive."""
    q, k, v = (t.exp() if i < 2 else t for i, t in enumerate(inputs()))
    g = log_decay(kind)
    given = [q, k, v] if g is None else [q, k, v, g]
    options = {"normalize": True, "read": read, "eps": 1e-3}
    actual, expected = derivatives(seqkern.linear_attention, given, **options), derivatives(quadratic, given, **options)
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("kind", ["token", "key"])
def test_on_every_device(kind, device):
    """Two chunks of one head."""
    q, k, v = (t.to(device) for t in inputs(1, 70, 1, 1, 4, 3))
    g = log_decay(kind, 1, 70, 1, 4).to(device)
    assert_same(derivatives(seqkern.linear_attention, (q, k, v, g)), derivatives(quadratic, (q, k, v, g)))


# The recurrences of the papers, token by token.


def test_retention_of_the_paper():
    """S_n = gamma S_{n-1} + K_n^T V_n, Retention(X_n) = Q_n S_n [2307.08621, equation 6]; gamma of equation 8."""
    q, k, v = inputs(L=80, H=4)
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], dtype=torch.float64)

    def recurrence(q, k, v, gamma):
        S, outputs = torch.zeros(2, 4, 6, 5, dtype=q.dtype), []
        for n in range(80):
            S = gamma[:, None, None] * S + k[:, n, :, :, None] * v[:, n, :, None, :]
            outputs.append((q[:, n, :, None] @ S)[:, :, 0] * 6**-0.5)
        return torch.stack(outputs, 1)

    expected = derivatives(recurrence, (q, k, v, gamma))
    assert_same(derivatives(lambda q, k, v, gamma: seqkern.retention(q, k, v, gamma=gamma), (q, k, v, gamma)), expected)
    assert_same([seqkern.retention(q, k, v)], expected[:1], 1e-6)  # the default is float32
    with torch.inference_mode():
        assert_same([seqkern.retention(q, k, v)], expected[:1], 1e-6)
    compiled = torch.compile(seqkern.retention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), seqkern.retention(q, k, v))


def test_gla_of_the_paper():
    """S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t [2312.06635, equation 3]."""
    q, k, v = inputs(L=80, H=4)
    alpha = torch.sigmoid(rand(2, 80, 4, 6, seed=4))

    def recurrence(q, k, v, alpha):
        S, outputs = torch.zeros(2, 4, 6, 5, dtype=q.dtype), []
        for t in range(80):
            S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, None] @ S)[:, :, 0])
        return torch.stack(outputs, 1)

    actual = derivatives(lambda q, k, v, alpha: seqkern.gla(q, k, v, alpha.log(), scale=1.0), (q, k, v, alpha))
    assert_same(actual, derivatives(recurrence, (q, k, v, alpha)))
    with pytest.raises(RuntimeError, match=r"^gla: log_decay must be \(B, L, HV, K\), got \(2, 80, 4\)"):
        seqkern.gla(q, k, v, alpha[..., 0].log())


def test_rwkv6_of_the_paper():
    """wkv_t = diag(u) k_t^T v_t + sum_{i<t} diag(prod w) k_i^T v_i, o_t = r_t wkv_t [2404.05892, equations 16, 17]."""
    r, k, v = inputs(L=80, H=4)
    w, u = torch.exp(-torch.exp(rand(2, 80, 4, 6, seed=4) / 2)), rand(4, 6, seed=5)

    def recurrence(r, k, v, w, u):
        S, outputs = torch.zeros(2, 4, 6, 5, dtype=r.dtype), []
        for t in range(80):
            kv = k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((r[:, t, :, None] @ (S + u[..., None] * kv))[:, :, 0])
            S = w[:, t, :, :, None] * S + kv
        return torch.stack(outputs, 1)

    actual = derivatives(lambda r, k, v, w, u: seqkern.rwkv6(r, k, v, w.log(), u), (r, k, v, w, u))
    assert_same(actual, derivatives(recurrence, (r, k, v, w, u)))


def test_normalized_attention_of_the_paper():
    """s_i = s_{i-1} + phi(x_i W_K) (x_i W_V)^T, z_i = z_{i-1} + phi(x_i W_K) [2006.16236, equations 18 to 20]."""
    q, k, v = inputs(L=80, H=4)
    q, k = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    s, z, outputs = torch.zeros(2, 4, 6, 5, dtype=q.dtype), torch.zeros(2, 4, 6, dtype=q.dtype), []
    for i in range(80):
        s = s + k[:, i, :, :, None] * v[:, i, :, None, :]
        z = z + k[:, i]
        outputs.append((q[:, i, :, None] @ s)[:, :, 0] / (q[:, i] * z).sum(-1, keepdim=True))
    o, state = seqkern.linear_attention(q, k, v, normalize=True, eps=0.0, return_final_state=True)
    assert_same([o, *state], [torch.stack(outputs, 1), s, z])


# Decays at the ends of their range.


@pytest.mark.parametrize("kind", ["token", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_infinity_is_a_reset(kind, dtype):
    """Wherever in a chunk: as if the sequence began there, and nothing is NaN."""
    q, k, v = (t.to(dtype) for t in inputs(1, 150, 1, 2))
    g = log_decay(kind, 1, 150, 2).to(dtype)
    cuts = [0, 5, 63, 64, 65, 129, 150]
    reset = g.clone()
    reset[:, cuts[1:-1]] = -INF
    actual = derivatives(seqkern.linear_attention, (q, k, v, reset))
    packed = torch.tensor(cuts)
    expected = derivatives(lambda *tensors: seqkern.linear_attention(*tensors, cu_seqlens=packed), (q, k, v, g))
    expected[-1][:, cuts[1:-1]] = 0
    actual[-1][:, 0], expected[-1][:, 0] = 0, 0
    assert all(t.isfinite().all() for t in actual)
    assert_same(actual, expected, 1e-11 if dtype == torch.float64 else 2e-5)


def test_minus_infinity_in_some_keys():
    q, k, v = inputs(1, 150, 1, 2)
    g = log_decay("key", 1, 150, 2).masked_fill(rand(1, 150, 2, 6, seed=6) > 1.5, -INF)
    actual = derivatives(seqkern.linear_attention, (q, k, v, g))
    assert_same(actual, derivatives(reference.linear_attention, (q, k, v, g)))


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("kind", ["head", "token", "key"])
def test_decays_of_any_strength(kind, size):
    """In float32, beside the same in float64: what comes through is as exact as without a decay."""
    q, k, v = (t.float() for t in inputs(1, 150, 1, 2))
    g = size * log_decay(kind, 1, 150, 2, strength=1.0).float()
    g = g.masked_fill(g > -size / 2, 0) if kind != "head" else g  # some tokens keep everything
    actual = derivatives(seqkern.linear_attention, (q, k, v, g))
    expected = derivatives(reference.linear_attention, [t.double() for t in (q, k, v, g)])
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=3e-6 * max(1, theirs.abs().max().item()))


# For 3000 tokens, the largest error of o, relative to its largest value.
WINDOW = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("dtype", WINDOW, ids=str)
def test_errors_do_not_grow_with_time(dtype, kind):
    q, k, v = (t.to(dtype) for t in inputs(1, 3000, 1, 1, 4, 3))
    g = log_decay(kind, 1, 3000, 1, 4, strength=0.05)
    with torch.no_grad():
        exact = reference.linear_attention(q.double(), k.double(), v.double(), g)
        error = (seqkern.linear_attention(q, k, v, g).double() - exact).abs().max() / exact.abs().max()
    assert error < WINDOW[dtype]


def test_sixty_thousand_tokens():
    """With keys and values of size 1 it is a linear scan."""
    q, k, v = (t[..., :1] for t in inputs(1, 65536, 2, 2, 1, 1))
    g = log_decay("token", 1, 65536, 2, strength=0.01)
    h = seqkern.linear_scan(g, (k * v)[..., 0], log_space=True)
    assert_same([seqkern.linear_attention(q, k, v, g)], [q * h[..., None]], 1e-10)


# States, heads, dtypes.


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("reverse", [False, True])
def test_split_anywhere(kind, reverse):
    q, k, v = (t.abs() if i < 2 else t for i, t in enumerate(inputs()))
    g = log_decay(kind)
    options = {"normalize": True, "reverse": reverse, "return_final_state": True}
    o, state = seqkern.linear_attention(q, k, v, g, **options)
    for cut in (0, 1, 63, 64, 65, 149, 150):
        carried, pieces = None, []
        for part in (slice(cut, 150), slice(0, cut)) if reverse else (slice(0, cut), slice(cut, 150)):
            tokens = [t if t is None or t.dim() == 1 else t[:, part] for t in (q, k, v, g)]
            piece, carried = seqkern.linear_attention(*tokens, initial_state=carried, **options)
            pieces.append(piece)
        joined = torch.cat(pieces[::-1] if reverse else pieces, 1)
        assert_same([joined, *carried], [o, *state])


def test_a_constant_decay_is_that_of_every_token():
    q, k, v = inputs()
    g = log_decay("head")
    tokens, keys = g.expand(2, 150, 4), g[:, None].expand(2, 150, 4, 6)
    o, dq, dk, dv, dg = derivatives(seqkern.linear_attention, (q, k, v, g))
    for spread in (tokens, keys):
        *same, dspread = derivatives(seqkern.linear_attention, (q, k, v, spread))
        assert_same(
            [*same, dspread.flatten(3).sum(-1).sum((0, 1)) if spread is keys else dspread.sum((0, 1))],
            [o, dq, dk, dv, dg],
        )


def test_grouped_heads_are_repeated_heads():
    q, k, v = inputs()
    g = log_decay("token")
    o, dq, dk, *rest = derivatives(seqkern.linear_attention, (q, k, v, g))
    same, dq4, dk4, *rest4 = derivatives(seqkern.linear_attention, (grouped(q, 4), grouped(k, 4), v, g))
    summed = [t.unflatten(2, (2, 2)).sum(3) for t in (dq4, dk4)]
    assert_same([o, dq, dk, *rest], [same, *summed, *rest4])


def test_decays_and_states_have_dtypes_of_their_own():
    q, k, v = (t.bfloat16() for t in inputs())
    g, S = log_decay("key").half(), rand(2, 4, 6, 5, seed=6)
    leaves = [t.requires_grad_() for t in (q, k, v, g, S)]
    o, state = seqkern.linear_attention(*leaves[:4], initial_state=S, return_final_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    grads = torch.autograd.grad([o, state], leaves, [torch.ones_like(o), torch.ones_like(state)])
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_leaves_earlier_chunks_alone(name, kind):
    """Bitwise, as it leaves other heads alone."""
    clean = dict(zip("qkv", (t.float() for t in inputs(H=4)), strict=True))
    g = log_decay(kind)
    sick = {key: t.clone() for key, t in clean.items()}
    sick[name][1, 100, 2] = math.nan
    actual, expected = (seqkern.linear_attention(*tensors.values(), g) for tensors in (sick, clean))
    may_differ = torch.zeros_like(expected, dtype=torch.bool)
    may_differ[1, 64:, 2] = True
    assert torch.equal(actual[~may_differ], expected[~may_differ])
    assert actual[1, 100, 2].isnan().all() or (name == "v" and not actual[1, 100, 2].isfinite().all())
