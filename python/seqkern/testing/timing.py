"""Timing of calls that are to be compared: interleaved, so that a drifting clock or a busy machine meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A warm sample lasts at least this long, so that the clock's own cost and resolution vanish in it.
_MIN_SAMPLE_US = 200.0
# A call slower than this is not called a second time before it is sampled.
_SLOW_US = 100e3
_MIN_TURNS = 3
# More than the last-level cache of any present processor or GPU.
_FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Timing:
    """Samples of one call, in microseconds."""

    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def quartiles_us(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.samples_us, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The distance of the quartiles, relative to the median."""
        low, high = self.quartiles_us
        return (high - low) / self.median_us

    def __str__(self) -> str:
        return f"{self.median_us:.1f} us (spread {100 * self.spread:.0f} %)"


def interleaved(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int = 15,
    cold: bool = False,
    device: str = "cpu",
    limit_s: float = float("inf"),
) -> dict[str, Timing]:
    """Times every call once per round, in turn, after one round that is not counted.

    Args:
        calls: what to time, by name. Each should do the same work every time.
        rounds: samples of each.
        cold: empty the caches before every sample, which is then one single call. Otherwise a sample repeats the call
            for at least 0.2 ms and is the mean.
        device: "cpu", or "cuda" to time with events on the current stream.
        limit_s: how long the samples of one call may take together. A slow call takes part in the first rounds only,
            in three at least; sample i of every call is of round i.

    Example:
        >>> import torch
        >>> from seqkern.testing import interleaved
        >>> x = torch.randn(1000)
        >>> timings = interleaved({"sum": x.sum, "exp": x.exp}, rounds=3)
        >>> timings["exp"].median_us > 0
        True
    """
    sample = _cuda_sample_us if torch.device(device).type == "cuda" else _cpu_sample_us
    repeats, turns = {}, {}
    for name, call in calls.items():
        us = sample(call, 1)
        if us < _SLOW_US:  # the first call may have had to set something up
            us = sample(call, 1)
        repeats[name] = 1 if cold else max(1, round(_MIN_SAMPLE_US / max(us, 0.1)))
        affordable = limit_s * 1e6 / max(us * repeats[name], 0.1)
        turns[name] = rounds if affordable > rounds else max(_MIN_TURNS, int(affordable))
    flush = torch.zeros(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn >= turns[name]:
                continue
            if flush is not None:
                flush.add_(1)
            samples[name].append(sample(call, repeats[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _cpu_sample_us(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begin) / 1e3 / repeats


def _cuda_sample_us(call: Callable[[], object], repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats
