"""What every operator is called with. One whose record joins OPERATORS is under the whole contract; what all operators
share needs no new test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .cases import COMMON, Inputs, Operator
from .chunked import DELTA_RULE, LINEAR_ATTENTION, MLSTM, SSD
from .recurrent import ELEMENTWISE_RNN, RNN


def _conv_workspace_bytes(inputs: Inputs) -> int:
    """Partial sums of the weight and bias gradients, one for each 4096 tokens of a row (csrc/causal_conv1d/tile.h)."""
    sizes = inputs.sizes
    chunks = -(-sizes["L"] // 4096)
    return sizes["B"] * chunks * (sizes["W"] + 1) * sizes["D"] * inputs.accumulator.itemsize + 8


CAUSAL_CONV1D = Operator(
    name="causal_conv1d",
    function=ops.causal_conv1d.causal_conv1d,
    step=ops.causal_conv1d.causal_conv1d_step,
    reference=ops.causal_conv1d.reference,
    reference_step=ops.causal_conv1d.reference_step,
    arguments={"x": "B D L", "weight": "D W", "bias": "D", "initial_state": "N D S"},
    outputs={"y": "B D L", "final_state": "N D S"},
    step_state="conv_state",
    step_options=("activation", "dilation"),
    autocast=("x", "weight"),
    factors=COMMON
    | {
        "shape": (
            (2, 3, 17),
            (2, 3, 1),
            (1, 5, 2),
            (3, 2, 3),
            (2, 16, 127),
            (1, 33, 129),
            (3, 7, 1000),
            (1, 2, 4100),  # the weight gradient is summed in chunks of 4096 tokens
            (0, 3, 5),
            (2, 0, 5),
            (2, 3, 0),
        ),
        "W": (4, 1, 2, 3, 5, 64),
        "dilation": (1, 2, 3),
        "bias": (False, True),
        "activation": (None, "silu"),
    },
    shape="B D L",
    small_shapes=((2, 3, 17), (1, 5, 2), (3, 2, 33), (2, 9, 8), (0, 3, 5), (2, 3, 0)),
    tiny={"shape": ((2, 2, 5), (3, 1, 2)), "W": (3, 1), "dilation": (1, 2)},
    options=lambda values: {"activation": values["activation"], "dilation": values["dilation"]},
    native_layouts=("contiguous", "transposed"),
    state_sizes=lambda sizes: {"S": (sizes["W"] - 1) * sizes["dilation"]},
    workspace_bytes=_conv_workspace_bytes,
)


def _with_pairs(function: Callable) -> Callable:
    """`selective_scan`, or its reference, as the table calls it: complex tensors as pairs in a last dimension of 2."""

    def call(u, delta, A, B, C, *, return_final_state, initial_state=None, **others):
        is_complex = _has_pairs(A)
        if is_complex:
            A, initial_state = _complex(A), None if initial_state is None else _complex(initial_state)
            B, C = (_complex_or_interleaved(t) for t in (B, C))
        options = {"initial_state": initial_state, "return_last_state": return_final_state, **others}
        result = function(u, delta, A, B, C, **options)
        if is_complex and return_final_state:
            return result[0], torch.view_as_real(result[1])
        return result

    return call


def _step_with_pairs(function: Callable) -> Callable:
    """`selective_scan_step`, or its reference, likewise, and with B and C that may be constant."""

    def call(state, u, delta, A, B, C, **others):
        is_complex = _has_pairs(A)
        if is_complex:
            A, B, C = _complex(A), _complex(B), _complex(C)
        if A.shape == B.shape:
            B = B.expand(u.shape[0], *B.shape)
        if A.shape == C.shape:
            C = C.expand(u.shape[0], *C.shape)
        if not is_complex:
            return function(state, u, delta, A, B, C, **others)
        complex_state = _complex(state)
        y = function(complex_state, u, delta, A, B, C, **others)
        state.copy_(torch.view_as_real(complex_state))
        return y

    return call


def _has_pairs(A: Tensor) -> bool:
    return A.dim() == 3 and A.shape[-1] == 2


def _complex(pairs: Tensor) -> Tensor:
    dtype = torch.float64 if pairs.dtype == torch.float64 else torch.float32
    return torch.complex(*pairs.to(dtype).unbind(-1))


def _complex_or_interleaved(pairs: Tensor) -> Tensor:
    """Half precision has no complex numbers: what varies in time is then passed in turn, real and imaginary."""
    variable = pairs.dim() > 3
    return pairs.flatten(-2) if variable and pairs.dtype.itemsize == 2 else _complex(pairs)


def _scan_shapes(values: dict[str, Any]) -> dict[str, str]:
    kinds = {"grouped": "B G S L", "shared": "B S L", "constant": "D S"}
    shapes = {name: kinds[values[name]] for name in "BC"}
    if not values["complex"]:
        return shapes
    # With complex A every variable projection has groups: (B, N, 2L) and complex (B, N, L) are in test_selective_scan.
    shapes = {name: "B G S L" if kind == "B S L" else kind for name, kind in shapes.items()}
    states = {"A": "D S", "initial_state": "N D S", "final_state": "N D S"}
    return {name: f"{letters} P" for name, letters in (shapes | states).items()}


def _scan_kept_bytes(inputs: Inputs) -> int:
    """The states at every 32nd token (csrc/selective_scan/params.h)."""
    sizes = inputs.sizes
    return sizes["B"] * -(-sizes["L"] // 32) * sizes["S"] * sizes["D"] * inputs.accumulator.itemsize


def _scan_workspace_bytes(inputs: Inputs) -> int:
    """Gradients of variable B and C by blocks of 64 channels, of parameters by sequences (csrc/.../cpu_plan.h)."""
    B, D, L, S, G = (inputs.sizes[letter] for letter in "BDLSG")
    blocks, slabs = G * -(-D // G // 64), min(32, inputs.num_runs)
    return (2 * blocks * B * L * S + slabs * (S + 2) * D) * inputs.accumulator.itemsize + 8


def _draw_A(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Decays, or next to nothing with either sign: states that last, and grow. The imaginary part is a frequency, with
    2 exp - 1 a low one: at high ones that decay is larger than 1."""
    real = variates[..., :1] if values["complex"] else variates
    real = 0.004 * real if values["growth"] else -0.1 - real.abs()
    frequency = variates[..., 1:] * (0.1 if values["transition"] == "two_exp_minus_one" else 1)
    return torch.cat([real, frequency], dim=-1) if values["complex"] else real


