"""What each operator of seqkern takes in a training step, beside plain PyTorch, on the very tensors of that step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import seqkern.nn
from seqkern.testing import interleaved


def plain_causal_conv1d(x, weight, bias, activation, *, dilation, initial_state=None, return_final_state=False):
    padded = F.pad(x, ((weight.shape[1] - 1) * dilation, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=len(weight)))


def plain_causal_conv1d_step(x, conv_state, weight, bias, activation, *, dilation):
    history = torch.cat([conv_state, x[..., None]], dim=2)
    conv_state.copy_(history[..., 1:])
    return F.silu((history[..., ::dilation] * weight).sum(-1) + bias).to(x.dtype)


class Operator(NamedTuple):
    module: ModuleType  # the module that calls it
    name: str  # its name there
    plain: Callable  # what one would write without seqkern
    passes: dict[str, Callable]  # what to time, by title: (call, function) -> results


class Call:
    """One call of an operator: its arguments, and the gradient that came back to its output."""

    def __init__(self, args: tuple, options: dict):
        self.args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        self.options, self.dy = options, None

    def forward(self, function: Callable) -> list[Tensor]:
        with torch.no_grad():
            return [function(*self.args, **self.options)]

    def forward_backward(self, function: Callable) -> list[Tensor]:
        args = [arg.detach().requires_grad_() if isinstance(arg, Tensor) else arg for arg in self.args]
        y = function(*args, **self.options)
        return [y, *torch.autograd.grad(y, [arg for arg in args if isinstance(arg, Tensor)], self.dy)]


TRAINING = {"forward": Call.forward, "forward + backward": Call.forward_backward}
OPERATORS = [
    Operator(seqkern.nn.conv, "causal_conv1d", plain_causal_conv1d, TRAINING),
    Operator(seqkern.nn.conv, "causal_conv1d_step", plain_causal_conv1d_step, {"step": Call.forward}),
]


@contextlib.contextmanager
def recorded(operator: Operator):
    """The list of the operator's calls within the block."""
    calls, function = [], getattr(operator.module, operator.name)

    def record(*args, **options):
        calls.append(call := Call(args, options))
        y = function(*args, **options)
        if y.requires_grad:
            y.register_hook(lambda dy: setattr(call, "dy", dy))
        return y

    setattr(operator.module, operator.name, record)
    try:
        yield calls
    finally:
        setattr(operator.module, operator.name, function)


def run_all(run: Callable, function: Callable, calls: list[Call]) -> list[Tensor]:
    return [result for call in calls for result in run(call, function)]


def print_table(step: Callable[[], object], device: str) -> None:
    """Runs `step`, a training step and whatever else calls operators, and times their calls on the tensors they had."""
    print(f"{'operator':<20}{'pass':<20}{'calls':>5}{'seqkern ms':>12}{'PyTorch ms':>12}{'ratio':>8}{'difference':>12}")
    for operator in OPERATORS:
        with recorded(operator) as calls:
            step()
        functions = {"seqkern": getattr(operator.module, operator.name), "PyTorch": operator.plain}
        for title, run in operator.passes.items() if calls else ():
            # Copies, because a step changes the state it is given.
            results = [run_all(run, function, copy.deepcopy(calls)) for function in functions.values()]
            difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
            timed = {name: partial(run_all, run, function, calls) for name, function in functions.items()}
            times = interleaved(timed, rounds=9, device=device)
            ours, plain = (times[name].median_us / 1000 for name in functions)
            row = f"{operator.name:<20}{title:<20}{len(calls):>5}{ours:>12.3f}{plain:>12.3f}{plain / ours:>7.1f}x"
            print(f"{row}{difference:>12.1e}", flush=True)
    print("Times: all calls of one training step, and of one token for each row of its batch.")
    print("Difference: the largest, relative to the largest value of each result, gradients included.")
