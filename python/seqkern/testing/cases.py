"""What a table of cases is made of, for tests, gradients and benchmarks: operators.py has the table.

An `Operator` states, as data, what its functions take and return. From that come its cases: a list of calls in which
every pair of values of two factors (options, dtypes, direction, packing, memory layout, shapes) occurs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Factors = dict[str, tuple[Any, ...]]

# What every operator can vary. `Operator.case` takes the first value of each factor unless told otherwise.
COMMON: Factors = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "parameter_dtype": ("same", torch.float32, torch.bfloat16, torch.float64),  # of parameters and initial states
    "packing": ("none", "cu_seqlens", "seq_idx"),
    "index_dtype": (torch.int32, torch.int64),  # of cu_seqlens
    "reverse": (False, True),
    "initial_state": (False, True),
    "return_final_state": (False, True),
    "layout": ("contiguous", "transposed", "strided", "expanded"),
}


@dataclass(frozen=True)
class Operator:
    """What an operator's functions take and return.

    Shapes are written as letters: "B D L". B is the batch, L the time, N the rows of a state (B, or the number of
    packed sequences), so that a test can cut time, pick a batch row or a sequence without knowing the operator.
    """

    name: str
    function: Callable
    step: Callable
    reference: Callable
    reference_step: Callable
    arguments: dict[str, str]  # the differentiable tensors, those first that others must fit, and their shapes
    outputs: dict[str, str]  # y, then the parts of the final state
    step_state: str  # the step's name for what the function calls initial_state
    step_options: tuple[str, ...]  # options that the step has as well
    autocast: tuple[str, ...]  # arguments that autocast casts
    factors: Factors
    shape: str  # letters of the factor "shape"
    small_shapes: tuple[tuple[int, ...], ...]  # for emulated kernels and transforms
    tiny: Factors  # factors narrowed for numerical derivatives
    options: Callable[[dict[str, Any]], dict[str, Any]]  # keyword options of a case, without packing and direction
    state_sizes: Callable[[dict[str, Any]], dict[str, int]]  # letters that follow from the others
    workspace_bytes: Callable[[Inputs], int]  # of the backward, on the CPU
    kept_bytes: Callable[[Inputs], int] = lambda inputs: 0  # between forward and backward, besides the inputs
    # Shapes that are others in some cases, "absent" those of arguments and outputs that there are not.
    variants: Callable[[dict[str, Any]], dict[str, str]] = lambda values: {}
    # The arguments that make up the initial state, and what is in an empty one. Several are passed as a tuple.
    state: dict[str, float] = field(default_factory=lambda: {"initial_state": 0.0})
    broadcast: tuple[str, ...] = ()  # arguments whose dimensions may be 1 or missing; their dtype is a parameter's
    native_layouts: tuple[str, ...] = ("contiguous",)  # in which data is not copied
    native_factors: dict[str, Any] = field(default_factory=dict)  # of calls that convert no tensor before their kernel
    distinct: str = ""  # the letter of a last dimension along which no layout repeats values
    from_outputs: tuple[str, ...] = ()  # gradients computed from outputs as they were returned, after rounding
    # Gradients that are differences of sums over these letters, whose terms are as large as the largest among them.
    cancelling: dict[str, str] = field(default_factory=dict)
    rounds_operands: bool = False  # of matrix products, to 16 bits, where the data have no more
    steps_multiply: bool = False  # matrices too, whose operands are rounded likewise
    ends_in_products: bool = False  # the backward's kernel, in those of torch, which give gradients of parameters
    chunk: int = 1  # tokens of a sequence, from its start in time, that a NaN in one of them may spoil
    harmless: dict[str, tuple[float, ...]] = field(default_factory=dict)  # infinities that are numbers like any other
    # Normal variates to an argument's range, by the case's values.
    draw: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = field(default_factory=dict)
    lean: dict[str, Any] = field(default_factory=dict)  # factors and letters of the shape for very many elements
    kernels: str = ""  # the operator of torch.ops.seqkern that it calls, where that is not its namesake

    def case(self, **values: Any) -> Case:
        """A case by hand: the first value of every factor, but for those given."""
        unknown = values.keys() - self.factors.keys()
        if unknown:
            raise ValueError(f"{self.name} has no factors {sorted(unknown)}; it has {sorted(self.factors)}")
        return Case(self, {name: values.get(name, choices[0]) for name, choices in self.factors.items()})

    def full_case(self, **values: Any) -> Case:
        """The same with every argument that may be None, and the final state."""
        names = [*self.arguments, "initial_state"]
        optional = {name: True for name in names if True in self.factors.get(name, ())}
        return self.case(**({"return_final_state": True} | optional | values))

    def of(self, values: dict[str, Any]) -> Operator:
        """The same with the shapes that arguments and outputs have in one case."""
        shapes = self.variants(values)
        arguments, outputs = (
            {name: shapes.get(name, letters) for name, letters in names.items() if shapes.get(name) != "absent"}
            for names in (self.arguments, self.outputs)
        )
        state = {name: value for name, value in self.state.items() if name in arguments}
        return replace(self, arguments=arguments, outputs=outputs, state=state)

    @functools.cached_property
    def cases(self) -> list[Case]:
        """Every pair of values of two factors, at sizes from nothing to thousands of tokens."""
        return [Case(self, values) for values in covering(self.factors)]

    @functools.cached_property
    def small_cases(self) -> list[Case]:
        """The same at a few dozen tokens."""
        return [Case(self, values) for values in covering(self.factors | {"shape": self.small_shapes})]

    @functools.cached_property
    def tiny_cases(self) -> list[Case]:
        """Every pair of options in float64 at sizes, and in layouts, for numerical derivatives."""
        narrow: Factors = {"dtype": (torch.float64,), "parameter_dtype": ("same",), "index_dtype": (torch.int64,)}
        narrow["layout"] = ("contiguous", "transposed", "strided")
        return [Case(self, values) for values in covering(self.factors | narrow | self.tiny)]

    def axis(self, name: str, letter: str) -> int | None:
        """Where an argument or output has a dimension, or None."""
        letters = (self.arguments | self.outputs)[name].split()
        return letters.index(letter) if letter in letters else None

    @property
    def data(self) -> list[str]:
        """Arguments with one value for every token."""
        return [name for name in self.arguments if self.axis(name, "L") is not None]

    @property
    def raw(self) -> str:
        """What its operators of torch.ops.seqkern are called, before _fwd, _bwd and _step."""
        return self.kernels or self.name

    @property
    def final_state(self) -> list[str]:
        """The outputs that make up the final state, in the order of the initial one."""
        return list(self.outputs)[1:]

    def joined(self, state: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The parts of a state as functions take and return them."""
        return tuple(state) if len(self.state) > 1 else state[0]

    def spoken(self, name: str, state: str = "initial_state") -> str:
        """What messages call an argument, given what they call the state."""
        if name not in self.state:
            return name
        return f"{state}'s {name}" if len(self.state) > 1 else state

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Case:
    """One call of an operator: a value for every factor."""

    operator: Operator
    values: dict[str, Any]

    def __getitem__(self, factor: str) -> Any:
        return self.values[factor]

    def but(self, **values: Any) -> Case:
        return replace(self, values=self.values | values)

    def __str__(self) -> str:
        parts = []
        for name, value in self.values.items():
            if value is None or value is False or (name == "parameter_dtype" and value == "same"):
                continue
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
            parts.append(name if value is True else text if name in ("dtype", "shape", "layout") else f"{name}={text}")
        return f"{self.operator.name}({' '.join(parts)})"

    def inputs(self, device: str = "cpu", seed: int = 0) -> Inputs:
        """Random tensors for this case, the same ones every time."""
        generator = torch.Generator().manual_seed(seed)
        sizes = dict(zip(self.operator.shape.split(), self["shape"], strict=True))
        options = self.operator.options(self.values) | {"reverse": self["reverse"]}
        options["return_final_state"] = self["return_final_state"]
        sizes["N"] = sizes["B"]
        if self["packing"] == "cu_seqlens":
            bounds = _bounds(sizes["B"] * sizes["L"], generator)
            sizes |= {"B": 1, "L": int(bounds[-1]), "N": len(bounds) - 1}
            options["cu_seqlens"] = bounds.to(self["index_dtype"]).to(device)
        elif self["packing"] == "seq_idx":
            options["seq_idx"] = _seq_idx(sizes["B"], sizes["L"], generator).to(device)
        if self.values.get("reset"):
            options["reset"] = (torch.rand(sizes["B"], sizes["L"], generator=generator) < 0.2).to(device)
        sizes |= {name: value for name, value in self.values.items() if len(name) == 1 and type(value) is int}
        sizes |= self.operator.state_sizes(self.values | sizes)

        operator, tensors = self.operator.of(self.values), {}
        for name, letters in operator.arguments.items():
            if self.values.get("initial_state" if name in operator.state else name) is False:
                continue
            shape = [sizes[letter] for letter in letters.split()]
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            value = operator.draw[name](value, self.values) if name in operator.draw else value
            is_data = name in operator.data and name not in operator.broadcast
            dtype = self["dtype"] if is_data or self["parameter_dtype"] == "same" else self["parameter_dtype"]
            keeps_last = letters.split()[-1] in ("P", operator.distinct)
            tensors[name] = _lay_out(value.to(device, dtype), self["layout"], keeps_last)
        return Inputs(operator, tensors, options, sizes)


