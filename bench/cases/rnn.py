"""Rows of rnn as layers of torch.nn, which multiply their input as well; of sLSTM by itself; of rnn_step."""

from itertools import product

import torch
from inputs import normal
from peers.rnn import layer

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
SHAPES = [(8, 1024, 64), (1, 512, 256), (16, 256, 512)]  # (B, L, P), and the input's size P
PACKED = (32, 256, 128)  # with lengths 1 to 256
PROJECTED = (16, 256, 128, 64)  # (B, L, P, Q)
PLAIN = (16, 256, 128)
HEADS = (16, 256, 12, 64)  # (B, L, H, P)
STEPS = [(1, 512), (64, 512)]  # (B, P)
GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman_tanh": 1}
EXPS = {"lstm": 5, "gru": 3, "slstm": 7, "elman_tanh": 1}  # of a unit and token; a sigmoid or tanh is one


def rows(device: str) -> list[Row]:
    rows = [_layer(device, cell, kind, shape) for cell, kind, shape in product(("gru", "lstm"), KINDS, SHAPES)]
    bfloat16 = product(("gru", "lstm"), KINDS, SHAPES)
    rows += [_layer(device, cell, kind, shape, torch.bfloat16) for cell, kind, shape in bfloat16]
    rows += [_layer(device, cell, kind, PACKED, more="packed") for cell, kind in product(("gru", "lstm"), KINDS)]
    rows += [_layer(device, "lstm", kind, PROJECTED, more="proj") for kind in KINDS]
    rows += [_layer(device, "elman_tanh", kind, PLAIN) for kind in KINDS]
    rows += [_slstm(device, kind) for kind in KINDS]
    return rows + [_step(device, shape) for shape in STEPS]


def _layer(device, cell, kind, shape, dtype=torch.float32, more="") -> Row:
    B, L, P, *rest = shape
    G, Q = GATES[cell], rest[0] if rest else P
    tokens = sum(1 + t * (L - 1) // (B - 1) for t in range(B)) if more == "packed" else B * L
    sizes = {"weight_ih_l0": (G * P, P), "weight_hh_l0": (G * P, Q), "bias_ih_l0": (G * P,), "bias_hh_l0": (G * P,)}
    sizes |= {"weight_hr_l0": (Q, P)} if more == "proj" else {}

    def inputs():
        new = normal(device)
        arguments = {"input": new(tokens, P) if more == "packed" else new(B, L, P)}
        arguments |= {name: new(*size) / P**0.5 for name, size in sizes.items()}
        arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
        if more == "packed":
            lengths = torch.tensor([1 + t * (L - 1) // (B - 1) for t in range(B)])
            arguments["batch_sizes"] = (lengths[None] > torch.arange(L)[:, None]).sum(1)
        return arguments

    products = 2 * tokens * (G * P * (P + Q) + (P * Q if more == "proj" else 0))
    size = tokens * (P + Q) * dtype.itemsize + sum(torch.Size(s).numel() for s in sizes.values()) * dtype.itemsize
    passes = 1 if kind == "forward" else 3
    return Row(
        op="rnn",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=" ".join(filter(None, (cell, "layer", more))),
        function=layer(seqkern.nn, cell),
        reference=layer(torch.nn, cell),
        inputs=inputs,
        bytes=passes * size,
        flops=passes * products,
        exps=passes * EXPS[cell] * tokens * P,
        unit="token",
        units=tokens,
        gradients=("input", *sizes),
        options=frozenset(filter(None, (cell, more))),
        quick=cell == "gru" and shape == SHAPES[0] and dtype == torch.float32,
    )


def _slstm(device, kind) -> Row:
    B, L, H, P = HEADS

    def inputs():
        new = normal(device)
        return {"x": new(B, L, H, 4, P), "R": new(H, 4, P, P) / P**0.5, "bias": new(H, 4, P), "cell": "slstm"}

    passes, tokens = 1 if kind == "forward" else 3, B * L * H
    return Row(
        op="rnn",
        kind=kind,
        shape=HEADS,
        dtype=torch.float32,
        device=device,
        variant="slstm",
        function=seqkern.rnn,
        reference=seqkern.reference.rnn,
        inputs=inputs,
        bytes=passes * 4 * (tokens * 5 * P + 4 * H * P * P),
        flops=passes * 2 * tokens * 4 * P * P,
        exps=passes * EXPS["slstm"] * tokens * P,
        gradients=("x", "R", "bias"),
        options=frozenset({"slstm"}),
        compiles=True,
    )


def _step(device, shape) -> Row:
    B, P = shape

    def inputs():
        new = normal(device)
        weights = {"R": new(1, 4, P, P) / P**0.5, "bias": new(1, 4, P)}
        return {"state0": new(B, 1, P).tanh(), "state1": new(B, 1, P), "x": new(B, 1, 4, P), **weights}

    def call(step):
        return lambda x, R, bias, **state: step(tuple(state.values()), x, R, bias, cell="lstm")

    return Row(
        op="rnn",
        kind="step",
        shape=shape,
        dtype=torch.float32,
        device=device,
        variant="lstm",
        function=call(seqkern.rnn_step),
        reference=call(seqkern.reference.rnn_step),
        inputs=inputs,
        bytes=4 * (4 * P * P + B * P * (4 + 4 + 1)),
        flops=2 * B * 4 * P * P,
        exps=EXPS["lstm"] * B * P,
        updates=("state0", "state1"),
        options=frozenset({"lstm"}),
        compiles=True,
        quick=shape == STEPS[0],
    )
