"""PEP 517 build backend: scikit-build-core, which asks for torch only where there is none.

Listing torch under build-system.requires would make every isolated build download gigabytes to read a few headers,
although the torch that seqkern will run beside is usually installed already.
"""

import os
import shlex

from scikit_build_core import build as scikit
from scikit_build_core.build import *  # noqa: F403

import torch_home


def _with_torch(requires):
    home = torch_home.find()
    if home is None:
        torch = shlex.split(os.environ.get("SEQKERN_TORCH", "torch==2.13.0"))[0]
        print(f"seqkern: no torch here, fetching {torch} to build against (SEQKERN_TORCH_DIR names an existing one)")
        return [*requires, torch]
    if not torch_home.is_supported(torch_home.version(home)):
        raise SystemExit(torch_home.too_old(home))
    return requires


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(scikit.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(scikit.get_requires_for_build_editable(config_settings))
