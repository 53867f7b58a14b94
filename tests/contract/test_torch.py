"""How operators sit in torch: schemas, fakes, autocast, what a call dispatches, what it allocates, its size limits."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What else a call may run: allocation, views, and autograd's own bookkeeping. No copy, no flip, no cat, no loop.
FORWARD_ALLOWED = {"aten::new_empty", "aten::empty", "aten::empty_strided", "aten::transpose", "aten::as_strided"}
# "to" without "_to_copy" found the dtype right and did nothing.
FORWARD_ALLOWED |= {"aten::squeeze", "aten::unsqueeze", "aten::to"}
BACKWARD_ALLOWED = FORWARD_ALLOWED | {"aten::new_zeros", "aten::zero_"}
# What a product of matrices calls, and a sum.
PRODUCTS = {"matmul", "bmm", "mm", "sum", "fill_", "copy_", "clone", "contiguous", "empty_like", "resolve_conj"}
PRODUCTS |= {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "narrow", "slice", "select"}
PRODUCTS = {f"aten::{name}" for name in PRODUCTS}


@pytest.fixture
def clean_memory(monkeypatch):
    """Without the poison, which would show up as work and memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_opcheck(tiny_case, record):
    calls = record(tiny_case)
    assert {op.name() for op, _ in calls} == {
        f"seqkern::{tiny_case.operator.raw}_{kind}" for kind in ("fwd", "bwd", "step")
    }
    for op, args in {op: (op, args) for op, args in calls}.values():
        torch.library.opcheck(op, args)
        if "_step" not in op.name():
            tensors = [isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args]
            differentiable = [arg.requires_grad_() if t else arg for t, arg in zip(tensors, args, strict=True)]
            torch.library.opcheck(op, differentiable, test_utils="test_autograd_registration")
        if "_fwd" in op.name():
            torch.library.opcheck(op, differentiable, test_utils="test_aot_dispatch_dynamic")


def test_fakes_agree(case, record):
    """Shapes, dtypes and strides without data: what compilation plans with. opcheck on the rest of the table."""
    for op, args in record(case):
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        outputs = op(*args)
        listed = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        for real, fake in zip(listed, [fakes] if isinstance(fakes, torch.Tensor) else fakes, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype), op.name()
            assert real.numel() == 0 or fake.stride() == real.stride(), op.name()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(operator, device, dtype):
    """Matrix operands are cast, decays and states never; gradients come back in the dtype of their tensors."""
    inputs = operator.full_case().inputs(device)
    by_hand = inputs.but({name: inputs.tensors[name].to(dtype) for name in operator.autocast})
    cotangents = by_hand.cotangents()
    with torch.autocast(device, dtype=dtype):
        outputs, grads = inputs.gradients(cotangents)
        step = inputs.step(0, [part.clone() for part in inputs.state])
    expected, expected_grads = by_hand.gradients(cotangents)
    for name, output in outputs.items():
        assert output.dtype == expected[name].dtype and torch.equal(output, expected[name]), name
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected_grads[name].float()), name
    expected_step = by_hand.step(0, [part.clone() for part in by_hand.state])
    assert step.dtype == expected_step.dtype and torch.equal(step, expected_step)


