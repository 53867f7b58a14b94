"""run.py --base REF: the working tree's seqkern against that of another commit.

REF is built in a git worktree under build/bench-base. Two processes then stay alive, one with each library, and take
turns row by row (A B A B ...), so that both meet the same machine; a row's ratio is that of each pair of turns. Both
run the benchmark code of the working tree.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from install import environment, install

ROOT = Path(__file__).resolve().parent.parent
TURNS = 7
QUICK_TURNS = 3


def main(ref: str, rows: list, arguments) -> int:
    print(f"seqkern of the working tree against {ref}, {len(rows)} rows")
    folder = build(ref)
    base, this = Worker(environment(folder), arguments.threads), Worker(None, arguments.threads)
    try:
        print(_line("row", "base us", "this us", "this / base", "range"))
        for row in rows:
            print(_compared(row.label, *_turns(base, this, row, QUICK_TURNS if arguments.quick else TURNS)), flush=True)
    finally:
        base.close()
        this.close()
    return 0


def build(ref: str) -> Path:
    """The folder with the seqkern of `ref`, built unless it is there already."""
    no_such = f"bench: --base {ref}: no such commit"
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", otherwise=no_such)
    folder = ROOT / "build" / "bench-base" / commit[:12]
    if (folder / "sitecustomize.py").exists():
        return folder
    source = folder.with_suffix(".source")
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(source)], capture_output=True)
    _git("worktree", "add", "--detach", str(source), commit)
    print(f"building {ref} ({commit[:12]}), log in {log}", flush=True)
    try:
        with log.open("w", encoding="utf-8") as output:
            install(source, folder, stdout=output, stderr=subprocess.STDOUT)
    except subprocess.CalledProcessError:
        sys.exit(f"bench: {ref} does not build; see {log}")
    finally:
        _git("worktree", "remove", "--force", str(source))
    return folder


class Worker:
    """A process that times rows with one seqkern. Asked for a row, it answers with samples in microseconds."""

    def __init__(self, env: dict | None, threads: int | None):
        command = [sys.executable, __file__, str(threads or 0)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env or os.environ, **pipes)

    def ask(self, row) -> list[float] | None:
        """Samples; None where this seqkern does not have the row."""
        print(row.device, row.label, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: a worker stopped with exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _turns(base: Worker, this: Worker, row, turns: int) -> tuple[list[float], list[float]]:
    medians = {base: [], this: []}
    for _ in range(turns):
        for worker, values in medians.items():
            samples = worker.ask(row)
            if samples is not None:
                values.append(statistics.median(samples))
    return medians[base], medians[this]


def _compared(label: str, base: list[float], this: list[float]) -> str:
    if not base or not this:
        return _line(label, "" if base else "absent", "" if this else "absent", "", "")
    ratios = [b / a for a, b in zip(base, this, strict=True)]
    return _line(
        label,
        f"{statistics.median(base):.1f}",
        f"{statistics.median(this):.1f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
    )


def _line(label: str, *cells: str) -> str:
    return label.ljust(72) + "".join(cell.rjust(width) for cell, width in zip(cells, (12, 12, 14, 18), strict=True))


def _git(*arguments: str, otherwise: str | None = None) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if result.returncode:
        sys.exit(otherwise or f"bench: git {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result.stdout.strip()


def work(threads: int) -> None:
    """The worker: one row in, one list of samples out."""
    import torch
    from contest import OURS
    from measure import reused_pages, timed

    torch.set_grad_enabled(False)
    if threads:
        torch.set_num_threads(threads)
    current = call = None
    for line in sys.stdin:
        if line != current:
            current, call = line, _call(*line.rstrip("\n").split(" ", 1))
        if call is None:
            print("null", flush=True)
            continue
        time.sleep(0.02)  # let the other worker's threads stop spinning
        with reused_pages():
            timings, _ = timed({OURS: call}, device=line.split(" ", 1)[0], rounds=11)
        print(json.dumps(timings[OURS].samples_us), flush=True)


def _call(device: str, label: str):
    """The row's call, or None where this seqkern has no such operator or option."""
    import cases
    from contest import Contest

    try:
        op = label.partition(" ")[0]
        row = next(row for row in cases.rows(op, device) if row.label == label)
        call = Contest(row).call(row.function)
        call()
    except (AttributeError, ImportError, RuntimeError, StopIteration, TypeError) as error:
        print(f"bench: {label}: {error}", file=sys.stderr)
        return None
    return call


if __name__ == "__main__":
    work(int(sys.argv[1]))
