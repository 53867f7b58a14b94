"""Outputs and gradients against the reference in float64, within what plain PyTorch does (seqkern.testing.compare)."""

import pytest
import torch

from seqkern.testing import assert_close


def reference_runs(inputs, cotangents):
    """The reference in float64, and in float32, in which the operator accumulates."""
    reference = inputs.operator.reference
    return [inputs.to(dtype).gradients(cotangents, reference) for dtype in (torch.float64, torch.float32)]


def test_outputs_and_gradients(case, device):
    inputs = case.inputs(device)
    cotangents = inputs.cotangents()
    outputs, grads = inputs.gradients(cotangents)
    exact, plain = reference_runs(inputs, cotangents)
    assert_close(outputs | grads, exact[0] | exact[1], plain[0] | plain[1], inputs.coarse)


def test_dtypes_and_devices(small_case, device):
    inputs = small_case.inputs(device)
    outputs, grads = inputs.gradients(inputs.cotangents())
    for name, output in outputs.items():
        is_state = inputs.operator.axis(name, "N") is not None
        assert output.dtype == (inputs.accumulator if is_state else inputs.dtype), name
        assert output.device.type == device
    assert all(grads[f"d{name}"].dtype == tensor.dtype for name, tensor in inputs.tensors.items())


def test_one_gradient_at_a_time(small_case):
    """Whichever tensors require a gradient, theirs are the same bits."""
    inputs = small_case.inputs()
    cotangents = inputs.cotangents()
    _, together = inputs.gradients(cotangents)
    for name, tensor in inputs.tensors.items():
        leaf = tensor.detach().requires_grad_()
        outputs = inputs.outputs(**{name: leaf})
        # A final state may not depend on this tensor at all.
        used = {key: output for key, output in outputs.items() if output.requires_grad}
        (grad,) = torch.autograd.grad(
            list(used.values()), leaf, [cotangents[key] for key in used], allow_unused=True, materialize_grads=True
        )
        assert torch.equal(grad, together[f"d{name}"]), name


def test_one_output_at_a_time(operator, device):
    """The gradient through the output alone and through the state alone add up to the gradient through both."""
    inputs = operator.case(dtype=torch.float64, initial_state=True, return_final_state=True).inputs(device)
    cotangents = inputs.cotangents()
    _, both = inputs.gradients(cotangents)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    total = dict.fromkeys(both, 0)
    for output, value in inputs.outputs(**leaves).items():
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        grads = torch.autograd.grad(value, list(leaves.values()), cotangents[output], **options)
        for name, grad in zip(both, grads, strict=True):
            total[name] = total[name] + grad
    for name in both:
        torch.testing.assert_close(total[name], both[name], rtol=1e-12, atol=1e-12, msg=name)


def test_expanded_cotangents(operator, device):
    """y.sum().backward() hands a gradient with strides of zero to the operator."""
    inputs = operator.case(dtype=torch.float64, initial_state=True, return_final_state=True).inputs(device)
    ones = {name: torch.ones_like(output) for name, output in inputs.outputs().items()}
    scalars = {name: torch.ones((), dtype=one.dtype, device=device).expand(one.shape) for name, one in ones.items()}
    expected, actual = inputs.gradients(ones)[1], inputs.gradients(scalars)[1]
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("factors", [{}, {"packing": "cu_seqlens", "reverse": True}], ids=str)
def test_memory_layout_changes_nothing(operator, device, layout, factors):
    case = operator.case(initial_state=True, return_final_state=True, layout=layout, **factors)
    inputs = case.inputs(device)
    contiguous = inputs.but({name: tensor.contiguous() for name, tensor in inputs.tensors.items()})
    cotangents = inputs.cotangents()
    actual, expected = inputs.gradients(cotangents), contiguous.gradients(cotangents)
    for mine, theirs in zip(actual, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


def test_no_input_is_changed(small_case):
    inputs = small_case.inputs()
    packing = {name: value for name, value in inputs.options.items() if isinstance(value, torch.Tensor)}
    tensors = inputs.tensors | packing
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    inputs.gradients(inputs.cotangents())
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
