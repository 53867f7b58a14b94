"""Under which conditions a time is taken: whether memory is reused or fresh, and whether the machine was quiet."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator

import torch

from seqkern.testing import Timing, interleaved

# Of the processors' time; above it a measurement is taken again.
QUIET = 0.02

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one whose allocator can be told what to do."""
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextlib.contextmanager
def reused_pages() -> Iterator[None]:
    """Within it, freed blocks of any size are used again.

    By itself glibc does so up to 32 MB, and maps larger blocks afresh at every call: then the first touch of each page
    costs more than the operator.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        if library is not None:
            library.mallopt(_M_MMAP_MAX, 65536)
            library.mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)
            library.mallopt(_M_TRIM_THRESHOLD, 64 * 1024 * 1024)


def fresh_pages(call: Callable) -> Callable | None:
    """The call, after which its freed memory goes back to the kernel, so that the next one gets fresh pages."""
    library = _glibc()
    if library is None:
        return None

    def call_and_trim():
        call()
        library.malloc_trim(0)

    return call_and_trim


class Others:
    """How much of this machine's processors other programs used between entry and exit: `share`, from 0 to 1."""

    share = 0.0

    def __enter__(self):
        self._before = _busy_seconds(), _own_seconds(), time.monotonic()
        return self

    def __exit__(self, *_):
        busy, own, now = self._before
        wall = (time.monotonic() - now) * (os.cpu_count() or 1)
        self.share = max(0.0, (_busy_seconds() - busy - (_own_seconds() - own)) / wall)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _busy_seconds() -> float:
    """Processor time that all programs of this machine, and its host's other guests (steal), have used."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except OSError:  # not Linux: every measurement counts as quiet
        return _own_seconds()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def timed(calls: dict[str, Callable], *, attempts: int = 1, **options) -> tuple[dict[str, Timing], float]:
    """Interleaved timings, and the share of the machine that others had meanwhile: the quietest of a few attempts."""
    best = None
    for _ in range(attempts):
        with Others() as others:
            timings = interleaved(calls, **options)
        if best is None or others.share < best[1]:
            best = timings, others.share
        if best[1] < QUIET:
            break
    return best


def captured(call: Callable) -> Callable:
    """The call as a CUDA graph, whose replay costs no Python and almost no launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
