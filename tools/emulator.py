"""Builds CUDA sources with a C++ compiler alone, to be run by the emulator of csrc/common/simt.

    python tools/emulator.py                          build _emu.so and print where it is
    python tools/emulator.py --sanitize thread A.cu B.cpp     build a torch-free program of these sources and run it

The compiler is $CXX or g++. Everything is cached under build/emu and rebuilt when the sources, their headers, the
compiler or torch change.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch_home

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emu"
JOBS = 2

BASE = "-std=c++20 -fPIC -fvisibility=hidden -Icsrc -DSEQKERN_EMULATE=1".split()
# "#pragma unroll" is unknown to g++; of op.cpp, the path to the CPU kernels is not used.
WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function".split()
# The emulator gives a thread 64 KiB of stack. A frame that is nearly as large has no business in a kernel. -O2 would
# compile half as long again, to save a tenth of the time of a run.
OPTIMIZED = ["-O1", "-Werror=frame-larger-than=32768"]
# What -fsanitize=null and alignment check at every access, AddressSanitizer and check_aligned() find without.
READABLE = ["-Og", "-g1", "-fno-omit-frame-pointer"]
SANITIZERS = {
    None: OPTIMIZED,
    "address": [
        *READABLE,
        "-fsanitize=address,undefined,bounds-strict",
        "-fno-sanitize=null,alignment,object-size",
        "-fno-sanitize-recover=all",
    ],
    "thread": [*READABLE, "-fsanitize=thread"],
}


def build_library(op_folders=None):
    """Builds _emu.so, which registers the CUDA path of operators as torch.ops.seqkern_emu for CPU tensors.

    op_folders names folders of csrc; all that hold an op.cpp when None. Returns the path for torch.ops.load_library.
    """
    home = torch_home.find()
    if home is None:
        raise RuntimeError("the emulator library needs torch's headers: install torch or set SEQKERN_TORCH_DIR")
    folders = sorted(p.parent for p in ROOT.glob("csrc/*/op.cpp"))
    if op_folders is not None:
        folders = [ROOT / "csrc" / name for name in op_folders]
    torch_flags = [f"-isystem{home / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]

    jobs = [(source, OPTIMIZED) for source in _emulator_sources()]
    jobs += [(source, OPTIMIZED) for folder in folders for source in sorted(folder.glob("*.cu"))]
    facing_torch = [source for folder in folders for source in sorted(folder.glob("op*.cpp"))]
    facing_torch += sorted(ROOT.glob("csrc/common/*.cpp"))
    jobs += [(source, OPTIMIZED + torch_flags) for source in facing_torch]
    libtorch = ["-Wl,--no-as-needed", str(home / "lib" / "libtorch.so")]
    return _link("_emu.so", jobs, ["-shared", "-Wl,--gc-sections", *libtorch], torch_home.version(home))


def build_program(sources, sanitize=None):
    """Builds a torch-free program of .cu and .cpp files and the emulator; returns its path.

    sanitize is None, "address" (with the undefined-behaviour checks) or "thread". Only kernels are instrumented: the
    emulator, and what calls the kernels, are not what is tested.
    """
    flags = SANITIZERS[sanitize]
    sources = [Path(source).resolve() for source in sources]
    jobs = [(source, OPTIMIZED) for source in _emulator_sources()]
    jobs += [(source, flags if source.suffix == ".cu" else OPTIMIZED) for source in sources]
    name = "-".join(filter(None, [sources[0].parent.name, sources[-1].stem, sanitize]))
    return _link(name, jobs, flags)


def run_program(program, *arguments, schedule=0, timeout=None):
    """Runs what build_program built, under the given order of threads; returns the CompletedProcess."""
    environment = os.environ | {
        "SEQKERN_SIMT_SCHEDULE": str(schedule),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66",
    }
    command = [str(program), *map(str, arguments)]
    if program.name.endswith("-thread") and shutil.which("setarch"):
        command = ["setarch", platform.machine(), "-R", *command]  # TSan needs addresses that are not random
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


_seconds = {}  # of the processor, for each (source, flags) that this process built or found built


def build_seconds(folder):
    """Processor time that it took to compile what this process asked for of one operator, cached or not."""
    mine = (f"csrc/{folder}/", f"tests/simt/{folder}.cpp")
    return sum(seconds for (source, _), seconds in _seconds.items() if source.startswith(mine))


def _emulator_sources():
    return sorted(ROOT.glob("csrc/common/simt/*.cpp"))


def _digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _contents_digest(files):
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.exists() else b"missing")
    return digest.hexdigest()[:16]


@cache
def _compiler():
    command = shlex.split(os.environ.get("CXX") or "g++")
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the emulator needs a C++20 compiler: {command[0]} (from $CXX or g++): {error}") from error
    return command, version


def _run(command):
    """Runs it and returns the seconds of processor time that it took, its children's included."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{output.read()}")
        sys.stderr.write(output.read())
    return usage.ru_utime + usage.ru_stime


def _compile(source, flags, torch_version):
    """The object of a source and a digest of all that it was made from.

    Paths are relative to the repository, since error texts of kernels show them.
    """
    command, version = _compiler()
    source = os.path.relpath(source, ROOT)
    key = _digest(source, flags, version, torch_version)
    stem = f"{Path(source).parent.name}-{Path(source).name}-{key}"
    made, needs, state, cost = (BUILD / "objects" / (stem + suffix) for suffix in (".o", ".d", ".digest", ".seconds"))

    def digest():  # of the source and the headers that it needed last time
        files = needs.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return _digest(key, _contents_digest(ROOT / file for file in files))

    if not (made.exists() and cost.exists() and state.exists() and state.read_text() == digest()):
        made.parent.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}.o")
        language = ["-x", "c++"] if source.endswith(".cu") else []
        compiling = [*command, *BASE, *WARNINGS, *flags, "-MMD", "-MF", str(needs), "-o", str(new), "-c"]
        cost.write_text(f"{_run([*compiling, *language, source]):.2f}")
        new.replace(made)
        state.write_text(digest())
    _seconds[source, tuple(flags)] = float(cost.read_text())
    return made, digest()


def _link(name, jobs, flags, torch_version=None):
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: _compile(*job, torch_version), jobs))
    made = BUILD / _digest(name, flags, *(digest for _, digest in objects)) / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        _run([*_compiler()[0], *[str(file) for file, _ in objects], *flags, "-pthread", "-o", str(new)])
        new.replace(made)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="sources of a torch-free program, one of them with main()")
    parser.add_argument("--sanitize", choices=["address", "thread"])
    parser.add_argument("--schedule", type=int, default=0, help="0 ascending, 1 descending, from 2 on seeded random")
    options = parser.parse_args()
    if not options.sources:
        print(build_library())
        return 0
    done = run_program(build_program(options.sources, options.sanitize), schedule=options.schedule)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
