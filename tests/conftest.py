"""Fixtures of the whole suite: poisoned memory, devices, and the table of cases.

A test that takes `case`, `small_case`, `tiny_case` or `operator` runs for every entry of `seqkern.testing.OPERATORS`.
One that also takes `device` runs its cases on the CPU, on emulated CUDA kernels, and on a GPU where there is one.
"""

import resource
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import seqkern
from seqkern import ops
from seqkern._load import library, load_emulator
from seqkern.testing import OPERATORS, SERVED

ROOT = Path(__file__).resolve().parent.parent

# Every tensor that torch or an operator allocates without a value is full of NaN.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

TABLES = ("case", "small_case", "tiny_case")

# Of the processor, for the tests that name an operator, without a GPU and without builds; those that name a folder of
# kernels serve all its operators. Twice as much fails: slow cores, or two threads on one, may take so long.
TEST_SECONDS = {str(operator): 120 * max(1, SERVED[str(operator)]) for operator in OPERATORS}
TEST_SECONDS["delta_rule"] = 240  # decays of three forms, each with kernels of its own
BUILDS = ("test_compilation_keeps_its_budget", "test_builds_keep_their_budget")
_spent = Counter()


def _processor_seconds():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _operators_in(name):
    """The name of one operator may be a part of another's."""
    found = []
    for operator in sorted(map(str, OPERATORS), key=len, reverse=True):
        if operator in name:
            found.append(operator)
            name = name.replace(operator, "")
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if item.name.startswith(BUILDS):
        return (yield)
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        _spent.update(dict.fromkeys(_operators_in(item.nodeid), _processor_seconds() - before))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """With pytest-xdist every worker keeps an account of its own."""
    _spent.update(getattr(node, "workeroutput", {}).get("spent", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["spent"] = dict(_spent)
        return
    if not torch.cuda.is_available() and any(spent > 2 * TEST_SECONDS[op] for op, spent in _spent.items()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for operator, seconds in _spent.items():
        budget = TEST_SECONDS[operator]
        verdict = "over" if seconds > budget else "within"
        terminalreporter.write_line(
            f"tests of {operator}: {seconds:.0f} s of the processor, {verdict} the budget of {budget} s"
        )


def pytest_generate_tests(metafunc):
    operators = OPERATORS
    if metafunc.definition.get_closest_marker("seq_idx"):
        operators = [operator for operator in OPERATORS if "seq_idx" in operator.factors["packing"]]
    if metafunc.definition.get_closest_marker("one_per_folder"):
        operators = list({operator.raw: operator for operator in reversed(operators)}.values())[::-1]
    if {"operator", "packed_as"} <= set(metafunc.fixturenames):
        pairs = [(operator, packing) for operator in operators for packing in operator.factors["packing"]]
        metafunc.parametrize(("operator", "packed_as"), pairs, ids=["{}-{}".format(*pair) for pair in pairs])
    elif "operator" in metafunc.fixturenames:
        metafunc.parametrize("operator", operators, ids=str)
    for table in TABLES:
        if table not in metafunc.fixturenames:
            continue
        cases = [case for operator in operators for case in getattr(operator, f"{table}s")]
        if "device" not in metafunc.fixturenames:
            metafunc.parametrize(table, cases, ids=str)
            continue
        emulated = [case for operator in operators for case in operator.small_cases]
        pairs = [("cpu", case) for case in cases]
        pairs += [("emulator", case) for case in (emulated if table == "case" else cases)]
        if torch.cuda.is_available():
            pairs += [pytest.param("cuda", case, marks=pytest.mark.gpu) for case in cases]
        metafunc.parametrize(f"device, {table}", pairs, indirect=["device"], ids=str)
        return
    if "device" in metafunc.fixturenames:
        cuda = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
        metafunc.parametrize("device", ["cpu", "emulator", *cuda], indirect=True)


@pytest.fixture(scope="session")
def emulator():
    """torch.ops.seqkern_emu: the CUDA kernels, compiled for the host, on CPU tensors."""
    sys.path.insert(0, str(ROOT / "tools"))
    from emulator import build_library

    namespace = load_emulator(build_library())
    ops.register("seqkern_emu")
    return namespace


@pytest.fixture
def device(request, monkeypatch):
    """Where the tensors live; for "emulator" on the CPU, with the operators replaced by emulated CUDA kernels."""
    if request.param == "emulator":
        monkeypatch.setattr(library, "ops", request.getfixturevalue("emulator"))
        return "cpu"
    return request.param


@pytest.fixture
def one_thread():
    """For loops of small operations, which further threads only wait in."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch_invariant():
    with seqkern.batch_invariant():
        yield


class Recorder:
    """Stands in for torch.ops.seqkern and keeps every call."""

    def __init__(self, namespace):
        self.namespace, self.calls = namespace, []

    def __getattr__(self, name):
        op = getattr(self.namespace, name).default

        def call(*args):
            self.calls.append((op, [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]))
            return op(*args)

        return call


@pytest.fixture
def record(monkeypatch):
    """Runs a case, backward and a step included, and returns the calls (operator, arguments) that it made."""

    def record(case, device="cpu"):
        recorder = Recorder(library.ops)
        inputs = case.inputs(device)
        follow = case.but(packing="none", reverse=False, initial_state=True).inputs(device)
        with monkeypatch.context() as patch:
            patch.setattr(library, "ops", recorder)
            inputs.gradients(inputs.cotangents())
            if follow.sizes["L"]:
                follow.step(0, [part.clone(memory_format=torch.contiguous_format) for part in follow.state])
        return recorder.calls

    return record
