"""What the operators on recurrent cells are called with: elementwise_rnn and rnn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _elementwise_rnn, _rnn
from .cases import COMMON, Inputs, Operator


def _with_tuple(function: Callable, name: str) -> Callable:
    """A function as the table calls it: a state of one part is that part."""

    def call(**given):
        if isinstance(given.get(name), Tensor):
            given[name] = (given[name],)
        return function(**given)

    return call


def _elementwise_shapes(values: dict[str, Any]) -> dict[str, str]:
    parts = _elementwise_rnn.CELLS[values["cell"]].published
    return {prefix + part: "absent" for prefix in ("", "final_") for part in "cnm" if part not in parts}


def _elementwise_gates(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Of relu, some with a sum below 0, but none so far below that adding 1 does not matter."""
    return 0.3 + 0.5 * variates.tanh() if values["cell"] == "indrnn" else variates


def _elementwise_options(values: dict[str, Any]) -> dict[str, Any]:
    """Solvers are asked for the last digits: what their default leaves is in test_elementwise_rnn.py."""
    atol = 1e-15 if values["dtype"] == torch.float64 else 1e-7
    return {"cell": values["cell"], "solver": values["solver"], "atol": atol}


def _elementwise_sizes(values: dict[str, Any]) -> dict[str, int]:
    cell = _elementwise_rnn.CELLS[values["cell"]]
    return {"G": cell.gates, "W": cell.weights}


