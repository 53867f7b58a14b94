"""Where torch is installed, found without importing it: the build needs only its headers.

Run as a program it prints the folder; CMakeLists.txt does that.
"""

import os
import re
import site
import sys
from pathlib import Path

MINIMUM = (2, 11)  # first version with every function of the stable ABI that csrc uses


def version(home):
    """The version of the torch in `home`, such as "2.13.0+cpu", or None where there is no torch."""
    try:
        text = (Path(home) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    return found and found[1]


def is_supported(text):
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return (int(major), int(minor)) >= MINIMUM


def too_old(home):
    wanted = ".".join(map(str, MINIMUM))
    return (
        f"seqkern needs torch >= {wanted}, but {home} is {version(home)}, which seqkern will not replace. "
        f"Upgrade it (pip install -U torch) or use another Python."
    )


def find():
    """The folder of torch: SEQKERN_TORCH_DIR, or the one of this interpreter, or None.

    pip's build isolation takes the site-packages folders off sys.path, so they are looked up by themselves.
    """
    explicit = os.environ.get("SEQKERN_TORCH_DIR")
    if explicit:
        if version(explicit) is None:
            sys.exit(f"seqkern: SEQKERN_TORCH_DIR={explicit} holds no torch; it must be .../site-packages/torch")
        return Path(explicit).resolve()
    folders = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment sees the user's packages through sys.path, or not at all
        folders.append(site.getusersitepackages())
    for folder in folders:
        home = Path(folder) / "torch"
        if folder and version(home):
            return home.resolve()
    return None


if __name__ == "__main__":
    torch = find()
    if torch is None:
        sys.exit("seqkern: no torch found; pip install torch first, or set SEQKERN_TORCH_DIR to its folder")
    if not is_supported(version(torch)):
        sys.exit(too_old(torch))
    print(torch, end="")
