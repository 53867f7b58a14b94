"""torch.compile and torch.export: one graph for every length, and no derivative that is silently missing."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

STATES = {"initial_state": True, "return_final_state": True}
CASES = [
    STATES,
    STATES | {"packing": "cu_seqlens", "reverse": True, "dtype": torch.bfloat16},
    {"packing": "seq_idx", "layout": "transposed", "parameter_dtype": torch.bfloat16},
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        yield
    torch._dynamo.reset()


def of_length(operator, L, factors):
    """With every argument that may be None, states only where the factors say so."""
    letters = operator.shape.split()
    sizes = dict(zip(letters, operator.factors["shape"][0], strict=True)) | {"L": L}
    offered = {name: value for name, value in factors.items() if value in operator.factors[name]}
    factors = {"initial_state": False, "return_final_state": False} | offered
    return operator.full_case(shape=tuple(sizes[letter] for letter in letters), **factors).inputs()


def compiled(operator, backend, dynamic=True):
    return torch.compile(operator.function, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize("factors", CASES, ids=str)
def test_one_graph_for_every_length(operator, factors):
    """Forward and backward, bitwise as in eager mode."""
    counter = CompileCounterWithBackend("aot_eager")
    function, graphs = compiled(operator, counter), []
    for L in (17, 33, 6, 64):
        inputs = of_length(operator, L, factors)
        cotangents = inputs.cotangents()
        actual, expected = inputs.gradients(cotangents, function), inputs.gradients(cotangents)
        for mine, theirs in zip(actual, expected, strict=True):
            for name in theirs:
                assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), name
        graphs.append(counter.frame_count)
    # The compiler starts over where it finds that an operator takes a number: one graph, in the second attempt.
    assert graphs == graphs[:1] * 4 and graphs[0] <= 2


OPTIONS = {"activation": "silu", "dilation": 2, "delta_softplus": True, "transition": "two_exp_minus_one"}
OPTIONS |= {"log_space": True, "reset": True, "a": "D"}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
def test_no_length_and_one_token(operator, options):
    function = compiled(operator, "aot_eager")
    for L in (0, 1, 2):
        inputs = of_length(operator, L, {name: value for name, value in options.items() if name in operator.factors})
        with torch.no_grad():
            assert torch.equal(inputs.outputs(function)["y"], inputs.outputs()["y"])


def test_step_updates_its_state_in_a_graph(operator):
    for kind in [{"complex": value} for value in operator.factors.get("complex", ())] or [{}]:
        inputs = operator.case(initial_state=True, **kind).inputs()
        step = torch.compile(operator.step, fullgraph=True, backend="aot_eager")
        states = [[part.clone() for part in inputs.state] for _ in range(2)]
        for t in range(3):
            ys = [inputs.step(t, state, function) for state, function in zip(states, (step, None), strict=True)]
            assert torch.equal(*ys) and all(map(torch.equal, *states))


@pytest.mark.slow
@torch.compiler.config.patch(force_disable_caches=True)  # the cache does not know when an operator's shapes change
def test_inductor(operator):
    """The default backend, with other operations around the operator that it fuses."""

    def layer(*args, **options):
        result = operator.function(*args, **options)
        y, *rest = result if isinstance(result, tuple) else (result,)
        return (torch.sigmoid(y) * 2, *rest)

    function = torch.compile(layer, fullgraph=True, dynamic=True)
    for L in (17, 40):
        inputs = of_length(operator, L, STATES)
        cotangents = inputs.cotangents()
        actual, expected = inputs.gradients(cotangents, function), inputs.gradients(cotangents, layer)
        for mine, theirs in zip(actual, expected, strict=True):
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], msg=name)


def test_export(operator):
    """A program with the operator inside, for any length."""

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return inputs.outputs(**tensors)

    inputs = of_length(operator, 17, STATES)
    dynamic = {
        name: {operator.axis(name, "L"): torch.export.Dim("L", min=2)} if name in inputs.data else None
        for name in inputs.tensors
    }
    program = torch.export.export(Module(), (inputs.tensors,), dynamic_shapes=(dynamic,), strict=False)
    assert [node.target.__name__ for node in program.graph.nodes if "seqkern" in str(node.target)] == [
        f"{operator.raw}_fwd.default"
    ]
    longer = of_length(operator, 23, STATES)
    actual, expected = program.module()(longer.tensors), longer.outputs()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def scalar_function(operator):
    """y.square().sum() of the first data argument, to be differentiated."""
    inputs = operator.case(dtype=torch.float64).inputs()
    name = operator.data[0]
    return lambda t: inputs.outputs(**{name: t})["y"].square().sum(), inputs.tensors[name]


def assert_right_or_raises(compute, expected):
    """A derivative may be missing; it may not be wrong."""
    try:
        actual = compute()
    except Exception as error:
        # One of the compiler, of autograd or of ours, not of the test.
        text = type(error).__module__ + str(error)
        assert "torch" in text or "not have been used in the graph" in text, error
        return
    assert actual is not None
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_forward_mode_is_right_or_raises(operator, fullgraph):
    f, x = scalar_function(operator)
    v = torch.randn_like(x)
    expected = torch.func.jvp(f, (x,), (v,))[1]
    assert expected != 0

    def transform(x, v):
        return torch.func.jvp(f, (x,), (v,))[1]

    def with_duals(f, x, v):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, v))).tangent

    def build(function):
        return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)

    assert_right_or_raises(lambda: build(transform)(x, v), expected)
    assert_right_or_raises(lambda: build(lambda x, v: with_duals(f, x, v))(x, v), expected)
    assert_right_or_raises(lambda: with_duals(build(f), x, v), expected)
    assert_right_or_raises(lambda: torch.func.jvp(build(f), (x,), (v,))[1], expected)
    jacobian = build(torch.func.jacfwd(f))
    assert_right_or_raises(lambda: (jacobian(x) * v).sum(), expected)


def test_forward_mode_says_why_it_raises(operator):
    f, x = scalar_function(operator)
    function = torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"seqkern: forward mode does not work under torch\.compile"):
        function(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_double_backward_is_right_or_raises(operator, backend):
    f, x = scalar_function(operator)

    def second(function):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(3).sum(), leaf)[0]

    assert_right_or_raises(lambda: second(torch.compile(f, backend=backend, fullgraph=True)), second(f))


def test_the_registered_operator_differentiates_twice(operator, record, monkeypatch):
    """What compiled code calls is the operator itself; called by hand it has first and second derivatives as well."""
    from seqkern._load import library

    inputs = operator.case(dtype=torch.float64, initial_state=True, return_final_state=True).inputs()
    options = {name: value for name, value in {"activation": "silu"}.items() if name in operator.factors}
    inputs = inputs.but(**options)

    def second(forward):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        with monkeypatch.context() as patch:
            if forward == "registered":
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            outputs = inputs.outputs(**leaves)
        loss = sum(output.square().sum() for output in outputs.values())
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return first, torch.autograd.grad(sum(grad.square().sum() for grad in first), list(leaves.values()))

    assert library.ops is torch.ops.seqkern
    for actual, expected in zip(second("registered"), second("function"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_right_or_raise(operator, transform):
    f, x = scalar_function(operator)
    function, argument = {
        "vmap": (torch.func.vmap(f), torch.stack([x, 2 * x])),
        "grad": (torch.func.grad(f), x),
    }[transform]
    compiled = torch.compile(function, backend="aot_eager")
    assert_right_or_raises(lambda: compiled(argument), function(argument))
