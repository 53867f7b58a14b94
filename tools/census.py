"""What the compiler needs for every CUDA kernel: registers, spills, stack, shared memory, planned occupancy.

    python tools/census.py [--arch 80 90a ...] [--operator causal_conv1d ...]

Compiles csrc/*/*.cu with the flags of the build and reads ptxas' report; needs nvcc, no GPU. Dynamic shared memory is
not in the report: tile.h states it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "90a")
FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -Icsrc -Xptxas=-v,-warn-spills".split()
JOBS = 2
REGISTERS_PER_SM = 65536
THREADS_PER_SM = {"80": 2048, "90": 2048, "100": 2048, "120": 1536}


def find_nvcc():
    """The path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(place) for place in places if place.exists()), None) or shutil.which("nvcc")


def census(archs=ARCHS, operators=None):
    """One dict for each kernel and architecture.

    Keys: operator, file, arch, kernel (demangled, without arguments), threads and planned_blocks_per_sm (as its
    __launch_bounds__ say), registers, spill_bytes, stack_bytes, static_smem_bytes, blocks_per_sm (as many as registers
    and threads allow).
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the census needs nvcc: set CUDA_HOME, or put nvcc on PATH")
    folders = sorted(
        path.parent for path in ROOT.glob("csrc/*/op.cpp") if not operators or path.parent.name in operators
    )
    sources = [source for folder in folders for source in sorted(folder.glob("*.cu"))]
    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(lambda source: _compile(nvcc, source, archs), sources))
    rows = [row for source, (report, ptx) in zip(sources, found, strict=True) for row in _rows(source, report, ptx)]
    for row, name in zip(rows, _demangled([row["kernel"] for row in rows]), strict=True):
        row["kernel"] = _short(name)
    return rows


def _compile(nvcc, source, archs):
    """ptxas' report, and the PTX that it was given."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *targets, "--keep", "--keep-dir", folder, "-c", str(source.relative_to(ROOT))]
        command += ["-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return done.stderr, "".join(file.read_text() for file in Path(folder).glob("*.ptx"))


# Of one kernel ptxas reports, in this order:
#   Compiling entry function '...' for 'sm_90a'
#   N bytes stack frame, N bytes spill stores, N bytes spill loads
#   Used N registers, used 1 barriers, N bytes smem, N bytes cmem[0]
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
# And PTX says of __launch_bounds__:
_BOUNDS = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)[^\n]*\s*\.minnctapersm (\d+)")


def _rows(source, report, ptx):
    bounds = {name: (int(threads), int(blocks)) for name, threads, blocks in _BOUNDS.findall(ptx)}
    for found in _REPORT.finditer(report):
        if found["name"] not in bounds:
            raise RuntimeError(
                f"{source.name}: {found['name']} must name its __launch_bounds__(threads, blocks per SM)"
            )
        threads, planned = bounds[found["name"]]
        registers = int(found["registers"])
        smem = re.search(r"(\d+) bytes smem", found["rest"])
        yield {
            "operator": source.parent.name,
            "file": source.name,
            "arch": found["arch"],
            "kernel": found["name"],
            "threads": threads,
            "planned_blocks_per_sm": planned,
            "registers": registers,
            "spill_bytes": int(found["stores"]) + int(found["loads"]),
            "stack_bytes": int(found["stack"]),
            "static_smem_bytes": int(smem[1]) if smem else 0,
            "blocks_per_sm": _blocks_per_sm(found["arch"], threads, registers),
        }


def _demangled(names):
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    return subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()


def _short(name):
    """fwd_time<__half> of the full name."""
    found = re.search(r"(\w+)<(\w+)>\(", name)
    return f"{found[1]}<{found[2]}>" if found else name


def _blocks_per_sm(arch, threads, registers):
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given to warps in units of 256
    return min(REGISTERS_PER_SM // (per_warp * warps), THREADS_PER_SM[arch.rstrip("af")] // threads)


def table(rows):
    """The rows as text."""
    columns = ["operator", "kernel", "arch", "threads", "registers", "spill_bytes", "stack_bytes", "static_smem_bytes"]
    columns += ["planned_blocks_per_sm", "blocks_per_sm"]
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="as in sm_<arch>: 80, 90a, 100, 120")
    parser.add_argument("--operator", nargs="+", help="folders of csrc; all by default")
    options = parser.parse_args()
    rows = census(options.arch, options.operator)
    print(table(rows))
    return int(any(row["spill_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
