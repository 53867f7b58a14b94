"""The layer rule of csrc/README.md, and what every operator's folder must hold."""

import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMMON = CSRC / "common"
OPERATORS = sorted(path.parent.name for path in CSRC.glob("*/op.cpp"))
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
FILES = ["README.md", "params.h", "tile.h", "cpu.cpp", "op.cpp"]
FACING_TORCH = {"op.cpp", "op_step.cpp", "call.h", "check.h", "library.h", "parallel.cpp"}
FACING_TORCH |= {"op_call.h", "op_cuda.h", "op_weights.h", "tensor.h", "tensor.cpp", "token_tensors.h"}
KERNELS = ["fwd*.cu", "bwd*.cu", "step*.cu"]


def name(path):
    return str(path.relative_to(ROOT))


def includes(path):
    """Names in #include lines: torch's, the compiler's and our own (relative to csrc)."""
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def reached(path, seen=None):
    """Every include that `path` reaches through our own headers, with the header that has it."""
    seen = {path} if seen is None else seen
    for include in includes(path):
        yield include, path
        own = CSRC / include
        if own.exists() and own not in seen:
            seen.add(own)
            yield from reached(own, seen)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name not in FACING_TORCH], ids=name)
def test_device_and_cpu_code_is_free_of_torch(path):
    found = [f"{include} in {name(via)}" for include, via in reached(path) if re.match(r"(torch|ATen|c10)/", include)]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_stay_in_their_layer(path):
    layer = path.relative_to(CSRC).parts[0]
    allowed = (
        {"common"} | ({layer} if layer in OPERATORS else set()) | (set(OPERATORS) if layer == "bindings.cpp" else set())
    )
    folders = {include.split("/")[0] for include in includes(path) if (CSRC / include).exists()}
    assert folders <= allowed
    assert not [include for include in includes(path) if include.startswith(".")], "includes are relative to csrc"


@pytest.mark.parametrize("path", [path for path in SOURCES if COMMON not in path.parents], ids=name)
def test_kernels_use_the_common_primitives(path):
    """Shared memory is one named struct from shared_memory(); only csrc/common knows of the emulator or holds PTX."""
    code = re.sub(r"//.*", "", path.read_text())
    assert "__shared__" not in code
    assert "SEQKERN_EMULATE" not in code
    assert not re.search(r"\basm\b", code)


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_folder_is_complete(op):
    folder = CSRC / op
    assert [file for file in FILES if not (folder / file).exists()] == []
    assert [pattern for pattern in KERNELS if not list(folder.glob(pattern))] == []
    assert (ROOT / "python" / "seqkern" / "ops" / f"{op}.py").exists()
    assert re.search(rf"\b{op}\b", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("op", OPERATORS)
def test_equation_tags_are_the_same_everywhere(op):
    """The tags that the operator's README numbers its equations with stand beside the Python, CPU and CUDA code."""

    def tags(*paths):
        return set(re.findall(r"\[([a-z_]+)\](?!\()", "\n".join(path.read_text() for path in paths)))

    folder = CSRC / op
    defined = set(re.findall(r"^(?:\| )?\[([a-z_]+)\](?!\()", (folder / "README.md").read_text(), re.MULTILINE))
    assert defined, f"the README of {op} has no equation tags"
    assert defined <= tags(ROOT / "python" / "seqkern" / "ops" / f"{op}.py")
    assert defined <= tags(*folder.glob("cpu*"))
    assert defined <= tags(*folder.glob("*.cu"), *folder.glob("*.cuh"))


def test_version_is_stated_once():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    texts = [ROOT / "CMakeLists.txt", ROOT / "README.md", *SOURCES]
    for folder in ("python", "tools", "tests", "bench", "examples"):
        texts += (ROOT / folder).rglob("*.py")
    stated = [name(path) for path in texts if re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", path.read_text())]
    assert stated == []


def test_no_python_newer_than_the_floor():
    """Every Python file parses as Python 3.10."""
    import ast

    for folder in ("python", "tools", "tests", "bench", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            with tokenize.open(path) as file:
                ast.parse(file.read(), name(path), feature_version=(3, 10))
