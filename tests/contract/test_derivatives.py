"""Derivatives: against finite differences in float64, and through torch.func against the reference."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap


def positional(inputs, function=None):
    """(a function of the differentiable tensors alone that returns a tuple, these tensors)

    -inf, which a constant of an empty state may be, is no number to take differences of.
    """
    names = list(inputs.tensors)

    def call(*tensors):
        outputs = inputs.outputs(function, **dict(zip(names, tensors, strict=True))).values()
        return tuple(output.masked_fill(output == -torch.inf, 0) for output in outputs)

    return call, tuple(inputs.tensors.values())


def leaves(inputs):
    return tuple(tensor.detach().clone().requires_grad_() for tensor in inputs.tensors.values())


def test_gradcheck(tiny_case):
    inputs = tiny_case.inputs()
    call, _ = positional(inputs)
    assert gradcheck(call, leaves(inputs), check_forward_ad=True)


def test_gradgradcheck(tiny_case):
    inputs = tiny_case.inputs()
    call, _ = positional(inputs)
    assert gradgradcheck(call, leaves(inputs), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.fixture
def tiny(operator):
    """One small call with every differentiable argument and output."""
    nonlinear = {name: value for name, value in {"activation": "silu"}.items() if name in operator.factors}
    narrow = {name: choices[0] for name, choices in operator.tiny.items()}
    return operator.full_case(dtype=torch.float64, **narrow, **nonlinear).inputs()


def scalar(inputs, function=None):
    """A nonlinear scalar function of the tensors, for Hessians."""
    call, tensors = positional(inputs, function)
    return lambda *args: sum(output.square().sum() for output in call(*args)), tensors


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_jvp(tiny_case):
    inputs = tiny_case.inputs()
    (call, tensors), (reference, _) = positional(inputs), positional(inputs, inputs.operator.reference)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    assert_same(jvp(call, tensors, tangents), jvp(reference, tensors, tangents))


def test_jvp_of_one_argument(tiny):
    """Tangents that are absent are zeros."""
    call, tensors = positional(tiny)
    reference, _ = positional(tiny, tiny.operator.reference)
    for i, tensor in enumerate(tensors):
        tangent = torch.randn_like(tensor)

        def along(function, i=i, tensor=tensor, tangent=tangent):
            return jvp(lambda t: function(*tensors[:i], t, *tensors[i + 1 :]), (tensor,), (tangent,))

        assert_same(along(call), along(reference))


def test_vjp(tiny_case):
    inputs = tiny_case.inputs()
    (call, tensors), (reference, _) = positional(inputs), positional(inputs, inputs.operator.reference)
    cotangents = tuple(inputs.cotangents().values())
    assert_same(vjp(call, *tensors)[1](cotangents), vjp(reference, *tensors)[1](cotangents))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
def test_jacobians(tiny, jacobian):
    argnums = tuple(range(len(tiny.tensors)))
    (call, tensors), (reference, _) = scalar(tiny), scalar(tiny, tiny.operator.reference)
    assert_same(jacobian(call, argnums)(*tensors), jacobian(reference, argnums)(*tensors))


def test_third_derivative(tiny):
    """Derivatives compose: nothing stops at the second."""

    def third(function):
        call, tensors = scalar(tiny, function)

        def of_first(t):
            return call(t, *tensors[1:])

        def second(t):
            return (grad(of_first)(t) * v).sum()

        return [jvp(grad(second), (tensors[0],), (v,))[1], grad(lambda t: (grad(second)(t) * v).sum())(tensors[0])]

    v = torch.randn_like(next(iter(tiny.tensors.values())))
    assert_same(third(None), third(tiny.operator.reference))


def test_forward_mode_inside_forward_mode_raises(tiny):
    """torch loses the inner tangent of an autograd.Function, so the call must not return."""
    call, tensors = scalar(tiny)

    def along_ones(function):
        return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]

    def of_first(t):
        return call(t, *tensors[1:])

    for nested in (along_ones(along_ones(of_first)), jacfwd(jacfwd(of_first)), along_ones(grad(along_ones(of_first)))):
        with pytest.raises(RuntimeError, match="seqkern: forward mode inside forward mode"):
            nested(tensors[0])


def batched(inputs, names, V=3):
    """Each named tensor as V different ones, stacked at its last dimension; and the in_dims that say so."""
    tensors, in_dims = [], []
    for name, tensor in inputs.tensors.items():
        chosen = name in names
        tensors.append(torch.stack([tensor * (1 + v) + v for v in range(V)], dim=-1) if chosen else tensor)
        in_dims.append(tensor.dim() if chosen else None)
    return tuple(tensors), tuple(in_dims)


def one_by_one(function, tensors, in_dims, V=3):
    """What vmap promises, with a loop."""
    results = [
        function(*(t if dim is None else t.select(dim, v) for t, dim in zip(tensors, in_dims, strict=True)))
        for v in range(V)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def subsets(inputs):
    """Data alone, parameters alone where there are any, everything."""
    data = set(inputs.data)
    return [names for names in (data, inputs.tensors.keys() - data, set(inputs.tensors)) if names]


def test_vmap(small_case):
    inputs = small_case.but(dtype=torch.float64, parameter_dtype="same").inputs()
    call, _ = positional(inputs)
    for names in subsets(inputs):
        tensors, in_dims = batched(inputs, names)
        assert_same(vmap(call, in_dims)(*tensors), one_by_one(call, tensors, in_dims))


def test_vmap_of_grad(tiny_case):
    inputs = tiny_case.inputs()
    call, tensors = scalar(inputs)
    gradient = grad(call, argnums=tuple(range(len(tensors))))
    for names in subsets(inputs):
        mapped, in_dims = batched(inputs, names)
        assert_same(vmap(gradient, in_dims)(*mapped), one_by_one(gradient, mapped, in_dims))


def test_vmap_over_packings(operator):
    """Different sequences in every element of the map."""
    inputs = operator.case(dtype=torch.float64, packing="cu_seqlens", initial_state=True).inputs()
    bounds, L = inputs.options["cu_seqlens"], inputs.sizes["L"]
    several = torch.stack([bounds, bounds.clamp(max=0).index_fill(0, torch.tensor(len(bounds) - 1), L)])
    mapped = vmap(lambda cu_seqlens: inputs.but(cu_seqlens=cu_seqlens).outputs()["y"])(several)
    assert_same(mapped, torch.stack([inputs.but(cu_seqlens=row).outputs()["y"] for row in several]))


def test_forward_mode_of_the_operator_itself_raises_or_is_right(tiny):
    """The registered operator has no forward-mode rule of its own; the public function always finds one."""
    with torch.autograd.forward_ad.dual_level():
        duals = {
            name: torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            for name, tensor in tiny.tensors.items()
        }
        actual = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in tiny.outputs(**duals).values()]
        reference = tiny.outputs(tiny.operator.reference, **duals)
        expected = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in reference.values()]
    assert_same(actual, expected)
