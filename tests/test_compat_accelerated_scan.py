"""seqkern.compat.accelerated_scan against the recurrence in float64, with the properties that the package's tests name:
odd lengths, complex gates of modulus close to one, and the gradient as a reversed scan."""

import subprocess
import sys

import pytest
import torch

from seqkern.compat.accelerated_scan import (
    Scan,
    scan,
    scan_forward,
    scan_inputs,
    scan_ref,
    warpscan_backward,
    warpscan_forward,
)

B, C = 2, 3
LONG = 1000  # tokens from which on a batch has one row
LENGTHS = [1, 2, 31, 64, 8000, 16323, 33753, 127323]
WIDE = {False: torch.float64, True: torch.complex128}
LOSSES = {
    "real mean": lambda x: x.real.mean(),
    "last sum": lambda x: x[..., -1].real.sum() + x[..., -1].imag.sum(),
    "square mean": lambda x: x.abs().square().mean(),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3407)


def loop(gates, tokens):
    x, xs = torch.zeros_like(tokens[..., 0]), []
    for gate, token in zip(gates.unbind(-1), tokens.unbind(-1), strict=True):
        x = gate * x + token
        xs.append(x)
    return torch.stack(xs, dim=-1)


def doubling(gates, tokens):
    """`loop` in as many passes as log2(T)."""
    reach = 1
    while reach < tokens.shape[-1]:
        front, kept = tokens[..., :reach], gates[..., reach:]
        tokens = torch.cat([front, tokens[..., reach:] + kept * tokens[..., :-reach]], dim=-1)
        gates = torch.cat([gates[..., :reach], kept * gates[..., :-reach]], dim=-1)
        reach *= 2
    return tokens


def wide(*tensors):
    return [t.detach().to(WIDE[t.is_complex()]).requires_grad_() for t in tensors]


