"""Trains recurrent layers to keep track of a state: an LSTM, a GRU, an sLSTM, and a recurrence that is linear.

    python3 examples/state_tracking.py                                some two minutes on a CPU with two cores

After every digit of a random string the model says what the digits so far add up to modulo 2 (parity), or modulo 5. It
is trained on strings that grow to 40 digits and tested on longer ones. A nonlinear recurrence holds the sum in its
state, for strings of any length. The linear one, a MinGRU, is as large and has the same gates, but decays between 0 and
1 that do not see the state: such a layer can tell no strings of any length apart by a sum modulo anything [2411.12537].

Below, in this order: the strings, the models, their training, and the results, as a table and as a plot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bootstrap

bootstrap.ensure("bench")  # the first time: installs torch and matplotlib if there are none, and builds seqkern

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from progress import Progress  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import seqkern.nn  # noqa: E402

TASKS = {"parity": 2, "sum modulo 5": 5}  # how many digits there are
LAYERS = {
    "LSTM": lambda dim: seqkern.nn.LSTM(dim, dim, batch_first=True),
    "GRU": lambda dim: seqkern.nn.GRU(dim, dim, batch_first=True),
    "sLSTM": lambda dim: seqkern.nn.SLSTM(dim, num_heads=1),
    "MinGRU": lambda dim: seqkern.nn.MinGRU(dim),  # the linear one
}

# ---- the strings


def strings(batch: int, length: int, digits: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Strings of digits (B, L), and after each digit the sum of those so far, modulo their number."""
    string = torch.randint(digits, (batch, length), generator=generator).to(device)
    return string, string.cumsum(dim=1) % digits


# ---- the models


class Tracker(nn.Module):
    """One recurrent layer between an embedding and a classifier."""

    def __init__(self, layer: str, digits: int, dim: int = 64):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(digits, dim), LAYERS[layer](dim)
        self.head = nn.Linear(dim, digits)

    def forward(self, string: Tensor) -> Tensor:  # (B, L) -> logits (B, L, digits)
        y = self.layer(self.embedding(string))
        return self.head(y[0] if isinstance(y, tuple) else y)  # LSTM and GRU return their state too, as torch.nn's do


# ---- training


def train(model: nn.Module, digits: int, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)  # the same strings for all models
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.2)
    progress = Progress(options.steps, options.batch * options.length, "digit")
    for step in range(options.steps):
        length = min(options.length, 2 + 2 * options.length * step // options.steps)  # full from half of the way on
        string, sums = strings(options.batch, length, digits, generator, options.device)
        loss = F.cross_entropy(model(string).flatten(0, 1), sums.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.advance(loss.item())
