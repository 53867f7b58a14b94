"""How far an operator's results are from the truth, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

# Over all cases and instruction sets, outputs and their gradients stay within 1.1 times the error of plain PyTorch.
# Parameter gradients reach 5 times: kernels add thousands of tokens one after another, PyTorch pairwise. A formula that
# loses digits is off by far more.
MULTIPLE = 6

NOTHING: Mapping[str, float] = MappingProxyType({})

Outputs = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


class Row(NamedTuple):
    """The comparison of one output."""

    name: str
    error: float  # largest absolute error of the operator
    plain: float  # of plain PyTorch
    scale: float  # largest absolute value
    used: float  # largest share of its limit that an element's error takes; NaN where only one side is finite

    @property
    def ok(self) -> bool:
        return self.used <= 1

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO FAR"
        return (
            f"{self.name}: error {self.error:.2e}, plain PyTorch {self.plain:.2e}, scale {self.scale:.2e}, "
            f"{self.used:.2f} of the limit: {verdict}"
        )


def compare(actual: Outputs, reference64: Outputs, plain: Outputs, coarse: Mapping[str, float] = NOTHING) -> list[Row]:
    """The error of each output against a reference in float64, beside the error that plain PyTorch makes.

    An element may be off by one rounding to its dtype, plus MULTIPLE times the largest error that plain PyTorch makes
    in the tensor, or one rounding of the largest element where plain PyTorch is exact by luck. So where `plain`
    computes in float32, a half-precision element must be within about one unit in its last place.

    Args:
        actual: a tensor, several, or a dict of them by name; the first has the dtype of the data.
        reference64: the same from the reference in float64.
        plain: the same from plain PyTorch. For float64 data that would be the reference itself; pass what it gives in
            float32, and its error is scaled to float64.
        coarse: names of outputs that are computed from numbers as large as the largest element among them, rounded to
            the dtype of the data, and by how many such roundings each may be off.

    Returns:
        A Row for each output. `all(row.ok for row in rows)` is the verdict.

    Example:
        >>> import torch
        >>> from seqkern.testing import compare
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> [row.ok for row in compare((exact.float(), exact.float() + 1e-3), (exact, exact), (exact, exact))]
        [True, False]
    """
    actual, reference64, plain = (_named(outputs) for outputs in (actual, reference64, plain))
    if actual.keys() != reference64.keys():
        raise ValueError(f"compare: outputs {list(actual)} against {list(reference64)}")
    is_double = next(iter(actual.values())).dtype == torch.float64
    accumulator = torch.float64 if is_double else torch.float32
    eps = torch.finfo(next(iter(actual.values())).dtype).eps
    rounded = [reference64[name] for name in coarse if name in reference64 and reference64[name].numel()]
    largest = max((float(tensor.abs().max()) for tensor in rounded), default=0)
    return [
        _row(name, actual[name], reference64[name], plain[name], accumulator, eps * largest * coarse.get(name, 0))
        for name in actual
    ]


def assert_close(actual: Outputs, reference64: Outputs, plain: Outputs, coarse: Mapping[str, float] = NOTHING) -> None:
    """Raises an AssertionError that lists every output, if one is too far off."""
    rows = compare(actual, reference64, plain, coarse)
    assert all(row.ok for row in rows), "\n" + "\n".join(map(str, rows))


def _row(name: str, actual: Tensor, reference64: Tensor, plain: Tensor, accumulator: torch.dtype, coarse: float) -> Row:
    if actual.shape != reference64.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, the reference has {tuple(reference64.shape)}")
    if actual.numel() == 0:
        return Row(name, 0.0, 0.0, 0.0, 0.0)
    truth = reference64.detach().double().cpu()
    error = (actual.detach().double().cpu() - truth).abs()
    plain_error = (plain.detach().double().cpu() - truth).abs()
    both = (actual.detach().cpu() == truth) | (actual.detach().isnan().cpu() & truth.isnan())  # infinities, NaN
    error, plain_error = error.masked_fill(both, 0), plain_error.masked_fill(~truth.isfinite(), 0)
    scale = truth.masked_fill(~truth.isfinite(), 0).abs()

    eps = torch.finfo(accumulator).eps
    if accumulator == torch.float64 and plain.dtype == torch.float32:
        plain_error *= eps / torch.finfo(torch.float32).eps
    one_rounding = torch.finfo(actual.dtype).eps * scale + torch.finfo(actual.dtype).smallest_normal
    limit = one_rounding + coarse + MULTIPLE * torch.maximum(plain_error.max(), eps * scale.max())
    used = (error / limit).max()
    return Row(name, float(error.max()), float(plain_error.max()), float(scale.max()), float(used))


def _named(outputs: Outputs) -> dict[str, Tensor]:
    if isinstance(outputs, dict):
        return outputs
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    return {f"output {i}": output for i, output in enumerate(outputs)}
