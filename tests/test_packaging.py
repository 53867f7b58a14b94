"""Installing, importing and auditing: the messages a user meets before the first kernel runs."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqkern
from seqkern._load import library

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
LIBRARY = library.path
HAS_PYTHON_MODULE = importlib.util.find_spec("seqkern._C") is not None  # not where Python's headers are missing


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.chdir(ROOT)


def run(*arguments, **environment):
    """Runs Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""} | environment,
    )


# ---- import


def patched(find, replacement):
    def write(path):
        contents = LIBRARY.read_bytes()
        assert find in contents
        path.write_bytes(contents.replace(find, replacement))

    return write


MACHINE = 18  # offset of the processor's number in an ELF header
ELF_OF_ANOTHER_MACHINE = LIBRARY.read_bytes()[:MACHINE] + b"\0\0" + LIBRARY.read_bytes()[MACHINE + 2 :]

BROKEN = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "file too short"),
    "text": (lambda path: path.write_text("not a library, but long enough to have a header" * 9), "invalid ELF header"),
    "old torch": (
        patched(b"\0torch_library_impl\0", b"\0torch_library_xmpl\0"),
        "undefined symbol: torch_library_xmpl",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_failed_import_names_causes_and_attempts(how, tmp_path, monkeypatch):
    breaking, reason = BROKEN[how]
    package = tmp_path / f"broken_{how.replace(' ', '_')}"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(Path(seqkern._load.__file__), package)
    breaking(package / "_ops.so")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"{package.name}._load")
    message = str(caught.value)
    assert message.startswith("seqkern: the operator library could not be loaded\n")
    assert re.search(rf"{re.escape(str(package / '_ops.so'))}: .*{reason}", message)
    assert torch.__version__ in message
    for cause in ("torch too old", "library missing", "broken build", "wrong machine", "pip install --force-reinstall"):
        assert cause in message


def test_version_is_that_of_the_sources():
    stated = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert seqkern.__version__ == importlib.metadata.version("seqkern") == stated


# ---- python -m seqkern


def test_report_and_self_check():
    result = run("-m", "seqkern")
    assert result.returncode == 0, result.stdout + result.stderr
    for fact in (seqkern.__version__, torch.__version__, str(LIBRARY), "threads"):
        assert fact in result.stdout
    assert ("instruction set" in result.stdout) == HAS_PYTHON_MODULE
    assert re.search(r"^ok +causal_conv1d on cpu", result.stdout, re.MULTILINE)


def test_report_without_the_python_module():
    hide = "import sys, runpy; sys.modules['seqkern._C'] = None; runpy.run_module('seqkern', run_name='__main__')"
    result = run("-c", hide)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unknown: seqkern._C is missing" in result.stdout


def test_failed_self_check_says_so_and_exits_with_1():
    spoil = (
        "import runpy, seqkern; wrong = seqkern.causal_conv1d;"
        "seqkern.causal_conv1d = lambda *a, **k: tuple(1.001 * t for t in wrong(*a, **k));"
        "runpy.run_module('seqkern', run_name='__main__')"
    )
    result = run("-c", spoil)
    assert result.returncode == 1
    assert re.search(r"^FAILED +causal_conv1d on cpu: relative difference 1.*e-03", result.stdout, re.MULTILINE)


def test_unknown_instruction_set():
    call = "import torch, seqkern; seqkern.causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 2))"
    result = run("-c", call, SEQKERN_ISA="avx1024")
    assert result.returncode == 1
    assert "SEQKERN_ISA must be one of generic, avx2, avx512, amx" in result.stderr
    assert "got 'avx1024'" in result.stderr