def close(actual, expected, eps_count=16):
    """Within some roundings of the actual dtype, relative to the largest expected value."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() or 1.0
    tolerance = eps_count * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.to(expected.dtype) / scale, expected / scale, rtol=0, atol=tolerance)


def shape(T):
    return (B if T < LONG else 1), C, T


def near_one(T):
    gates = torch.polar(0.99 + 0.01 * torch.rand(shape(T)), 6.28 * torch.rand(shape(T)))
    return gates.requires_grad_(), torch.randn(shape(T)).tanh().requires_grad_()


@pytest.mark.parametrize("complex", [False, True])
def test_oracles_agree(complex):
    gates, tokens = torch.rand(2, B, C, 45, dtype=WIDE[complex])
    torch.testing.assert_close(doubling(gates, tokens), loop(gates, tokens), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("T", LENGTHS)
def test_scan(T, dtype):
    gates, tokens = torch.rand(2, *shape(T)).to(dtype)
    leaves = [gates.requires_grad_(), tokens.requires_grad_()]
    x = scan(*leaves)
    exact_leaves = wide(*leaves)
    exact = doubling(*exact_leaves)
    assert x.dtype == dtype and x.is_contiguous()
    close(x, exact.detach())
    for actual, wanted in zip(
        torch.autograd.grad(x.mean(-1).sum(), leaves),
        torch.autograd.grad(exact.mean(-1).sum(), exact_leaves, materialize_grads=True),
        strict=True,
    ):
        close(actual, wanted)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("T", LENGTHS[2:])
def test_complex_gates_near_one(T, loss):
    leaves = near_one(T)
    x = scan_inputs(*leaves)
    exact_leaves = wide(*leaves)
    exact = doubling(exact_leaves[0], exact_leaves[1].to(torch.complex128))
    assert x.dtype == torch.complex64
    close(x, exact.detach(), 32)
    grads = torch.autograd.grad(LOSSES[loss](x), leaves)
    assert [grad.dtype for grad in grads] == [torch.complex64, torch.float32]
    for actual, wanted in zip(grads, torch.autograd.grad(LOSSES[loss](exact), exact_leaves), strict=True):
        close(actual, wanted, 32)


@pytest.mark.parametrize("T", LENGTHS)
def test_gradient_is_a_reversed_scan(T):
    gates, tokens = (t.requires_grad_() for t in torch.randn(2, 1, 1, T))
    x = scan(gates, tokens)
    dgates, dtokens = torch.autograd.grad(x.sum(), (gates, tokens))

    gates, x = gates.detach(), x.detach()
    following = torch.cat([gates[..., 1:], torch.ones_like(gates[..., :1])], dim=-1)
    before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], dim=-1)
    expected = scan_forward(following, torch.ones_like(x), reverse=True)
    torch.testing.assert_close(dtokens, expected, rtol=1.3e-6, atol=1e-5)
    torch.testing.assert_close(dgates, expected * before, rtol=1.3e-6, atol=2e-5)


def test_reverse_and_other_names():
    gates, tokens = torch.rand(2, B, C, 50)
    x = scan(gates, tokens)
    flipped = scan(gates.flip(-1), tokens.flip(-1)).flip(-1)
    torch.testing.assert_close(scan_forward(gates, tokens, True), flipped)
    torch.testing.assert_close(scan_ref(gates, tokens, reverse=True), flipped)
    for same in (Scan.apply(gates, tokens), scan_inputs(forget=gates, inputs=tokens), scan_ref(gates, tokens)):
        assert torch.equal(same, x)


@pytest.mark.parametrize("reverse", [False, True])
def test_ref_with_other_operations(reverse):
    """The largest sum of a run of tokens that ends here: addition in place of the product, maximum of the sum."""
    gates, tokens = torch.randn(2, B, C, 20)
    options = {"mul": torch.add, "add": torch.maximum, "zeros_like": lambda x: torch.full_like(x, -torch.inf)}
    x = scan_ref(gates, tokens, **options, reverse=reverse)
    order = range(20)[:: -1 if reverse else 1]
    largest = torch.full((B, C), -torch.inf)
    for t in order:
        largest = torch.maximum(largest + gates[..., t], tokens[..., t])
        assert torch.equal(x[..., t], largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warpscan_functions_write_in_place(dtype):
    gates, tokens, dx = torch.rand(3, B, C, 50).to(dtype)
    x, dgates, dtokens = (torch.full_like(tokens, torch.nan) for _ in range(3))
    assert warpscan_forward(gates, tokens, x, False) is x
    warpscan_backward(gates, x, dx, dgates, dtokens)
    leaves = [gates.requires_grad_(), tokens.requires_grad_()]
    expected = scan(*leaves)
    assert torch.equal(x, expected)
    for actual, wanted in zip((dgates, dtokens), torch.autograd.grad(expected, leaves, dx), strict=True):
        assert torch.equal(actual, wanted)


def test_shapes_and_second_derivatives():
    tokens = torch.randn(B, C, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(C, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda gate, tokens: scan(gate[None], tokens), (gate, tokens))
    assert scan(tokens[..., :0], tokens[..., :0]).shape == (B, C, 0)
    with pytest.raises(RuntimeError, match="linear_scan: a must be"):
        scan(tokens[..., :5], tokens)


def test_modules():
    """What programs import from release 0.3.1 and the one before."""
    code = """
import seqkern.compat
print("accelerated_scan" in seqkern.compat.install(force=True))
from accelerated_scan.complex import scan as c
from accelerated_scan.ref import scan as r
from accelerated_scan.scalar import scan as s, Scan
from accelerated_scan.triton import scan as t
from accelerated_scan.warp import scan, scan_forward, warpscan_backward, warpscan_forward
import accelerated_scan, inspect
print(accelerated_scan.__version__, c is s, scan is t)
print(*(next(iter(inspect.signature(f).parameters)) for f in (c, r, s, t, scan)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert output == ["True", "0.3.1", "True", "True", *"forget gates forget gates gates".split()]
