"""The machine's ceilings, measured: copy, read and write bandwidth by size, and multiply-add rates.

The floor of a benchmark row is the larger of two times: that of a copy of as many bytes into existing memory, taken in
the row's own turns, and its operations at the multiply-add rate measured here (matrix products: within 15 % of the
arithmetic peak, and what a program can reach). An exponential, a logarithm, a sine or a cosine counts as EXP_FLOPS of
these operations.
"""

from collections.abc import Callable

import torch
from measure import timed

SIZES = (2**20, 2**23, 2**25, 2**27, 2**29)  # bytes read plus bytes written
QUICK_SIZES = (2**23, 2**25)
MATRIX = {"cpu": 1024, "cuda": 8192}
# On a CPU some ten vector instructions (rounding, remainder, a polynomial of degree five or six, scaling), each in the
# place of a multiply-add. A GPU has a unit for it with an eighth of the multiply-adds' throughput.
EXP_FLOPS = {"cpu": 20, "cuda": 16}


def copy(num_bytes: int, device: str) -> Callable:
    """Moves `num_bytes` in all: half of them read, half written, between two existing buffers."""
    source = torch.ones(max(1, num_bytes // 8), device=device)
    target = torch.empty_like(source).copy_(source)
    return lambda: target.copy_(source)


def _read(num_bytes: int, device: str) -> Callable:
    source = torch.ones(num_bytes // 4, device=device)
    return source.sum


def _write(num_bytes: int, device: str) -> Callable:
    target = torch.empty(num_bytes // 4, device=device).zero_()
    return target.zero_


def _product(dtype: torch.dtype, device: str) -> Callable:
    n = MATRIX[device]
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def measure(device: str, quick: bool = False) -> dict:
    """{"copy"|"read"|"write": {bytes: GB/s}, "float32"|"bfloat16": GFLOP/s}; quick: copies of two sizes, float32."""
    rounds = 5 if quick else 15
    moves = {"copy": copy} if quick else {"copy": copy, "read": _read, "write": _write}
    sizes = QUICK_SIZES if quick else SIZES
    calls = {(name, size): make(size, device) for name, make in moves.items() for size in sizes}
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        calls[str(dtype).removeprefix("torch."), 2 * MATRIX[device] ** 3] = _product(dtype, device)
    timings, _ = timed(calls, device=device, rounds=rounds, attempts=1 if quick else 3)

    ceilings: dict = {}
    for (name, work), timing in timings.items():
        rate = work / timing.median_us / 1e3
        if name in ("copy", "read", "write"):
            ceilings.setdefault(name, {})[work] = rate
        else:
            ceilings[name] = rate
    return ceilings


def describe(ceilings: dict) -> str:
    lines = []
    for name, value in ceilings.items():
        if isinstance(value, dict):
            sizes = ", ".join(f"{rate:.1f} at {size / 2**20:.0f} MB" for size, rate in value.items())
            lines.append(f"  {name:<9} {sizes} (GB/s)")
        else:
            lines.append(f"  {name:<9} {value:.0f} GFLOP/s, matrix product")
    return "\n".join(lines)
