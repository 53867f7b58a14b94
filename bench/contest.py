"""One row of the table: seqkern and its competitors are checked against float64, then take turns."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import roofline
import torch
from cases import Row
from measure import captured, fresh_pages, reused_pages, timed
from peers import Missing, Peer

from seqkern.testing import Timing, compare

OURS = "seqkern"
COPY = "copy"
EMPTY = "empty operator"


@dataclasses.dataclass
class Result:
    """A finished row. Times are by name and condition: "warm", "cold", "fresh" and on CUDA "graph"."""

    row: Row
    check: list  # of seqkern.testing.compare
    errors: dict[str, float]  # of seqkern and each competitor: largest error over largest value, worst output
    absent: dict[str, str]  # competitors that did not take part, and why
    times: dict[str, dict[str, Timing]]
    floor_us: float
    floor_of: str  # "bytes" or "flops"
    empty_us: float | None  # of the empty operator, in rows of one step
    others_share: float  # of the machine, used by other programs while this was timed

    def condition(self, name: str) -> str:
        """What stands for a contestant's steady speed: on CUDA without the cost of launches, if possible."""
        return "graph" if "graph" in self.times[name] else "warm"

    def time(self, name: str) -> Timing:
        return self.times[name][self.condition(name)]


# Returns a view of its argument and does nothing else: what a call through torch.ops costs at least.
empty_operator = torch.ops.aten.alias.default


class Contest:
    """The row's inputs, and everyone who takes part."""

    def __init__(self, row: Row, quick: bool = False):
        self.row = row
        self.quick = quick
        self.inputs = row.inputs()
        self.functions = {OURS: row.function}
        self.absent: dict[str, str] = {}

    def invite(self, peer: Peer) -> None:
        """Prepares a competitor, or notes why it is absent."""
        try:
            function = peer.load()
            self.call(function)()
        except Missing as missing:
            self.absent[peer.name] = str(missing)
        except Exception as error:  # someone else's code: its failure is a result
            self.absent[peer.name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            self.functions[peer.name] = function

    def call(self, function: Callable, inputs: dict | None = None) -> Callable:
        """The row's call of `function` without arguments; it returns the outputs, then the gradients.

        The caller has gradients disabled, as in inference.
        """
        inputs = self.inputs if inputs is None else inputs
        if self.row.kind != "forward+backward":
            return functools.partial(function, **inputs)
        inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in self.row.gradients}
        leaves = [inputs[name] for name in self.row.gradients]
        cotangents = [_noise_like(output) for output in _tuple(function(**inputs))]

        def both():
            with torch.enable_grad():
                outputs = _tuple(function(**inputs))
            return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

        return both

    def results(self, function: Callable, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Outputs, gradients and updated arguments by name, from inputs in `dtype`."""
        inputs = {
            name: value.detach().clone() if name in self.row.updates else value for name, value in self.inputs.items()
        }
        if dtype is not None:
            inputs = {name: value.to(dtype) if _is_data(value) else value for name, value in inputs.items()}
        results = _tuple(self.call(function, inputs)())
        named = {f"output {i}": tensor.detach() for i, tensor in enumerate(results)}
        return named | {name: inputs[name] for name in self.row.updates}

    def check(self) -> tuple[list, dict[str, float]]:
        """seqkern against the float64 reference, and everyone's error."""
        truth = self.results(self.row.reference, torch.float64)
        own = self.results(self.row.function)
        plain = self.results(self.row.reference, torch.promote_types(self.row.dtype, torch.float32))
        plain = {name: tensor.to(own[name].dtype) for name, tensor in plain.items()}
        checked = compare(own, truth, plain)
        errors = {}
        for name, function in self.functions.items():
            errors[name] = _largest_error(own if name == OURS else self.results(function), truth)
        return checked, errors

    def run(self, ceilings: dict, checked: list, errors: dict[str, float]) -> Result:
        row, device = self.row, self.row.device
        rounds, cold_rounds, attempts = (9, 3, 1) if self.quick else (31, 9, 3)
        take_turns = functools.partial(timed, device=device, attempts=attempts)
        with reused_pages():
            calls = {name: self.call(function) for name, function in self.functions.items()}
            calls[COPY] = roofline.copy(row.bytes, device)
            if row.kind == "step":
                calls[EMPTY] = functools.partial(empty_operator, self.inputs["x"])
            warm, others_share = take_turns(calls, rounds=rounds)
            times = {name: {"warm": timing} for name, timing in warm.items()}
            compared = {name: call for name, call in calls.items() if name in (OURS, COPY, "torch")}
            cold, _ = take_turns(compared, rounds=cold_rounds, cold=True)
            for name, timing in cold.items():
                times[name]["cold"] = timing
            if device == "cpu" and row.kind != "step":
                fresh = {name: fresh_pages(calls[name]) for name in (OURS, "torch") if name in calls}
                if all(fresh.values()):
                    for name, timing in take_turns(fresh, rounds=cold_rounds)[0].items():
                        times[name]["fresh"] = timing
        if device == "cuda":
            graphs, _ = take_turns(_captured({name: calls[name] for name in calls if name != EMPTY}), rounds=rounds)
            for name, timing in graphs.items():
                times[name]["graph"] = timing

        copy_us = times[COPY].get("graph", warm[COPY]).median_us
        floors = {"bytes": copy_us, "flops": row.flops / ceilings["float32"] / 1e3}
        floor_of = max(floors, key=floors.get)
        return Result(
            row=row,
            check=checked,
            errors=errors,
            absent=self.absent,
            times=times,
            floor_us=floors[floor_of],
            floor_of=floor_of,
            empty_us=warm[EMPTY].median_us if EMPTY in warm else None,
            others_share=others_share,
        )


def _captured(calls: dict[str, Callable]) -> dict[str, Callable]:
    """The calls as CUDA graphs, but for those that read from the device, which cannot be captured."""
    graphs = {}
    for name, call in calls.items():
        with contextlib.suppress(RuntimeError):
            graphs[name] = captured(call)
    return graphs


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _is_data(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _noise_like(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in every dtype and memory order, laid out like `tensor`."""
    generator = torch.Generator(tensor.device).manual_seed(1)
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device).bfloat16()
    return torch.empty_like(tensor).copy_(noise)


def _largest_error(results: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest error over largest value, of the worst output."""
    return max(
        float((results[name].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))
        for name, exact in truth.items()
    )
