"""delta_rule against products of its transitions as matrices, against the recurrences of papers, over long times."""

import math

import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern import reference

INF = math.inf
DECAYS = ("none", "token", "key")


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B=2, L=150, H=2, HV=4, K=6, V=5):
    """q, k of length 1, v and beta in float64; 150 tokens are two chunks and a part of one."""
    k, beta = F.normalize(rand(B, L, H, K, seed=2), dim=-1), 1 + rand(B, L, HV, seed=7).tanh()
    return rand(B, L, H, K, seed=1), k, rand(B, L, HV, V, seed=3), beta


def log_decay(kind, B=2, L=150, HV=4, K=6, strength=0.3):
    shapes = {"token": (B, L, HV), "key": (B, L, HV, K)}
    return None if kind == "none" else -strength * rand(*shapes[kind], seed=4).abs()


def grouped(x, HV):
    return x.repeat_interleave(HV // x.shape[-2], dim=-2)


def dense(q, k, v, beta, *, log_decay=None, erase_key=None, initial_state=None, scale=None, qk_l2norm=False):
    """Transitions as matrices M_t = (I - beta_t k_t e_t^T) diag(exp g_t): token i reads what token j wrote through
    M_i ... M_{j+1}. No state."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if qk_l2norm else x for x in (q, k))
    HV, K = v.shape[2], q.shape[-1]
    q, k, e = (grouped(x, HV).transpose(1, 2) for x in (q, k, k if erase_key is None else erase_key))  # (B, HV, L, K)
    written = beta.mT[..., None] * k
    M = torch.eye(K).to(q) - written[..., :, None] * e[..., None, :]
    if log_decay is not None:
        g = log_decay if log_decay.dim() == 4 else log_decay[..., None]
        M = M * g.transpose(1, 2).exp()[..., None, :]
    reads, scores, tokens = q[:, :, :0], [], zip(*(t.split(1, dim=2) for t in (q, written, M)), strict=True)
    for j, (q_j, written_j, M_j) in reversed(list(enumerate(tokens))):
        reads = torch.cat([q_j, reads], dim=2)  # of tokens i >= j
        scores.append(F.pad(reads @ written_j.mT, (0, 0, j, 0)))
        reads = reads @ M_j.squeeze(2)
    o = torch.cat(scores[::-1], dim=-1) @ v.transpose(1, 2)
    if initial_state is not None:
        o = o + reads @ initial_state
    return scale * o.transpose(1, 2)


def derivatives(function, tensors, **options):
    """The output, and the gradients of all tensors, by name, for a random gradient of it."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    o = function(**leaves, **options)
    grads = torch.autograd.grad(o, list(leaves.values()), rand(*o.shape, seed=9).to(o))
    return {"o": o.detach()} | dict(zip(leaves, grads, strict=True))


def assert_same(actual, expected, tolerance=1e-11):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def named(*tensors, **others):
    return dict(zip(("q", "k", "v", "beta"), tensors, strict=True)) | {n: t for n, t in others.items() if t is not None}


# Against transitions as matrices.


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(("erase", "qk_l2norm"), [(False, False), (False, True), (True, True)])
def test_transitions_as_matrices(one_thread, kind, erase, qk_l2norm):
    shape = {"B": 1, "HV": 2}
    given = named(*inputs(**shape, H=1), log_decay=log_decay(kind, **shape), initial_state=rand(1, 2, 6, 5, seed=6))
    if erase:
        given["erase_key"] = 0.3 * rand(1, 150, 1, 6, seed=5)
    options = {"qk_l2norm": qk_l2norm, "scale": 0.7}
    actual, expected = (derivatives(function, given, **options) for function in (seqkern.delta_rule, dense))
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("kind", DECAYS)
def test_on_every_device(one_thread, kind, device):
    """Two chunks of one head."""
    given = named(*inputs(1, 70, 1, 1, 4, 3), log_decay=log_decay(kind, 1, 70, 1, 4))
    given = {name: t.to(device) for name, t in given.items()}
    actual, expected = (derivatives(f, given, qk_l2norm=True) for f in (seqkern.delta_rule, dense))
    assert_same(actual, expected)


# The recurrences of the papers, token by token, with the state as they write it: (V, K).


def of_paper(transition):
    """S_t = transition(S_{t-1}, k_t, v_t, beta_t, gate_t), o_t = S_t q_t."""

    def function(q, k, v, beta, gate=None):
        S, outputs = q.new_zeros(*v[:, 0].shape, q.shape[-1]), []
        for t in range(q.shape[1]):
            gate_t = None if gate is None else gate[:, t]
            S = transition(S, k[:, t, :, :, None], v[:, t, :, :, None], beta[:, t, :, None, None], gate_t)
            outputs.append((S @ q[:, t, :, :, None])[..., 0])
        return torch.stack(outputs, 1)

    return function


def kkT(k):
    return k @ k.mT


IDENTITY = torch.eye(6, dtype=torch.float64)
PAPERS = {
    # S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T [2406.06484]
    "DeltaNet": ((), lambda S, k, v, beta, gate: S @ (IDENTITY - beta * kkT(k)) + beta * v @ k.mT),
    # S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T [2412.06464]
    "Gated DeltaNet": (
        (2, 80, 4),
        lambda S, k, v, beta, gate: S @ (gate[..., None, None] * (IDENTITY - beta * kkT(k))) + beta * v @ k.mT,
    ),
    # S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, transposed [2510.26692]
    "Kimi Delta Attention": (
        (2, 80, 4, 6),
        lambda S, k, v, beta, gate: ((IDENTITY - beta * kkT(k)) @ torch.diag_embed(gate) @ S.mT + beta * k @ v.mT).mT,
    ),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_recurrences_of_the_papers(one_thread, paper):
    gate_shape, transition = PAPERS[paper]
    given = named(*inputs(L=80, H=4))
    if gate_shape:
        given["gate"] = torch.sigmoid(rand(*gate_shape, seed=4) + 2)

    def operator(gate=None, **tensors):
        return seqkern.delta_rule(**tensors, log_decay=None if gate is None else gate.log(), scale=1.0)

    assert_same(derivatives(operator, given), derivatives(of_paper(transition), given))


def test_several_steps_of_one_token():
    """DeltaProduct [2502.10297]: n steps S_j = (I - beta_j k_j k_j^T) S_{j-1} + beta_j k_j v_j^T between two outputs,
    the first of them after the token's decay: tokens repeated."""
    n, L = 3, 40
    q, k, v, beta = inputs(2, n * L, 4, 4)
    q, alpha = q[:, ::n], torch.sigmoid(rand(2, L, 4, seed=4) + 2)
    S, outputs = torch.zeros(2, 4, 6, 5, dtype=q.dtype), []
    for i in range(L):
        S = alpha[:, i, :, None, None] * S
        for j in range(n * i, n * (i + 1)):
            k_j, beta_j = k[:, j, :, :, None], beta[:, j, :, None, None]
            S = S - beta_j * kkT(k_j) @ S + beta_j * k_j @ v[:, j, :, None, :]
        outputs.append((S.mT @ q[:, i, :, :, None])[..., 0])

    g = F.pad(alpha.log()[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)  # on the first step
    o = seqkern.delta_rule(q.repeat_interleave(n, dim=1), k, v, beta, log_decay=g, scale=1.0)[:, n - 1 :: n]
    assert_same({"o": o}, {"o": torch.stack(outputs, 1)})


def test_reflections_count_modulo_two():
    """beta = 2 flips the sign of the state, exactly, as often as there is a one; up to 1 it never would."""
    bits = rand(1, 8192, 1) > 0
    one = torch.ones(1, 8192, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = one.to(dtype)
        o = seqkern.delta_rule(q, q, 0 * q, 2.0 * bits, initial_state=one[:, :1])
        assert torch.equal(o[..., 0], 1 - 2 * (bits.cumsum(1) % 2).to(dtype))


def test_two_reflections_count_modulo_three():
    """Two of them, at an angle of 60 degrees, turn the state by 120."""
    bits = (rand(1, 3000, 1) > 0).double()
    angles = torch.tensor([0.0, math.pi / 3], dtype=torch.float64)
    k = torch.stack([angles.cos(), angles.sin()], dim=-1).repeat(3000, 1)[None, :, None]
    q, v = torch.zeros_like(k), torch.zeros(1, 6000, 1, 1, dtype=torch.float64)
    q[..., 0] = 1
    start = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    o = seqkern.delta_rule(q, k, v, 2 * bits.repeat_interleave(2, 1), initial_state=start, scale=1.0)[:, 1::2, :, 0]
    assert_same({"o": o}, {"o": torch.cos(2 * math.pi / 3 * bits.cumsum(1))})


# Long times.


def loop(q, k, v, beta, dtype):
    """Token by token, everything in one dtype."""
    q, k, v, beta = (t.to(dtype) for t in (q, k, v, beta))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    S, outputs = q.new_zeros(q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        u = beta[0, t, :, None] * (v[0, t] - (k[0, t, :, None] @ S)[:, 0])
        S = S + k[0, t, :, :, None] * u[:, None]
        outputs.append((q[0, t, :, None] @ S)[:, 0])
    return q.shape[-1] ** -0.5 * torch.stack(outputs)[None]


# How much of the error of the loop in the dtype of the data is allowed.
OF_LOOP = {torch.float32: 3, torch.bfloat16: 0.5, torch.float16: 0.5}


def test_errors_where_they_do_not_decay(one_thread):
    """With beta near 2 transitions are reflections: whatever is wrong in a state stays in it."""
    q, k, v = rand(1, 8192, 2, 64, seed=1), rand(1, 8192, 2, 64, seed=2), rand(1, 8192, 2, 64, seed=3)
    beta, rows = 2 - 0.05 * torch.rand(1, 8192, 2, generator=torch.Generator().manual_seed(4)).double(), []
    for dtype, share in OF_LOOP.items():
        given = [t.to(dtype) for t in (q, k, v, beta)]
        exact = loop(*given, torch.float64)
        outputs = seqkern.delta_rule(*given, qk_l2norm=True), loop(*given, dtype), loop(*given, torch.float32)
        errors = [((o.double() - exact).abs().max() / exact.abs().max()).item() for o in outputs]
        rows.append((str(dtype), *errors))
        assert errors[0] < share * errors[1], rows
    for row in rows:
        print("| {} | {:.1e} | {:.1e} | {:.1e} |".format(*row))  # dtype, seqkern, the loop, the loop in float32


@pytest.mark.parametrize("kind", ["none", "token"])
def test_parallel_keys(one_thread, kind):
    """Where all tokens have the same key, what a chunk sums up cancels: float32 then keeps 5 digits, with little decay
    as well."""
    q, k, v, beta = (t.float() for t in inputs(1, 300, 1, 2, 32, 16))
    given = named(q, k[:, :1].expand_as(k), v, beta, log_decay=log_decay(kind, 1, 300, 2, strength=0.01))
    actual = derivatives(seqkern.delta_rule, given, qk_l2norm=True)
    expected = derivatives(reference.delta_rule, {name: t.double() for name, t in given.items()}, qk_l2norm=True)
    for name, truth in expected.items():
        limit = 1e-5 * truth.abs().max().item()
        torch.testing.assert_close(actual[name].double(), truth, rtol=0, atol=limit, msg=name)


def test_sixty_thousand_tokens():
    """With keys and values of size 1 it is a linear scan."""
    q, k, v, beta = (t[..., :1] if t.dim() == 4 else t for t in inputs(1, 65536, 2, 2))
    g = log_decay("token", 1, 65536, 2, strength=0.01)
    h = seqkern.linear_scan(g.exp() * (1 - beta * k[..., 0].square()), beta * (k * v)[..., 0])
    assert_same({"o": seqkern.delta_rule(q, k, v, beta, log_decay=g)}, {"o": q * h[..., None]}, 1e-10)


# Decays at the ends of their range.


@pytest.mark.parametrize("kind", ["token", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_infinity_is_a_reset(kind, dtype):
    """Wherever in a chunk: as if the sequence began there, and nothing is NaN."""
    given = named(*inputs(1, 150, 1, 2), log_decay=log_decay(kind, 1, 150, 2))
    given = {name: t.to(dtype) for name, t in given.items()}
    cuts = [0, 5, 63, 64, 65, 129, 150]
    reset = given["log_decay"].clone()
    reset[:, cuts[1:-1]] = -INF
    actual = derivatives(seqkern.delta_rule, given | {"log_decay": reset})
    expected = derivatives(seqkern.delta_rule, given, cu_seqlens=torch.tensor(cuts))
    expected["log_decay"][:, cuts[1:-1]] = 0
    actual["log_decay"][:, 0], expected["log_decay"][:, 0] = 0, 0
    assert_same(actual, expected, 1e-11 if dtype == torch.float64 else 2e-5)


def test_minus_infinity_in_some_keys():
    g = log_decay("key", 1, 150, 2).masked_fill(rand(1, 150, 2, 6, seed=6) > 1.5, -INF)
    given = named(*inputs(1, 150, 1, 2), log_decay=g)
    assert_same(derivatives(seqkern.delta_rule, given), derivatives(reference.delta_rule, given))


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("kind", ["token", "key"])
def test_decays_of_any_strength(kind, size):
    """In float32, beside the same in float64: what comes through is as exact as without a decay."""
    g = size * log_decay(kind, 1, 150, 2, strength=1.0)
    given = named(*inputs(1, 150, 1, 2), log_decay=g.masked_fill(g > -size / 2, 0))  # some tokens keep everything
    given = {name: t.float() for name, t in given.items()}
    actual = derivatives(seqkern.delta_rule, given)
    expected = derivatives(reference.delta_rule, {name: t.double() for name, t in given.items()})
    for name, truth in expected.items():
        limit = 6e-6 * max(1, truth.abs().max().item())
        torch.testing.assert_close(actual[name].double(), truth, rtol=0, atol=limit, msg=name)


# States, heads, dtypes.


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("reverse", [False, True])
def test_split_anywhere(kind, reverse):
    given = named(*inputs(), log_decay=log_decay(kind))
    options = {"reverse": reverse, "return_final_state": True}
    o, state = seqkern.delta_rule(**given, **options)
    for cut in (0, 1, 63, 64, 65, 149, 150):
        carried, pieces = None, []
        for part in (slice(cut, 150), slice(0, cut)) if reverse else (slice(0, cut), slice(cut, 150)):
            tokens = {name: t[:, part] for name, t in given.items()}
            piece, carried = seqkern.delta_rule(**tokens, initial_state=carried, **options)
            pieces.append(piece)
        joined = torch.cat(pieces[::-1] if reverse else pieces, 1)
        assert_same({"o": joined, "state": carried}, {"o": o, "state": state})


def test_a_decay_of_a_token_is_that_of_every_key():
    given = named(*inputs(), log_decay=log_decay("token"))
    keys = given["log_decay"][..., None].expand(2, 150, 4, 6)
    actual = derivatives(seqkern.delta_rule, given | {"log_decay": keys})
    actual["log_decay"] = actual["log_decay"].sum(-1)
    assert_same(actual, derivatives(seqkern.delta_rule, given))


@pytest.mark.parametrize("kind", DECAYS)
def test_the_key_itself_as_erase_key(kind):
    given = named(*inputs(), log_decay=log_decay(kind))
    actual = derivatives(seqkern.delta_rule, given | {"erase_key": given["k"]})
    actual["k"] += actual.pop("erase_key")
    assert_same(actual, derivatives(seqkern.delta_rule, given))


@pytest.mark.parametrize("kind", ["token", "key"])
def test_grouped_heads_are_repeated_heads(kind):
    given = named(*inputs(), log_decay=log_decay(kind), erase_key=0.3 * rand(2, 150, 2, 6, seed=5))
    shared = ("q", "k", "erase_key")
    actual = derivatives(seqkern.delta_rule, given | {name: grouped(given[name], 4) for name in shared}, qk_l2norm=True)
    actual |= {name: actual[name].unflatten(2, (2, 2)).sum(3) for name in shared}
    assert_same(actual, derivatives(seqkern.delta_rule, given, qk_l2norm=True))


def test_betas_decays_and_states_have_dtypes_of_their_own():
    q, k, v, beta = inputs()
    tensors = named(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta, log_decay=log_decay("key").half())
    tensors["initial_state"] = rand(2, 4, 6, 5, seed=6)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    o, state = seqkern.delta_rule(**leaves, return_final_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    leaves = list(leaves.values())
    grads = torch.autograd.grad([o, state], leaves, [torch.ones_like(o), torch.ones_like(state)])
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
def test_nan_leaves_earlier_chunks_alone(name, kind):
    """Bitwise, as it leaves other heads alone."""
    clean = named(*(t.float() for t in inputs(H=4)), log_decay=log_decay(kind))
    sick = clean[name].clone()
    sick[1, 100, 2] = math.nan
    actual, expected = seqkern.delta_rule(**clean | {name: sick}), seqkern.delta_rule(**clean)
    may_differ = torch.zeros_like(expected, dtype=torch.bool)
    may_differ[1, 64:, 2] = True
    assert torch.equal(actual[~may_differ], expected[~may_differ])
    assert actual[1, 100, 2].isnan().all()


# Tokens sorted to memories.


def routes(B, L, R, num_routes, seed=0, dtype=torch.int64):
    """R different ones for each token, the last of them never taken."""
    scores = torch.rand(B, L, num_routes - 1, generator=torch.Generator().manual_seed(seed))
    return scores.topk(R, dim=-1).indices.to(dtype)


def unpacked(o, order, route):
    return torch.empty_like(o[0]).index_copy(0, order, o[0]).unflatten(0, route.shape)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 2, 5), (1, 7, 1, 3), (3, 0, 2, 4), (0, 5, 2, 4)], ids=str)
def test_packs_by_route(shape, dtype):
    B, L, R, M = shape
    x, route = torch.arange(B * L).reshape(B, L), routes(*shape, dtype=dtype)
    packed, cu_seqlens, order = seqkern.pack_by_route(x, route, M)
    assert packed.shape == (1, B * L * R) and cu_seqlens.shape == (B * M + 1,)
    expected = [x[b][(route[b] == m).any(-1)] for b in range(B) for m in range(M)]
    for n, tokens in enumerate(expected):
        assert torch.equal(packed[0, cu_seqlens[n] : cu_seqlens[n + 1]], tokens)
    assert torch.equal(packed[0], x.flatten()[order // R])
    assert torch.equal(unpacked(packed, order, route), x[..., None].expand(B, L, R))
    compiled = torch.compile(seqkern.pack_by_route, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x, route, M), (packed, cu_seqlens, order)))


def test_routes_that_do_not_fit():
    x, route = torch.zeros(2, 5, 3), torch.zeros(2, 5, 2, dtype=torch.int64)
    for bad, message in [
        (route[..., 0], r"x and route must be \(B, L, ...\) and \(B, L, R\), got \(2, 5, 3\) and \(2, 5\)"),
        (route[:, 1:], r"x and route must be .*, got \(2, 5, 3\) and \(2, 4, 2\)"),
        (route.float(), "route must be int32 or int64, got float32"),
        (route.to("meta"), r"route must be on the device of x; move it with \.to\(cpu\)"),
        (route + 4, "route must be from 0 to num_routes - 1 = 3, got 4 to 4"),
        (route - 1, "route must be from 0 to num_routes - 1 = 3, got -1 to -1"),
    ]:
        with pytest.raises(RuntimeError, match=f"^pack_by_route: {message}"):
            seqkern.pack_by_route(x, bad, 4)


def test_mixture_of_memories():
    """[2502.13685]: each token updates and reads its memories only, and mixes what it read; a loop over memories."""
    B, L, R, M, H, K, V = 2, 60, 2, 4, 2, 6, 5
    q, k, v, beta = inputs(B, L, H, H, K, V)
    g, route = log_decay("token", B, L, H), routes(B, L, R, M)
    weight = torch.softmax(rand(B, L, R, seed=8), dim=-1)

    def packed_memories(weight, **tensors):
        _, cu_seqlens, order = seqkern.pack_by_route(q, route, M)
        packed = {name: t.flatten(0, 1)[order // R][None] for name, t in tensors.items()}
        o, states = seqkern.delta_rule(**packed, cu_seqlens=cu_seqlens, return_final_state=True)
        assert states.shape == (B * M, H, K, V) and not states[M - 1].any()
        return (weight[..., None, None] * unpacked(o, order, route)).sum(2)

    def looped(weight, **tensors):
        rows = []
        for b in range(B):
            row = torch.zeros(L, H, V, dtype=q.dtype)
            for m in range(M):
                chosen = (route[b] == m).nonzero()  # (tokens of the memory, 2)
                at, slot = chosen.unbind(1)
                o = reference.delta_rule(**{name: t[b : b + 1, at] for name, t in tensors.items()})[0]
                row = row.index_add(0, at, weight[b, at, slot, None, None] * o)
            rows.append(row)
        return torch.stack(rows)

    given = named(q, k, v, beta, log_decay=g, weight=weight)
    assert_same(derivatives(packed_memories, given), derivatives(looped, given))
