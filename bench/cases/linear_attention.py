"""Rows of linear_attention under its names: ssd, linear attention with a decay per token and per key (gla), mlstm, and
their steps."""

from itertools import product

import torch
from inputs import by_pieces, normal

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
SSD = {"cpu": [(1, 2048, 24, 64, 128)], "cuda": [(1, 2048, 24, 64, 128), (8, 4096, 80, 64, 128)]}  # (B, L, H, P, N)
HEADS = {"cpu": [(1, 2048, 8, 128, 128)], "cuda": [(1, 8192, 96, 128, 128), (8, 2048, 32, 128, 128)]}  # (B, L, H, K, V)
MLSTM = {"cpu": [(1, 2048, 4, 128, 256)], "cuda": [(8, 8192, 16, 128, 256)]}
SSD_STEPS = [(1, 24, 64, 128), (64, 24, 64, 128)]  # (B, H, P, N); the last state has 50 MB
STEPS = [(1, 32, 128, 128), (32, 32, 128, 128)]  # (B, H, K, V); the last state has 67 MB
DTYPES = (torch.float32, torch.bfloat16)  # of all but decays, dt, gates and states, which are float32
CHUNK = 64  # tokens: what is counted is the chunk form, whose products are the fewest at usual sizes


def rows(device: str) -> list[Row]:
    rows = []
    for dtype, kind in product(DTYPES, KINDS):
        usual = dtype == torch.float32
        taking_part = {"slow": usual, "compiles": usual, "quick": usual and kind == "forward"}
        rows += [_ssd(device, kind, shape, dtype, **taking_part) for shape in SSD[device]]
        if kind == "forward":
            rows += [_ssd(device, kind, shape, dtype, whole=True, **taking_part) for shape in SSD[device][:1]]
        for shape, form in product(HEADS[device], ("per token", "per key")):
            rows.append(_attention(device, kind, shape, dtype, form, slow=usual, compiles=usual))
        rows += [_mlstm(device, kind, shape, dtype, slow=usual) for shape in MLSTM[device]]
    rows += [_ssd_step(device, shape, dtype) for shape, dtype in product(SSD_STEPS, DTYPES)]
    rows += [_step(device, shape, dtype) for shape, dtype in product(STEPS, DTYPES)]
    return rows


