"""Set-up for the commands of this repository: a Python with torch and with seqkern built into it.

    import bootstrap
    bootstrap.ensure("test")     # extras of pyproject.toml

returns at once where everything is there. Otherwise it installs what is missing, builds, and starts the command again:
in the Python that runs it if that has torch (which is never touched), else in .venv in the project's folder.
Nothing is looked up on the network unless something is missing.

As a program (`python3 tools/bootstrap.py test bench dev`) it does the same and prints the path of that Python.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        "seqkern needs Python 3.10 or newer, and this is {}.{}: run the command with python3.10 to python3.14".format(
            *sys.version_info
        )
    )

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import torch_home

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / "build"
LOG = BUILD / "bootstrap.log"
RESTARTED = "_SEQKERN_RESTARTED"


def ensure(*extras):
    """Returns in a Python that can `import seqkern`, built from the present sources, and the given extras."""
    restarted = os.environ.pop(RESTARTED, None)
    python = _interpreter()
    if python != sys.executable:
        if restarted:
            sys.exit(f"seqkern: {python} does not start as a virtual environment; remove {VENV} and try again")
        _restart(python)
    _install_missing(extras)
    if _is_built():
        return
    if restarted == "built":
        sys.exit(f"seqkern: built and installed, but {sys.executable} does not find it; see {LOG}")
    _build()
    _restart(python, "built")  # a running process does not see a new editable installation


def _say(text):
    print(f"seqkern: {text}", file=sys.stderr, flush=True)


def _restart(python, why="other Python"):
    os.environ[RESTARTED] = why
    sys.stdout.flush()
    os.execv(python, [python, *sys.orig_argv[1:]])


# ---- which Python


def _interpreter():
    """The Python to run in, made if need be."""
    if Path(sys.prefix).resolve() == VENV:
        return sys.executable
    if _torch() and _is_ours_to_install_into():
        return sys.executable
    python = str(VENV / "bin" / "python")
    if not _starts(python):
        _make_venv(python, sees_torch=_torch() is not None)
    return python


def _torch():
    """The folder of the torch that this Python would import, or None."""
    spec = importlib.util.find_spec("torch")
    home = Path(spec.origin).parent if spec and spec.origin else None
    return home if home and torch_home.version(home) else None


def _starts(python):
    return os.path.exists(python) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def _is_ours_to_install_into():
    """Whether pip may install here: not into the system's own Python (PEP 668), nor where we cannot write."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    system_owned = sys.prefix == sys.base_prefix and marker.exists()
    return not system_owned and os.access(sysconfig.get_path("purelib"), os.W_OK)


def _make_venv(python, sees_torch):
    _say(f"making {VENV}" + (", which sees this Python's torch" if sees_torch else ""))
    command = [sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] if sees_torch else []), str(VENV)]
    hint = (
        "Install the venv module (on Debian and Ubuntu: apt install python3-venv), or activate a virtual environment."
    )
    if importlib.util.find_spec("ensurepip"):
        _run(command, "making the virtual environment", hint)
    else:  # Debian without python3-venv, perhaps with pip
        _run([*command, "--without-pip"], "making the virtual environment", hint)
        _run([sys.executable, "-m", "pip", "--python", python, "install", "pip"], "installing pip into it", hint)


# ---- what is installed


