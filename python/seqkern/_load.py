"""Finds and loads the compiled operators; when that fails, says what was tried and what to do."""

import platform
import sys
from pathlib import Path

import torch

_CAUSES = """\
Likely causes:
  torch too old     "undefined symbol": seqkern needs torch >= 2.11, and this is {torch}. Upgrade torch.
  library missing   no _ops.so: this is a source tree that was not built, or the installation broke off.
  broken build      "file too short", "invalid ELF header", or "undefined symbol: ...seqkern...": the build was cut short.
  wrong machine     "wrong ELF class", "version `GLIBC...' not found", "cannot open shared object file": built for another
                    processor or a newer Linux than this one ({machine}, {libc}).
In the last three cases build it here: `pip install --force-reinstall --no-deps .` in seqkern's source folder
(or `python3 tests/run.py` there, which sets up everything and runs the tests)."""


def _failure(attempts: list[str]) -> ImportError:
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
    }
    tried = "\n".join(f"  {attempt}" for attempt in attempts)
    return ImportError(
        "seqkern: the operator library could not be loaded\n"
        f"Tried, with Python {platform.python_version()} and torch {torch.__version__}:\n{tried}\n{_CAUSES.format(**facts)}"
    )


def _load() -> Path:
    attempts = []
    # An editable installation has two folders: the sources, and the one with the compiled modules.
    for folder in sys.modules[__package__].__path__:
        path = Path(folder) / "_ops.so"
        if not path.is_file():
            attempts.append(f"{path}: no such file")
            continue
        try:
            torch.ops.load_library(path)
            return path
        except OSError as error:
            attempts.append(f"{path}: {error}")
    raise _failure(attempts)


class _Library:
    """The namespace that Python calls operators through; tests point it at the emulator's."""

    def __init__(self):
        self.path = _load()
        self.ops = torch.ops.seqkern


def load_emulator(path: str | Path):
    """Loads a library built with -DSEQKERN_EMULATE and returns its namespace, ready for `library.ops`."""
    torch.ops.load_library(path)
    return torch.ops.seqkern_emu


library = _Library()
