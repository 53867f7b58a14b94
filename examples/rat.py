"""Trains RAT, a recurrence within chunks of 16 tokens and attention across them, beside its two extremes.

    python3 examples/rat.py                                           a few minutes on a CPU with two cores

RAT [2507.04416] sums up keys and values by a gated recurrence that starts anew with every chunk. A query sees the sums
at the ends of the chunks before, and that of its own token. With chunks of one token this is attention, with one chunk
for the whole text a recurrent network; in between, one token in 16 is left to attend to, and nothing else to keep.
After as few steps as here the recurrent network is ahead, and RAT lies between the two.

Below, in this order: the layer, the same written out for every pair of tokens, and the results: how far the two differ,
and what small character models learn with each size of chunk.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bootstrap

bootstrap.ensure()  # the first time: installs torch if there is none, and builds seqkern

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import train_text  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import seqkern  # noqa: E402

# ---- the layer


class RAT(nn.Module):
    """Queries, keys, values, a forget gate and an output gate; keys and values are summed up within chunks."""

    def __init__(self, dim: int, chunk: int, heads: int = 4):
        super().__init__()
        self.chunk, self.heads = chunk, heads
        self.in_proj, self.out_proj = nn.Linear(dim, 5 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim)
        B, L, _ = x.shape
        q, k, v, forget, gate = self.in_proj(x).chunk(5, dim=-1)
        begins = (torch.arange(L, device=x.device) % self.chunk == 0).expand(B, L)
        log_decay, enter = F.logsigmoid(forget), torch.sigmoid(-forget)
        k = seqkern.linear_scan(log_decay, enter * k, reset=begins, log_space=True)
        v = seqkern.linear_scan(log_decay, enter * v, reset=begins, log_space=True)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))  # (B, L, H, K)
        return self.out_proj(torch.sigmoid(gate) * self.attend(q, k, v).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """To the ends of earlier chunks, and to the token itself, under one softmax."""
        L, K = q.shape[1], q.shape[3]
        chunk_of = torch.arange(L, device=q.device) // self.chunk  # of each token; rotated by it, q and k know how far
        q, k = rotate(q, chunk_of) * K**-0.5, rotate(k, chunk_of)
        k_ends, v_ends = (t[:, self.chunk - 1 :: self.chunk] for t in (k, v))  # (B, chunks that end, H, K)
        scores = torch.einsum("blhk,bchk->blhc", q, k_ends)
        earlier = torch.arange(k_ends.shape[1], device=q.device) < chunk_of[:, None]  # (L, chunks that end)
        scores = scores.masked_fill(~earlier[:, None], -torch.inf)
        weights = torch.cat([scores, (q * k).sum(-1, keepdim=True)], dim=-1).softmax(dim=-1)
        return torch.einsum("blhc,bchk->blhk", weights[..., :-1], v_ends) + weights[..., -1:] * v


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary positions: x (B, L, H, K), pairs of channels turned by an angle that grows with position (L,)."""
    size = x.shape[-1] // 2
    angles = position[:, None] * 10000 ** (-torch.arange(size, device=x.device) / size)  # (L, K/2)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


# ---- the same, for every pair of tokens


def written_out(layer: RAT, x: Tensor) -> Tensor:
    """No recurrence: the share of every token in the sum of every other is a product of gates. Memory L^2 dim."""
    L = x.shape[1]
    q, k, v, forget, gate = layer.in_proj(x).chunk(5, dim=-1)
    chunk_of = torch.arange(L) // layer.chunk
    pairs = (chunk_of[:, None] == chunk_of) & torch.ones(L, L, dtype=torch.bool).tril()  # j no later, in the same chunk
    total = F.logsigmoid(forget).cumsum(1)
    shares = torch.exp(total[:, :, None] - total[:, None]).masked_fill(~pairs[..., None], 0)  # (B, L, L, dim)
    shares = shares * torch.sigmoid(-forget)[:, None]
    k, v = (torch.einsum("btjd,bjd->btd", shares, t) for t in (k, v))
    q, k, v = (t.unflatten(-1, (layer.heads, -1)) for t in (q, k, v))
    q, k = rotate(q, chunk_of) * q.shape[-1] ** -0.5, rotate(k, chunk_of)

    ends = torch.arange(L) % layer.chunk == layer.chunk - 1
    seen = (ends & (chunk_of < chunk_of[:, None])) | torch.eye(L, dtype=torch.bool)  # (L, L)
    scores = torch.einsum("bthk,bjhk->bhtj", q, k).masked_fill(~seen, -torch.inf)
    o = torch.einsum("bhtj,bjhk->bthk", scores.softmax(dim=-1), v)
    return layer.out_proj(torch.sigmoid(gate) * o.flatten(-2))


@torch.no_grad()
def difference(chunk: int, length: int) -> float:
    """Between the layer and the same written out, relative to the largest output, in float64."""
    layer, x = RAT(32, chunk).double(), torch.randn(2, length, 32, dtype=torch.float64)
    expected = written_out(layer, x)
    return ((layer(x) - expected).abs().max() / expected.abs().max()).item()


# ---- results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--text", metavar="FILE", help="default: the source of Python's standard library")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="bytes in each row of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    text = train_text.read_text(options.text)
    held_out = max(len(text) // 20, 300)
    text, validation_text = text[:-held_out], text[-held_out:]
    options.length = min(options.length, held_out - 1)
    rows = []
    for chunk in (1, options.chunk, options.length):
        torch.manual_seed(options.seed)  # the same parameters, and batches, for all of them
        generator = torch.Generator().manual_seed(options.seed)
        print(f"chunks of {chunk}: differs from the same written out by {difference(chunk, 100):.1e}")
        train_text.MIXERS["rat"] = lambda dim, layer, chunk=chunk: RAT(dim, chunk)
        model = train_text.CharModel("rat", dim=96, depth=3).to(options.device)
        begin = time.perf_counter()
        train_text.train(model, text, options, generator)
        seconds = time.perf_counter() - begin
        loss = train_text.evaluate(model, validation_text, options)
        rows.append((chunk, (options.length - 1) // chunk + 1, loss, seconds))

    print(f"\n{'chunk':>8}{'seen':>8}{'validation loss':>22}{'training':>12}")
    for chunk, seen, loss, seconds in rows:
        print(f"{chunk:>8}{seen:>8}{f'{loss:.3f} nats/byte':>22}{f'{seconds:.0f} s':>12}")
    print("Seen: the keys that the last token of a row attends to, and that a cache would hold.")


if __name__ == "__main__":
    main()
