"""Every kernel on small cases under AddressSanitizer and ThreadSanitizer, by a torch-free program."""

import sys
from pathlib import Path

import pytest

from seqkern.testing import SERVED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import emulator  # noqa: E402

OPERATORS = sorted(path.parent.name for path in ROOT.glob("csrc/*/op.cpp"))


BUILD_SECONDS = 60  # of the processor, for each operator that a folder serves: the emulator and both sanitizers


def build(folder, sanitize):
    kernels = sorted((ROOT / "csrc" / folder).glob("*.cu"))
    return emulator.build_program([*kernels, ROOT / "tests" / "simt" / f"{folder}.cpp"], sanitize)


@pytest.fixture
def program(folder, sanitize):
    return build(folder, sanitize)


@pytest.mark.parametrize("folder", OPERATORS)
@pytest.mark.parametrize(("sanitize", "schedule"), [(None, 0), (None, 2), ("address", 0), ("thread", 1)])
def test_kernels_agree_with_a_naive_loop(program, sanitize, schedule):
    every = 1 if sanitize is None else 11  # cases under a sanitizer
    done = emulator.run_program(program, schedule, every, schedule=schedule)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", OPERATORS)
def test_builds_keep_their_budget(folder):
    emulator.build_library()
    for sanitize in emulator.SANITIZERS:
        build(folder, sanitize)
    assert 0 < emulator.build_seconds(folder) < BUILD_SECONDS * SERVED[folder]
