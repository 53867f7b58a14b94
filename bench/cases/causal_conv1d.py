"""Rows of causal_conv1d and causal_conv1d_step."""

from itertools import product

import torch

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
SHAPES = {
    "cpu": [(1, 1536, 2048), (4, 768, 1024), (1, 5120, 512)],
    "cuda": [(1, 1536, 2048), (4, 768, 1024), (1, 5120, 512), (4, 2048, 4096)],
}
STEPS = [(1, 1536), (8, 1536), (64, 1536)]
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCES = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.3)  # their shares of the packed row


def rows(device: str) -> list[Row]:
    first = SHAPES[device][0]
    rows = []
    for shape, dtype, order, kind in product(SHAPES[device], DTYPES, ("time", "channels"), KINDS):
        quick = shape == first and order == "time" and (dtype == torch.float32 or kind == "forward")
        rows.append(_sequences(device, kind, shape, dtype, order=order, quick=quick))
    rows.append(_sequences(device, "forward", first, torch.float32, width=64))
    rows += [_sequences(device, kind, first, torch.float32, packed=True) for kind in KINDS]
    rows += [_step(device, shape, dtype) for shape, dtype in product(STEPS, DTYPES)]
    return rows


def _sequences(device, kind, shape, dtype, *, order="time", width=4, packed=False, quick=False) -> Row:
    B, D, L = shape

    def inputs():
        generator = torch.Generator(device).manual_seed(0)
        new = {"generator": generator, "device": device}
        x = torch.randn(B, D, L, **new) if order == "time" else torch.randn(B, L, D, **new).transpose(1, 2)
        arguments = {
            "x": x.to(dtype),
            "weight": torch.randn(D, width, **new).div(width**0.5).to(dtype),
            "bias": torch.randn(D, **new).to(dtype),
            "activation": "silu",
        }
        if packed:
            lengths = [round(share * L) for share in SEQUENCES[:-1]]
            bounds = torch.tensor([0, *lengths, L - sum(lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            arguments["cu_seqlens"] = bounds.to(device)
        return arguments

    tokens, parameters = B * D * L * dtype.itemsize, D * (width + 1) * dtype.itemsize
    forward = 2 * tokens + parameters  # x, y
    backward = 3 * tokens + 2 * parameters  # dy, x, dx; dweight and dbias
    macs = B * D * L * width
    return Row(
        op="causal_conv1d",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"W={width}, {f'{len(SEQUENCES)} sequences' if packed else order}",
        function=seqkern.causal_conv1d,
        reference=seqkern.reference.causal_conv1d,
        inputs=inputs,
        bytes=forward if kind == "forward" else forward + backward,
        flops=2 * macs if kind == "forward" else 8 * macs,  # backward: pre again, dx, dweight
        gradients=("x", "weight", "bias"),
        options=frozenset({"cu_seqlens"} if packed else ()),
        compiles=width == 4 and shape == SHAPES[device][0],
        quick=quick or (packed and kind == "forward"),
    )


def _step(device, shape, dtype) -> Row:
    (B, D), width = shape, 4

    def inputs():
        generator = torch.Generator(device).manual_seed(0)

        def new(*size):
            return torch.randn(size, generator=generator, device=device).to(dtype)

        state = new(B, D, width - 1)
        return {"x": new(B, D), "conv_state": state, "weight": new(D, width), "bias": new(D), "activation": "silu"}

    return Row(
        op="causal_conv1d",
        kind="step",
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"W={width}",
        function=seqkern.causal_conv1d_step,
        reference=seqkern.reference.causal_conv1d_step,
        inputs=inputs,
        bytes=(2 * B * D + 2 * B * D * (width - 1) + D * (width + 1)) * dtype.itemsize,
        flops=2 * B * D * width,
        updates=("conv_state",),
        compiles=True,
        quick=shape == (8, 1536),
    )
