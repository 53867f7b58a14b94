"""The benchmark programs: what they report, what they refuse to report, and that they end in time."""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

from seqkern.testing import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
TINY = ["--as-installed", "--quick", "--device", "cpu", "--filter", r" step \([^)]*\) float32"]
NAMES = sorted({operator.raw for operator in OPERATORS})


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A run of one row of every operator: what it printed, and the folder of its JSON."""
    out = tmp_path_factory.mktemp("bench")
    done = run(BENCH / "run.py", *TINY, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = out.iterdir()
    return done.stdout, folder


@pytest.fixture(params=NAMES)
def report(request, reports):
    text, folder = reports
    path = folder / f"{request.param}.json"
    return text, json.loads(path.read_text()), path


def test_json_is_complete(report):
    from cases import rows

    _, contents, path = report
    assert contents["schema"] == 1
    assert (contents["operator"], contents["device"]) == (path.stem, "cpu")
    machine = contents["machine"]
    assert {"device", "cores", "threads", "python", "isa", "versions", "commit", "dirty"} <= machine.keys()
    assert {"seqkern", "torch"} <= machine["versions"].keys()
    assert contents["ceilings"]["float32"] > 0 and all(rate > 0 for rate in contents["ceilings"]["copy"].values())
    (row,) = contents["rows"]
    (choice,) = [choice for choice in rows(path.stem, "cpu") if choice.label == row["label"]]
    assert all(line["ok"] for line in row["check"]) and len(row["check"]) == 1 + len(choice.updates)
    assert row["floor_us"] > 0 and row["empty_us"] > 0 and row["bytes"] > 0
    for name in ("seqkern", "torch", "copy"):
        for condition in ("warm", "cold"):
            time = row["times"][name][condition]
            assert 0 < time["min_us"] <= time["low_us"] <= time["median_us"] <= time["high_us"] <= time["max_us"]
            assert len(time["samples_us"]) >= 3
    assert row["ratios"]["torch"]["median"] > 0
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_every_competitor_is_named_with_its_error_or_its_absence(report):
    from cases import rows
    from peers import peers

    text, contents, _ = report
    (row,) = contents["rows"]
    op = contents["operator"]
    (choice,) = [choice for choice in rows(op, "cpu") if choice.label == row["label"]]
    for peer in peers(op):
        if peer.takes(choice):
            assert (peer.name in row["errors"]) != (peer.name in row["absent"]), peer.name
            assert peer.name in text
    assert all(error < 1e-6 for error in row["errors"].values())


def test_unit_of_an_operator_is_reported(reports):
    text, folder = reports
    assert "ns/state step/thread" in text
    (row,) = json.loads((folder / "selective_scan.json").read_text())["rows"]
    assert (row["unit"], row["units"]) == ("state step", 8 * 1536 * 16) and row["exps"] > row["units"]


def test_wrong_result_is_not_timed(tmp_path):
    planted = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(BENCH)!r})
        import seqkern
        right = seqkern.causal_conv1d_step

        def wrong(*args, **kwargs):
            y = right(*args, **kwargs)
            y[3, 100] += 1e-4
            return y

        seqkern.causal_conv1d_step = wrong
        import run
        sys.exit(run.main({[*TINY, "--op", "causal_conv1d", "--out", str(tmp_path)]!r}))
    """)
    done = run("-c", planted)
    assert done.returncode == 1, done.stderr
    assert "WRONG RESULTS" in done.stdout and "output 0" in done.stdout
    assert "GB/s" not in done.stdout and not list(tmp_path.iterdir())


def test_competitor_that_is_wrong_is_not_timed():
    import cases
    from contest import Contest
    from peers import Peer

    row = next(row for row in cases.rows("selective_scan", "cpu") if row.kind == "step" and row.quick)

    def off(by):
        return lambda: lambda **inputs: row.function(**inputs) + by

    with torch.no_grad():
        contest = Contest(row, quick=True)
        contest.invite(Peer("right", off(by=0), frozenset({"step"})))
        contest.invite(Peer("wrong", off(by=1), frozenset({"step"})))
        _, errors = contest.check()
    assert errors.keys() == contest.functions.keys() == {"seqkern", "right"}
    assert "WRONG" in contest.absent["wrong"]


def test_slow_competitor_takes_part_in_the_first_rounds():
    from report import ratio_of

    from seqkern.testing import interleaved

    calls = {"slow": lambda: time.sleep(0.02), "seqkern": lambda: None}
    times = interleaved(calls, rounds=10, limit_s=0.03)
    assert {name: len(timing.samples_us) for name, timing in times.items()} == {"slow": 3, "seqkern": 10}
    result = argparse.Namespace(
        condition=lambda name: "warm", times={name: {"warm": timing} for name, timing in times.items()}
    )
    assert min(ratio_of(result, "slow")) > 1


def test_competitor_that_would_take_minutes_says_so():
    import cases
    from peers import peers

    backwards = [row for row in cases.rows("selective_scan", "cpu") if row.kind == "forward+backward" and row.slow]
    (reference,) = (
        peer for peer in peers("selective_scan") if peer.name == "mamba-ssm ref" and peer.takes(backwards[0])
    )
    absences = {row.shape[2]: reference.absence(row, quick=False, compile=True) for row in backwards}
    assert absences.pop(128) == "" and absences
    assert all("quadratic" in absence for absence in absences.values())


def test_every_operator_has_rows():
    import cases

    assert cases.operators() == sorted(NAMES)
    for op in cases.operators():
        for device in ("cpu", "cuda"):
            labels = [row.label for row in cases.rows(op, device)]
            assert len(labels) == len(set(labels))
        assert {row.kind for row in cases.rows(op, "cpu")} == {"forward", "forward+backward", "step"}


