"""Finds and loads the compiled operators; when that fails, says what was tried and what to do."""

import platform
import sys
from pathlib import Path

import torch

_FAILURE = """\
seqkern: the operator library could not be loaded
Tried, with Python {python} and torch {torch}:
{attempts}
Likely causes:
  torch too old     "undefined symbol: torch_..." or "aoti_torch_...": seqkern needs torch >= 2.11. Upgrade torch.
  library missing   "no such file": the source tree was not built, or the installation broke off.
  broken build      "file too short", "invalid ELF header", "undefined symbol: ...seqkern...": the build was cut short.
  wrong machine     "wrong ELF class", "version `GLIBC_...' not found", "cannot open shared object file" although it is
                    there: built for another processor, or for a newer Linux than this one ({machine}, {libc}).
But for the first, build it here: `pip install --force-reinstall --no-deps .` in seqkern's source folder, or
`python3 tests/run.py` there, which sets up everything and runs the tests."""


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
            reason = str(error.__cause__ or error)  # the dynamic linker's own words, which begin with the path
            attempts.append(reason if str(path) in reason else f"{path}: {reason}")
    raise ImportError(
        _FAILURE.format(
            python=platform.python_version(),
            torch=torch.__version__,
            attempts="\n".join(f"  {attempt}" for attempt in attempts),
            machine=platform.machine(),
            libc=" ".join(platform.libc_ver()),
        )
    )


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