def test_autocast_leaves_float64_alone(operator, device):
    inputs = operator.case(dtype=torch.float64).inputs(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(inputs.outputs()["y"], inputs.outputs()["y"])
        assert inputs.outputs()["y"].dtype == torch.float64


def dispatched(run):
    """Names of all operators that run, the inner ones too, with our own kept apart."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CPU]
    names = [name for name in names if not name.startswith(("autograd::", "torch::autograd::", "[memory]"))]
    return [name for name in names if "seqkern" in name], {name for name in names if "seqkern" not in name}


# Calls that take their data as it lies; parameters in any other than the contiguous order are copied.
NATIVE = [
    {},
    {"reverse": True, "initial_state": True, "return_final_state": True},
    {"packing": "cu_seqlens", "initial_state": True, "return_final_state": True, "layout": "transposed"},
    {"packing": "seq_idx", "reverse": True, "dtype": torch.bfloat16},
]


def native(operator, factors):
    offers = operator.factors | {"layout": operator.native_layouts}
    offered = {name: value for name, value in factors.items() if value in offers[name]}
    inputs = operator.case(**operator.native_factors, **offered).inputs()
    return inputs.but({n: t.contiguous() for n, t in inputs.tensors.items() if n not in inputs.data})


@pytest.mark.parametrize("factors", NATIVE, ids=str)
def test_one_kernel_forward_and_one_backward(operator, clean_memory, factors):
    inputs = native(operator, factors)
    with torch.no_grad():
        ours, others = dispatched(inputs.outputs)
    assert ours == [f"seqkern::{operator.raw}_fwd"] and others <= FORWARD_ALLOWED, others

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs, cotangents = {}, inputs.cotangents()
    ours, others = dispatched(lambda: outputs.update(inputs.outputs(**leaves)))
    functions = {name for name in others if name.startswith("_")}  # autograd.Function, by its class
    assert ours == [f"seqkern::{operator.raw}_fwd"] and others - functions <= FORWARD_ALLOWED, others

    ours, others = dispatched(
        lambda: torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(cotangents.values()))
    )
    functions = {name for name in others if re.search(r"Backward\d?$", name)}
    allowed = BACKWARD_ALLOWED | (PRODUCTS if operator.ends_in_products else set())
    assert ours == [f"seqkern::{operator.raw}_bwd"] and others - functions <= allowed, others


def test_one_kernel_for_a_step(operator, clean_memory):
    inputs = operator.case(initial_state=True).inputs()
    ours, others = dispatched(lambda: inputs.step(0, inputs.state))
    selected = {"aten::select", "aten::as_strided"}  # the test cuts its token out
    assert ours == [f"seqkern::{operator.raw}_step"] and others <= FORWARD_ALLOWED | selected, others


def peak_bytes(run):
    """The most memory that was allocated at once, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


@pytest.mark.parametrize("factors", NATIVE, ids=str)
def test_peak_allocation(operator, clean_memory, factors):
    """Outputs, gradients, and what the operator states that it keeps and works in: nothing else."""
    inputs = native(operator, {"shape": operator.factors["shape"][4]} | factors)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs = {}
    forward = peak_bytes(lambda: outputs.update(inputs.outputs(**leaves)))
    assert forward <= sum(output.nbytes for output in outputs.values()) + operator.kept_bytes(inputs)

    cotangents = list(inputs.cotangents().values())
    backward = peak_bytes(lambda: torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents))
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in leaves.values())
    assert backward <= gradients + operator.workspace_bytes(inputs)


@pytest.mark.one_per_folder
def test_more_than_two_to_the_31_elements(operator, clean_memory):
    """Offsets are 64 bit: rows repeated by strides of zero all come out like the first, forward and backward."""
    long = {"L": 2**19, "B": 2}
    inner = next(letter for letter in operator.shape.split() if letter not in long)
    large = [name for name in operator.case().inputs().data if operator.axis(name, inner) is not None]
    dims = operator.outputs["y"].count(" ")
    needed = 6e9 * (1 + sum(operator.arguments[name].count(" ") >= dims for name in large))
    available = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    if available < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available")
    shape = [long.get(letter, operator.lean.get(letter, 2)) for letter in operator.shape.split()]
    lean = {name: value for name, value in operator.lean.items() if name in operator.factors}
    inputs = operator.case(dtype=torch.bfloat16, shape=tuple(shape), **lean).inputs()
    repeats = 2**31 // torch.Size(shape).numel() + 1

    def repeated(name, tensor):
        """More of the first dimension that is neither batch nor time: channels or heads."""
        at = operator.axis(name, inner)
        if at is None:
            return tensor
        first = tensor.narrow(at, 0, 1)
        return first.expand(*tensor.shape[:at], 2 * repeats, *tensor.shape[at + 1 :])

    wide = inputs.but({name: repeated(name, tensor) for name, tensor in inputs.tensors.items()})
    narrow = inputs.but(
        {
            name: tensor if operator.axis(name, inner) is None else tensor.narrow(operator.axis(name, inner), 0, 1)
            for name, tensor in inputs.tensors.items()
        }
    )
    at = operator.axis("y", inner)

    x = next(name for name in operator.data if operator.axis(name, inner) is not None)
    leaf = wide.tensors[x].requires_grad_()
    y = wide.outputs()["y"]
    assert y.numel() > 2**31
    cotangent = narrow.outputs()["y"]
    (dx,) = torch.autograd.grad(y, leaf, cotangent.expand(y.shape))
    expected = {"y": cotangent} | narrow.gradients({"y": cotangent})[1]
    for i in (0, repeats, 2 * repeats - 1):
        assert torch.equal(y.select(at, i), expected["y"].select(at, 0))
        of_one, of_all = (grad.select(operator.axis(x, inner), j) for grad, j in ((expected[f"d{x}"], 0), (dx, i)))
        assert torch.equal(of_all, of_one)
