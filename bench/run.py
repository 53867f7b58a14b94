"""The microbenchmark: operators x shapes x dtypes x devices, against plain PyTorch and other projects.

Sets up what is missing, checks every operator against a float64 reference, measures the machine's ceilings, then times
seqkern and its competitors in turns. bench/README.md says how the figures are made.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
QUICK_BUDGET_S = 25


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a few rows, few samples, nothing compiled: under 30 s")
    options.add_argument("--op", action="append", help="only this operator (may be repeated)")
    options.add_argument("--filter", default="", metavar="REGEX", help="only rows whose label matches")
    options.add_argument("--dtype", action="append", help="only this dtype, such as bfloat16 (may be repeated)")
    options.add_argument("--device", choices=("cpu", "cuda", "all"), help="default: all that are here")
    options.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    options.add_argument("--no-compile", action="store_true", help="leave out what goes through torch.compile")
    options.add_argument("--budget", type=float, metavar="S", help="seconds after which no row is begun; --quick: 25")
    options.add_argument("--out", type=Path, default=HERE / "out", help="folder for JSON and plots, default bench/out")
    options.add_argument("--base", metavar="REF", help="compare the working tree with this commit instead")
    options.add_argument("--peer-sdist", action="append", default=[], metavar="PATH", help="a peer's .tar.gz or folder")
    options.add_argument("--list", action="store_true", help="print the labels of the chosen rows and stop")
    options.add_argument("--ceilings", action="store_true", help="measure the machine's ceilings and stop")
    options.add_argument("--as-installed", action="store_true", help="set up nothing: use the seqkern that imports")
    return options


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.peer_sdist:
        os.environ["SEQKERN_PEER_SDIST"] = os.pathsep.join(arguments.peer_sdist)
    if not arguments.as_installed:
        sys.path.insert(0, str(ROOT / "tools"))
        import bootstrap

        bootstrap.ensure("bench")

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = choose(arguments)
    if not rows:
        print("bench: no row matches; --list without other options prints all", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(row.label for row in rows))
        return 0
    if arguments.ceilings:
        import roofline

        for device in dict.fromkeys(row.device for row in rows):
            print(f"{device}:\n{roofline.describe(roofline.measure(device, arguments.quick))}")
        return 0
    if arguments.base:
        import compare

        return compare.main(arguments.base, rows, arguments)
    return bench(rows, arguments)


def choose(arguments: argparse.Namespace) -> list:
    """The rows that the options leave."""
    import cases
    import torch

    devices = ["cpu", "cuda"] if arguments.device in (None, "all") else [arguments.device]
    if "cuda" in devices and not torch.cuda.is_available():
        if arguments.device:
            print("bench: no CUDA device here", file=sys.stderr)
        devices.remove("cuda")
    return [
        row
        for device in devices
        for op in arguments.op or cases.operators()
        for row in cases.rows(op, device)
        if re.search(arguments.filter, row.label)
        and (not arguments.dtype or str(row.dtype).removeprefix("torch.") in arguments.dtype)
        and (row.quick or not arguments.quick)
    ]


def bench(rows: list, arguments: argparse.Namespace) -> int:
    import report
    import torch

    failed = False
    budget = arguments.budget or (QUICK_BUDGET_S if arguments.quick else float("inf"))
    end = time.monotonic() + budget
    tables = list(dict.fromkeys((row.op, row.device) for row in rows))
    for number, (op, device) in enumerate(tables):
        chosen = [row for row in rows if (row.op, row.device) == (op, device)]
        share = (end - time.monotonic()) / (len(tables) - number)
        with torch.no_grad():
            results, ceilings = measure(op, device, chosen, arguments, share)
        if results is None:
            failed = True
            continue
        print(f"\n{op} on {device}\n{report.table(results)}\n")
        document = report.document(op, device, results, ceilings, arguments.quick)
        for path in report.write(arguments.out, document, results):
            print(f"wrote {path}")
    return 1 if failed else 0


def measure(op: str, device: str, rows: list, arguments: argparse.Namespace, budget: float) -> tuple[list | None, dict]:
    """The results of one operator; None, after saying why, where one of its rows computes something wrong."""
    import peers
    import roofline
    import torch
    from contest import Contest

    start = time.monotonic()
    checked, left_out = [], {}
    for number, row in enumerate(rows, 1):
        if checked and time.monotonic() - start > budget / 2:
            break
        progress(f"[check {number}/{len(rows)}] {row.label}")
        try:
            contest = Contest(row, arguments.quick)
            for peer in peers.peers(op):
                if not peer.takes(row):
                    continue
                absence = peer.absence(row, arguments.quick, not arguments.no_compile)
                if absence:
                    contest.absent[peer.name] = absence
                else:
                    contest.invite(peer)
            checked.append((contest, *contest.check()))
        except torch.OutOfMemoryError:
            left_out[row.label] = "this device has too little memory"
    wrong = [(contest.row, line) for contest, lines, _ in checked for line in lines if not line.ok]
    if wrong:
        progress("")
        print(f"{op} on {device}: WRONG RESULTS, so no time is reported")
        for row, line in wrong:
            print(f"  {row.label}: {line}")
        return None, {}

    progress("[ceilings]")
    ceilings = roofline.measure(device, arguments.quick)
    progress("")
    print(f"\nceilings of this machine, {device}:\n{roofline.describe(ceilings)}")
    results = []
    for number, (contest, lines, errors) in enumerate(checked, 1):
        if results and time.monotonic() - start > budget:
            break
        progress(f"[time {number}/{len(rows)}] {contest.row.label}")
        results.append(contest.run(ceilings, lines, errors))
    progress("")
    timed = {result.row.label for result in results}
    for label in (row.label for row in rows if row.label not in timed):
        print(f"left out, {left_out.get(label, 'the time is up (--budget)')}: {label}")
    return results, ceilings


def progress(text: str) -> None:
    """One line that is written over on a terminal; elsewhere one line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
