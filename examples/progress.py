"""A bar that shows how far a training is."""

from __future__ import annotations

import sys
import time


class Progress:
    """A bar that redraws itself in a terminal; elsewhere a line for every tenth of the way."""

    def __init__(self, steps: int, tokens_per_step: int, token: str):
        self.steps, self.tokens_per_step, self.token = steps, tokens_per_step, token
        self.step, self.loss, self.begin = 0, None, time.perf_counter()

    def advance(self, loss: float) -> None:
        """One more step, with its loss in nats per token."""
        self.step += 1
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss  # a running mean
        seconds = time.perf_counter() - self.begin
        bar = "#" * (30 * self.step // self.steps)
        line = (
            f"[{bar:<30}] {self.step}/{self.steps}  loss {self.loss:.3f} nats/{self.token}  "
            f"{self.tokens_per_step * self.step / seconds:,.0f} {self.token}s/s  {seconds:.0f} s"
        )
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if self.step == self.steps else "", flush=True)
        elif self.step in {1, self.steps} or self.step * 10 // self.steps > (self.step - 1) * 10 // self.steps:
            print(line, flush=True)