def _elementwise_kept_bytes(inputs: Inputs) -> int:
    """The states at every 16th token (csrc/elementwise_rnn/params.h)."""
    B, L, D = (inputs.sizes[letter] for letter in "BLD")
    return len(_elementwise_rnn.CELLS[inputs.options["cell"]].empty) * B * -(-L // 16) * D * inputs.accumulator.itemsize


def _elementwise_workspace_bytes(inputs: Inputs) -> int:
    """Gradients of the weights by sequences (csrc/elementwise_rnn/cpu_plan.h)."""
    return min(32, inputs.num_runs) * inputs.tensors["weights"].numel() * inputs.accumulator.itemsize + 8


ELEMENTWISE_RNN = Operator(
    name="elementwise_rnn",
    function=_with_tuple(ops.elementwise_rnn.elementwise_rnn, "initial_state"),
    step=_with_tuple(ops.elementwise_rnn.elementwise_rnn_step, "state"),
    reference=_with_tuple(ops.elementwise_rnn.reference, "initial_state"),
    reference_step=_with_tuple(ops.elementwise_rnn.reference_step, "state"),
    arguments={"x": "B L G D", "weights": "W D", "h": "N D", "c": "N D", "n": "N D", "m": "N D"},
    outputs={"y": "B L D", "final_h": "N D", "final_c": "N D", "final_n": "N D", "final_m": "N D"},
    state={"h": 0.0, "c": 0.0, "n": 0.0, "m": -math.inf},
    step_state="state",
    step_options=("cell",),
    autocast=(),
    factors=COMMON
    | {
        "packing": ("none", "cu_seqlens"),
        "shape": (
            (2, 17, 3),
            (2, 1, 4),
            (1, 2, 5),
            (3, 33, 2),
            (2, 130, 40),
            (1, 260, 6),
            (0, 5, 3),
            (2, 5, 0),
            (2, 0, 3),
        ),
        "cell": ("slstm", "gru", "lstm", "indrnn", "elman"),  # the first has the most gates and parts
        "solver": ("auto", "newton", "shooting", "serial"),
        "reset": (False, True),
    },
    shape="B L D",
    small_shapes=((2, 17, 3), (1, 2, 40), (3, 33, 2), (1, 150, 6), (0, 5, 3), (2, 0, 3)),
    tiny={"shape": ((2, 2, 1), (1, 3, 1)), "solver": ("auto", "newton")},
    options=_elementwise_options,
    variants=_elementwise_shapes,
    native_factors={"cell": "gru"},
    state_sizes=_elementwise_sizes,
    workspace_bytes=_elementwise_workspace_bytes,
    kept_bytes=_elementwise_kept_bytes,
    harmless={"x": (-math.inf, math.inf)},
    draw={
        "x": _elementwise_gates,
        "weights": lambda t, values: t.tanh(),
        "h": lambda t, values: t.tanh(),
        "n": lambda t, values: 0.5 + t.abs(),
    },
    lean={"cell": "indrnn"},
)


def _rnn_shapes(values: dict[str, Any]) -> dict[str, str]:
    parts = _rnn.CELLS[values["cell"]].published
    shapes = {prefix + part: "absent" for prefix in ("", "final_") for part in "cnm" if part not in parts}
    if values["proj"] and values["cell"] != "gru":
        return shapes
    return shapes | {"proj": "absent", "R": "H G P P", "y": "B L H P", "h": "N H P", "final_h": "N H P"}


def _rnn_gates(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Of relu, far enough from 0 that a sum has the sign of x, and so near that adding 1 changes it."""
    relu = values["cell"] == "elman_relu"
    return variates.sign() * (0.5 + 0.2 * variates.abs().tanh()) if relu else variates


def _rnn_weights(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """States that do not grow; with relu, sums that are small beside x."""
    size = 0.1 / max(1, variates.shape[-1]) if values["cell"] == "elman_relu" else max(1, variates.shape[-1]) ** -0.5
    return size * variates.tanh()


def _rnn_kept_bytes(inputs: Inputs) -> int:
    """u, and the numbers beside h."""
    carried = len(_rnn.CELLS[inputs.options["cell"]].carried)
    B, L, H, P = (inputs.sizes[letter] for letter in "BLHP")
    return inputs.tensors["x"].nbytes + carried * B * L * H * P * inputs.accumulator.itemsize


def _rnn_workspace_bytes(inputs: Inputs) -> int:
    """What the products of [weights] read and write, and with 16 bits torch's copies of it."""
    B, L, H, G, P = (inputs.sizes[letter] for letter in "BLHGP")
    Q = inputs.sizes["Q"] if "proj" in inputs.tensors else P
    operands = B * L * H * (2 * Q + P if "proj" in inputs.tensors else Q)
    numbers = operands + H * G * P * Q
    if inputs.dtype.itemsize == 2:
        numbers += 2 * inputs.tensors["x"].numel() + operands + H * G * P * Q + 2**14
    return numbers * inputs.dtype.itemsize


RNN = Operator(
    name="rnn",
    function=_with_tuple(ops.rnn.rnn, "initial_state"),
    step=_with_tuple(ops.rnn.rnn_step, "state"),
    reference=_with_tuple(ops.rnn.reference, "initial_state"),
    reference_step=_with_tuple(ops.rnn.reference_step, "state"),
    arguments={"x": "B L H G P", "R": "H G P Q", "bias": "H G P", "proj": "H Q P"}
    | {"h": "N H Q", "c": "N H P", "n": "N H P", "m": "N H P"},
    outputs={"y": "B L H Q", "final_h": "N H Q", "final_c": "N H P", "final_n": "N H P", "final_m": "N H P"},
    state={"h": 0.0, "c": 0.0, "n": 0.0, "m": -math.inf},
    step_state="state",
    step_options=("cell", "zoneout"),
    autocast=("x", "R", "proj"),
    factors=COMMON
    | {
        "packing": ("none", "cu_seqlens"),
        "shape": (
            (2, 17, 3, 5, 4),
            (2, 1, 2, 4, 3),
            (1, 2, 1, 17, 20),
            (3, 3, 2, 1, 1),
            (2, 40, 1, 48, 33),
            (1, 70, 2, 16, 16),
            (9, 7, 1, 8, 8),
            (0, 5, 2, 3, 2),
            (2, 0, 2, 3, 2),
            (2, 5, 0, 3, 2),
            (2, 5, 2, 0, 0),
        ),
        "cell": ("slstm", "lstm", "gru", "elman_tanh", "elman_relu"),  # the first has the most gates and parts
        "bias": (False, True),
        "proj": (False, True),
        "zoneout": (0.0, 0.3),
        "reset": (False, True),
    },
    shape="B L H P Q",
    small_shapes=(
        (2, 9, 2, 5, 4),
        (1, 2, 1, 17, 20),
        (3, 6, 1, 3, 3),
        (1, 20, 1, 8, 8),
        (0, 5, 2, 3, 2),
        (2, 0, 1, 3, 2),
    ),
    tiny={"shape": ((1, 2, 1, 2, 1), (1, 3, 1, 1, 2))},
    # The random numbers of training are a function of a token's place; they are in test_rnn.py.
    options=lambda values: {"cell": values["cell"], "zoneout": values["zoneout"], "training": False},
    variants=_rnn_shapes,
    native_factors={"cell": "lstm"},
    state_sizes=lambda values: {"G": _rnn.CELLS[values["cell"]].gates},
    workspace_bytes=_rnn_workspace_bytes,
    kept_bytes=_rnn_kept_bytes,
    rounds_operands=True,
    steps_multiply=True,
    ends_in_products=True,
    harmless={"x": (-math.inf, math.inf)},
    draw={
        "x": _rnn_gates,
        "R": _rnn_weights,
        "proj": _rnn_weights,
        "bias": lambda t, values: 0.1 * t.tanh(),
        "h": lambda t, values: t.tanh(),
        "n": lambda t, values: 0.5 + t.abs(),
    },
    lean={"cell": "elman_tanh", "P": 16, "Q": 1},
)
