"""Which solver of elementwise_rnn is the fastest, over channels and tokens: a table, JSON and a heat map.

    python3 bench/solvers.py                              # every pair that fits, two minutes on two cores
    python3 bench/solvers.py --cell lstm --scale 1 --out bench/results
    python3 bench/solvers.py --channels 64 1024 --tokens 512 4096 --rounds 3

Of one batch row, inputs and recurrent weights are normal numbers, the weights times --scale. Solvers take turns; a time
is a median, and every solver's answer is compared with float64 first. Beside the solvers: a Python loop, torch.nn.GRU
(of as many channels, with dense matrices) and pararnn-torch where it is installed; these only where they take less than
about a second. Nothing is extrapolated: an empty cell was not measured.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANNELS = (64, 256, 1024, 4096, 16384, 65536)
TOKENS = (512, 2048, 8192, 32768, 131072)
SOLVERS = ("serial", "newton", "shooting", "auto")
MOST_BYTES = 2**30  # of x
LOOP_TOKENS, DENSE_CHANNELS, EAGER_NUMBERS = 8192, 1024, 2**21  # beyond: not measured


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cell", default="gru")
    options.add_argument("--scale", type=float, default=0.5, help="of the recurrent weights")
    options.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    options.add_argument("--as-installed", action="store_true", help="set up nothing: use the seqkern that imports")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not options.as_installed:
        sys.path.insert(0, str(ROOT / "tools"))
        import bootstrap

        bootstrap.ensure("bench")
    import machine

    pairs = [(D, L) for D in options.channels for L in options.tokens]
    results = []
    for number, (D, L) in enumerate(pairs, 1):
        print(f"{number} of {len(pairs)}: {D} channels, {L} tokens", file=sys.stderr, flush=True)
        result = measured(options, D, L)
        if result is not None:
            results.append(result)
    print(table(results))
    folder = options.out / machine.folder(options.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"solvers_{options.cell}.json"
    facts = {"machine": machine.facts(options.device), "cell": options.cell, "scale": options.scale}
    path.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")
    plot(path.with_suffix(".png"), options, results)
    print(f"\n{path}\n{path.with_suffix('.png')}")
    return 0


def measured(options, D: int, L: int) -> dict | None:
    """Times in microseconds, errors and statistics of one pair; None where x would not fit."""
    import torch
    from cases.elementwise_rnn import CELLS
    from inputs import normal
    from measure import reused_pages, timed

    import seqkern

    G, W, *_ = CELLS[options.cell]
    if L * G * D * 4 > MOST_BYTES:
        return None
    new = normal(options.device)
    x, weights = new(1, L, G, D), options.scale * new(W, D)

    def call(solver, **more):
        return lambda: seqkern.elementwise_rnn(x, weights, cell=options.cell, solver=solver, **more)

    calls = {solver: call(solver) for solver in SOLVERS}
    truth = seqkern.elementwise_rnn(x.double(), weights.double(), cell=options.cell, solver="serial")
    errors, repaired = {}, {}
    for solver in SOLVERS:
        h, stats = call(solver, return_stats=True)()
        errors[solver] = float((h - truth).abs().max())
        repaired[solver] = float(stats.repaired.float().mean())
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"{D} channels, {L} tokens: an error of {max(errors.values()):.1e}; nothing was measured")
    with torch.no_grad(), reused_pages():
        how = {"rounds": options.rounds, "device": options.device, "limit_s": 2}
        times, others = timed(calls, **how)  # by themselves: the caches are the same for all
        if beside := competitors(options.cell, x, weights):
            times |= timed(beside, **how)[0]
    return {
        "channels": D,
        "tokens": L,
        "times_us": {name: timing.median_us for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "errors": errors,
        "repaired": repaired,
        "others_share": others,
    }


def competitors(cell: str, x, weights) -> dict:
    import torch
    from peers import Missing
    from peers.elementwise_rnn import loop, pararnn

    L, D = x.shape[1], x.shape[-1]
    calls = {}
    if L <= LOOP_TOKENS and L * D <= 64 * EAGER_NUMBERS:
        calls["loop"] = lambda: loop(x, weights, cell)
    if cell == "gru" and L <= LOOP_TOKENS and D <= DENSE_CHANNELS:
        gru, entering = torch.nn.GRU(D, D, batch_first=True, device=x.device), x[:, :, 0].contiguous()
        calls["torch.nn.GRU"] = lambda: gru(entering)
    if cell == "gru" and L * D <= EAGER_NUMBERS:
        try:
            solve = pararnn()
            calls["pararnn"] = lambda: solve(x, weights, cell)
        except Missing as missing:
            print(f"pararnn: {missing}", file=sys.stderr)
    return calls


def table(results: list[dict]) -> str:
    """Times of the serial solver, and everybody else's as multiples of it."""
    names = list(dict.fromkeys(name for result in results for name in result["times_us"]))
    others = [name for name in names if name != "serial"]
    lines = [
        f"| channels | tokens | serial us | {' | '.join(others)} | best | repaired by newton, shooting | error |",
        "| --- " * (len(others) + 6) + "|",
    ]
    for result in results:
        times = result["times_us"]
        ratios = [f"{times[name] / times['serial']:.2f}" if name in times else "" for name in others]
        repaired = ", ".join(f"{100 * result['repaired'][name]:.0f} %" for name in ("newton", "shooting"))
        lines.append(
            f"| {result['channels']} | {result['tokens']} | {times['serial']:.0f} | {' | '.join(ratios)} "
            f"| {best(result)} | {repaired} | {max(result['errors'].values()):.0e} |"
        )
    slower = [result["times_us"]["auto"] / min(result["times_us"][name] for name in SOLVERS[:3]) for result in results]
    lines += ["", f"auto over the best solver: median {statistics.median(slower):.2f}, largest {max(slower):.2f}"]
    return "\n".join(lines)


def best(result: dict) -> str:
    return min(SOLVERS[:3], key=result["times_us"].get)


def plot(path: Path, options, results: list[dict]) -> None:
    """The best solver of every pair by colour, and how many times as fast as serial it is."""
    import machine
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    of_pair = {(result["channels"], result["tokens"]): result for result in results}
    grid = [
        [SOLVERS.index(best(of_pair[D, L])) if (D, L) in of_pair else float("nan") for L in options.tokens]
        for D in options.channels
    ]
    colours = ListedColormap(["#4c72b0", "#dd8452", "#55a868"])
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.imshow(grid, cmap=colours, vmin=-0.5, vmax=2.5, aspect="auto", origin="lower")
    for row, D in enumerate(options.channels):
        for column, L in enumerate(options.tokens):
            text = "not measured"
            if (D, L) in of_pair:
                times = of_pair[D, L]["times_us"]
                of_shooting, of_newton = (times["serial"] / times[name] for name in ("shooting", "newton"))
                text = f"{times['serial'] / 1e3:.3g} ms serial\nshooting {of_shooting:.2g}x\nnewton {of_newton:.2g}x"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(options.tokens)), options.tokens)
    axes.set_yticks(range(len(options.channels)), options.channels)
    axes.set_xlabel("tokens T")
    axes.set_ylabel("channels D, one batch row")
    axes.set_title(f"elementwise_rnn, {options.cell}, on {machine.device_name(options.device)}: the fastest solver")
    figure.legend(
        handles=[Patch(color=colours(i), label=SOLVERS[i]) for i in range(3)], loc="outside lower center", ncols=3
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