def _ssd(device, kind, shape, dtype, *, whole=False, **taking_part) -> Row:
    """`whole`: with D, z, a bias and softplus, as Mamba-2 calls it."""
    B, L, H, P, N = shape

    def inputs():
        new = normal(device)
        arguments = {
            "x": new(B, L, H, P).to(dtype),
            "dt": new(B, L, H),
            "A": -(1 + torch.arange(H, device=device) % 16.0),
        }
        arguments |= {"B": new(B, L, 1, N).to(dtype), "C": (new(B, L, 1, N) / N**0.5).to(dtype)}
        if not whole:
            return arguments | {"dt": 0.001 * 100 ** torch.sigmoid(arguments["dt"])}
        step = 0.001 * 100 ** torch.rand(H, generator=torch.Generator().manual_seed(1)).to(device)
        arguments["dt"] /= 4
        options = {"D": new(H), "z": new(B, L, H, P).to(dtype), "dt_bias": step.expm1().log(), "dt_softplus": True}
        return arguments | options

    values, keys = B * L * H * P * dtype.itemsize, B * L * N * dtype.itemsize
    read = (2 if whole else 1) * values + 2 * keys + B * L * H * 4  # x, z; B, C; dt
    return _row(
        device,
        kind,
        shape,
        dtype,
        "ssd, D, z, softplus" if whole else "ssd",
        options=frozenset({"ssd", "whole"} if whole else {"ssd"}),
        function=seqkern.ssd,
        reference=by_pieces(seqkern.reference.ssd, ("x", "dt", "B", "C", "z")),
        inputs=inputs,
        read=read,
        written=values,
        sizes=(B * L, 1, H, N, P),
        exps_per_token=H * (CHUNK // 2 + 4),
        gradients=("x", "dt", "A", "B", "C", *(("D", "z", "dt_bias") if whole else ())),
        **taking_part,
    )


def _attention(device, kind, shape, dtype, form, **taking_part) -> Row:
    B, L, H, K, V = shape

    def inputs():
        new = normal(device)
        keys = {"q": new(B, L, H, K).to(dtype), "k": (new(B, L, H, K) / K**0.5).to(dtype)}
        gates = new(*((B, L, H) if form == "per token" else (B, L, H, K)))
        return keys | {"v": new(B, L, H, V).to(dtype), "log_decay": torch.nn.functional.logsigmoid(gates) / 8}

    values, keys = B * L * H * V * dtype.itemsize, B * L * H * K * dtype.itemsize
    decays = B * L * H * 4 * (1 if form == "per token" else K)
    return _row(
        device,
        kind,
        shape,
        dtype,
        f"decay {form}",
        options=frozenset({form}),
        function=seqkern.linear_attention,
        reference=by_pieces(seqkern.reference.linear_attention, ("q", "k", "v", "log_decay")),
        inputs=inputs,
        read=values + 2 * keys + decays,
        written=values,
        sizes=(B * L, H, H, K, V),
        exps_per_token=H * (CHUNK // 2 + 2 if form == "per token" else 3 * K),
        gradients=("q", "k", "v", "log_decay"),
        **taking_part,
    )


def _mlstm(device, kind, shape, dtype, **taking_part) -> Row:
    B, L, H, K, V = shape

    def inputs():
        new = normal(device)
        arguments = {name: new(B, L, H, size).to(dtype) for name, size in (("q", K), ("k", K), ("v", V))}
        return arguments | {"i": new(B, L, H), "f": 3 + new(B, L, H)}

    values, keys = B * L * H * V * dtype.itemsize, B * L * H * K * dtype.itemsize
    return _row(
        device,
        kind,
        shape,
        dtype,
        "mlstm",
        options=frozenset({"mlstm"}),
        function=seqkern.mlstm,
        reference=by_pieces(seqkern.reference.mlstm, ("q", "k", "v", "i", "f")),
        inputs=inputs,
        read=values + 2 * keys + 2 * B * L * H * 4,
        written=values,
        sizes=(B * L, H, H, K, V),
        exps_per_token=H * (CHUNK // 2 + 6),
        gradients=("q", "k", "v", "i", "f"),
        **taking_part,
    )


# Gradients that are differences of sums, of as many terms in a row (seqkern.testing.chunked).
CANCELLING = {"dt": lambda L, K, V: L, "A": lambda L, K, V: L, "dt_bias": lambda L, K, V: L}
CANCELLING |= {"i": lambda L, K, V: K * V, "f": lambda L, K, V: K * V}


def _coarse(kind, dtype, gradients, terms) -> dict[str, float]:
    """What seqkern's contract allows: operands of products are rounded to 16 bits where data are."""
    names = ["y", *(gradients if kind != "forward" else ())]
    if dtype == torch.bfloat16:
        allowed = {name: 2.0 if name in CANCELLING else 1.0 for name in names}
    else:
        allowed = {name: CANCELLING[name](*terms) ** 0.5 for name in names if name in CANCELLING}
    return {f"output {i}": allowed[name] for i, name in enumerate(names) if name in allowed}


def _row(device, kind, shape, dtype, variant, *, read, written, sizes, exps_per_token, **fields) -> Row:
    tokens, H, HV, K, V = sizes
    backward = kind != "forward"
    # Of each token and value head: q S and the update of S, and half of C scores and their product with v. The backward
    # updates S again, and dS, and takes a product with S or dS for each of dq, dk and dv; then five of the second kind.
    states, scores = 4 * K * V, CHUNK * (K * H / HV + V)
    flops = states + scores + (10 * K * V + CHUNK * (K * H / HV + 2 * K + 2 * V) if backward else 0)
    return Row(
        op="linear_attention",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=variant,
        bytes=(3 * read + 2 * written if backward else read + written),  # read, with dy, and the gradients of all
        flops=round(tokens * HV * flops),
        exps=tokens * exps_per_token * (2 if backward else 1),
        coarse=_coarse(kind, dtype, fields["gradients"], (shape[1], K, V)),
        **fields,
    )


def _ssd_step(device, shape, dtype) -> Row:
    B, H, P, N = shape

    def inputs():
        new = normal(device)
        tokens = {"x": new(B, H, P).to(dtype), "dt": new(B, H), "A": -1 - torch.arange(H, device=device) % 16.0}
        tokens |= {"B": new(B, 1, N).to(dtype), "C": new(B, 1, N).to(dtype), "D": new(H), "z": new(B, H, P).to(dtype)}
        return {"state": new(B, H, P, N)} | tokens | {"dt_bias": new(H) - 4, "dt_softplus": True}

    size = 2 * B * H * P * N * 4 + (3 * B * H * P + 2 * B * N) * dtype.itemsize + B * H * 4
    return _step_row(
        device, shape, dtype, "ssd, float32 state", seqkern.ssd_step, seqkern.reference.ssd_step, inputs, size
    )


def _step(device, shape, dtype) -> Row:
    B, H, K, V = shape

    def inputs():
        new = normal(device)
        tokens = {name: new(B, H, size).to(dtype) for name, size in (("q", K), ("k", K), ("v", V))}
        return {"state": new(B, H, K, V)} | tokens | {"log_decay": -new(B, H).abs() / 8}

    size = 2 * B * H * K * V * 4 + 2 * B * H * (K + V) * dtype.itemsize + B * H * 4
    function, reference = seqkern.linear_attention_step, seqkern.reference.linear_attention_step
    return _step_row(device, shape, dtype, "decay per token, float32 state", function, reference, inputs, size)


def _step_row(device, shape, dtype, variant, function, reference, inputs, size) -> Row:
    B, H, first, second = shape
    return Row(
        op="linear_attention",
        kind="step",
        shape=shape,
        dtype=dtype,
        device=device,
        variant=variant,
        function=function,
        reference=reference,
        inputs=inputs,
        bytes=size,
        flops=6 * B * H * first * second,
        exps=B * H,
        options=frozenset({"ssd"} if variant.startswith("ssd") else {"per token"}),
        updates=("state",),
        compiles=True,
        quick=shape == SSD_STEPS[0],
    )
