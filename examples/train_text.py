"""Trains a small character model on the source of Python's standard library, lets it write, and times its operators.

    python3 examples/train_text.py                                    about two minutes on a CPU with two cores
    python3 examples/train_text.py --text FILE --steps 1000 --prompt "Once upon"

Below, in this order: the text, the model, its training, and generation one token at a time. Last of all it prints what
each operator of seqkern took in the last training step, beside plain PyTorch (operator_table.py).
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bootstrap

bootstrap.ensure()  # the first time: installs torch if there is none, and builds seqkern

import operator_table  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from progress import Progress  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import seqkern.nn  # noqa: E402

State = Tensor | tuple[Tensor, ...]  # of one layer

# What mixes tokens over time, by the name that --mixer takes: (size of a token, number of the layer) -> module with
# forward(x), step(x, state) and zero_state(batch_size), such as seqkern.nn's.
MIXERS = {
    "mamba": lambda dim, layer: seqkern.nn.Mamba(dim),
    "mamba2": lambda dim, layer: seqkern.nn.Mamba2(dim, d_state=64, headdim=32),
    "conv": lambda dim, layer: seqkern.nn.GatedConv(dim, 2 * dim, width=4, dilation=2**layer),
    "mingru": lambda dim, layer: seqkern.nn.MinGRU(dim),
    "minlstm": lambda dim, layer: seqkern.nn.MinLSTM(dim),
    "lru": lambda dim, layer: seqkern.nn.LRU(dim, dim),
    "rglru": lambda dim, layer: seqkern.nn.RGLRU(dim, num_heads=dim // 16),
    "s5": lambda dim, layer: seqkern.nn.S5(dim, 2 * dim),
    "hgrn": lambda dim, layer: seqkern.nn.HGRN(dim, lower_bound=layer / 5),
    "aaren": lambda dim, layer: seqkern.nn.Aaren(dim, num_heads=dim // 16),
    "para_gru": lambda dim, layer: seqkern.nn.ParaGRU(dim),
    "para_lstm": lambda dim, layer: seqkern.nn.ParaLSTM(dim),
    "slstm_diag": lambda dim, layer: seqkern.nn.SLSTMDiag(dim, layer=layer, depth=5),
    "indrnn": lambda dim, layer: seqkern.nn.IndRNN(dim, length=256),
    "lstm": lambda dim, layer: WithStep("lstm", seqkern.nn.LSTM(dim, dim, batch_first=True)),
    "gru": lambda dim, layer: WithStep("gru", seqkern.nn.GRU(dim, dim, batch_first=True)),
    "slstm": lambda dim, layer: seqkern.nn.SLSTM(dim, num_heads=dim // 40, layer=layer, depth=5),
    "gla": lambda dim, layer: seqkern.nn.GLA(dim, num_heads=dim // 40),
    "retnet": lambda dim, layer: seqkern.nn.RetNet(dim, num_heads=dim // 40),
    "gated_delta_net": lambda dim, layer: seqkern.nn.GatedDeltaNet(dim, num_heads=dim // 40, expand_v=1.0),
    "kda": lambda dim, layer: seqkern.nn.KDA(dim, num_heads=dim // 40),
    "mlstm": lambda dim, layer: seqkern.nn.MLSTM(dim, num_heads=dim // 40),
}

# ---- the text


def read_text(path: str | None) -> Tensor:
    """All bytes of the file; without one, the standard library's top-level modules, which every machine has."""
    files = [Path(path)] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    if len(text) < 1000:
        sys.exit(f"train_text: {path or 'the standard library'} has {len(text)} bytes; give a longer text with --text")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, L): the bytes from each start on, and the byte that follows each of them."""
    tokens = text[starts[:, None] + torch.arange(length + 1)].long().to(device)
    return tokens[:, :-1], tokens[:, 1:]


# ---- the model


class Block(nn.Module):
    """Mixes over time, then within each token."""

    def __init__(self, dim: int, mixer: nn.Module):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim)
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)

    def step(self, x: Tensor, state: State) -> Tensor:  # (B, dim); the state is updated in place
        x = x + self.mixer.step(self.norm(x), state)
        return x + self.mlp(x)


class WithStep(nn.Module):
    """One of torch.nn's recurrent layers, as seqkern has them, with a step: those return a state instead."""

    def __init__(self, cell: str, layer: seqkern.nn.LSTM | seqkern.nn.GRU):
        super().__init__()
        self.cell, self.layer = cell, layer

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim)
        return self.layer(x)[0]

    def zero_state(self, batch_size: int) -> State:  # (h, c) or (h,)
        zeros = self.layer.weight_hh_l0.new_zeros(batch_size, 1, self.layer.hidden_size)
        return (zeros, zeros.clone()) if self.cell == "lstm" else (zeros,)

    def step(self, x: Tensor, state: State) -> Tensor:  # (B, dim)
        (w_ih, w_hh, b_ih, b_hh), P = self.layer.all_weights[0], self.layer.hidden_size
        gates = F.linear(x, w_ih, b_ih).view(len(x), 1, -1, P)  # of one head
        return seqkern.rnn_step(state, gates, w_hh.view(1, -1, P, P), b_hh.view(1, -1, P), cell=self.cell).flatten(1)