@dataclass
class Inputs:
    """The arguments of one call."""

    operator: Operator
    tensors: dict[str, Tensor]  # differentiable arguments by name; those that are None are left out
    options: dict[str, Any]
    sizes: dict[str, int]

    def but(self, tensors: dict[str, Tensor] | None = None, **options: Any) -> Inputs:
        return replace(self, tensors=self.tensors | (tensors or {}), options=self.options | options)

    def to(self, dtype: torch.dtype) -> Inputs:
        """With every tensor in one dtype, for references."""
        return self.but({name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[self.data[0]].dtype

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def data(self) -> list[str]:
        """Tensors with one value for every token."""
        return [name for name in self.operator.data if name in self.tensors]

    @property
    def coarse(self) -> dict[str, float]:
        """The outputs and gradients that `seqkern.testing.compare` allows more roundings of the data, and how many."""
        operator, gradients = self.operator, [f"d{name}" for name in self.tensors]
        if self.dtype == self.accumulator:
            terms = {
                f"d{name}": [self.sizes[letter] for letter in letters.split()]
                for name, letters in operator.cancelling.items()
            }
            return {name: math.sqrt(math.prod(sizes)) for name, sizes in terms.items() if name in gradients}
        if operator.rounds_operands:
            allowed = dict.fromkeys((*operator.outputs, *gradients), 1.0)
            return allowed | {f"d{name}": 2.0 for name in operator.cancelling}
        return {name: 1.0 for name in gradients if name.removeprefix("d") in operator.from_outputs}

    @property
    def num_runs(self) -> int:
        """Sequences and stretches of padding."""
        if self.options.get("seq_idx") is None:
            return self.sizes["N"]
        ids = self.options["seq_idx"].clamp(min=-1)
        return len(ids) + int((ids[:, 1:] != ids[:, :-1]).sum()) + int((ids < 0).all(1).sum())

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The parts of the initial state; none where it is None."""
        return tuple(self.tensors[name] for name in self.operator.state if name in self.tensors)

    @property
    def empty_state(self) -> list[Tensor]:
        """An empty state for each of the initial ones."""
        return [torch.full_like(self.tensors[name], value) for name, value in self.operator.state.items()]

    def with_state(self, state: Sequence[Tensor]) -> Inputs:
        """The same call from another initial state."""
        return self.but(dict(zip(self.operator.state, state, strict=True)))

    def outputs(self, function: Callable | None = None, **tensors: Tensor) -> dict[str, Tensor]:
        """Calls the operator, or another function of the same signature, and names what it returns."""
        called = self.but(tensors)
        others = called._without_state()
        state = {"initial_state": self.operator.joined(called.state)} if called.state else {}
        result = (function or self.operator.function)(**others, **state, **self.options)
        y, *final = result if isinstance(result, tuple) else (result,)
        parts = final[0] if final and isinstance(final[0], tuple) else final
        return dict(zip(self.operator.outputs, (y, *parts), strict=False))

    def _without_state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.operator.state}

    def cotangents(self, seed: int = 1) -> dict[str, Tensor]:
        """Random gradients of the outputs, in their memory order."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator, dtype=torch.float64))
            for name, output in self.outputs().items()
        }

    def gradients(
        self, cotangents: dict[str, Tensor], function: Callable | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(outputs, gradients of the tensors, zeros where the call does not depend on one)."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        outputs = self.outputs(function, **leaves)
        attached = {name: output for name, output in outputs.items() if output.requires_grad}  # not: an empty state
        grads = torch.autograd.grad(
            list(attached.values()),
            list(leaves.values()),
            [cotangents[name].to(output) for name, output in attached.items()],
            allow_unused=True,
            materialize_grads=True,
        )
        detached = {name: output.detach() for name, output in outputs.items()}
        return detached, {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def step(self, t: int, state: Sequence[Tensor], function: Callable | None = None, **options: Any) -> Tensor:
        """Token t of this call through the step function, which moves the parts of `state` on."""
        tensors = self._without_state()
        for name in self.data:
            tensors[name] = tensors[name].select(self.operator.axis(name, "L"), t)
        tensors[self.operator.step_state] = self.operator.joined(state)
        options = {name: self.options[name] for name in self.operator.step_options} | options
        return (function or self.operator.step)(**tensors, **options)

    def tokens(self, begin: int, end: int) -> Inputs:
        """The same call on a part of the time."""
        cut = {name: self.tensors[name].narrow(self.operator.axis(name, "L"), begin, end - begin) for name in self.data}
        cut_options = self._resets(lambda reset: reset[:, begin:end])
        return replace(self.but(cut, **cut_options), sizes=self.sizes | {"L": end - begin})

    def rows(self, letter: str, index: slice) -> Inputs:
        """The same call on some batch rows ("B") or rows of the state ("N")."""
        cut = {}
        for name, tensor in self.tensors.items():
            axis = self.operator.axis(name, letter)
            if axis is not None:
                cut[name] = tensor.movedim(axis, 0)[index].movedim(0, axis)
        return self.but(cut, **(self._resets(lambda reset: reset[index]) if letter == "B" else {}))

    def flipped(self) -> Inputs:
        """The same call, in the same direction, on tokens in the opposite order."""
        flipped = {name: self.tensors[name].flip(self.operator.axis(name, "L")) for name in self.data}
        return self.but(flipped, **self._resets(lambda reset: reset.flip(1)))

    def _resets(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The option `reset` (B, L), where there is one, changed."""
        return {"reset": change(self.options["reset"])} if "reset" in self.options else {}


def covering(factors: Factors) -> list[dict[str, Any]]:
    """A short list of choices in which every pair of values of two factors occurs together (greedy, deterministic)."""
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }

    def pairs(row: dict[str, int]) -> Iterator[tuple]:
        return itertools.combinations([(name, row[name]) for name in names if name in row], 2)

    table = []
    while missing:
        row = dict(min(missing, key=lambda pair: [(names.index(name), i) for name, i in pair]))
        for name in sorted(names, key=lambda name: -len(factors[name])):
            if name not in row:
                # Ties go round the values, so that what is covered already still varies.
                turn = [(i + len(table)) % len(factors[name]) for i in range(len(factors[name]))]
                row[name] = max(turn, key=lambda i: sum(pair in missing for pair in pairs(row | {name: i})))
        missing.difference_update(pairs(row))
        table.append({name: factors[name][row[name]] for name in names})
    return table


def _bounds(tokens: int, generator: torch.Generator) -> Tensor:
    """cu_seqlens with empty sequences at both ends and in the middle."""
    cuts = torch.randint(0, tokens + 1, (3,), generator=generator)
    return torch.cat([torch.tensor([0, 0]), cuts, cuts[:1], torch.tensor([tokens, tokens])]).sort().values


def _seq_idx(B: int, L: int, generator: torch.Generator) -> Tensor:
    """Padding in front, between and behind, an id that comes again, and in every third row nothing but padding."""
    rows = torch.full((B, L), -1, dtype=torch.int32)
    for b in range(B):
        if b % 3 == 2:
            continue
        cuts = [0, *torch.randint(0, L + 1, (4,), generator=generator).sort().values.tolist(), L]
        ids = (4, 0, -1, 0, 7) if b % 3 == 0 else (-1, 2, 0, 0, -3)
        for id, begin, end in zip(ids, cuts[:-1], cuts[1:], strict=True):
            rows[b, begin:end] = id
    return rows


def _lay_out(tensor: Tensor, layout: str, keeps_last: bool) -> Tensor:
    """In another memory order, or between NaNs, or with strides of zero (which repeats values, or vectors of them)."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        room = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = room[(slice(1, None, 2),) * tensor.dim()]
        return view.copy_(tensor)
    if layout == "expanded":
        last = tensor.dim() - 1 - keeps_last
        corner = tensor[:1] if last < 2 else tensor[:1].narrow(last, 0, min(1, tensor.shape[last]))
        return corner.expand_as(tensor)
    return tensor
