"""What is measured: one module per operator, each with `rows(device)`. A new operator adds its module here and its
competitors in bench/peers; nothing else changes."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: one operator, called in one way on one kind of input."""

    op: str
    kind: str  # "forward", "forward+backward" or "step"
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    variant: str  # what else tells the row from its neighbours
    function: Callable  # seqkern's, called with the inputs as keywords
    reference: Callable  # the same in plain torch, exact in float64
    inputs: Callable[[], dict]  # the arguments, the same at every call
    bytes: int  # the fewest that must move: every input read once, every output written once
    flops: int
    exps: int = 0  # exponentials, logarithms, sines and cosines
    unit: str = ""  # what people count of this operator, if anything
    units: int = 0
    gradients: tuple[str, ...] = ()  # inputs differentiated in "forward+backward"
    updates: tuple[str, ...] = ()  # inputs changed in place
    options: frozenset[str] = frozenset()  # what a competitor must support to take part
    coarse: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of seqkern.testing.compare, by result
    yardsticks: dict[str, Callable] = dataclasses.field(default_factory=dict)  # of the same inputs: timed beside it
    compiles: bool = False  # competitors that go through torch.compile, which takes seconds, take part
    slow: bool = False  # competitors that take about a second for a call take part
    quick: bool = False  # part of --quick

    @property
    def label(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"{self.op} {self.kind} ({shape}) {str(self.dtype).removeprefix('torch.')} {self.variant}"


def operators() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def rows(op: str, device: str) -> list[Row]:
    return importlib.import_module(f"{__name__}.{op}").rows(device)
