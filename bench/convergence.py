"""How many sweeps multiple shooting takes on weights that were trained: a table for csrc/elementwise_rnn/README.md.

    python3 bench/convergence.py                          # every cell and task, about ten minutes on two cores
    python3 bench/convergence.py --cell gru --task parity --steps 800

A cell learns a task for a while, two layers of it in a small model, and then reads a long sequence. For chunks of some
lengths, whatever chunks the operator would choose, the table has after how many sweeps 50, 90, 99 and 100 % of the
channels are accepted. The tasks are the next byte of the source of Python's standard library, and parity: whether the
ones among the bits so far are odd in number. "random" has normal inputs and normal weights of the size given, but those
of indrnn end at 1, beyond which states overflow.
"""

import argparse
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = ("gru", "lstm", "slstm", "indrnn", "elman")
TASKS = ("text", "parity", "random 1", "random 2")
CHUNKS = (64, 128, 256, 512, 1024, 2048)
SHARES = (0.5, 0.9, 0.99, 1.0)  # of channels
DIM, DEPTH, BATCH = 64, 2, 16
TOLERANCE = 1e-5  # of the larger of 1 and the state, as for float32; of the estimate without what rounding grows to


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cell", choices=CELLS, nargs="+", default=CELLS)
    options.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    options.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    options.add_argument("--tokens", type=int, default=16384, help="that are read; a multiple of all chunks")
    options.add_argument("--steps", type=int, default=400, help="of the training")
    options.add_argument("--length", type=int, default=128, help="of the sequences in training")
    options.add_argument("--most", type=int, default=16, help="sweeps that are tried")
    options.add_argument("--as-installed", action="store_true", help="set up nothing: use the seqkern that imports")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not options.as_installed:
        sys.path.insert(0, str(ROOT / "tools"))
        import bootstrap

        bootstrap.ensure("bench")
    print("| cell | weights | largest | " + " | ".join(f"{chunk} tokens" for chunk in options.chunks) + " |")
    print("| --- | --- | --- |" + " --- |" * len(options.chunks))
    for cell in options.cell:
        for task in options.task:
            print(row(options, cell, task), flush=True)
    return 0


def row(options, cell: str, task: str) -> str:
    import torch

    from seqkern.ops._elementwise_rnn import CELLS as SIZES

    torch.manual_seed(0)
    if task.startswith("random"):
        G, W, D = SIZES[cell].gates, SIZES[cell].weights, DEPTH * DIM
        x, weights = torch.randn(options.tokens, G, D), float(task.split()[1]) * torch.randn(W, D)
        weights = weights.clamp(-1, 1) if cell == "indrnn" else weights
        learned = task
    else:
        x, weights, loss = trained(options, cell, task)
        learned = f"{task}, {loss:.2f} nats"
    cells = [f"`{cell}`", learned, f"{weights.abs().max():.1f}"]
    for chunk in options.chunks:
        sweeps = sweeps_taken(SIZES[cell], x, weights, chunk, options.most).sort().values
        numbers = [int(sweeps[int(share * (len(sweeps) - 1))]) for share in SHARES]
        cells.append(", ".join(f">{options.most}" if k > options.most else str(k) for k in numbers))
        print(f"{cell}, {task}: {chunk} tokens: {cells[-1]}", file=sys.stderr, flush=True)
    return "| " + " | ".join(cells) + " |"


# ---- shooting; P chunks of C tokens, and S parts of a state


def sweeps_taken(cell, x, weights, chunk: int, most: int):
    """(D,): the sweeps after which a channel is accepted; most + 1 if it is not. x: (L, G, D)."""
    import torch

    x = x.unflatten(0, (-1, chunk))  # (P, C, G, D)
    P, D = len(x), x.shape[-1]
    empty = torch.tensor(list(cell.empty.values()))
    s = torch.zeros(P, len(empty), D)
    s[0] = empty[:, None]
    taken, running = torch.full((D,), most + 1), torch.arange(D)
    for k in range(1, most + 1):
        F, M, N = sweep(cell, x, weights, s)
        accepted = is_accepted(F, M, N, s)
        taken[running[accepted]] = k
        rest = ~accepted
        if not rest.any():
            break
        running, x, weights = running[rest], x[..., rest], weights[..., rest]
        s = corrected(F[..., rest], M[..., rest], s[..., rest])
    return taken


