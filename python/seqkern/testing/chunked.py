"""What the operators that go by chunks of tokens are called with: delta_rule, and those on the kernels of
linear_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .cases import COMMON, Inputs, Operator

CHUNK = 64  # tokens, at most (csrc/linear_attention, csrc/delta_rule)
PACKINGS = ("none", "cu_seqlens")


def _positive(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Where outputs are divided by sums of products: none of these is close to 0."""
    return 0.2 + variates.abs() if values["normalize"] else variates


def _bounded(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """The same with a sign for every token and head, for divisors of either sign."""
    return (0.2 + variates.abs()) * variates[..., :1].sign()


def _log_decay(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """One in twenty forgets everything."""
    return -variates.abs().where(variates.abs() < 2, math.inf)


def _attention_shapes(values: dict[str, Any]) -> dict[str, str]:
    shapes = {} if values["normalize"] else {"z": "absent", "final_z": "absent"}
    shapes |= {} if values["bonus"] else {"bonus": "absent"}
    return shapes | {"log_decay": values["log_decay"]}


def _attention_options(values: dict[str, Any]) -> dict[str, Any]:
    read = "previous" if values["bonus"] else values["read"]
    return {"normalize": values["normalize"], "read": read, "scale": values["scale"]}


def _bytes_per_token(inputs: Inputs) -> int:
    """One accumulator for each token and value head."""
    return inputs.sizes["B"] * inputs.sizes["L"] * inputs.sizes["HV"] * inputs.accumulator.itemsize


def _workspace_bytes(inputs: Inputs) -> int:
    """Gradients of q and k by parts of value heads, of parameters by runs (csrc/linear_attention/cpu_plan.h)."""
    letters = "B L H G S V" if inputs.operator.name == "ssd" else "B L HV H K V"
    B, L, HV, H, K, V = (inputs.sizes[letter] for letter in letters.split())
    group = HV // max(1, H)
    parts = max(1, -(-group // 6), min(torch.get_num_threads() // max(1, inputs.num_runs * H), group))
    keys = 0 if parts == 1 else parts * 2 * B * L * H * K
    D, bonus = inputs.tensors.get("D"), H * parts * K if "bonus" in inputs.tensors else 0
    numbers = 3 + (0 if D is None else V if D.dim() == 2 else 1)
    return (keys + inputs.num_runs * (HV * numbers + bonus)) * inputs.accumulator.itemsize + 8


LINEAR_ATTENTION = Operator(
    name="linear_attention",
    function=ops.linear_attention.linear_attention,
    step=ops.linear_attention.linear_attention_step,
    reference=ops.linear_attention.reference,
    reference_step=ops.linear_attention.reference_step,
    arguments={
        "v": "B L HV V",
        "q": "B L H K",
        "k": "B L H K",
        "log_decay": "B L HV",
        "bonus": "H K",
        "S": "N HV K V",
        "z": "N HV K",
    },
    outputs={"y": "B L HV V", "final_S": "N HV K V", "final_z": "N HV K"},
    state={"S": 0.0, "z": 0.0},
    step_state="state",
    step_options=("normalize", "read", "scale"),
    autocast=("q", "k", "v"),
    factors=COMMON
    | {
        "packing": PACKINGS,
        "shape": (
            (2, 17, 4, 2, 5, 3),
            (2, 1, 2, 2, 3, 4),
            (1, 2, 3, 1, 4, 1),
            (3, 3, 2, 1, 1, 2),
            (2, 130, 2, 1, 16, 20),  # tokens of two chunks and two more
            (1, 200, 1, 1, 33, 40),
            (2, 64, 2, 2, 64, 64),
            (1, 65, 1, 1, 70, 17),
            (0, 5, 2, 1, 3, 4),
            (2, 0, 2, 1, 3, 4),
            (2, 5, 0, 0, 3, 4),
            (2, 5, 2, 1, 0, 4),
            (2, 5, 2, 1, 3, 0),
        ),
        "normalize": (True, False),
        "log_decay": ("B L HV", "absent", "HV", "B L HV K"),
        "read": ("current", "previous"),
        "bonus": (False, True),
        "scale": (None, 0.7),
    },
    shape="B L HV H K V",
    small_shapes=(
        (2, 17, 4, 2, 5, 3),
        (1, 2, 3, 1, 4, 1),
        (1, 70, 1, 1, 3, 9),
        (3, 5, 2, 2, 20, 18),
        (0, 5, 2, 1, 3, 4),
        (2, 0, 2, 1, 3, 4),
    ),
    tiny={"shape": ((1, 3, 1, 1, 2, 1), (1, 2, 2, 1, 1, 2)), "scale": (0.7,)},
    options=_attention_options,
    variants=_attention_shapes,
    state_sizes=lambda sizes: {},
    workspace_bytes=_workspace_bytes,
    kept_bytes=lambda inputs: _bytes_per_token(inputs) * inputs.options["normalize"],
    rounds_operands=True,
    chunk=CHUNK,
    harmless={"log_decay": (-math.inf,)},
    draw={"q": _positive, "k": _positive, "bonus": _positive, "z": _positive, "log_decay": _log_decay},
    lean={"H": 1, "K": 1, "V": 64},
)


def _ssd_shapes(values: dict[str, Any]) -> dict[str, str]:
    return {"D": values["D_shape"]}


SSD = Operator(
    name="ssd",
    function=ops.ssd.ssd,
    step=ops.ssd.ssd_step,
    reference=ops.ssd.reference,
    reference_step=ops.ssd.reference_step,
    # V is the size of a head here, S that of a state, and N the rows of states.
    arguments={
        "x": "B L H V",
        "C": "B L G S",
        "B": "B L G S",
        "dt": "B L H",
        "A": "H",
        "dt_bias": "H",
        "D": "H",
        "z": "B L H V",
        "initial_state": "N H V S",
    },
    outputs={"y": "B L H V", "final_state": "N H V S"},
    step_state="state",
    step_options=("dt_softplus", "dt_limit"),
    autocast=("x", "B", "C"),
    factors=COMMON
    | {
        "shape": (
            (2, 17, 4, 2, 3, 5),
            (2, 1, 2, 2, 4, 3),
            (1, 2, 3, 1, 1, 4),
            (3, 3, 2, 1, 2, 1),
            (2, 130, 2, 1, 20, 16),
            (1, 200, 1, 1, 40, 33),
            (2, 64, 2, 2, 64, 64),
            (1, 65, 1, 1, 17, 70),
            (0, 5, 2, 1, 4, 3),
            (2, 0, 2, 1, 4, 3),
            (2, 5, 0, 0, 4, 3),
            (2, 5, 2, 1, 4, 0),
            (2, 5, 2, 1, 0, 3),
        ),
        "dt_bias": (False, True),
        "D": (False, True),
        "D_shape": ("H", "H V"),
        "z": (False, True),
        "dt_softplus": (False, True),
        "dt_limit": ((0.0, math.inf), (0.2, 0.7)),
    },
    shape="B L H G V S",
    small_shapes=(
        (2, 17, 4, 2, 3, 5),
        (1, 2, 3, 1, 1, 4),
        (1, 70, 1, 1, 9, 3),
        (3, 5, 2, 2, 18, 20),
        (0, 5, 2, 1, 4, 3),
        (2, 0, 2, 1, 4, 3),
    ),
    tiny={"shape": ((1, 3, 1, 1, 1, 2), (1, 2, 2, 1, 2, 1))},
    options=lambda values: {"dt_softplus": values["dt_softplus"], "dt_limit": values["dt_limit"]},
    variants=_ssd_shapes,
    state_sizes=lambda sizes: {},
    workspace_bytes=_workspace_bytes,
    kept_bytes=lambda inputs: inputs.tensors["x"].nbytes if "z" in inputs.tensors else 0,
    rounds_operands=True,
    chunk=CHUNK,
    harmless={"dt": (-math.inf,)},
    cancelling={name: "L" for name in ("dt", "A", "dt_bias")},
    draw={
        "A": lambda t, values: -0.1 - t.abs(),
        "dt": lambda t, values: t - 0.5 if values["dt_softplus"] else 0.1 + 0.5 * t.abs(),
        "dt_bias": lambda t, values: 0.1 * t.abs(),
    },
    lean={"G": 1, "S": 1, "V": 64},
    kernels="linear_attention",
)

MLSTM = Operator(
    name="mlstm",
    function=ops.mlstm.mlstm,
    step=ops.mlstm.mlstm_step,
    reference=ops.mlstm.reference,
    reference_step=ops.mlstm.reference_step,
    arguments={
        "v": "B L HV V",
        "q": "B L H K",
        "k": "B L H K",
        "f": "B L HV",
        "i": "B L HV",
        "C": "N HV K V",
        "n": "N HV K",
        "m": "N HV",
    },
    outputs={"y": "B L HV V", "final_C": "N HV K V", "final_n": "N HV K", "final_m": "N HV"},
    state={"C": 0.0, "n": 0.0, "m": -math.inf},
    step_state="state",
    step_options=("scale", "eps"),
    autocast=("q", "k", "v"),
    factors=COMMON
    | {
        "packing": PACKINGS,
        "shape": LINEAR_ATTENTION.factors["shape"],
        "scale": (None, 0.7),
        "eps": (1e-6, 0.0),
        "gates": (1.0, 4.0),  # the size of their pre-activations
    },
    shape="B L HV H K V",
    small_shapes=LINEAR_ATTENTION.small_shapes,
    tiny={"shape": ((1, 3, 1, 1, 2, 1), (1, 2, 1, 1, 1, 2)), "scale": (0.7,), "gates": (1.0,)},
    options=lambda values: {"scale": values["scale"], "eps": values["eps"]},
    state_sizes=lambda sizes: {},
    workspace_bytes=_workspace_bytes,
    kept_bytes=lambda inputs: 2 * _bytes_per_token(inputs),
    rounds_operands=True,
    chunk=CHUNK,
    cancelling={name: "K V" for name in ("i", "f", "m")},
    harmless={"i": (-math.inf,), "f": (-math.inf, math.inf)},
    draw={
        "q": _bounded,
        "k": lambda t, values: 0.2 + t.abs(),
        "i": lambda t, values: values["gates"] * t,
        "f": lambda t, values: values["gates"] * t + 2,
    },
    lean={"H": 1, "K": 1, "V": 64},
    kernels="linear_attention",
)


def _delta_shapes(values: dict[str, Any]) -> dict[str, str]:
    return {"log_decay": values["log_decay"]}


def _delta_options(values: dict[str, Any]) -> dict[str, Any]:
    return {"qk_l2norm": values["qk_l2norm"], "scale": values["scale"]}


def _short(variates: Tensor, values: dict[str, Any]) -> Tensor:
    """Keys of length at most 1, in every memory layout, so that with beta up to 2 states do not grow."""
    return variates.tanh() * max(1, variates.shape[-1]) ** -0.5


def _kept_u(inputs: Inputs) -> int:
    """u, in the dtype of v, but float32 where that is float16."""
    v = inputs.tensors["v"]
    return v.numel() * (4 if v.dtype == torch.float16 else v.dtype.itemsize)


def _delta_workspace_bytes(inputs: Inputs) -> int:
    """Gradients that parts of value heads or of values give each a part of (csrc/delta_rule/cpu_plan.h)."""
    B, L, HV, H, K, V = (inputs.sizes[letter] for letter in "B L HV H K V".split())
    threads, runs, group = torch.get_num_threads(), inputs.num_runs, HV // max(1, H)
    heads = max(1, -(-group // 6), min(threads // max(1, runs * H), group))
    values = max(1, -(-V // 64)) if threads >= 2 * runs * HV else 1
    keys = 0 if heads * values == 1 else heads * values * 3 * B * L * H * K
    numbers = 0 if values == 1 else values * B * L * HV * (2 + K)
    return (keys + numbers) * inputs.accumulator.itemsize + 8


DELTA_RULE = Operator(
    name="delta_rule",
    function=ops.delta_rule.delta_rule,
    step=ops.delta_rule.delta_rule_step,
    reference=ops.delta_rule.reference,
    reference_step=ops.delta_rule.reference_step,
    arguments={
        "v": "B L HV V",
        "q": "B L H K",
        "k": "B L H K",
        "erase_key": "B L H K",
        "beta": "B L HV",
        "log_decay": "B L HV",
        "initial_state": "N HV K V",
    },
    outputs={"y": "B L HV V", "final_state": "N HV K V"},
    step_state="state",
    step_options=("scale", "qk_l2norm"),
    autocast=("q", "k", "v", "erase_key"),
    factors=COMMON
    | {
        "packing": PACKINGS,
        "shape": LINEAR_ATTENTION.factors["shape"],
        "log_decay": ("B L HV", "absent", "B L HV K"),
        "erase_key": (False, True),
        "qk_l2norm": (True, False),
        "scale": (None, 0.7),
    },
    shape="B L HV H K V",
    small_shapes=LINEAR_ATTENTION.small_shapes,
    tiny={"shape": ((1, 3, 1, 1, 2, 1), (1, 2, 2, 1, 1, 2)), "scale": (0.7,)},
    options=_delta_options,
    variants=_delta_shapes,
    state_sizes=lambda sizes: {},
    workspace_bytes=_delta_workspace_bytes,
    kept_bytes=_kept_u,
    rounds_operands=True,
    chunk=CHUNK,
    distinct="K",  # keys that are all parallel cost digits (test_delta_rule.py has them)
    harmless={"log_decay": (-math.inf,)},
    draw={
        "k": _short,
        "erase_key": lambda t, values: 0.3 * _short(t, values),
        "beta": lambda t, values: 1 + t.tanh(),
        "log_decay": _log_decay,
    },
    lean={"H": 1, "K": 1, "V": 64},
)
