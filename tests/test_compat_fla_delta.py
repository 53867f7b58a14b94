"""The delta rules of seqkern.compat.fla against the recurrences that fla documents, written out in float64 torch."""

import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from seqkern.compat import fla

B, T, H, HV, K, V = 2, 9, 2, 4, 5, 3
WIDE = torch.float64
BOUNDS = [0, 4, 4, 9]
FUNCTIONS = [
    f"{kind}_{rule}" for rule in ("delta_rule", "gated_delta_rule", "kda") for kind in ("chunk", "fused_recurrent")
]
GATED = [name for name in FUNCTIONS if name.endswith(("gated_delta_rule", "kda"))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=FUNCTIONS)
def name(request):
    return request.param


def leaf(*shape):
    return torch.randn(*shape, dtype=WIDE).requires_grad_()


def tokens(name, batch=B, length=T):
    """The arguments by name, and all decays (batch, length, HV, K or 1)."""
    given = {"q": leaf(batch, length, H, K), "k": leaf(batch, length, H, K), "v": leaf(batch, length, HV, V)}
    if name in GATED:
        per_key = (K,) if name.endswith("kda") else ()
        given["g"] = (-torch.rand(batch, length, HV, *per_key, dtype=WIDE)).requires_grad_()
    given["beta"] = torch.rand(batch, length, HV, dtype=WIDE).requires_grad_()
    return given