def test_list_and_filters():
    cpu = [BENCH / "run.py", "--as-installed", "--device", "cpu"]
    labels = run(*cpu, "--list", "--dtype", "bfloat16", "--filter", "step").stdout.splitlines()
    assert labels and all("step" in label and "bfloat16" in label for label in labels)
    assert run(*cpu, "--filter", "no such row").returncode == 2


def test_base_needs_a_commit():
    done = run(BENCH / "run.py", *TINY, "--base", "no-such-ref")
    assert done.returncode != 0 and "--base no-such-ref: no such commit" in done.stderr


def test_base_workers_answer_with_samples():
    import cases
    import compare

    row = next(row for row in cases.rows("causal_conv1d", "cpu") if row.kind == "step")
    worker = compare.Worker(None, threads=1)
    samples = worker.ask(row)
    missing = worker.ask(argparse.Namespace(device="cpu", label="causal_conv1d of another kind"))
    worker.close()
    assert len(samples) > 3 and min(samples) > 0 and missing is None
    assert "1.000" in compare._compared(row.label, samples, samples)


def test_pages_are_reused_or_fresh():
    from measure import fresh_pages, reused_pages

    def allocate():
        torch.ones(2**24)  # 64 MB, 16384 pages of 4 KB

    def faults(call):
        """Of a typical call: small blocks settle in the corners of the first ones, whose room is then too small."""
        counts = []
        for _ in range(31):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call()
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return statistics.median(counts)

    with reused_pages():
        assert faults(allocate) < 100
        assert faults(fresh_pages(allocate)) > 10000


def test_reference_of_a_peer_comes_from_its_sdist(tmp_path, monkeypatch):
    from peers import Missing, functions_of_sdist

    with pytest.raises(Missing):
        functions_of_sdist("other/ops.py", ("f",), {})
    source = tmp_path / "other-1.0" / "other" / "ops.py"
    source.parent.mkdir(parents=True)
    source.write_text("import nowhere\n\ndef f(x):\n    return scale * x\n")
    archive = tmp_path / "other-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source.parent.parent, "other-1.0")
    for sdist in (archive, source.parent.parent):
        monkeypatch.setenv("SEQKERN_PEER_SDIST", str(sdist))
        (f,) = functions_of_sdist("other/ops.py", ("f",), {"scale": 2})
        assert f(21) == 42


def test_module_of_an_unpacked_sdist_needs_no_other(tmp_path, monkeypatch):
    from peers import Missing, module_of_sdist

    package = tmp_path / "other-1.0" / "othermodule"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import nowhere\n")
    (package / "ops.py").write_text("from othermodule.scale import by\n\ndef f(x):\n    return by * x\n")
    (package / "scale.py").write_text("by = 2\n")
    (package / "broken.py").write_text("import nowhere\n")
    monkeypatch.setenv("SEQKERN_PEER_SDIST", str(package.parent))
    assert module_of_sdist("othermodule.ops").f(21) == 42
    with pytest.raises(Missing, match="nowhere"):
        module_of_sdist("othermodule.broken")
    with pytest.raises(Missing, match="no unpacked source distribution"):
        module_of_sdist("anothermodule.ops")
    assert not [name for name in sys.modules if name.startswith("othermodule")]


def test_gpu_dry_run(tmp_path):
    (tmp_path / "ops.py").write_text("")
    sdist = tmp_path / "other-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as tar:
        tar.add(tmp_path / "ops.py", "other-1.0/other/ops.py")
    names = ["risks", "peers", "sanitizers", "ncu"]
    chosen = ["--only", ",".join(names), "--peer-sdist", sdist, "--out", tmp_path]
    done = run(BENCH / "gpu.py", "--dry-run", *chosen)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    contents = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["stage"] for stage in contents["stages"]] == names
    assert (
        "unpacked other-1.0" in contents["stages"][1]["detail"] and (tmp_path / "peers/other-1.0/other/ops.py").exists()
    )
    assert {line["risk"] for line in contents["risks"]} >= {"load", "numerics", "side_stream", "graph", "second_device"}


def test_gpu_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    import gpu

    def hang(visit):
        return visit.python("-c", "import time; time.sleep(60)")

    def succeed(visit):
        return visit.python("-c", "print('still here')").strip()

    visit = gpu.Visit(argparse.Namespace(wheel=None, peer_sdist=[], dry_run=True, out=tmp_path))
    stages = [gpu.Stage("hanging", hang, limit_s=1, reserve_s=0), gpu.Stage("next", succeed, limit_s=30, reserve_s=5)]
    assert gpu.run(visit, stages)
    first, second = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert first["verdict"] == "timeout" and first["seconds"] < 10
    assert (second["verdict"], second["detail"]) == ("pass", "still here")


def test_gpu_deadline_is_shared_out():
    import gpu

    assert sum(stage.reserve_s for stage in gpu.STAGES) + gpu.STAGES[0].limit_s <= gpu.DEADLINE_S
    assert next(stage for stage in gpu.STAGES if stage.name == "tests").limit_s <= 240


def test_convergence_counts_sweeps(one_thread, capsys):
    import convergence

    sizes = "--tokens 256 --chunks 32 128 --steps 2 --length 16".split()
    tasks = ["--task", "text", "parity", "random 1", "--cell", "slstm", "indrnn"]
    convergence.main(["--as-installed", *tasks, *sizes])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    for row in rows:
        short, long = ([int(k) for k in cell.split(", ")] for cell in row.strip(" |").split(" | ")[-2:])
        assert 1 <= short[0] <= short[-1] <= 8 and long[-1] <= 2  # after k sweeps k chunks are exact
