"""The CPU kernels of the other instruction sets, each in a process of its own: the choice is made once in each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqkern.testing import OPERATORS

_C = pytest.importorskip("seqkern._C", reason="this build has no Python headers, so no list of instruction sets")

HERE = Path(__file__).parent
TESTS = [
    f"{__file__}::test_the_one_asked_for_is_used",
    f"{HERE / 'test_values.py'}::test_outputs_and_gradients",
    f"{HERE / 'test_sequences.py'}::test_packed_equals_separate",
    f"{HERE / 'test_sequences.py'}::test_nan_and_inf_stay_in_their_sequence",
    f"{HERE / 'test_step.py'}",
    *sorted({str(HERE.parent / f"test_{operator.raw}.py") for operator in OPERATORS}),
]
MULTIPLYING = [str(operator) for operator in OPERATORS if operator.rounds_operands]


def test_the_one_asked_for_is_used():
    assert _C.isa() == os.environ.get("SEQKERN_ISA", _C.isas()[-1])


@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != _C.isa()])
def test_values_under(isa):
    chosen = "not emulator and not cuda"
    if {isa, _C.isa()} == {"avx512", "amx"}:  # the same kernels but for products of matrices
        chosen += f" and ({' or '.join(MULTIPLYING)})"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *options, *TESTS]
    result = subprocess.run(command, env=os.environ | {"SEQKERN_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_ones_are_refused():
    code = "import torch, seqkern; seqkern.causal_conv1d(torch.ones(1, 1, 1), torch.ones(1, 1))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=os.environ | {"SEQKERN_ISA": "mmx"}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "SEQKERN_ISA must be one of generic, avx2, avx512, amx" in result.stderr and "got 'mmx'" in result.stderr
