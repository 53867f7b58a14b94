"""The results as a table, as JSON and as a plot."""

import json
import statistics
from pathlib import Path

import machine
import torch
from contest import COPY, OURS, Result
from measure import QUIET

from seqkern.testing import Timing

SCHEMA = 1
NAMES = ("#", "kind", "shape", "dtype", "variant")


def table(results: list[Result]) -> str:
    """Two tables with common row numbers: seqkern's figures, then the competitors' times over seqkern's and errors."""
    own = [[*NAMES, "us", "spread", "call us", "cold us", "fresh us", "GB/s", "GFLOP/s", "of floor", "over copy"]]
    own[0] += [_unit(results[0]), "above empty", "error"]
    for number, result in enumerate(results, 1):
        row, times, steady = result.row, result.times[OURS], result.time(OURS)
        us = steady.median_us
        own.append(
            [
                f"{number}{'' if result.others_share < QUIET else '~'}",
                row.kind,
                "x".join(map(str, row.shape)),
                str(row.dtype).removeprefix("torch."),
                row.variant,
                _us(steady),
                f"{100 * steady.spread:.0f} %",
                "" if result.condition(OURS) == "warm" else _us(times["warm"]),
                _us(times.get("cold")),
                _us(times.get("fresh")),
                f"{row.bytes / us / 1e3:.1f}",
                f"{row.flops / us / 1e3:.1f}",
                f"{100 * result.floor_us / us:.0f} % {result.floor_of}",
                f"{us / result.time(COPY).median_us:.2f}x",
                f"{_per_unit(result):.3f}" if row.unit else "",
                "" if result.empty_us is None else f"{times['warm'].median_us - result.empty_us:+.1f} us",
                f"{result.errors[OURS]:.0e}",
            ]
        )
    names = _competitors(results)
    others = [[*NAMES, *names]]
    for line, result in zip(own[1:], results, strict=True):
        others.append([*line[: len(NAMES)], *(_against(result, name) for name in names)])
    return "\n".join(
        [
            _aligned(own),
            "",
            "Times as multiples of seqkern's, and errors:",
            _aligned(others),
            *_notes(results),
        ]
    )


def _competitors(results: list[Result]) -> list[str]:
    """All that is timed beside seqkern and has a column: competitors, then yardsticks."""
    rivals = [name for result in results for name in result.errors if name != OURS]
    return list(dict.fromkeys([*rivals, *(name for result in results for name in result.row.yardsticks)]))


def _unit(result: Result) -> str:
    return f"ns/{result.row.unit}/thread" if result.row.device == "cpu" else f"ps/{result.row.unit}"


def _per_unit(result: Result) -> float:
    """Time for one of what people count of this operator, in `_unit`."""
    scale = 1e3 * torch.get_num_threads() if result.row.device == "cpu" else 1e6
    return scale * result.time(OURS).median_us / result.row.units


def _us(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median_us:.1f}"


def _against(result: Result, name: str) -> str:
    if name not in result.times:
        return ""
    ratio, _, _ = ratio_of(result, name)
    return f"{ratio:.2f}x {result.errors[name]:.0e}" if name in result.errors else f"{ratio:.2f}x"


def ratio_of(result: Result, name: str) -> tuple[float, float, float]:
    """Someone's time over seqkern's, of samples taken in the same round: median and quartiles."""
    condition = result.condition(name)
    samples = (result.times[who][condition].samples_us for who in (name, OURS))
    pairs = zip(*samples, strict=False)  # a slow contestant's are of the first rounds
    ratios = [theirs / ours for theirs, ours in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(ratios), low, high


def _aligned(lines: list) -> str:
    """Columns under their headings, without those that are empty."""
    used = [column for column in zip(*lines, strict=True) if any(column[1:])]
    lines = list(zip(*used, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < len(NAMES) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _notes(results: list[Result]) -> list[str]:
    notes = []
    absent = {}
    for result in results:
        for name, reason in result.absent.items():
            absent.setdefault((name, reason), []).append(result)
    for (name, reason), rows in absent.items():
        where = "" if len(rows) == len(results) else f" ({len(rows)} of {len(results)} rows)"
        notes.append(f"  {name}: {reason}{where}")
    if notes:
        notes = ["", "Not measured:", *notes]
    if any(result.others_share >= QUIET for result in results):
        notes += ["", f"~ other programs used more than {100 * QUIET:.0f} % of the machine: do not publish this row."]
    return notes


def document(op: str, device: str, results: list[Result], ceilings: dict, quick: bool) -> dict:
    """Everything that was measured, as plain data."""
    return {
        "schema": SCHEMA,
        "operator": op,
        "device": device,
        "machine": machine.facts(device),
        "quick": quick,
        "ceilings": {
            name: {str(size): rate for size, rate in value.items()} if isinstance(value, dict) else value
            for name, value in ceilings.items()
        },
        "rows": [_plain(result) for result in results],
    }


def _plain(result: Result) -> dict:
    row = result.row
    return {
        "label": row.label,
        "kind": row.kind,
        "shape": list(row.shape),
        "dtype": str(row.dtype).removeprefix("torch."),
        "variant": row.variant,
        "bytes": row.bytes,
        "flops": row.flops,
        "exps": row.exps,
        "unit": row.unit,
        "units": row.units,
        "floor_us": result.floor_us,
        "floor_of": result.floor_of,
        "empty_us": result.empty_us,
        "others_share": result.others_share,
        "check": [comparison._asdict() | {"ok": comparison.ok} for comparison in result.check],
        "errors": result.errors,
        "ratios": {
            name: dict(zip(("median", "low", "high"), ratio_of(result, name), strict=True))
            for name in result.times
            if name != OURS
        },
        "times": {
            name: {condition: _statistics(timing) for condition, timing in conditions.items()}
            for name, conditions in result.times.items()
        },
        "absent": result.absent,
    }


def _statistics(timing: Timing) -> dict:
    low, high = timing.quartiles_us
    return {
        "median_us": timing.median_us,
        "low_us": low,
        "high_us": high,
        "min_us": min(timing.samples_us),
        "max_us": max(timing.samples_us),
        "samples_us": list(timing.samples_us),
    }


def write(directory: Path, contents: dict, results: list[Result]) -> list[Path]:
    """directory/<device>/<op>.json, and .png where matplotlib is installed."""
    folder = directory / machine.folder(contents["device"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{contents['operator']}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return [path]
    matplotlib.use("Agg")
    _plot(path.with_suffix(".png"), contents, results)
    return [path, path.with_suffix(".png")]


def _plot(path: Path, contents: dict, results: list[Result]) -> None:
    """One group of bars per row: time of seqkern and of each competitor, and the floor as a line across the group."""
    import matplotlib.pyplot as plt

    names = [OURS, *_competitors(results)]
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    height = sum(len(result.errors) + len(result.row.yardsticks) + 1.5 for result in results)
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.14 * height), layout="constrained")
    y, ticks = 0.0, []
    for result in results:
        taking_part = [name for name in names if name in result.times]
        top = y
        for name in taking_part:
            timing = result.time(name)
            low, high = timing.quartiles_us
            error = [[timing.median_us - low], [high - timing.median_us]]
            axes.barh(y, timing.median_us, height=0.9, color=colours[name], xerr=error, ecolor="0.3")
            y += 1
        axes.vlines(result.floor_us, top - 0.6, y - 0.4, color="black", linewidth=2)
        ticks.append(((top + y - 1) / 2, result.row.label.partition(" ")[2]))
        y += 1.5
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time, us (bars are medians, whiskers quartiles, black line the floor)")
    axes.set_title(f"{contents['operator']} on {contents['machine']['device']}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
