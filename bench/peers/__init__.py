"""What seqkern is compared with: one module per operator, each with `PEERS`.

Peers of one name fill one column of the table: "torch" is the best plain expression without a loop of our own, or where
there is none the best loop, "compiled" the same under torch.compile. Other projects' code is never copied: an adapter
loads it from the installed package, or from its source distribution (--peer-sdist, or the environment variable
SEQKERN_PEER_SDIST).
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import os
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Row


class Missing(Exception):
    """A peer that cannot take part here, and why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A competitor. `load` returns a function of the operator's keyword arguments, or raises `Missing`."""

    name: str
    load: Callable[[], Callable]
    kinds: frozenset[str]
    options: frozenset[str] = frozenset()  # what it handles, no more and no less
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    compiles: bool = False  # goes through torch.compile: seconds before the first call
    slow: bool = False  # takes about a second for a call of usual size
    unfit: Callable[[Row], str] = lambda row: ""  # why it is left out of a row that it could take part in, or ""

    def takes(self, row: Row) -> bool:
        return row.kind in self.kinds and row.options == self.options and row.device in self.devices

    def absence(self, row: Row, quick: bool, compile: bool) -> str:
        """Why it is not even tried in a row that it takes, or ""."""
        if self.compiles and (quick or not compile or not row.compiles):
            return "not in every row, nor with --quick or --no-compile"
        if self.slow and (quick or not row.slow):
            return "slow, so not in every row, nor with --quick"
        return self.unfit(row)


def peers(op: str) -> tuple[Peer, ...]:
    return importlib.import_module(f"{__name__}.{op}").PEERS


def installed(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        if error.name == name:
            raise Missing("not installed") from None
        raise Missing(f"installed, but does not import: {error}") from None


def of_transformers(name: str) -> Callable:
    """A function of its Mamba model."""
    function = getattr(installed("transformers.models.mamba.modeling_mamba"), name, None)
    if function is None:
        version = importlib.metadata.version("transformers")
        raise Missing(f"transformers {version} has no {name} of its own")
    return function


def compiled(function: Callable) -> Callable[[], Callable]:
    """`load` of a function under torch.compile."""

    def load():
        # A copy of the code, because torch keeps what it compiled with the code: every row gets its own.
        copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(copy, dynamic=False, fullgraph=True)

    return load


def build(op: str, source: Path, folder: Path) -> list[str]:
    """Builds what is needed of an unpacked source distribution into `folder`; the names of the modules."""
    module = importlib.import_module(f"{__name__}.{op}")
    return module.build(source, folder) if hasattr(module, "build") else []


def sdists() -> list[Path]:
    """Source distributions named by the user: .tar.gz files or unpacked folders."""
    return [Path(path) for path in os.environ.get("SEQKERN_PEER_SDIST", "").split(os.pathsep) if path]


def functions_of_sdist(path: str, names: tuple[str, ...], namespace: dict) -> tuple[Callable, ...]:
    """Functions of the file whose path ends in `path` within a source distribution.

    Only these functions are compiled, in `namespace`: importing the package would need its CUDA modules.
    """
    for sdist in sdists():
        text = _read(sdist, path)
        if text is not None:
            tree = ast.parse(text)
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
            exec(compile(tree, f"{sdist}/{path}", "exec"), namespace)
            return tuple(namespace[name] for name in names)
    raise Missing("not installed, and no source distribution given (--peer-sdist)")


def module_of_sdist(module: str):
    """A module of an unpacked source distribution. Its package's own __init__ does not run: that may need more than
    was built."""
    package = module.partition(".")[0]
    for sdist in filter(Path.is_dir, sdists()):
        if (sdist / package).is_dir():
            bare = types.ModuleType(package)
            bare.__path__ = [str(sdist / package)]
            sys.modules[package] = bare
            try:
                return importlib.import_module(module)
            except ImportError as error:
                raise Missing(f"does not import from its source distribution: {error}") from None
            finally:  # others would take the package for installed
                for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                    del sys.modules[name]
    raise Missing("not installed, and no unpacked source distribution given (--peer-sdist)")


def _read(sdist: Path, path: str) -> str | None:
    if sdist.is_dir():
        found = next((file for file in sdist.rglob(Path(path).name) if file.as_posix().endswith(path)), None)
        return found and found.read_text(encoding="utf-8")
    with tarfile.open(sdist) as archive:
        member = next((member for member in archive.getmembers() if member.name.endswith("/" + path)), None)
        return member and archive.extractfile(member).read().decode()
