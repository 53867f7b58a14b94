"""Rows of delta_rule with a decay per token (Gated DeltaNet) and per key (KDA), and of its step, with keys and queries
normalised by the operator."""

from itertools import product

import torch
import torch.nn.functional as F
from inputs import by_pieces, normal

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
HEADS = {  # (B, L, H, K, V)
    "cpu": [(1, 2048, 8, 128, 128)],
    "cuda": [(1, 8192, 96, 128, 128), (8, 2048, 32, 128, 128), (1, 65536, 8, 128, 128)],
}
STEPS = [(1, 32, 128, 128), (32, 32, 128, 128)]  # (B, H, K, V); the last state has 67 MB
DTYPES = (torch.float32, torch.bfloat16)  # of all but decays, beta and states, which are float32
OPTIONS = {"decay per token": frozenset({"per token"}), "decay per key": frozenset({"per key"})}
CHUNK = 64  # tokens: what is counted is the chunk form, whose products are the fewest at usual sizes
GRADIENTS = ("q", "k", "v", "beta", "log_decay")


def rows(device: str) -> list[Row]:
    rows = []
    for dtype, kind, shape, variant in product(DTYPES, KINDS, HEADS[device], OPTIONS):
        rows.append(_row(device, kind, shape, dtype, variant))
    return rows + [_step(device, shape, dtype) for shape, dtype in product(STEPS, DTYPES)]


def _row(device, kind, shape, dtype, variant) -> Row:
    B, L, H, K, V = shape
    per_key, backward, usual = variant == "decay per key", kind != "forward", dtype == torch.float32

    def inputs():
        new = normal(device)
        tokens = {name: new(B, L, H, size).to(dtype) for name, size in (("q", K), ("k", K), ("v", V))}
        gates = new(*((B, L, H, K) if per_key else (B, L, H)))
        return tokens | {"beta": new(B, L, H).sigmoid(), "log_decay": F.logsigmoid(gates) / 8, "qk_l2norm": True}

    # Of each token and head. Products with a state: q and e read it, k and u change it; the backward changes S and dS
    # again, and has one for du, dk, and for dq and de with S. Of a chunk, half a product each: q k, e k, the solution
    # and P u; the backward has dq, de and two of dk more, and P dn, dP, dA and another solution.
    states, keys, values = (14 + 6, 2 + 2 + 4, 2 + 4) if backward else (6, 2, 2)
    read = B * L * H * ((2 * K + V) * dtype.itemsize + 4 + (4 * K if per_key else 4))
    written = B * L * H * V * dtype.itemsize
    return Row(
        op="delta_rule",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=variant,
        function=seqkern.delta_rule,
        reference=by_pieces(seqkern.reference.delta_rule, GRADIENTS),
        inputs=inputs,
        bytes=3 * read + 2 * written if backward else read + written,
        flops=B * L * H * (states * K * V + CHUNK * (keys * K + values * V)),
        exps=B * L * H * (3 * K if per_key else CHUNK // 2 + 2) * (2 if backward else 1),
        gradients=GRADIENTS,
        options=OPTIONS[variant],
        coarse={} if usual else {f"output {i}": 1.0 for i in range(1 + (len(GRADIENTS) if backward else 0))},
        compiles=usual and not per_key,
        slow=usual,
        quick=usual and not per_key and not backward,
    )


def _step(device, shape, dtype) -> Row:
    B, H, K, V = shape

    def inputs():
        new = normal(device)
        tokens = {name: new(B, H, size).to(dtype) for name, size in (("q", K), ("k", K), ("v", V))}
        gates = {"beta": new(B, H).sigmoid(), "log_decay": -new(B, H).abs() / 8, "qk_l2norm": True}
        return {"state": new(B, H, K, V)} | tokens | gates

    return Row(
        op="delta_rule",
        kind="step",
        shape=shape,
        dtype=dtype,
        device=device,
        variant="decay per token, float32 state",
        function=seqkern.delta_rule_step,
        reference=seqkern.reference.delta_rule_step,
        inputs=inputs,
        bytes=2 * B * H * K * V * 4 + 2 * B * H * (K + V) * dtype.itemsize + 2 * B * H * 4,
        flops=8 * B * H * K * V,
        exps=B * H,
        options=OPTIONS["decay per token"],
        updates=("state",),
        compiles=True,
        quick=(shape, dtype) == (STEPS[0], torch.float32),
    )