def _draw_delta(variates: Tensor, values: dict[str, Any]) -> Tensor:
    return variates - 1 if values["delta_softplus"] else 0.3 * variates.abs()


SELECTIVE_SCAN = Operator(
    name="selective_scan",
    function=_with_pairs(ops.selective_scan.selective_scan),
    step=_step_with_pairs(ops.selective_scan.selective_scan_step),
    reference=_with_pairs(ops.selective_scan.reference),
    reference_step=_step_with_pairs(ops.selective_scan.reference_step),
    # S is the size of a state here, N the rows of states, and P the two parts of a complex number.
    arguments={
        "u": "B D L",
        "delta": "B D L",
        "A": "D S",
        "B": "B G S L",
        "C": "B G S L",
        "D": "D",
        "z": "B D L",
        "delta_bias": "D",
        "initial_state": "N D S",
    },
    outputs={"y": "B D L", "final_state": "N D S"},
    step_state="state",
    step_options=("delta_softplus", "transition"),
    autocast=(),
    factors=COMMON
    | {
        "shape": (
            (2, 3, 17),
            (2, 4, 1),
            (1, 5, 2),
            (3, 2, 3),
            (2, 16, 127),
            (1, 33, 129),  # tokens of one more than four chunks
            (1, 6, 1000),
            (1, 1, 31),
            (3, 20, 32),
            (2, 8, 33),
            (0, 3, 5),
            (2, 0, 5),
            (2, 3, 0),
        ),
        "S": (16, 1, 3, 5, 20, 64),
        "B": ("grouped", "shared", "constant"),
        "C": ("grouped", "shared", "constant"),
        "groups": (1, 2),
        "D": (False, True),
        "z": (False, True),
        "delta_bias": (False, True),
        "delta_softplus": (False, True),
        "transition": ("exp", "two_exp_minus_one"),
        "complex": (False, True),
        "growth": (False, True),
    },
    shape="B D L",
    small_shapes=((2, 3, 17), (1, 6, 2), (3, 2, 33), (2, 10, 8), (0, 3, 5), (2, 3, 0)),
    tiny={
        "shape": ((1, 2, 3), (2, 2, 2)),
        "S": (2, 1),
        "B": ("grouped", "constant"),
        "C": ("grouped", "constant"),
    },
    options=lambda values: {"delta_softplus": values["delta_softplus"], "transition": values["transition"]},
    variants=_scan_shapes,
    native_layouts=("contiguous", "transposed"),
    state_sizes=lambda sizes: {"G": math.gcd(sizes["D"], sizes["groups"]), "P": 2},
    workspace_bytes=_scan_workspace_bytes,
    kept_bytes=_scan_kept_bytes,
    draw={
        "A": _draw_A,
        "B": lambda t, values: t / 2,
        "C": lambda t, values: t / 2,
        "delta": _draw_delta,
        "delta_bias": lambda t, values: 0.1 * t.abs(),
    },
    lean={"S": 1},
)


