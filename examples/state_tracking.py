"""Trains recurrent layers to keep track of a state: an LSTM, a GRU, an sLSTM, and a recurrence that is linear.

    python3 examples/state_tracking.py                                about a minute on a CPU with two cores

After every digit of a random string the model says what the digits so far add up to modulo 2 (parity), or modulo 5. It
is trained on strings that grow to 40 digits and tested on longer ones. A nonlinear recurrence holds the sum in its
state, for strings of any length. The linear one, a MinGRU, has a gate as well, but one that does not see the state and
makes decays between 0 and 1: such a layer has no place for a sum modulo anything, and guesses [2411.12537].

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


@torch.no_grad()
def accuracy(model: nn.Module, length: int, digits: int, options: argparse.Namespace) -> Tensor:
    """(L,): the share of right answers after each digit of 1000 strings that training has not seen."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    string, sums = strings(1000, length, digits, generator, options.device)
    return (model(string).argmax(dim=-1) == sums).float().mean(dim=0).cpu()


# ---- results


def print_table(accuracies: dict[str, dict[str, Tensor]], trained: int) -> None:
    lengths = [trained // 2, trained, 2 * trained, 4 * trained]
    print(f"\n{'right answers after':<20}" + "".join(f"{length:>8} digits" for length in lengths))
    for task, of_layers in accuracies.items():
        for layer, shares in of_layers.items():
            row = "".join(f"{100 * shares[length - 1]:>13.1f} %" for length in lengths)
            print(f"{task + ', ' + layer:<20}{row}")
    print(f"Strings of the training have up to {trained} digits.")


def plot(path: Path, accuracies: dict[str, dict[str, Tensor]], trained: int) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, (task, of_layers) in zip(panels, accuracies.items(), strict=True):
        for width, (layer, shares) in zip((5, 3, 1.5, 1.5), of_layers.items(), strict=True):  # some lie on each other
            axes.plot(range(1, len(shares) + 1), 100 * shares, label=layer, linewidth=width)
        axes.axvline(trained, color="0.6", linestyle="--", label="longest of the training")
        axes.axhline(100 / TASKS[task], color="0.6", linestyle=":", label="guessing")
        axes.set(xlabel="digits so far", title=task, ylim=(0, 102))
    panels[0].set_ylabel("right answers, %")
    panels[-1].legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=40, help="digits in the longest strings of the training")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("state_tracking.png"))
    options = parser.parse_args()

    accuracies = {task: {} for task in TASKS}
    for task, digits in TASKS.items():
        for layer in LAYERS:
            torch.manual_seed(options.seed)
            model = Tracker(layer, digits).to(options.device)
            size = sum(parameter.numel() for parameter in model.parameters())
            print(f"{task}, {layer}: {size:,} parameters, {options.device}")
            train(model, digits, options)
            accuracies[task][layer] = accuracy(model, 4 * options.length, digits, options)
    print_table(accuracies, options.length)
    plot(options.plot, accuracies, options.length)


if __name__ == "__main__":
    main()
