"""Matrix products and functions of vectors of the CPU kernels: torch-free programs for each instruction set here."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

_C = pytest.importorskip("seqkern._C", reason="this build has no Python headers, so no list of instruction sets")

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-std=c++20 -O2 -Wall -Wextra -ffp-contract=off -Wno-psabi -Wno-unused-function".split()


def flags_of(isa):
    """What CMakeLists.txt compiles the kernels of an instruction set with."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(rf"^set\(flags_{isa} (.*)\)", text, re.MULTILINE)[1].replace('"', "")
    return [flag for word in flags.split() for flag in (flags_of("avx2") if word.startswith("$") else [word])]


@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != "amx"])  # avx512 has the products of amx
@pytest.mark.parametrize("name", ["gemm", "math"])
def test_program(name, isa, tmp_path):
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    program = tmp_path / name
    sources = [str(ROOT / "tests" / "cpu" / f"{name}.cpp"), str(ROOT / "csrc" / "common" / "isa.cpp")]
    command = [*compiler, *FLAGS, *flags_of(isa), f"-I{ROOT / 'csrc'}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0 and built.stderr == "", built.stderr
    environment = {name: value for name, value in os.environ.items() if name != "SEQKERN_ISA"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