def sweep(cell, x, weights, s):
    """[sweep]: F (P, S, D), M and N (P, S, S, D), with M[:, i, j] = d F_i / d s_j."""
    import torch
    from torch.autograd import forward_ad

    S, step = s.shape[1], near_kink if cell.step.__name__ == "indrnn" else cell.step
    along = torch.eye(S)[:, :, None, None].expand(S, S, len(s), s.shape[2])  # part, direction
    with forward_ad.dual_level():
        state = tuple(
            forward_ad.make_dual(part.expand(S, -1, -1).contiguous(), tangent.contiguous())
            for part, tangent in zip(s.unbind(1), along, strict=True)
        )
        N = torch.zeros(S, S, *along.shape[2:])
        for x_t in x.unbind(1):
            state = step(weights.unbind(), x_t.unbind(1), state)
            M = torch.stack([forward_ad.unpack_dual(part).tangent for part in state])  # part, direction, P, D
            N = torch.maximum(N, M.abs())
        F = torch.stack([forward_ad.unpack_dual(part).primal[0] for part in state], dim=1)
    return F, M.permute(2, 0, 1, 3), N.permute(2, 0, 1, 3)


def near_kink(w, x, s):
    """The step of indrnn, whose slope is 1 from a little below 0 on, as in csrc/elementwise_rnn/cells.h."""
    total = w[0] * s[0] + x[0]
    sloped = total * (total > -1e-3)
    return (sloped + (total.relu() - sloped).detach(),)  # detach: a value without a derivative


def is_accepted(F, M, N, s):
    """[estimate]: (D,), whether the states of a sweep that began with s are near enough to the recurrence's."""
    import torch

    errors = [torch.zeros_like(s[0])]
    for F_p, M_p, s_next in zip(F[:-1], M, s[1:], strict=False):
        errors.append(times(M_p.abs(), errors[-1]) + (F_p - s_next).abs())
    near = TOLERANCE * s.abs().clamp(min=1)
    inside = torch.stack([times(N_p, e_p) for N_p, e_p in zip(N, errors, strict=True)])
    return ((torch.stack(errors) <= near) & (inside <= near)).all(dim=(0, 1))


def corrected(F, M, s):
    """[correct]: the boundaries of the next sweep."""
    import torch

    after = s.clone()
    for p in range(len(s) - 1):
        moved = F[p] + times(M[p], after[p] - s[p])
        after[p + 1] = torch.where(moved.isfinite(), moved, F[p])
    return after


def times(M, v):
    """M v, (S, S, D) times (S, D); a zero in v is skipped, whatever is in M."""
    return (M * v).where(v != 0, 0).sum(1)


# ---- training


def trained(options, cell: str, task: str):
    """Gates of a long sequence (L, G, D) and weights (W, D), the channels of all layers side by side, and the loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    import seqkern.nn

    make = {
        "gru": seqkern.nn.ParaGRU,
        "lstm": seqkern.nn.ParaLSTM,
        "slstm": lambda dim: seqkern.nn.SLSTMDiag(dim, layer=1, depth=2),
        "indrnn": lambda dim: seqkern.nn.IndRNN(dim, length=options.length),
        "elman": lambda dim: seqkern.nn.IndRNN(dim, activation="tanh", length=options.length),
    }[cell]
    text = standard_library()

    def tokens(batch, length):
        """Inputs and targets (batch, length)."""
        if task == "parity":
            bits = torch.randint(2, (batch, length))
            return bits, bits.cumsum(dim=1) % 2
        starts = torch.randint(len(text) - length, (batch, 1))
        window = text[starts + torch.arange(length + 1)].long()
        return window[:, :-1], window[:, 1:]

    classes = 2 if task == "parity" else 256
    embedding, head = nn.Embedding(classes, DIM), nn.Linear(DIM, classes)
    norms, layers = (nn.ModuleList(make(DIM) for _ in range(DEPTH)) for make in (nn.LayerNorm, make))
    parameters = [*nn.ModuleList([embedding, head, norms, layers]).parameters()]

    def run(inputs, keep=None):
        h = embedding(inputs)
        for norm, layer in zip(norms, layers, strict=True):
            keep is None or keep.append(layer.in_proj(norm(h)).unflatten(-1, (layer.gates, DIM)))
            h = h + layer(norm(h))
        return head(h)

    rate = 1e-2
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.steps, pct_start=0.2)
    loss = 0.0
    for step in range(options.steps):
        length = options.length
        if task == "parity":  # shorter at first
            length = min(length, 2 + 4 * step * length // (3 * options.steps))
        inputs, targets = tokens(BATCH, length)
        now = functional.cross_entropy(run(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        now.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if cell in ("indrnn", "elman"):
            for layer in layers:
                layer.constrain()
        loss = now.item() if step == 0 else 0.9 * loss + 0.1 * now.item()
        if step % max(options.steps // 10, 1) == 0:
            print(f"{cell}, {task}: step {step} of {options.steps}, loss {loss:.2f}", file=sys.stderr, flush=True)

    gates = []
    with torch.no_grad():
        run(tokens(1, options.tokens)[0], gates)
    return torch.cat(gates, dim=-1)[0], torch.cat([layer.recurrent.detach() for layer in layers], dim=-1), loss


def standard_library():
    import torch

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
