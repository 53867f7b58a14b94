"""Sets up what is missing, builds seqkern and runs its tests; arguments go to pytest."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tools"))
    import bootstrap

    bootstrap.ensure("test")

    import pytest

    os.chdir(ROOT)
    sys.exit(pytest.main(sys.argv[1:]))
