"""Trains Mamba on parity twice: with decays between -1 and 1, which learns it, and between 0 and 1, which cannot.

    python3 examples/parity.py                                        under a minute on a CPU with two cores

After every bit of a random string the model says whether the ones so far are odd in number. It is trained on strings of
40 bits and tested on longer ones. One state suffices if its decay can be -1: a one flips its sign, a zero leaves it be
[2411.12537]. With decays between 0 and 1 a state can count ones, but not modulo two: beyond the length of its training
the model guesses. Each of the seeds 0 to 19 makes the first model right for at least 99 % of the strings of 80 bits.

Below, in this order: the strings, the model, its training, and the results, as a table and as a plot.
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

TRANSITIONS = {"two_exp_minus_one": "decays in (-1, 1)", "exp": "decays in (0, 1)"}

# ---- the strings


def strings(batch: int, length: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Bits (B, L), and after each of them the parity of those so far."""
    bits = torch.randint(2, (batch, length), generator=generator).to(device)
    return bits, bits.cumsum(dim=1) % 2


# ---- the model


class ParityModel(nn.Module):
    """One Mamba layer between an embedding and a classifier."""

    def __init__(self, transition: str, dim: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(2, dim)
        self.norm, self.mamba = nn.LayerNorm(dim), seqkern.nn.Mamba(dim, transition=transition)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2))

    def forward(self, bits: Tensor) -> Tensor:  # (B, L) -> logits (B, L, 2)
        x = self.embedding(bits)
        return self.head(x + self.mamba(self.norm(x)))


# ---- training


def train(model: nn.Module, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)  # the same strings for both models
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.4e-2, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.4e-2, total_steps=options.steps, pct_start=0.2)
    progress = Progress(options.steps, options.batch * options.length, "bit")
    for _ in range(options.steps):
        bits, parity = strings(options.batch, options.length, generator, options.device)
        loss = F.cross_entropy(model(bits).flatten(0, 1), parity.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.advance(loss.item())


@torch.no_grad()
def accuracy(model: nn.Module, length: int, options: argparse.Namespace) -> Tensor:
    """(L,): the share of right answers after each bit of 2000 strings that training has not seen."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    bits, parity = strings(2000, length, generator, options.device)
    return (model(bits).argmax(dim=-1) == parity).float().mean(dim=0).cpu()


# ---- results


def print_table(accuracies: dict[str, Tensor], trained: int) -> None:
    print("\nright answers after  " + "".join(f"{TRANSITIONS[transition]:>20}" for transition in accuracies))
    for length in (trained // 2, trained, 2 * trained, 4 * trained):
        shares = "".join(f"{100 * accuracy[length - 1]:>18.1f} %" for accuracy in accuracies.values())
        note = {trained: "  as trained", 2 * trained: "  twice as long"}.get(length, "")
        print(f"{length:>14} bits  {shares}{note}")


def plot(path: Path, accuracies: dict[str, Tensor], trained: int) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for transition, accuracy in accuracies.items():
        axes.plot(range(1, len(accuracy) + 1), 100 * accuracy, label=f"{TRANSITIONS[transition]}: {transition}")
    axes.axvline(trained, color="0.6", linestyle="--", label="length of the training")
    axes.axhline(50, color="0.6", linestyle=":", label="guessing")
    axes.set(xlabel="bits so far", ylabel="right answers, %", title="Parity with one Mamba layer", ylim=(40, 102))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=40, help="bits in each string of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("parity.png"))
    options = parser.parse_args()

    accuracies = {}
    for transition, decays in TRANSITIONS.items():
        torch.manual_seed(options.seed)  # the same parameters at first
        model = ParityModel(transition).to(options.device)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{transition}: {decays}, {size:,} parameters, {options.device}")
        train(model, options)
        accuracies[transition] = accuracy(model, 4 * options.length, options)
    print_table(accuracies, options.length)
    plot(options.plot, accuracies, options.length)


if __name__ == "__main__":
    main()