class CharModel(nn.Module):
    def __init__(self, mixer: str, dim: int = 160, depth: int = 5):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim, MIXERS[mixer](dim, layer)) for layer in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> logits (B, L, 256)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def zero_states(self, batch_size: int) -> list[State]:
        return [block.mixer.zero_state(batch_size) for block in self.blocks]

    def step(self, tokens: Tensor, states: list[State]) -> Tensor:  # (B,) -> logits (B, 256)
        x = self.embedding(tokens)
        for block, state in zip(self.blocks, states, strict=True):
            x = block.step(x, state)
        return self.head(self.norm(x))


# ---- training


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def train(
    model: nn.Module, text: Tensor, options: argparse.Namespace, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns the last batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps=options.steps))
    progress = Progress(options.steps, options.batch * options.length, "byte")
    for _ in range(options.steps):
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
        batch = windows(text, starts, options.length, options.device)
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.advance(loss.item())
    return batch


def learning_rate(step: int, steps: int) -> float:
    """Share of the full rate: a linear rise, then half a cosine."""
    rise = min(20, steps // 4) + 1
    return min((step + 1) / rise, 0.525 + 0.475 * math.cos(math.pi * max(step - rise, 0) / steps))


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, options: argparse.Namespace) -> float:
    """Mean loss over 128 windows that are spread over the text."""
    starts = torch.linspace(0, len(text) - options.length - 1, 128).long()
    batches = starts.split(options.batch)
    losses = [loss_of(model, *windows(text, batch, options.length, options.device)) * len(batch) for batch in batches]
    return float(sum(losses)) / len(starts)


# ---- generation, one token at a time


@torch.no_grad()
def generate(model: CharModel, prompt: bytes, length: int, generator: torch.Generator) -> tuple[bytes, float]:
    """Continues the prompt. Also the largest difference of the prompt's logits, by steps and by one forward."""
    device = model.head.weight.device
    tokens = torch.tensor([list(prompt)], device=device)
    states = model.zero_states(1)
    logits = torch.stack([model.step(tokens[:, t], states) for t in range(len(prompt))], dim=1)
    difference = (logits - model(tokens)).abs().max().item()

    text, logits = bytearray(prompt), logits[:, -1]
    for _ in range(length):
        probabilities = torch.softmax(logits.float().cpu() / 0.7, dim=-1)  # below 1: prefers what is likely
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        text.append(token.item())
        logits = model.step(token.to(device), states)
    return bytes(text), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", choices=MIXERS, default="mamba")
    parser.add_argument("--text", metavar="FILE", help="default: the source of Python's standard library")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="bytes in each row of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: by autocast")
    parser.add_argument("--prompt", default="class Stack:\n    def ")
    parser.add_argument("--sample-length", type=int, default=400, metavar="BYTES")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)  # of batches and samples: the same for every device
    text = read_text(options.text)
    held_out = max(len(text) // 20, 300)
    text, validation_text = text[:-held_out], text[-held_out:]
    options.length = min(options.length, held_out - 1)
    model = CharModel(options.mixer).to(options.device)
    size = f"{len(text):,} bytes of text, {sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"{size}, mixer {options.mixer}, {options.device}, {options.dtype}")

    # Without autocast's cache of weights, which lasts until the block ends: the first step's would serve every step.
    autocast = {"enabled": options.dtype == "bfloat16", "cache_enabled": False}
    with torch.autocast(torch.device(options.device).type, torch.bfloat16, **autocast):
        last_batch = train(model, text, options, generator)
        validation = evaluate(model, validation_text, options)
        print(f"validation loss {validation:.3f} nats/byte ({validation / math.log(2):.2f} bits)\n")

        prompt = options.prompt.encode() or b"\n"
        sample, difference = generate(model, prompt, options.sample_length, generator)
        print(f"--- written one token at a time\n{sample.decode(errors='replace')}\n---")
        print(f"largest difference of the prompt's logits, step by step against at once: {difference:.1e}\n")

        def last_step():
            loss_of(model, *last_batch).backward()
            with torch.no_grad():
                model.step(last_batch[0][:, 0], model.zero_states(options.batch))

        operator_table.print_table(last_step, options.device)


if __name__ == "__main__":
    main()