def _requirements(key):
    """A list of strings in pyproject.toml, for this Python. (Python 3.10 cannot read TOML by itself.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    items = ast.literal_eval(re.search(rf"^{key} = (\[.*?\])", text, re.MULTILINE | re.DOTALL)[1])
    split = [re.fullmatch(r"([^;]*)(?:; python_version >= '(.*)')?", item).groups() for item in items]
    return [requirement for requirement, python in split if list(sys.version_info) >= _numbers(python or "")]


def _is_installed(requirement):
    name, relation, wanted = re.fullmatch(r"([\w.-]+)(?:(>=|==)(.*))?", requirement).groups()
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return installed == wanted if relation == "==" else _numbers(installed) >= _numbers(wanted or "")


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)][:3]


def _has_program(name, minimum):
    path = shutil.which(name)
    if path is None:
        return False
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\d+\.\d+", output)
    return found is not None and _numbers(found[0]) >= _numbers(minimum)


def _install_missing(extras):
    if _torch() is None:
        torch = os.environ.get("SEQKERN_TORCH", "torch==2.13.0")
        _say(f"installing {torch} (SEQKERN_TORCH chooses another; a CUDA build is several GB)")
        _install(*shlex.split(torch))
    elif not torch_home.is_supported(torch_home.version(_torch())):
        sys.exit(torch_home.too_old(_torch()))

    wanted = [*_requirements("requires"), *_requirements("dependencies")]
    for extra in extras:
        wanted += _requirements(extra)
    missing = [item for item in wanted if not item.startswith("torch>") and not _is_installed(item)]
    cmake = re.search(r'^cmake.version = ">=(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    missing += [f"cmake>={cmake}"] if not _is_installed(f"cmake>={cmake}") and not _has_program("cmake", cmake) else []
    missing += ["ninja"] if not _is_installed("ninja>=1.5") and not _has_program("ninja", "1.5") else []
    if missing:
        _say(f"installing {', '.join(missing)}")
        _install(*missing)


def _install(*requirements):
    _pip(
        *requirements,
        what=f"installing {' '.join(requirements)}",
        hint=f"Without a network, install it by hand for {sys.executable} and run the command again.",
    )


def _pip(*arguments, what, hint):
    if importlib.util.find_spec("pip") is None:
        _run([sys.executable, "-m", "ensurepip"], "installing pip", f"Install pip for {sys.executable}.")
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments], what, hint)
    importlib.invalidate_caches()


# ---- the build


def _fingerprint():
    """Everything that the build depends on."""
    digest = hashlib.sha256()
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})
    scripts = ["CMakeLists.txt", "pyproject.toml", "tools/backend.py", "tools/torch_home.py"]
    for path in [*sources, *(ROOT / name for name in scripts)]:
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    variables = ["SEQKERN_CUDA", "SEQKERN_CUDA_ARCHS", "SEQKERN_TORCH_DIR", "CUDA_HOME", "CXX"]
    facts = [sys.version, str(ROOT), torch_home.version(_torch()), *(os.environ.get(name, "") for name in variables)]
    digest.update("\n".join(facts).encode())
    return digest.hexdigest()


def _stamp():
    return BUILD / f"built-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"


def _is_built():
    if not _stamp().exists() or _stamp().read_text() != _fingerprint():
        return False
    package = importlib.util.find_spec("seqkern")
    folders = [Path(folder) for folder in package.submodule_search_locations] if package else []
    return ROOT / "python" / "seqkern" in folders and any((folder / "_ops.so").exists() for folder in folders)


def _build():
    _say("building and installing (editable); takes a minute or two the first time")
    start = time.monotonic()
    _pip(
        *["--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--editable", str(ROOT)],
        what="building",
        hint="The build needs a C++20 compiler (g++ 11 or newer). SEQKERN_CUDA=OFF leaves the CUDA kernels out. "
        f"After a change of compilers, remove {BUILD}.",
    )
    for line in re.findall(r"-- seqkern: (.*)", LOG.read_text(encoding="utf-8")):
        _say(line)
    _stamp().write_text(_fingerprint())
    _say(f"built in {time.monotonic() - start:.0f} s")


def _run(command, what, hint):
    BUILD.mkdir(exist_ok=True)
    with LOG.open("w", encoding="utf-8") as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        print(LOG.read_text(encoding="utf-8"), file=sys.stderr)
        sys.exit(f"seqkern: {what} failed (log above, and in {LOG}).\n{hint}")


if __name__ == "__main__":
    ensure(*sys.argv[1:])
    print(sys.executable)
