"""Launches and bytes that csrc/causal_conv1d/README.md claims, counted by the emulator."""

import ctypes
import sys
from math import ceil
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

B, D, L, W = 2, 24, 1040, 4
THREAD_TOKENS = {"fwd": 8, "bwd": 16}  # channel path


@pytest.fixture
def count(emulator):
    """count(run): launches, bytes read and bytes written by run()."""
    from emulator import build_library

    library = ctypes.CDLL(str(build_library()))
    counters = [library.seqkern_simt_launches, library.seqkern_simt_bytes_read, library.seqkern_simt_bytes_written]
    for counter in counters:
        counter.restype = ctypes.c_int64

    def count(run):
        library.seqkern_simt_reset()
        run()
        return tuple(counter() for counter in counters)

    return count


def tensor(dtype, channels_last):
    return torch.ones(B, L, D, dtype=dtype).transpose(1, 2) if channels_last else torch.ones(B, D, L, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_traffic_is_as_the_readme_says(emulator, count, dtype, channels_last):
    x, dy = tensor(dtype, channels_last), tensor(dtype, channels_last)
    weight, bias = torch.ones(D, W, dtype=dtype), torch.ones(D)
    size, weights = x.element_size(), W * weight.element_size() + 4
    n = L // (16 // size)

    forward = count(lambda: emulator.causal_conv1d_fwd(x, weight, bias, None, None, None, True, 1, False, False))
    backward = count(lambda: emulator.causal_conv1d_bwd(dy, None, x, weight, bias, None, None, None, True, 1, False))

    if channels_last:
        m, lanes = ceil(L / THREAD_TOKENS["fwd"]), 8  # the power of two that covers D with 4 channels each
        assert forward == (1, B * D * (size * (L + 3 * (m - 1)) + ceil(L * lanes / 2048) * weights), B * D * L * size)
        m, chunks = ceil(L / THREAD_TOKENS["bwd"]), ceil(L / 256)
        read = B * D * (size * (2 * L + 9 * (m - 1)) + chunks * weights)
    else:
        assert forward == (1, B * D * (size * (L + 4 * (n - 1)) + ceil(n / 2) * weights), B * D * L * size)
        chunks = ceil(L / 512)
        read = B * D * (size * (2 * L + 12 * (n - 1)) + 32 * chunks * weights)
    partials = 4 * B * chunks * (W + 1) * D
    assert backward == (2, read + partials, B * D * L * size + partials + D * weights)


@pytest.mark.parametrize(("silu", "launches"), [(False, 3), (True, 4)])
def test_launches_of_the_general_path(emulator, count, silu, launches):
    x, weight = tensor(torch.float32, False), torch.ones(D, 7)
    assert count(lambda: emulator.causal_conv1d_fwd(x, weight, None, None, None, None, silu, 1, False, False))[0] == 1
    backward = count(lambda: emulator.causal_conv1d_bwd(x, None, x, weight, None, None, None, None, silu, 1, False))
    assert backward[0] == launches
