"""What seqkern is compared with: one module per operator, each with `PEERS`.

Peers of one name fill one column of the table: "torch" is the best plain expression without a loop of our own,
"compiled" such an expression under torch.compile. Other projects' code is never copied: an adapter loads it from the
installed package, or from its source distribution (--peer-sdist, or the environment variable SEQKERN_PEER_SDIST).
"""

import ast
import dataclasses
import importlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path


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

    def takes(self, row) -> bool:
        return row.kind in self.kinds and row.options == self.options and row.device in self.devices


def peers(op: str) -> tuple[Peer, ...]:
    return importlib.import_module(f"{__name__}.{op}").PEERS


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


def _read(sdist: Path, path: str) -> str | None:
    if sdist.is_dir():
        found = next((file for file in sdist.rglob(Path(path).name) if file.as_posix().endswith(path)), None)
        return found and found.read_text(encoding="utf-8")
    with tarfile.open(sdist) as archive:
        member = next((member for member in archive.getmembers() if member.name.endswith("/" + path)), None)
        return member and archive.extractfile(member).read().decode()
