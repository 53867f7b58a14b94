"""Unpacks source distributions of other packages into a folder, and builds the CUDA kernels that are compared with.

python3 bench/build_peers.py [--unpack-only] FOLDER SDIST.tar.gz ...

`PYTHONPATH=FOLDER python3 bench/run.py --peer-sdist FOLDER/PACKAGE-VERSION` then measures them. Only what bench/peers
asks for is built, and for this machine's GPU alone.
"""

import argparse
import sys
import tarfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpack-only", action="store_true")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sdists", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for sdist in arguments.sdists:
        with tarfile.open(sdist) as archive:
            archive.extractall(arguments.folder)
    sources = sorted(path for path in arguments.folder.iterdir() if path.is_dir())
    built = [] if arguments.unpack_only else [name for source in sources for name in _build(source, arguments.folder)]
    print(f"unpacked {', '.join(source.name for source in sources)}; built {', '.join(built) or 'nothing'}")
    return 0


def _build(source: Path, folder: Path) -> list[str]:
    import cases
    import peers

    return [name for op in cases.operators() for name in peers.build(op, source, folder)]


if __name__ == "__main__":
    sys.exit(main())
