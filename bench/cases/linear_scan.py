"""Rows of linear_scan and linear_scan_step."""

from itertools import product

import torch

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
FIRST = (4, 4096, 1024)  # (B, L, D)
SHAPES = {"cpu": [FIRST], "cuda": [FIRST, (8, 2048, 8192)]}
LONG = (1, 2**20, 8)
SHORT = (8192, 16, 64)
COMPLEX = (4, 4096, 512)
PACK = (1, 16384, 1024)
STEPS = [(8, 1536), (64, 4096)]  # (B, D)
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCES = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.3)  # their shares of the packed row

# Of each number, the backward's beside the forward's: [state]; [dstate] and [da], with `log_space` another product.
FLOPS = {"forward": 2, "forward+backward": 2 + 3}
COMPLEX_FLOPS = {"forward": 8, "forward+backward": 8 + 8 + 6}


def rows(device: str) -> list[Row]:
    rows = []
    for shape, dtype, kind in product(SHAPES[device], DTYPES, KINDS):
        usual = dtype == torch.float32 and shape == FIRST
        rows.append(_sequences(device, kind, shape, dtype, slow=usual, compiles=usual, quick=kind == "forward"))
    for dtype, kind in product(DTYPES, KINDS):
        usual = dtype == torch.float32
        rows.append(_sequences(device, kind, LONG, dtype, slow=usual, compiles=usual))
    for kind in KINDS:
        rows.append(_sequences(device, kind, FIRST, constant=True))
        rows.append(_sequences(device, kind, FIRST, log_space=True))
        rows.append(_sequences(device, kind, COMPLEX, complex=True, slow=True))
        rows.append(_sequences(device, kind, SHORT, slow=True, compiles=True))
        rows.append(_sequences(device, kind, PACK, packed=True))
    rows += [_step(device, shape, dtype) for shape, dtype in product(STEPS, DTYPES)]
    return rows


def _sequences(
    device,
    kind,
    shape,
    dtype=torch.float32,
    *,
    constant=False,
    log_space=False,
    complex=False,
    packed=False,
    **taking_part,
) -> Row:
    B, L, D = shape
    data = dtype.to_complex() if complex else dtype

    def inputs():
        generator = torch.Generator(device).manual_seed(0)
        b = torch.randn(shape, dtype=data if complex else None, generator=generator, device=device)
        a = _decays((1, 1, D) if constant else shape, complex, generator, device)
        arguments = {"a": (a.log() if log_space else a).to(data), "b": b.to(data)}
        if log_space:
            arguments["log_space"] = True
        if packed:
            lengths = [round(share * L) for share in SEQUENCES[:-1]]
            bounds = torch.tensor([0, *lengths, L - sum(lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            arguments["cu_seqlens"] = bounds.to(device)
        return arguments

    numbers = B * L * D
    decays = D if constant else numbers
    size = (decays + 2 * numbers) * data.itemsize  # a; b, h
    if kind == "forward+backward":
        size += 2 * (decays + numbers) * data.itemsize + numbers * data.itemsize  # a, h; da, db; dh
    whole = not (constant or log_space or complex or packed)
    named = {"constant a": constant, "log space": log_space, "complex": complex}
    return Row(
        op="linear_scan",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"{len(SEQUENCES)} sequences" if packed else next((name for name in named if named[name]), "real"),
        function=seqkern.linear_scan,
        reference=_chunks if shape == LONG else seqkern.reference.linear_scan,
        inputs=inputs,
        bytes=size,
        flops=((COMPLEX_FLOPS if complex else FLOPS)[kind] + (log_space and kind != "forward")) * numbers,
        exps=(1 if kind == "forward" else 2) * numbers if log_space else 0,
        gradients=("a", "b"),
        options=frozenset({"cu_seqlens"} if packed else {"many tokens"} if shape == LONG else ()),
        yardsticks={"a * b": lambda a, b: a * b} if whole else {},
        **taking_part,
    )


def _decays(shape, complex, generator, device):
    """Between 0.5 and 1, as gates are after some training; complex ones at any angle."""
    magnitude = 0.5 + 0.5 * torch.rand(shape, generator=generator, device=device)
    if not complex:
        return magnitude
    return torch.polar(magnitude, 6.28 * torch.rand(shape, generator=generator, device=device))


def _chunks(a, b):
    """The scan of 1024 chunks side by side, then of their last states: two short loops instead of a long one."""
    B, L, D = b.shape
    a, b = (t.reshape(B, 1024, -1, D) for t in (a, b))
    products, states = a.cumprod(2), seqkern.reference.linear_scan(a.flatten(0, 1), b.flatten(0, 1)).view_as(b)
    entering = seqkern.reference.linear_scan(products[:, :-1, -1], states[:, :-1, -1])
    entering = torch.cat([torch.zeros_like(entering[:, :1]), entering], dim=1)
    return (products * entering[:, :, None] + states).reshape(B, L, D)


def _step(device, shape, dtype) -> Row:
    B, D = shape

    def inputs():
        generator = torch.Generator(device).manual_seed(0)
        state, b = torch.randn(2, B, D, generator=generator, device=device)
        return {"state": state, "a": _decays(shape, False, generator, device).to(dtype), "b": b.to(dtype)}

    return Row(
        op="linear_scan",
        kind="step",
        shape=shape,
        dtype=dtype,
        device=device,
        variant="float32 state",
        function=seqkern.linear_scan_step,
        reference=seqkern.reference.linear_scan_step,
        inputs=inputs,
        bytes=B * D * (2 * 4 + 3 * dtype.itemsize),
        flops=FLOPS["forward"] * B * D,
        updates=("state",),
        compiles=True,
        quick=shape == STEPS[-1],
    )