def _with_numbers(function: Callable) -> Callable:
    """`linear_scan`, or its reference, as the table calls it: complex tensors as pairs in a last dimension of 2."""

    def call(a, b, *, initial_state=None, **options):
        if b.dim() < 4 or b.shape[-1] != 2:
            return function(a, b, initial_state, **options)
        initial_state = None if initial_state is None else _complex(initial_state)
        result = function(_complex(a), _complex(b), initial_state, **options)
        h, *final = map(torch.view_as_real, result if isinstance(result, tuple) else (result,))
        return h.to(b.dtype), *final

    return call


def _step_with_numbers(function: Callable) -> Callable:
    """`linear_scan_step`, or its reference, likewise, with an a that may be constant in time."""

    def call(state, a, b, **options):
        has_pairs = b.dim() == 3
        a, b_number = (_complex(a), _complex(b)) if has_pairs else (a, b)
        a = a.squeeze(1) if a.dim() == 3 else a
        if not has_pairs:
            return function(state, a, b, **options)
        numbers = _complex(state)
        h = function(numbers, a, b_number, **options)
        state.copy_(torch.view_as_real(numbers))
        return torch.view_as_real(h).to(b.dtype)

    return call


def _draw_decay(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Of size at most 1, with every sign or angle, or the logarithms of such, some of them -inf."""
    size, angle = variates[..., :1] if values["complex"] else variates, variates[..., 1:]
    size = -size.abs().where(size < 1.5, math.inf) if values["log_space"] else size.cos()
    if not values["complex"]:
        return size
    return torch.cat([size, angle] if values["log_space"] else [size * angle.cos(), size * angle.sin()], dim=-1)


def _linear_shapes(values: dict[str, Any]) -> dict[str, str]:
    shapes = {"a": values["a"], "b": "B L D", "y": "B L D", "initial_state": "N D", "final_state": "N D"}
    return {name: f"{letters} P" if values["complex"] else letters for name, letters in shapes.items()}


LINEAR_SCAN = Operator(
    name="linear_scan",
    function=_with_numbers(ops.linear_scan.linear_scan),
    step=_step_with_numbers(ops.linear_scan.linear_scan_step),
    reference=_with_numbers(ops.linear_scan.reference),
    reference_step=_step_with_numbers(ops.linear_scan.reference_step),
    # E is the one of a constant dimension, P the two parts of a complex number.
    arguments={"b": "B L D", "a": "B L D", "initial_state": "N D"},
    outputs={"y": "B L D", "final_state": "N D"},
    step_state="state",
    step_options=("log_space",),
    autocast=(),
    factors=COMMON
    | {
        "shape": (
            (2, 17, 3),
            (2, 1, 4),
            (1, 2, 5),
            (3, 3, 2),
            (2, 127, 16),
            (1, 129, 33),
            (1, 650, 100),  # more than two segments, real or complex
            (1, 31, 1),
            (3, 32, 20),
            (2, 33, 8),
            (0, 5, 3),
            (2, 5, 0),
            (2, 0, 3),
        ),
        "a": ("B L D", "B L E", "L D", "B E D", "D", "E"),
        "complex": (False, True),
        "log_space": (False, True),
        "reset": (False, True),
    },
    shape="B L D",
    small_shapes=((2, 17, 3), (1, 2, 6), (3, 33, 2), (2, 8, 10), (0, 5, 3), (2, 0, 3)),
    tiny={"shape": ((1, 3, 2), (2, 2, 2)), "a": ("B L D", "B L E", "D", "E")},
    options=lambda values: {"log_space": values["log_space"]},
    variants=_linear_shapes,
    broadcast=("a",),
    from_outputs=("a",),
    state_sizes=lambda sizes: {"E": 1, "P": 2},
    workspace_bytes=lambda inputs: 0,
    draw={"a": _draw_decay},
)

SOFTMAX_SCAN = Operator(
    name="softmax_scan",
    function=ops.softmax_scan.softmax_scan,
    step=ops.softmax_scan.softmax_scan_step,
    reference=ops.softmax_scan.reference,
    reference_step=ops.softmax_scan.reference_step,
    arguments={"v": "B L H V", "s": "B L H", "m": "N H", "n": "N H", "w": "N H V"},
    outputs={"y": "B L H V", "final_m": "N H", "final_n": "N H", "final_w": "N H V"},
    state={"m": -math.inf, "n": 0.0, "w": 0.0},
    step_state="state",
    step_options=(),
    autocast=(),
    factors=COMMON
    | {
        "shape": (
            (2, 17, 3, 5),
            (2, 1, 4, 3),
            (1, 2, 5, 1),
            (3, 3, 2, 2),
            (2, 127, 16, 4),
            (1, 129, 3, 33),
            (1, 1000, 2, 6),
            (1, 31, 1, 1),
            (3, 32, 1, 20),
            (2, 33, 1, 64),
            (2, 9, 65, 3),
            (0, 5, 3, 4),
            (2, 5, 0, 4),
            (2, 5, 3, 0),
            (2, 0, 3, 4),
        ),
    },
    shape="B L H V",
    small_shapes=((2, 17, 3, 5), (1, 2, 6, 1), (3, 33, 2, 3), (2, 8, 1, 40), (0, 5, 3, 4), (2, 0, 3, 4)),
    tiny={"shape": ((1, 3, 2, 2), (2, 2, 1, 2))},
    options=lambda values: {},
    state_sizes=lambda sizes: {},
    workspace_bytes=lambda inputs: 0,
    kept_bytes=lambda inputs: 2 * inputs.tensors["s"].numel() * inputs.accumulator.itemsize,  # m and n of every token
    from_outputs=("s", "m", "n"),
    harmless={"s": (-math.inf,)},
    draw={"n": lambda t, values: 0.5 + t.abs()},
    lean={"V": 64},
)


OPERATORS = (
    CAUSAL_CONV1D,
    DELTA_RULE,
    ELEMENTWISE_RNN,
    LINEAR_ATTENTION,
    LINEAR_SCAN,
    MLSTM,
    RNN,
    SELECTIVE_SCAN,
    SOFTMAX_SCAN,
    SSD,
)

SERVED = Counter(operator.raw for operator in OPERATORS)  # how many operators each folder of csrc serves
