"""Rows of softmax_scan and softmax_scan_step."""

from itertools import pairwise, product

import torch

import seqkern
from cases import Row

KINDS = ("forward", "forward+backward")
FIRST = (1, 2048, 16, 64)  # (B, L, H, V)
SHAPES = [FIRST, (4, 4096, 8, 64)]
STEP = (64, 16, 64)  # (B, H, V)
DTYPES = (torch.float32, torch.bfloat16)  # of s, v and o
SEQUENCES = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.3)  # their shares of the packed row

# Of each value, multiply-adds counted twice: [sumv], [out]; and in the backward [dout], [dsum], [dv], [ds].
FLOPS = {"forward": 3 + 1, "forward+backward": 4 + 2 + 2 + 1 + 2}


def rows(device: str) -> list[Row]:
    rows = []
    for shape, dtype, kind in product(SHAPES, DTYPES, KINDS):
        usual = dtype == torch.float32
        quick = shape == FIRST and usual
        rows.append(_sequences(device, kind, shape, dtype, slow=usual, compiles=usual, quick=quick))
    rows += [_sequences(device, kind, FIRST, torch.float32, packed=True) for kind in KINDS]
    rows += [_step(device, dtype) for dtype in DTYPES]
    return rows


def _sequences(device, kind, shape, dtype, *, packed=False, **taking_part) -> Row:
    B, L, H, V = shape

    def inputs():
        generator = torch.Generator(device).manual_seed(0)
        s = torch.randn(B, L, H, generator=generator, device=device).to(dtype)
        arguments = {"s": s, "v": torch.randn(shape, generator=generator, device=device).to(dtype)}
        if packed:
            lengths = [round(share * L) for share in SEQUENCES[:-1]]
            bounds = torch.tensor([0, *lengths, L - sum(lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            arguments["cu_seqlens"] = bounds.to(device)
        return arguments

    scores, values, normalizers = B * L * H * dtype.itemsize, B * L * H * V * dtype.itemsize, B * L * H * 2 * 4
    size = scores + 2 * values  # s, v; o
    if kind == "forward+backward":
        size += normalizers + (normalizers + scores + 3 * values) + (scores + values)  # written; read, with do; ds, dv
    return Row(
        op="softmax_scan",
        kind=kind,
        shape=shape,
        dtype=dtype,
        device=device,
        variant=f"{len(SEQUENCES)} sequences" if packed else "plain",
        function=seqkern.softmax_scan,
        reference=_reference,
        inputs=inputs,
        bytes=size,
        flops=FLOPS[kind] * B * L * H * V,
        exps=(1 if kind == "forward" else 2) * B * L * H,  # of the two of a token one is always exp(0)
        gradients=("s", "v"),
        options=frozenset({"cu_seqlens"} if packed else ()),
        **taking_part,
    )


def _reference(s, v, cu_seqlens=None):
    """seqkern.reference.softmax_scan, token by token without slices of whole sequences, whose backward is quadratic."""
    bounds = [0, s.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ss, vs, os = s.unbind(1), v.unbind(1), []
    for begin, end in pairwise(bounds):
        m, n, w = torch.full_like(ss[0], -torch.inf), torch.zeros_like(ss[0]), torch.zeros_like(vs[0])
        for s_t, v_t in zip(ss[begin:end], vs[begin:end], strict=True):
            largest = torch.maximum(m, s_t)
            kept, weight, m = torch.exp(m - largest), torch.exp(s_t - largest), largest
            n, w = kept * n + weight, kept[..., None] * w + weight[..., None] * v_t
            os.append(w / n[..., None])
    return torch.stack(os, dim=1)


def _step(device, dtype) -> Row:
    B, H, V = STEP

    def inputs():
        generator = torch.Generator(device).manual_seed(0)

        def new(*size):
            return torch.randn(size, generator=generator, device=device)

        state = {"m": new(B, H), "n": 1 + new(B, H).abs(), "w": new(B, H, V)}
        return state | {"s": new(B, H).to(dtype), "v": new(B, H, V).to(dtype)}

    return Row(
        op="softmax_scan",
        kind="step",
        shape=STEP,
        dtype=dtype,
        device=device,
        variant="float32 state",
        function=lambda m, n, w, s, v: seqkern.softmax_scan_step((m, n, w), s, v),
        reference=lambda m, n, w, s, v: seqkern.reference.softmax_scan_step((m, n, w), s, v),
        inputs=inputs,
        bytes=2 * B * H * (V + 2) * 4 + B * H * (2 * V + 1) * dtype.itemsize,
        flops=FLOPS["forward"] * B * H * V,
        exps=B * H,
        updates=("m", "n", "w"),
        compiles=True,
        quick=True,
    )
