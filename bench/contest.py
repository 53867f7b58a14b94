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

SAMPLES_S = 2.0  # for the warm samples of one contestant, three of them at least
# Of the largest value. A competitor that is further off computes something else.
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclasses.dataclass
class Result:
    """A finished row. Times are by name and condition: "warm", "cold", "fresh" and on CUDA "graph"."""

    row: Row
    check: list  # of seqkern.testing.compare
    errors: dict[str, float]  # of seqkern and each competitor: largest error over largest value, worst output
    absent: dict[str, str]  # competitors that did not take part, and why
    times: dict[str, dict[str, Timing]]
    floor_us: float
    floor_of: str  # "bytes", "flops" or "exps"
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
            self.functions[peer.name] = peer.load()
        except Missing as missing:
            self.absent[peer.name] = str(missing)
        except Exception as error:  # someone else's code: its failure is a result
            self.absent[peer.name] = _failure(error)

    def call(self, function: Callable, inputs: dict | None = None) -> Callable:
        """The row's call of `function` without arguments; it returns the outputs, then the gradients.

        The caller has gradients disabled, as in inference.
        """
        inputs = self.inputs if inputs is None else inputs
        if self.row.kind != "forward+backward":
            return functools.partial(function, **inputs)
        inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in self.row.gradients}
        leaves = [inputs[name] for name in self.row.gradients]
        cotangents = []

        def both():
            with torch.enable_grad():
                outputs = _tuple(function(**inputs))
            if not cotangents:
                cotangents.extend(map(_noise_like, outputs))
            return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

        return both

    def results(self, function: Callable, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Outputs, gradients and updated arguments by name, from inputs in `dtype`."""
        inputs = {
            name: value.detach().clone() if name in self.row.updates else value for name, value in self.inputs.items()
        }
        if dtype is not None:
            inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
        results = _tuple(self.call(function, inputs)())
        named = {f"output {i}": tensor.detach() for i, tensor in enumerate(results)}
        named |= {name: inputs[name] for name in self.row.updates}
        return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in named.items()}

    def check(self) -> tuple[list, dict[str, float]]:
        """seqkern against the float64 reference, and everyone's error. A competitor that fails or is far off goes."""
        truth = self.results(self.row.reference, torch.float64)
        own = self.results(self.row.function)
        plain = self.results(self.row.reference, torch.promote_types(self.row.dtype, torch.float32))
        plain = {name: tensor.to(own[name].dtype) for name, tensor in plain.items()}
        checked = compare(own, truth, plain, self.row.coarse)
        errors = {OURS: _largest_error(own, truth)}
        for name, function in self.functions.items():
            if name == OURS:
                continue
            try:
                error = _largest_error(self.results(function), truth)
            except Exception as failure:
                self.absent[name] = _failure(failure)
                continue
            if error <= LARGEST_ERROR[self.row.dtype]:
                errors[name] = error
            else:
                self.absent[name] = f"WRONG: its largest error is {error:.0e} of the largest value"
        self.functions = {name: self.functions[name] for name in errors}
        return checked, errors

    def run(self, ceilings: dict, checked: list, errors: dict[str, float]) -> Result:
        row, device = self.row, self.row.device
        rounds, cold_rounds, attempts = (9, 3, 1) if self.quick else (31, 9, 3)
        take_turns = functools.partial(timed, device=device, attempts=attempts)
        with reused_pages():
            calls = {name: self.call(function) for name, function in self.functions.items()}
            calls |= {name: self.call(function) for name, function in row.yardsticks.items()}
            calls[COPY] = roofline.copy(row.bytes, device)
            if row.kind == "step":
                calls[EMPTY] = functools.partial(empty_operator, next(filter(torch.is_tensor, self.inputs.values())))
            warm, others_share = take_turns(calls, rounds=rounds, limit_s=SAMPLES_S)
            times = {name: {"warm": timing} for name, timing in warm.items()}
            compared = {name: calls[name] for name in (OURS, COPY, "torch", *row.yardsticks) if name in calls}
            cold, _ = take_turns(compared, rounds=cold_rounds, cold=True, limit_s=SAMPLES_S / 4)
            for name, timing in cold.items():
                times[name]["cold"] = timing
            if device == "cpu" and row.kind != "step":
                fresh = {name: fresh_pages(call) for name, call in compared.items() if name != COPY}
                if all(fresh.values()):
                    again, _ = take_turns(fresh, rounds=cold_rounds, limit_s=SAMPLES_S / 4)
                    for name, timing in again.items():
                        times[name]["fresh"] = timing
        if device == "cuda":
            graphs = _captured({name: calls[name] for name in calls if name != EMPTY})
            graphs, _ = take_turns(graphs, rounds=rounds, limit_s=SAMPLES_S)
            for name, timing in graphs.items():
                times[name]["graph"] = timing

        copy_us = times[COPY].get("graph", warm[COPY]).median_us
        flops = {"flops": row.flops, "exps": row.exps * roofline.EXP_FLOPS[device]}
        floors = {"bytes": copy_us} | {name: count / ceilings["float32"] / 1e3 for name, count in flops.items()}
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


def _failure(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"fails: {type(error).__name__}: {message[:120]}"


def _cast(value, dtype: torch.dtype):
    """Floating-point tensors in `dtype`, complex ones in its complex form."""
    if not torch.is_tensor(value) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


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
