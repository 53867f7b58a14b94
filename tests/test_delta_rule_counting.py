"""What the delta rule can count, learned from examples [2411.12537, 2502.10297]: with beta up to 2 it turns a state
around, which parity takes; two such steps for each token rotate it, which counting modulo 3 takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqkern

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KEYS, VALUES = 2, 4, 4
LENGTH, BATCH, UPDATES, RATE = 48, 32, 300, 0.03


class Counter(nn.Module):
    """Every digit has keys, values and betas of its own, `steps` of each; the last step of a token is read."""

    def __init__(self, modulus: int, steps: int, largest_beta: float):
        super().__init__()
        self.steps, self.largest_beta, self.sizes = steps, largest_beta, (KEYS, KEYS, VALUES, 1)
        self.embedding = nn.Embedding(modulus, steps * HEADS * sum(self.sizes))
        self.read = nn.Sequential(nn.Linear(HEADS * VALUES, 32), nn.GELU(), nn.Linear(32, modulus))

    def forward(self, digits):
        B, L = digits.shape
        q, k, v, b = self.embedding(digits).view(B, L * self.steps, HEADS, -1).split(self.sizes, dim=-1)
        beta = self.largest_beta * F.hardsigmoid(b[..., 0])
        o = seqkern.delta_rule(q, k, v, beta, qk_l2norm=True)
        return self.read(o.view(B, L, self.steps, -1)[:, :, -1])


def accuracy(modulus, steps, largest_beta, seed):
    """Of the second half of sums modulo `modulus`, after training."""
    torch.manual_seed(seed)
    model = Counter(modulus, steps, largest_beta)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=UPDATES)
    for _ in range(UPDATES):
        digits, sums = examples(modulus, BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(digits).flatten(0, 1), sums.flatten()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        digits, sums = examples(modulus, 256)
        return (model(digits).argmax(-1) == sums)[:, LENGTH // 2 :].float().mean().item()


def examples(modulus, batch):
    digits = torch.randint(modulus, (batch, LENGTH))
    return digits, digits.cumsum(1) % modulus


@pytest.mark.parametrize(
    ("modulus", "steps", "largest_beta", "learns"),
    [(2, 1, 2.0, True), (2, 1, 1.0, False), (3, 2, 2.0, True), (3, 1, 2.0, False)],
    ids=["parity, beta to 2", "parity, beta to 1", "modulo 3, two steps", "modulo 3, one step"],
)
def test_counting(modulus, steps, largest_beta, learns):
    """Some of three beginnings finds the solution, where there is one."""
    best = max(accuracy(modulus, steps, largest_beta, seed) for seed in range(3))
    assert best > 0.99 if learns else best < 0.6
