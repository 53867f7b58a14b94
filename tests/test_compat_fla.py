"""seqkern.compat.fla against the recurrences that fla documents, written out here in plain float64 torch."""

import inspect
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from seqkern.compat import fla

B, T, H, K, V = 2, 9, 3, 4, 5
WIDE = torch.float64
BOUNDS = [0, 4, 4, 9]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def gradients(outputs, tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(outputs, tensors, [torch.randn(t.shape, dtype=t.dtype) for t in outputs])


def leaf(*shape):
    return torch.randn(*shape, dtype=WIDE).requires_grad_()


def sequence(q, k, v, g, scale, S, *, gv=None, u=None, reverse=False):
    """One sequence and head, token by token: q, k, g (T, K), v, gv (T, V), u (K,), S (K, V) -> (o, S)."""
    o = [None] * len(q)
    for t in reversed(range(len(q))) if reverse else range(len(q)):
        new = torch.outer(k[t], v[t])
        read = None if u is None else S + u[:, None] * new
        S = torch.exp(g[t])[:, None] * S
        S = (S if gv is None else torch.exp(gv[t]) * S) + new
        o[t] = scale * (q[t] @ (S if read is None else read))
    return (torch.stack(o) if o else torch.zeros_like(v)), S


def recurrence(q, k, v, g, scale=None, state=None, cu_seqlens=None, gv=None, u=None, reverse=False):
    """g broadcasts to (B, T, H, K) -> (o, states)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = g.expand(q.shape) if isinstance(g, torch.Tensor) else torch.full_like(q, g)
    bounds = [(b, 0, q.shape[1]) for b in range(len(q))]
    bounds = bounds if cu_seqlens is None else [(0, *pair) for pair in pairwise(cu_seqlens.tolist())]
    outs, states = [], []
    for n, (b, begin, end) in enumerate(bounds):
        o, S = [], []
        for h in range(q.shape[2]):
            own = [t[b, begin:end, h] for t in (q, k, v, g)]
            start = q.new_zeros(q.shape[-1], v.shape[-1]) if state is None else state[n, h]
            more = {"gv": None if gv is None else gv[b, begin:end, h], "u": None if u is None else u[h]}
            out, last = sequence(*own, scale, start, **more, reverse=reverse)
            o.append(out)
            S.append(last)
        outs.append(torch.stack(o, dim=1))
        states.append(torch.stack(S))
    return (torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]), torch.stack(states)


def qkv():
    return leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V)


def log_decay(*shape):
    return (-torch.rand(*shape, dtype=WIDE)).requires_grad_()


RETENTION = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=WIDE)))[:, None]
LIGHTNING = -8 / H * (1 - 2 / 6) * torch.arange(H, dtype=WIDE)[:, None]
# name: (the arguments after v, what `recurrence` takes of them)
FUNCTIONS = {
    "simple_gla": (lambda: {"g": log_decay(B, T, H)}, lambda a: {"g": a["g"][..., None]}),
    "simple_gla-constant": (lambda: {"g_gamma": log_decay(H)}, lambda a: {"g": a["g_gamma"][:, None]}),
    "simple_gla-both": (
        lambda: {"g": log_decay(B, T, H), "g_gamma": log_decay(H)},
        lambda a: {"g": (a["g"] + a["g_gamma"])[..., None]},
    ),
    "simple_gla-none": (dict, lambda a: {"g": 0}),
    "retention": (dict, lambda a: {"g": RETENTION}),
    "lightning_attn": (lambda: {"layer_idx": 2, "num_layers": 6}, lambda a: {"g": LIGHTNING}),
    "linear_attn": (lambda: {"normalize": False}, lambda a: {"g": 0}),
    "gla": (lambda: {"g": log_decay(B, T, H, K)}, lambda a: {"g": a["g"]}),
    "rwkv6": (lambda: {"w": log_decay(B, T, H, K), "u": leaf(H, K)}, lambda a: {"g": a["w"], "u": a["u"]}),
}
KINDS = ("chunk", "fused_chunk", "fused_recurrent", "parallel")


def functions():
    every = [
        (form, kind, getattr(fla, f"{kind}_{form.partition('-')[0]}", None)) for form in FUNCTIONS for kind in KINDS
    ]
    known = [row for row in every if row[2] is not None and not (row[1] == "parallel" and "-" in row[0])]
    return [pytest.param(form, function, id=f"{kind}-{form}") for form, kind, function in known]


def arguments(form, function):
    """As FUNCTIONS has them, under the function's own names."""
    make, meaning = FUNCTIONS[form]
    args = make()
    given = {"gk" if function is fla.fused_recurrent_gla and name == "g" else name: t for name, t in args.items()}
    return given, meaning(args), [t for t in args.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("form", "function"), functions())
def test_values_and_gradients(form, function, scale):
    tensors = qkv()
    given, meaning, others = arguments(form, function)
    has_state = "initial_state" in inspect.signature(function).parameters
    state = leaf(B, H, K, V) if has_state else None
    options = {"initial_state": state, "output_final_state": True} if has_state else {}
    o, final = function(*tensors, **given, scale=scale, **options)
    wanted, wanted_final = recurrence(*tensors, **meaning, scale=scale, state=state)
    close(o, wanted)
    inputs = [*tensors, *others]
    outputs, expected = [o], [wanted]
    if has_state:
        close(final, wanted_final)
        inputs.append(state)
        outputs, expected = [o, final], [wanted, wanted_final]
        again = function(*tensors, **given, scale=scale, initial_state=state)
        assert torch.equal(again[0], o) and again[1] is None
    else:
        assert final is None
    for actual, value in zip(gradients(outputs, inputs), gradients(expected, inputs), strict=True):
        close(actual, value, 1e-5)


@pytest.mark.parametrize(("form", "function"), functions())
def test_sequences_in_a_batch_of_one(form, function):
    tensors = [t[:1].detach() for t in qkv()]
    given, _, _ = arguments(form, function)
    one = {name: t[:1].detach() if isinstance(t, torch.Tensor) and t.dim() > 2 else t for name, t in given.items()}
    _, meaning = FUNCTIONS[form]
    meaning = meaning({"g" if name == "gk" else name: t for name, t in one.items()})
    cu_seqlens = torch.tensor(BOUNDS)
    has_state = "initial_state" in inspect.signature(function).parameters
    state = torch.randn(3, H, K, V, dtype=WIDE) if has_state else None
    options = {"initial_state": state, "output_final_state": True} if has_state else {}
    o, final = function(*tensors, **one, cu_seqlens=cu_seqlens, **options)
    wanted, wanted_final = recurrence(*tensors, **meaning, state=state, cu_seqlens=cu_seqlens)
    close(o, wanted)
    if has_state:
        close(final, wanted_final)


@pytest.mark.parametrize("form", [form for form in FUNCTIONS if "-" not in form])
def test_reverse(form):
    function = getattr(fla, f"fused_recurrent_{form}")
    tensors = qkv()
    given, meaning, _ = arguments(form, function)
    state = torch.randn(B, H, K, V, dtype=WIDE)
    o, final = function(*tensors, **given, reverse=True, initial_state=state, output_final_state=True)
    wanted, wanted_final = recurrence(*tensors, **meaning, state=state, reverse=True)
    close(o, wanted)
    close(final, wanted_final)


V_FIRST = ["chunk_gla", "chunk_simple_gla"] + [f"fused_recurrent_{form}" for form in ("gla", "retention", "simple_gla")]


@pytest.mark.parametrize("name", V_FIRST)
def test_values_first_in_states(name):
    kind, form = re.fullmatch("(chunk|fused_recurrent)_(.*)", name).groups()
    function = getattr(fla, name)
    state = torch.randn(B, H, K, V, dtype=WIDE)
    args = (*qkv(), *arguments(form, function)[0].values())
    o, final = function(*args, initial_state=state, output_final_state=True)
    turned, final_turned = function(*args, initial_state=state.mT, output_final_state=True, state_v_first=True)
    close(turned, o)
    close(final_turned, final.mT)
    if kind == "fused_recurrent":
        old = {"transpose_state_layout": True, "initial_state": state.mT, "output_final_state": True}
        close(function(*args, **old)[1], final.mT)
        with pytest.raises(ValueError, match="transpose_state_layout is the old name"):
            function(*args, **old, state_v_first=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_decays_of_values(both, reverse):
    q, k, v = qkv()
    gk, gv, state = log_decay(B, T, H, K) if both else None, log_decay(B, T, H, V), leaf(B, H, K, V)
    options = {"reverse": reverse, "output_final_state": True}
    o, final = fla.fused_recurrent_gla(q, k, v, gk, gv, initial_state=state, **options)
    wanted = recurrence(q, k, v, gk if both else 0, state=state, gv=gv, reverse=reverse)
    close(o, wanted[0])
    close(final, wanted[1])
    tensors = [q, k, v, gv, state, *([gk] if both else [])]
    for actual, expected in zip(gradients([o, final], tensors), gradients(wanted, tensors), strict=True):
        close(actual, expected, 1e-5)
    turned = fla.fused_recurrent_gla(q, k, v, gk, gv, initial_state=state.mT, state_v_first=True, **options)
    close(turned[0], o)
    close(turned[1], final.mT)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("kind", ["chunk", "fused_chunk", "fused_recurrent", "reverse"])
def test_normalized(kind, scale, packed):
    """The divisor is the sum of the scores, scale included, plus 1e-10."""
    rows = 1 if packed else B
    q, k, v = ((t[:rows].detach().abs()).requires_grad_() for t in qkv())
    reverse, N = kind == "reverse", 3 if packed else B
    function = getattr(fla, f"{'fused_recurrent' if reverse else kind}_linear_attn")
    options = {"normalize": True, "scale": scale, **({"reverse": True} if reverse else {})}
    options |= {"cu_seqlens": torch.tensor(BOUNDS)} if packed else {}
    S, z = torch.rand(N, H, K, V, dtype=WIDE), torch.rand(N, 1, H, K, dtype=WIDE)

    def wanted(S, z):
        """A last value of 1 makes z the last column of the state."""
        columns = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        state = torch.cat([S, z[:, 0, :, :, None]], dim=-1)
        o, last = recurrence(q, k, columns, 0, scale, state, options.get("cu_seqlens"), reverse=reverse)
        return o[..., :-1] / (o[..., -1:] + 1e-10), last[..., :-1], last[..., -1][:, None]

    o, (last, z_last) = function(q, k, v, initial_state=(S, z), output_final_state=True, **options)
    outputs, expected = [o, last, z_last], wanted(S, z)
    for actual, value in zip(outputs, expected, strict=True):
        close(actual, value)
    for actual, value in zip(gradients(outputs, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        close(actual, value, 1e-5)
    close(function(q, k, v, initial_state=S, **options)[0], wanted(S, torch.zeros_like(z))[0])
    o, none = function(q, k, v, **options)
    assert none is None
    close(o, wanted(torch.zeros_like(S), torch.zeros_like(z))[0])


def test_defaults_are_those_of_fla():
    q, k, v = qkv()
    assert torch.equal(fla.chunk_linear_attn(q, k, v)[0], fla.chunk_linear_attn(q, k, v, normalize=True)[0])
    plain = fla.fused_recurrent_linear_attn(q, k, v)[0]
    assert torch.equal(plain, fla.fused_recurrent_linear_attn(q, k, v, normalize=False)[0])
    zero = fla.chunk_linear_attn(torch.zeros_like(q), k, v)[0]
    assert not zero.any()  # 0 / 1e-10


def test_value_heads_may_share_keys():
    q, k, v = qkv()
    v, g = leaf(B, T, 2 * H, V), log_decay(B, T, 2 * H)
    o, _ = fla.chunk_simple_gla(q, k, v, g)
    wanted, _ = fla.chunk_simple_gla(q.repeat_interleave(2, 2), k.repeat_interleave(2, 2), v, g)
    close(o, wanted)


def test_arguments_that_fla_has_given_up():
    q, k, v = qkv()
    calls = [
        lambda **o: fla.chunk_simple_gla(q, k, v, **o),
        lambda **o: fla.chunk_retention(q, k, v, **o),
        lambda **o: fla.fused_chunk_retention(q, k, v, **o),
        lambda **o: fla.parallel_retention(q, k, v, **o),
        lambda **o: fla.parallel_simple_gla(q, k, v, **o),
        lambda **o: fla.chunk_lightning_attn(q, k, v, 0, 2, **o),
        lambda **o: fla.fused_recurrent_lightning_attn(q, k, v, 0, 2, **o),
        lambda **o: fla.chunk_rwkv6(q, k, v, torch.zeros_like(q), q[0, 0], **o),
        lambda **o: fla.fused_recurrent_rwkv6(q, k, v, torch.zeros_like(q), q[0, 0], **o),
    ]
    for call in calls:
        with pytest.raises(DeprecationWarning, match="there is no head_first"):
            call(head_first=True)
        assert torch.equal(call(chunk_size=32)[0], call()[0])
    for call in calls[3:5]:
        with pytest.raises(NotImplementedError, match="output_attentions must be False"):
            call(output_attentions=True)


def test_half_precision():
    tensors = [t.detach().bfloat16() for t in qkv()]
    g = -torch.rand(B, T, H)
    o, state = fla.chunk_simple_gla(*tensors, g, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    wanted, _ = recurrence(*(t.double() for t in tensors), g.double()[..., None])
    assert (o.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_names_of_the_package():
    code = """
import seqkern.compat
seqkern.compat.install(force=True)
from fla.ops import chunk_gla, chunk_retention, chunk_simple_gla, fused_recurrent_rwkv6
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.gla import chunk_gla as same, fused_chunk_gla, fused_recurrent_gla
from fla.ops.gla.chunk import chunk_gla as same_again
from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn
from fla.ops.lightning_attn import chunk_lightning_attn, fused_recurrent_lightning_attn
from fla.ops.retention import chunk_retention, fused_chunk_retention, fused_recurrent_retention, parallel_retention
from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla
from fla.ops.simple_gla.fused_recurrent import fused_recurrent_simple_gla
import fla, sys
print(chunk_gla is same is same_again is fla.ops.gla.chunk.chunk_gla, fla.__version__)
for missing in ("from fla.ops.rwkv7 import chunk_rwkv7", "from fla.layers import GatedLinearAttention"):
    try:
        exec(missing)
    except ImportError as error:
        print("ImportError")
seqkern.compat.uninstall()
print(any(name.partition(".")[0] == "fla" for name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "0.5.2", "ImportError", "ImportError", "False"]