PLANS = {  # shapes, and the bytes that a forward moves
    "causal_conv1d": ("--channels 1536 --length 2048 --width 4", 2 * 1536 * 2048 * 2 + 1536 * 5 * 2),
    "delta_rule": ("--heads 8 --keys 128 --size 64 --length 2048 --decay token", (2 * 128 + 3 * 64 + 2) * 8 * 2048 * 2),
    "elementwise_rnn": (
        "--channels 512 --length 4096 --cell gru --no-checkpoints",
        4 * 512 * 4096 * 2 + 3 * 512 * 4,
    ),
    "linear_attention": (
        "--heads 8 --keys 128 --size 64 --length 2048 --decay key",
        (3 * 128 + 2 * 64) * 8 * 2048 * 2,
    ),
    "linear_scan": ("--channels 1024 --length 4096 --constant-over-time", 2 * 1024 * 4096 * 2 + 1024 * 2),
    "mlstm": (
        "--heads 4 --keys 64 --size 128 --length 2048 --no-backward --states",
        (2 * (64 + 128) + 2) * 4 * 2048 * 2 + 2 * 4 * (64 * 128 + 64 + 1) * 4,
    ),
    "rnn": (
        "--heads 12 --size 64 --cell lstm --length 512",
        5 * 12 * 64 * 512 * 2 + 12 * 4 * 64 * 64 * 2,
    ),
    "selective_scan": (
        "--channels 1536 --length 2048 --states 16 --no-checkpoints",
        (4 * 1536 + 2 * 16) * 2048 * 2 + 1536 * 18 * 4,
    ),
    "softmax_scan": ("--heads 16 --size 64 --length 2048", (2 * 64 + 1) * 16 * 2048 * 2 + 2 * 16 * 2048 * 4),
    "ssd": (
        "--heads 24 --size 64 --states 128 --length 2048 --gate --no-backward",
        ((3 * 64 + 1) * 24 + 2 * 128) * 2048 * 2,
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_is_printed(name):
    shape, moved = PLANS[name]
    result = run("-m", "seqkern.plan", name, "--batch", "1", "--dtype", "bf16", *shape.split())
    if not HAS_PYTHON_MODULE:
        assert result.stderr.startswith("seqkern.plan needs seqkern._C")
        return
    assert result.returncode == 0, result.stderr
    for call in ("forward", "backward", "step"):
        assert f"{name} {call}\n" in result.stdout
    forward, _, _ = result.stdout.partition("backward")
    assert re.search(rf"bytes moved +{moved:,}\n", forward)


# ---- the binary


def test_library_passes_the_audit(tools):
    import audit

    objects = ROOT / "build" if list((ROOT / "build").glob(audit.ISA_OBJECTS)) else None
    assert [check for check in audit.audit(LIBRARY, objects) if not check.ok] == []


def test_audit_finds_what_is_wrong(tools, tmp_path):
    import audit

    source, bad = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text(
        'extern "C" void* PyLong_FromLong(long);\n'
        "namespace at { void add(int); }\n"
        f'const char* where = "{ROOT}/bad.cpp";\n'
        'void* exported() { at::add(1); asm("pxor %mm0, %mm0"); return PyLong_FromLong(where[0]); }\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", bad, "-Wl,-rpath,/opt/lib"], check=True)
    failed = {check.name for check in audit.audit(bad) if not check.ok}
    assert failed >= {
        "needs libtorch.so and the C/C++ runtime",
        "has no library search path",
        "no Python symbols",
        "only the stable C functions of torch",
        "exports nothing",
        "no path of the build machine",
        "uses no MMX register",
    }


def test_audit_finds_code_that_instruction_sets_would_share(tools, tmp_path):
    import audit

    folder = tmp_path / "cpu_avx2.dir"
    folder.mkdir()
    (folder / "cpu.cpp").write_text("inline int shared(int x) { return x + 1; }\nint (*use)(int) = &shared;\n")
    subprocess.run(["g++", "-c", folder / "cpu.cpp", "-o", folder / "cpu.cpp.o"], check=True)
    (check,) = audit.check_isa_objects(tmp_path)
    assert not check.ok
    assert "W shared(int)" in check.detail


# ---- the build


def test_build_asks_for_torch_only_where_there_is_none(tools, monkeypatch, capsys):
    import backend
    import torch_home

    assert not any(item.startswith("torch") for item in backend.get_requires_for_build_wheel())
    monkeypatch.setattr(torch_home, "find", lambda: None)
    monkeypatch.setenv("SEQKERN_TORCH", "torch==2.12.0")
    assert "torch==2.12.0" in backend.get_requires_for_build_editable()
    assert capsys.readouterr().out.count("\n") == 1


def test_old_torch_is_neither_used_nor_replaced(tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    result = run(TOOLS / "torch_home.py", SEQKERN_TORCH_DIR=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == (
        f"seqkern needs torch >= 2.11, but {tmp_path} is 2.9.1+cpu, which seqkern will not replace. "
        "Upgrade it (pip install -U torch) or use another Python.\n"
    )


COMMANDS = ["tests/run.py", "examples/train_text.py", "examples/parity.py", "bench/run.py"]


@pytest.mark.parametrize("command", [*COMMANDS, "tools/bootstrap.py"])
def test_command_tells_an_old_python_what_it_needs(command):
    """It must parse there and stop at the first line of the set-up."""
    ast.parse((ROOT / command).read_text(), command, feature_version=(3, 8))
    pretend = f"import sys; sys.version_info = (3, 9, 2); sys.path.insert(0, {str(TOOLS)!r}); import bootstrap"
    result = run("-c", pretend)
    assert result.returncode == 1
    assert result.stderr.startswith("seqkern needs Python 3.10 or newer, and this is 3.9: ")
    assert result.stderr.count("\n") == 1


def test_set_up_knows_what_is_installed(tools):
    import bootstrap

    assert bootstrap._requirements("dependencies") == ["torch>=2.11", "numpy"]
    assert bootstrap._is_installed("torch>=2.11")
    assert not bootstrap._is_installed("torch>=99.0")
    assert not bootstrap._is_installed("torch==2.11.0.dev1")
    assert not bootstrap._is_installed("no-such-distribution")
