"""One command for a machine with a GPU and without a network: install or build, the risk list, all GPU tests, other
packages' kernels, benchmarks, compute-sanitizer, ncu. Everything is bounded: eight minutes in all, whatever hangs.

    python3 bench/gpu.py --out DIR                     builds this source tree offline
    python3 bench/gpu.py --out DIR --wheel FILE.whl    uses a prebuilt wheel
    python3 bench/gpu.py --out DIR --peer-sdist F.tar.gz     builds this package's CUDA kernels to compare with
    python3 bench/gpu.py --dry-run                     the same stages on the CPU, under a minute

DIR then holds gpu.json (stages and risks), gpu.log (all output), ncu.csv and <device>/<op>.json of the benchmarks.
Nothing is installed into this Python: seqkern goes into a folder of its own under DIR.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from install import environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEADLINE_S = 480
CUDA_BIN = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/opt/nvidia/nsight-compute"]
OUR_KERNELS = "seqkern"  # the namespace, part of every mangled name


@dataclass(frozen=True)
class Stage:
    """`limit_s` is the most it may take, `reserve_s` what is kept for it however long the stages before it take."""

    name: str
    run: Callable[["Visit"], str]
    limit_s: float
    reserve_s: float


class Failed(Exception):
    pass


class Unavailable(Exception):
    """A tool that is not here, or does not work on this machine: no verdict on seqkern."""


class Visit:
    """One run of this program: where things are, and how long is left."""

    def __init__(self, arguments: argparse.Namespace):
        self.wheel = arguments.wheel
        self.peer_sdists = arguments.peer_sdist
        self.dry_run = arguments.dry_run
        self.device = "cpu" if arguments.dry_run else "cuda"
        self.out = arguments.out
        self.site = self.out / "site"
        self.deadline = time.monotonic() + DEADLINE_S
        self.stage_deadline = self.deadline
        self.log = (self.out / "gpu.log").open("w", encoding="utf-8")
        self.environment = dict(os.environ)

    def python(self, *arguments, **environment: str) -> str:
        """Runs this Python with the installed seqkern, within the stage's time; returns its output."""
        return self.command([sys.executable, *map(str, arguments)], **environment)

    def command(self, command: list[str], **environment: str) -> str:
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        start = self.log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a hanging child of the child ends too
        )
        try:
            code = process.wait(max(1.0, self.stage_deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        output = self._since(start)
        if code:
            raise Failed(f"exit code {code}: {_last_line(output)}", output)
        return output

    def _since(self, start: int) -> str:
        with open(self.log.name, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            text = log.read()
        self.log.seek(0, os.SEEK_END)
        return text


# ---- the stages


def install(visit: Visit) -> str:
    if visit.wheel is None and visit.dry_run:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--no-index"]
        visit.command([*command, "--no-deps", "--no-build-isolation", str(ROOT)])
        return "metadata of the source tree; the seqkern that is installed is used"
    archs = None if visit.wheel else os.environ.get("SEQKERN_CUDA_ARCHS") or _native_arch(visit)
    chosen = {"SEQKERN_CUDA_ARCHS": archs} if archs else {}
    visit.python(HERE / "install.py", visit.wheel or ROOT, visit.site, **chosen)
    visit.environment = environment(visit.site)
    return f"built for {archs}" if archs else f"wheel {visit.wheel.name}"


def _native_arch(visit: Visit) -> str:
    program = "import torch; print('arch', *torch.cuda.get_device_capability())"
    major, minor = re.findall(r"^arch (\d+) (\d+)$", visit.python("-c", program), re.MULTILINE)[0]
    return f"{major}{minor}a-real" if (major, minor) == ("9", "0") else f"{major}{minor}-real"


def risks(visit: Visit) -> str:
    lines = visit.out / "risks.json"
    try:
        visit.python(HERE / "gpu_risks.py", "--device", visit.device, "--json", lines)
    finally:
        if lines.exists():
            visit.risks = json.loads(lines.read_text(encoding="utf-8"))
            lines.unlink()
            for line in visit.risks:
                print(f"    {line['verdict']:<5}{line['risk']:<17}{line['detail']}", flush=True)
    return f"{sum(line['verdict'] == 'PASS' for line in visit.risks)} of {len(visit.risks)} pass, none fails"


def tests(visit: Visit) -> str:
    chosen = ["-m", "gpu"] if not visit.dry_run else ["-m", "not gpu", "-k", "test_expanded_cotangents and cpu"]
    # -v, so that the log of a run that is ended at its limit says how far it came.
    output = visit.python("-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "tests", *chosen)
    if " passed" not in output:
        raise Failed("no test ran")
    return _last_line(output).strip("= ")


def peers(visit: Visit) -> str:
    """Others' CUDA kernels from source distributions: where they stay unbuilt, the benchmarks go on without them."""
    if not visit.peer_sdists:
        return "no --peer-sdist: those that are installed take part"
    folder = visit.out / "peers"
    options = ["--unpack-only"] if visit.dry_run else []
    try:
        output = visit.python(HERE / "build_peers.py", *options, folder, *visit.peer_sdists)
    except (Failed, subprocess.TimeoutExpired) as failure:
        reason = failure.args[0] if isinstance(failure, Failed) else "the time was up"
        raise Unavailable(f"not built: {reason}") from failure
    finally:
        visit.peer_sdists = [path for path in folder.glob("*") if path.is_dir()]
        visit.environment["PYTHONPATH"] = os.pathsep.join([str(folder), visit.environment.get("PYTHONPATH", "")])
    return _last_line(output)


def sanitizers(visit: Visit) -> str:
    return "; ".join(_sanitizer(visit, tool) for tool in ("memcheck", "racecheck"))


def _sanitizer(visit: Visit, tool: str) -> str:
    options = ["--tool", tool, "--error-exitcode", "86", "--kernel-name", f"kernel_substring={OUR_KERNELS}"]
    small = ["gpu_small.py", "--device", visit.device, "--limit", "12"]
    target = [sys.executable, str(HERE / small[0]), *small[1:]]
    program = _tool("compute-sanitizer")
    if visit.dry_run:
        if tool == "memcheck":
            visit.command(target)
        if program is None:
            return f"{tool}: the program it would watch runs; compute-sanitizer is not here"
        visit.command([program, *options, "--require-cuda-init", "no", "true"])
        return f"{tool}: command line accepted"
    if program is None:
        raise Unavailable("compute-sanitizer is not here")
    # Without the caching allocator every tensor is an allocation of its own, so that its end can be overrun.
    output = _watched(visit, [program, *options, *target], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return f"{tool}: {_last_line(output).strip('= ')}"


def _watched(visit: Visit, command: list[str], **environment: str) -> str:
    """The output of a program under one of NVIDIA's tools; `Unavailable` where the tool itself cannot work."""
    try:
        return visit.command(command, **environment)
    except Failed as failure:
        sign = re.search(
            r"Device not supported|LibraryNotLoaded|Failed to initialize|ERR_NVGPUCTRPERM", failure.args[1]
        )
        if sign:
            raise Unavailable(f"{Path(command[0]).name} does not work here: {sign[0]}") from failure
        raise


def benchmarks(visit: Visit) -> str:
    budget = 0.8 * (visit.stage_deadline - time.monotonic())
    arguments = ["--as-installed", "--no-compile", "--device", visit.device, "--out", visit.out]
    arguments += ["--budget", f"{budget:.0f}"]
    for sdist in visit.peer_sdists:
        arguments += ["--peer-sdist", sdist]
    if visit.dry_run:
        arguments += ["--quick", "--filter", r" step \([^)]*\) float32"]
    output = visit.python(HERE / "run.py", *arguments)
    return ", ".join(re.findall(r"^wrote (.*\.json)$", output, re.MULTILINE))


def profile(visit: Visit) -> str:
    options = ["--clock-control", "none", "--kernel-name-base", "mangled", "--kernel-name", f"regex:{OUR_KERNELS}"]
    options += ["--launch-count", "32", "--csv", "--log-file", str(visit.out / "ncu.csv")]
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy"):
        options += ["--section", section]
    target = [sys.executable, str(HERE / "gpu_small.py"), "--device", visit.device, "--largest"]
    program = _tool("ncu")
    if visit.dry_run:
        visit.command(target)
        return "the program it would watch runs"
    if program is None:
        raise Unavailable("ncu is not here")
    _watched(visit, [program, *options, *target])
    text = (visit.out / "ncu.csv").read_text(encoding="utf-8", errors="replace")
    if OUR_KERNELS not in text:
        raise Unavailable(f"ncu read no kernel: {_last_line(text)}")
    launches = set(re.findall(r'^"(\d+)"', text, re.MULTILINE))
    return f"{len(launches)} launches in ncu.csv"


STAGES = (
    Stage("install", install, limit_s=150, reserve_s=0),
    Stage("risks", risks, limit_s=60, reserve_s=30),
    Stage("tests", tests, limit_s=240, reserve_s=100),
    Stage("peers", peers, limit_s=150, reserve_s=0),
    Stage("benchmarks", benchmarks, limit_s=180, reserve_s=80),
    Stage("sanitizers", sanitizers, limit_s=90, reserve_s=40),
    Stage("ncu", profile, limit_s=60, reserve_s=20),
)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(CUDA_BIN))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


# ---- the run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--out", type=Path, help="required, but for --dry-run")
    parser.add_argument("--peer-sdist", type=Path, action="append", default=[], metavar="PATH", help="a peer's .tar.gz")
    parser.add_argument("--only", metavar="STAGES", help=f"of {','.join(stage.name for stage in STAGES)}")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",") if arguments.only else [stage.name for stage in STAGES]
    if unknown := set(names) - {stage.name for stage in STAGES}:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    if arguments.wheel is not None and not arguments.wheel.is_file():
        parser.error(f"no such wheel: {arguments.wheel}")
    if arguments.out is None and not arguments.dry_run:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory() as scratch:
        arguments.out = (arguments.out or Path(scratch)).resolve()
        arguments.out.mkdir(parents=True, exist_ok=True)
        return run(Visit(arguments), [stage for stage in STAGES if stage.name in names])


def run(visit: Visit, stages: list[Stage]) -> int:
    visit.risks = []
    done = []
    for index, stage in enumerate(stages):
        start = time.monotonic()
        kept = sum(later.reserve_s for later in stages[index + 1 :])
        visit.stage_deadline = min(start + stage.limit_s, max(start + stage.reserve_s, visit.deadline - kept))
        visit.stage_deadline = min(visit.stage_deadline, visit.deadline)
        print(f"== {stage.name} (at most {visit.stage_deadline - start:.0f} s)", flush=True)
        visit.log.write(f"\n==== {stage.name}\n")
        try:
            verdict, detail = "pass", stage.run(visit)
        except Unavailable as reason:
            verdict, detail = "unavailable", str(reason)
        except subprocess.TimeoutExpired:
            verdict, detail = "timeout", f"stopped after {time.monotonic() - start:.0f} s"
        except Exception as error:  # the other stages still run
            verdict, detail = "FAIL", str(error.args[0] if error.args else error)
        seconds = time.monotonic() - start
        done.append({"stage": stage.name, "verdict": verdict, "seconds": round(seconds, 1), "detail": detail})
        print(f"   {verdict} in {seconds:.0f} s: {detail}", flush=True)
        _write(visit, done)
        if stage.name == "install" and verdict != "pass":
            break  # nothing to run
    shutil.rmtree(visit.site, ignore_errors=True)
    width = max(len(stage["detail"]) for stage in done)
    print(f"\n{'stage':<12}{'verdict':<13}{'s':>6}  detail\n{'-' * min(100, 33 + width)}")
    for stage in done:
        print(f"{stage['stage']:<12}{stage['verdict']:<13}{stage['seconds']:>6.0f}  {stage['detail']}")
    print(f"\nresults in {visit.out}")
    return any(stage["verdict"] in ("FAIL", "timeout") for stage in done)


def _write(visit: Visit, done: list[dict]) -> None:
    contents = {"dry_run": visit.dry_run, "stages": done, "risks": visit.risks}
    (visit.out / "gpu.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
