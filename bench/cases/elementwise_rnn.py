"""Rows of elementwise_rnn and elementwise_rnn_step."""

from itertools import product

import torch
from inputs import by_pieces, normal

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
FIRST = (8, 1024, 512)  # (B, L, D)
FEW, MANY = (1, 4096, 64), (16, 256, 4096)
PACK = (1, 8192, 512)
STEP = (64, 4096)  # (B, D)
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCES = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.3)  # their shares of the packed row

# G, W, S; of a token and channel: multiply-adds counted twice, and exponentials (a sigmoid or a tanh is one).
CELLS = {
    "gru": (3, 3, 1, {"forward": 13, "forward+backward": 13 + 40}, 3),
    "lstm": (3, 5, 2, {"forward": 17, "forward+backward": 17 + 55}, 4),
    "slstm": (4, 4, 3, {"forward": 17, "forward+backward": 17 + 55}, 6),
    "indrnn": (1, 1, 1, {"forward": 2, "forward+backward": 2 + 6}, 0),
    "elman": (1, 1, 1, {"forward": 2, "forward+backward": 2 + 8}, 1),
}
PARTS = {"lstm": 2}  # of a step's state; that of slstm is right in any scale, and so cannot be compared


def rows(device: str) -> list[Row]:
    rows = []
    for dtype, kind in product(DTYPES, KINDS):
        usual = dtype == torch.float32
        rows.append(_sequences(device, "gru", kind, FIRST, dtype, slow=usual, compiles=usual, quick=usual))
    rows += [_sequences(device, "gru", kind, shape, slow=True) for shape, kind in product((FEW, MANY), KINDS)]
    others = [cell for cell in CELLS if cell != "gru"]
    rows += [_sequences(device, cell, kind, FIRST, slow=True) for cell, kind in product(others, KINDS)]
    rows += [_sequences(device, "gru", kind, PACK, packed=True) for kind in KINDS]
    rows += [_step(device, cell, dtype) for cell, dtype in (*product(("gru",), DTYPES), ("lstm", torch.float32))]
    return rows


def _sequences(device, cell, kind, shape, dtype=torch.float32, *, packed=False, **taking_part) -> Row:
    B, L, D = shape
    G, W, S, flops, exps = CELLS[cell]

    def inputs():
        new = normal(device)
        weights = 0.5 * new(W, D)
        arguments = {"x": new(B, L, G, D).to(dtype), "weights": weights.clamp(-1, 1), "cell": cell}
        if packed:
            lengths = [round(share * L) for share in SEQUENCES[:-1]]
            bounds = torch.tensor([0, *lengths, L - sum(lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            arguments["cu_seqlens"] = bounds.to(device)
        return arguments

    tokens = B * L * D
    size = tokens * (G + 1) * dtype.itemsize  # x, h
    if kind == "forward+backward":
        size += tokens * ((2 * G + 1) * dtype.itemsize + 2 * S * 4 / 16)  # x, dh, dx; checkpoints written and read
    return Row(
        op="elementwise_rnn",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"{cell}, {len(SEQUENCES)} sequences" if packed else cell,
        function=seqkern.elementwise_rnn,
        reference=seqkern.reference.elementwise_rnn if packed else by_pieces(seqkern.reference.elementwise_rnn, ("x",)),
        inputs=inputs,
        bytes=int(size),
        flops=flops[kind] * tokens,
        exps=exps * tokens * (1 if kind == "forward" else 3),  # the backward computes the states again, then adjoints
        gradients=("x", "weights"),
        options=frozenset({cell, "cu_seqlens"} if packed else {cell}),
        **taking_part,
    )


def _step(device, cell, dtype) -> Row:
    B, D = STEP
    G, W, _, flops, exps = CELLS[cell]
    parts = [f"state{i}" for i in range(PARTS.get(cell, 1))]

    def inputs():
        new = normal(device)
        state = {name: new(B, D) for name in parts}
        return state | {"x": new(B, G, D).to(dtype), "weights": (0.5 * new(W, D)).clamp(-1, 1)}

    def call(step):
        return lambda x, weights, **state: step(tuple(state.values()), x, weights, cell=cell)

    return Row(
        op="elementwise_rnn",
        kind="step",
        shape=STEP,
        dtype=dtype,
        device=device,
        variant=f"{cell}, float32 state",
        function=call(seqkern.elementwise_rnn_step),
        reference=call(seqkern.reference.elementwise_rnn_step),
        inputs=inputs,
        bytes=B * D * (2 * 4 * len(parts) + (G + 1) * dtype.itemsize) + W * D * 4,
        flops=flops["forward"] * B * D,
        exps=exps * B * D,
        updates=tuple(parts),
        options=frozenset({cell}),
        compiles=True,
        quick=cell == "gru" and dtype == torch.float32,
    )
