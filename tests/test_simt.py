"""The emulator's own tests: kernels of tests/simt with known results, and kernels with a planted bug each."""

import ctypes
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import emulator  # noqa: E402

SOURCES = [*sorted((ROOT / "tests" / "simt").glob("*.cu")), ROOT / "tests" / "simt" / "runner.cpp"]
SCHEDULES = [0, 1, 2, 3, 4, 5]  # ascending, descending, seeded random


def declared(kind):
    """The names of the cases that the sources declare as Case or Fault."""
    return [name for source in SOURCES for name in re.findall(rf'^const {kind} \w+\("(\w+)"', source.read_text(), re.M)]


@cache
def program(sanitize=None):
    return emulator.build_program(SOURCES, sanitize)


def run(*names, sanitize=None, schedule=0):
    done = emulator.run_program(program(sanitize), *names, schedule=schedule)
    return done.returncode, done.stdout + done.stderr


def line_of(source, text):
    lines = (ROOT / "tests" / "simt" / source).read_text().splitlines()
    return f"tests/simt/{source}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


# --- kernels without a bug


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_do_not_depend_on_the_order_of_threads(schedule):
    assert run(*declared("Case"), schedule=schedule) == (0, "")


@pytest.mark.parametrize(("sanitize", "schedule"), [("address", 0), ("address", 2), ("thread", 0), ("thread", 2)])
def test_sanitizers_are_silent(sanitize, schedule):
    assert run(*declared("Case"), sanitize=sanitize, schedule=schedule) == (0, "")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_static_shared_memory_belongs_to_a_block(schedule):
    assert run("static_shared_of_two_blocks", schedule=schedule) == (0, "")


# --- the library


def test_python_reaches_settings_and_counters():
    path = emulator.build_library([])  # without operators
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    counters = [library.seqkern_simt_launches, library.seqkern_simt_bytes_read, library.seqkern_simt_bytes_written]
    for counter in counters:
        counter.restype = ctypes.c_int64
    library.seqkern_simt_set_schedule(1)
    library.seqkern_simt_set_resident_blocks(4)
    library.seqkern_simt_reset()
    assert [counter() for counter in counters] == [0, 0, 0]


# --- missing synchronisation


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_barrier_gives_a_wrong_result(schedule):
    code, text = run("missing_barrier", schedule=schedule)
    assert code == 1
    assert re.search(r"y\[\d+\] is .*, not ", text)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_wait_for_an_asynchronous_copy_gives_nan(schedule):
    code, text = run("missing_wait", schedule=schedule)
    assert code == 1
    assert "nan" in text


@pytest.mark.parametrize(
    ("name", "source", "write", "read"),
    [
        ("missing_barrier", "barrier.cu", "s.value[threadIdx.x] = mine", "mine = s.value[kThreads - 1 - threadIdx.x]"),
        ("shuffle_as_barrier", "barrier.cu", "s.value[threadIdx.x] = static_cast<float>", "= s.value[threadIdx.x / 32"),
        ("missing_fence", "blocks.cu", "partial[blockIdx.x] =", "*sum += partial[i]"),
        ("race_of_blocks", "blocks.cu", "y[threadIdx.x] = static_cast<int>(threadIdx.x)", "y[threadIdx.x] = static"),
    ],
)
def test_thread_sanitizer_names_both_lines_of_a_race(name, source, write, read):
    code, text = run(name, sanitize="thread")
    assert code != 0
    assert "data race" in text
    assert line_of(source, write) in text
    assert line_of(source, read) in text


# --- bad indices


@pytest.mark.parametrize(
    ("name", "message", "line"),
    [
        ("global_out_of_bounds", "heap-buffer-overflow", "y[threadIdx.x] = x[threadIdx.x]"),
        ("shared_out_of_bounds", "heap-buffer-overflow", "(&shared_memory<float>())[threadIdx.x + offset]"),
        ("member_out_of_bounds", "index 64 out of bounds", "shared_memory<Shared>().value[threadIdx.x + offset]"),
    ],
)
def test_address_sanitizer_names_the_line_of_a_bad_index(name, message, line):
    code, text = run(name, sanitize="address")
    assert code != 0
    assert message in text
    assert line_of("memory.cu", line) in text


# --- what CUDA leaves undefined


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_shuffle", r"mask ffffffff in divergent code.*__shfl_xor_sync|__shfl_xor_sync .*in divergent code"),
        ("shuffle_and_barrier", r"deadlock.*lanes 0000ffff wait for __shfl_xor_sync.*ffff0000 wait for __syncthreads"),
        ("lane_outside_its_mask", r"mask 0000ffff, which leaves out its own lane (1[6-9]|2\d|3[01])"),
        ("masks_that_differ", r"__shfl_sync with mask .* in divergent code: lane \d+ is at __shfl_sync with mask"),
        ("divergent_ldmatrix", r"lanes 0000ffff wait for load_matrix .*lanes ffff0000 wait for __syncthreads"),
        ("barrier_in_one_branch", r"a barrier in divergent code|__syncthreads in divergent code"),
        ("barrier_in_two_branches", r"__syncthreads in divergent code.*is at the one of tests/simt/barrier.cu"),
        ("misaligned_vector", r"misaligned access: the address must be a multiple of 16 bytes"),
        ("too_little_shared_memory", r"read_dynamic.*shared_memory\(\) of 256 bytes.*smem_bytes = 128"),
        ("too_much_shared_memory", r"launch of read_dynamic failed: .*smem 1048576 bytes"),
        ("too_many_threads", r"launch of read_dynamic failed: .*grid 2x3x1, threads 2048"),
        ("flag_that_nobody_sets", r"wait_for_nobody in the emulator: deadlock.*wait for a flag"),
        ("too_many_blocks_for_a_barrier", r"deadlock.*132 of 140 blocks are resident"),
    ],
)
def test_undefined_behaviour_is_an_error(name, message, schedule):
    code, text = run(name, schedule=schedule)
    assert code == 1
    assert text.startswith(f"{name}: seqkern: ")
    assert re.search(message, text, re.S), text


def test_every_planted_bug_has_a_test():
    text = Path(__file__).read_text()
    assert [name for name in declared("Fault") if f'"{name}"' not in text] == []
