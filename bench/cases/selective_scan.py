"""Rows of selective_scan and selective_scan_step, with all that Mamba asks of them: softplus, bias, D and z."""

import math
from itertools import product

import torch
from torch.utils.checkpoint import checkpoint

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
FIRST = (1, 1536, 2048, 16)  # (B, D, L, N)
SHAPES = {
    "cpu": [FIRST, (4, 768, 1024, 16), (1, 5120, 512, 16)],
    "cuda": [FIRST, (8, 4096, 2048, 16), (4, 768, 1024, 16), (1, 5120, 512, 16)],
}
SHORT = (1, 1536, 128, 16)  # where a backward that is quadratic in L ends as well
LONG = (1, 256, 65536, 16)
WIDE = (1, 1536, 512, 64)
STEPS = [(1, 1536, 16), (8, 1536, 16), (128, 8192, 16)]  # (B, D, N); the last state has 64 MB
DTYPES = (torch.float32, torch.bfloat16)  # of u, delta, z, B, C and y; parameters and states are float32
SEQUENCES = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.3)  # their shares of the packed row
CHUNK = 32  # tokens between two checkpoints (csrc/selective_scan/params.h)

# Multiply-adds count twice. Of each state: delta' A, the input's product, the update, the product with C; and in the
# backward the first three again and [out], [dstate] with its carry, [dC], [dB], [du], [dA], [ddelta].
FLOPS = {"forward": 6, "forward+backward": 6 + 20}
COMPLEX_FLOPS = {"forward": 18, "forward+backward": 18 + 54}


def rows(device: str) -> list[Row]:
    rows = []
    for shape, dtype, kind in product(SHAPES[device], DTYPES, KINDS):
        usual = dtype == torch.float32 and shape in SHAPES["cpu"]
        quick = shape == FIRST and kind == "forward"
        rows.append(_sequences(device, kind, shape, dtype, slow=usual, compiles=usual, quick=quick))
    rows += [_sequences(device, kind, SHORT, slow=True, quick=kind != "forward") for kind in KINDS]
    rows += [_sequences(device, kind, FIRST, order="channels") for kind in KINDS]
    rows += [_sequences(device, kind, WIDE) for kind in KINDS]
    rows += [_sequences(device, kind, FIRST, complex=True) for kind in KINDS]
    rows += [_sequences(device, kind, FIRST, packed=True) for kind in KINDS]
    rows += [_step(device, shape, dtype) for shape, dtype in product(STEPS, DTYPES)]
    if device == "cuda":
        rows += [_sequences(device, kind, LONG, dtype) for dtype, kind in product(DTYPES, KINDS)]
    return rows


def _sequences(
    device, kind, shape, dtype=torch.float32, *, order="time", complex=False, packed=False, **taking_part
) -> Row:
    B, D, L, N = shape
    parts = 2 if complex else 1

    def inputs():
        generator = torch.Generator(device).manual_seed(0)

        def new(channels, length):
            if order == "time":
                return torch.randn(B, channels, length, generator=generator, device=device).to(dtype)
            return torch.randn(B, length, channels, generator=generator, device=device).to(dtype).transpose(1, 2)

        arguments = {"u": new(D, L), "delta": new(D, L), "z": new(D, L), "B": new(N, L * parts), "C": new(N, L * parts)}
        arguments |= _parameters(D, N, complex, generator, device)
        if packed:
            lengths = [round(share * L) for share in SEQUENCES[:-1]]
            bounds = torch.tensor([0, *lengths, L - sum(lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            arguments["cu_seqlens"] = bounds.to(device)
        return arguments

    tokens, projections = B * D * L * dtype.itemsize, 2 * B * N * L * parts * dtype.itemsize
    parameters = (D * N * parts + 2 * D) * 4
    checkpoints = B * math.ceil(L / CHUNK) * D * N * parts * 4
    read = 3 * tokens + projections + parameters  # u, delta, z; B, C; A, D, delta_bias
    size = read + tokens  # y
    if kind == "forward+backward":
        size += checkpoints + (checkpoints + tokens + read) + read  # written; read, with dy; the gradients
    passes = 1 if kind == "forward" else 2
    return Row(
        op="selective_scan",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"{len(SEQUENCES)} sequences" if packed else "complex" if complex else order,
        function=seqkern.selective_scan,
        reference=seqkern.reference.selective_scan if packed else _reference,
        inputs=inputs,
        bytes=size,
        flops=(COMPLEX_FLOPS if complex else FLOPS)[kind] * B * D * L * N,
        exps=passes * B * D * L * (N * (3 if complex else 1) + 3),  # decays; softplus takes two, silu one
        unit="state step",
        units=B * D * L * N,
        gradients=("u", "delta", "z", "B", "C", "A", "D", "delta_bias"),
        options=frozenset({"cu_seqlens"} if packed else {"complex"} if complex else ()),
        **taking_part,
    )


def _parameters(D, N, complex, generator, device) -> dict:
    """As Mamba starts: A = -1 ... -N, and a bias that makes delta' lie between 0.001 and 0.1."""
    n = torch.arange(N, device=device)
    A = torch.complex(torch.full((N,), -0.5, device=device), math.pi * n) if complex else -(n + 1.0)
    delta = 10 ** (torch.rand(D, generator=generator, device=device) * 2 - 3)
    D_skip = torch.randn(D, generator=generator, device=device)
    return {"A": A.repeat(D, 1), "D": D_skip, "delta_bias": delta.expm1().log(), "delta_softplus": True}


def _reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """seqkern.reference.selective_scan, which keeps (B, D, L, N) tensors, on 128 tokens at a time."""
    ys, state = [], None
    pieces = (t.split(128 * t.shape[-1] // u.shape[-1], dim=-1) for t in (u, delta, B, C, z))
    for u_, delta_, B_, C_, z_ in zip(*pieces, strict=True):
        arguments = (u_, delta_, A, B_, C_, D, z_, delta_bias, delta_softplus, True)
        function = seqkern.reference.selective_scan
        y, state = checkpoint(function, *arguments, initial_state=state, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys, dim=-1)


def _step(device, shape, dtype) -> Row:
    B, D, N = shape

    def inputs():
        generator = torch.Generator(device).manual_seed(0)

        def new(*size):
            return torch.randn(size, generator=generator, device=device)

        tokens = {name: new(B, D).to(dtype) for name in ("u", "delta", "z")}
        projections = {name: new(B, N).to(dtype) for name in ("B", "C")}
        parameters = _parameters(D, N, False, generator, device)
        return {"state": new(B, D, N)} | tokens | projections | parameters

    return Row(
        op="selective_scan",
        kind="step",
        shape=shape,
        dtype=dtype,
        device=device,
        variant="float32 state",
        function=seqkern.selective_scan_step,
        reference=seqkern.reference.selective_scan_step,
        inputs=inputs,
        bytes=(2 * B * D * N + D * N + 2 * D) * 4 + (4 * B * D + 2 * B * N) * dtype.itemsize,
        flops=FLOPS["forward"] * B * D * N,
        exps=B * D * (N + 3),
        unit="state step",
        units=B * D * N,
        updates=("state",),
        compiles=shape != STEPS[-1],
        quick=shape == (8, 1536, 16),
    )
