"""Puts a seqkern into a folder of its own, where a child process finds it before any other.

python3 bench/install.py SOURCE FOLDER      SOURCE is a wheel or a source tree
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Python runs a sitecustomize at its start. An editable installation answers `import seqkern` through a finder of its
# own, ahead of PYTHONPATH, so that finder must go.
_SITECUSTOMIZE = """\
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "seqkern" not in getattr(finder, "known_source_files", {})]
"""


def install(source: Path, folder: Path, **options) -> None:
    """Installs a wheel, or builds a source tree, into `folder` without a network; `options` go to subprocess.run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(folder), str(source)]
    subprocess.run(command, check=True, **options)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is to use the seqkern in `folder`."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    install(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