def recurrence(q, k, v, g=None, beta=None, *, scale=None, state=None, cu_seqlens=None, normalize=False, gv=None):
    """fla's: S = exp(g) S, then S += k beta (v - S^T k), o = scale S^T q -> (o, states)."""
    scale = K**-0.5 if scale is None else scale
    q, k = (t.repeat_interleave(HV // H, dim=2) for t in (q, k))
    if normalize:
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = torch.ones(v.shape[:3], dtype=WIDE) if beta is None else beta
    g = torch.zeros_like(beta) if g is None else g
    g = g if g.dim() == 4 else g[..., None]
    bounds = [(b, 0, q.shape[1]) for b in range(len(q))]
    bounds = bounds if cu_seqlens is None else [(0, *pair) for pair in pairwise(cu_seqlens.tolist())]
    outs, states = [], []
    for n, (b, begin, end) in enumerate(bounds):
        S = q.new_zeros(HV, K, V) if state is None else state[n]
        for t in range(begin, end):
            S = S * g[b, t, :, :, None].exp()
            S = S if gv is None else S * gv[b, t, :, None].exp()
            u = beta[b, t, :, None] * (v[b, t] - torch.einsum("hkv,hk->hv", S, k[b, t]))
            S = S + k[b, t, :, :, None] * u[:, None]
            outs.append(scale * torch.einsum("hkv,hk->hv", S, q[b, t]))
        states.append(S)
    return torch.stack(outs).view(v.shape), torch.stack(states)


def compare(actual, expected, inputs):
    """Values, and gradients of a random sum of them."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-6)
    cotangents = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(expected, inputs, cotangents)
    grads = torch.autograd.grad(actual, inputs, [c.to(a.dtype) for a, c in zip(actual, cotangents, strict=True)])
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_values_and_gradients(name, normalize, packed):
    given = tokens(name, 1 if packed else B)
    state = leaf(3 if packed else B, HV, K, V)
    cu_seqlens = torch.tensor(BOUNDS) if packed else None
    scale = 0.7 if packed else None
    function = getattr(fla, name)
    options = {"scale": scale, "cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": normalize}
    actual = function(**given, initial_state=state, output_final_state=True, **options)
    wanted = recurrence(**given, scale=scale, state=state, cu_seqlens=cu_seqlens, normalize=normalize)
    compare(actual, wanted, [*given.values(), state])
    o, none = function(**given, initial_state=state, **options)
    assert torch.equal(o, actual[0]) and none is None


def test_arguments_by_position(name):
    """q, k, v, g, beta: fla has the decay before beta, and only the ungated rule has beta in its place."""
    given = tokens(name)
    order = list(inspect.signature(getattr(fla, name)).parameters)
    assert order[: len(given)] == (
        list(given) if name != "fused_recurrent_gated_delta_rule" else ["q", "k", "v", "g", "gk"]
    )
    if name == "fused_recurrent_gated_delta_rule":
        assert order[5:7] == ["gv", "beta"]
        arguments = [*list(given.values())[:4], None, None, given["beta"]]
    else:
        arguments = given.values()
    torch.testing.assert_close(getattr(fla, name)(*arguments)[0], recurrence(**given)[0])


@pytest.mark.parametrize("name", GATED, indirect=True)
def test_gates_in_the_kernel(name):
    given = tokens(name) | {"g": leaf(*tokens(name)["g"].shape), "beta": leaf(B, T, HV)}
    per_key = name.endswith("kda")
    A_log, dt_bias = leaf(HV), leaf(HV * (K if per_key else 1))
    of_head = (HV, K) if per_key else (HV,)
    rate = A_log.exp()[:, None] if per_key else A_log.exp()
    x = given["g"] + dt_bias.view(of_head)
    flags = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias, "use_beta_sigmoid_in_kernel": True}
    gates = {"": -rate * torch.log(1 + x.exp())}
    if per_key:
        gates["lower_bound"] = -5 / (1 + torch.exp(-rate * x))
    for kind, g in gates.items():
        for twice in (False, True):
            beta = (2 if twice else 1) * torch.sigmoid(given["beta"])
            options = flags | {"allow_neg_eigval": twice} | ({"lower_bound": -5.0} if kind else {})
            actual = getattr(fla, name)(**given, **options, output_final_state=True)
            wanted = recurrence(**given | {"g": g, "beta": beta})
            # The gates are float32 here, as they are in fla.
            for a, e in zip(actual, wanted, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
            inputs = [*given.values(), A_log, dt_bias]
            grads, expected = (
                torch.autograd.grad(t[0].double().sum(), inputs, retain_graph=True) for t in (actual, wanted)
            )
            torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    without = {**given, "use_gate_in_kernel": True}
    with pytest.raises(ValueError, match=f"{name}: use_gate_in_kernel needs g and A_log"):
        getattr(fla, name)(**without)
    with pytest.raises(ValueError, match=f"{name}: allow_neg_eigval needs use_beta_sigmoid_in_kernel"):
        getattr(fla, name)(**given, allow_neg_eigval=True)


@pytest.mark.parametrize("per_key", [False, True])
def test_decays_of_keys_and_values(per_key):
    given = tokens("fused_recurrent_gated_delta_rule")
    gk = (-torch.rand(B, T, HV, K, dtype=WIDE)).requires_grad_() if per_key else None
    gv, state = (-torch.rand(B, T, HV, V, dtype=WIDE)).requires_grad_(), leaf(B, HV, K, V)
    options = {"initial_state": state, "output_final_state": True}
    actual = fla.fused_recurrent_gated_delta_rule(**given, gk=gk, gv=gv, **options)
    both = given | {"g": given["g"][..., None] + gk if per_key else given["g"]}
    inputs = [*given.values(), gv, state, *([gk] if per_key else [])]
    compare(actual, recurrence(**both, gv=gv, state=state), inputs)
    turned = fla.fused_recurrent_gated_delta_rule(
        **given, gk=gk, gv=gv, initial_state=state.mT, output_final_state=True, state_v_first=True
    )
    assert torch.equal(turned[0], actual[0]) and torch.equal(turned[1].mT, actual[1])


@pytest.mark.parametrize("name", GATED, indirect=True)
def test_states_with_values_first(name):
    given, state = tokens(name), leaf(B, HV, K, V)
    o, last = getattr(fla, name)(**given, initial_state=state, output_final_state=True)
    for option in ("state_v_first", "transpose_state_layout"):
        turned = getattr(fla, name)(**given, initial_state=state.mT, output_final_state=True, **{option: True})
        assert torch.equal(turned[0], o) and torch.equal(turned[1].mT, last)


class Names(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqkern":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


def test_one_token_behind_a_state_is_a_step(name):
    """Without gradients; the state that was given stays as it is."""
    given, state = tokens(name, length=1), leaf(B, HV, K, V)
    before = state.detach().clone()
    wanted = recurrence(**given, state=state, normalize=True)
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for turned in [False, True] if name in GATED else [False]:
        layout = {"state_v_first": True, "initial_state": state.mT} if turned else {}
        with torch.no_grad(), Names() as names:
            o, last = getattr(fla, name)(**given, **options | layout)
        assert names.seen == ["delta_rule_step"] and torch.equal(state, before)
        torch.testing.assert_close((o, last.mT if turned else last), wanted)
    with Names() as names:
        getattr(fla, name)(**given, **options)[0].sum().backward()
    assert names.seen == ["delta_rule_fwd", "delta_rule_bwd"] and state.grad is not None


def test_half_precision(name):
    given = {key: t.detach() for key, t in tokens(name).items()}
    given |= {key: given[key].bfloat16() for key in "qkv"}
    given |= {"k": F.normalize(given["k"].float(), dim=-1).bfloat16()}
    o, state = getattr(fla, name)(**given, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    wanted, _ = recurrence(**{key: t.double() for key, t in given.items()})
    assert (o.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_arguments_that_are_not_taken(name):
    given = tokens(name)
    if name != "fused_recurrent_delta_rule":
        with pytest.raises(DeprecationWarning, match=f"{name}: there is no head_first"):
            getattr(fla, name)(**given, head_first=True)
    if name in ("chunk_gated_delta_rule", "chunk_kda"):
        with pytest.raises(NotImplementedError, match=f"{name}: cp_context must be None"):
            getattr(fla, name)(**given, cp_context=object())
        assert torch.equal(getattr(fla, name)(**given, chunk_size=32)[0], getattr(fla, name)(**given)[0])
    if name == "chunk_kda":
        with pytest.raises(NotImplementedError, match="return_intermediate_states must be False"):
            fla.chunk_kda(**given, return_intermediate_states=True)
        with pytest.raises(ValueError, match="safe_gate with use_gate_in_kernel needs a lower_bound"):
            fla.chunk_kda(**given, safe_gate=True, use_gate_in_kernel=True, A_log=leaf(HV))
