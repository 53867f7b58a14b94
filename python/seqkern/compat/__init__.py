"""Other packages' functions under their own names: code written for them runs on seqkern's operators.

    import seqkern.compat
    seqkern.compat.install()
    from causal_conv1d import causal_conv1d_fn      # seqkern's

One module per package, named like it; its MODULES say what each of the package's modules holds, as a mapping where a
name there is not the function's own. Call `install` before whatever imports the package. Of transformers that is the
model's own module: its Mamba models look for mamba_ssm and causal_conv1d when it is imported, and on every device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import accelerated_scan, causal_conv1d, fla, mamba_ssm, selective_scan_cuda

__all__ = ["install", "installed", "uninstall"]

_PACKAGES = (accelerated_scan, causal_conv1d, fla, mamba_ssm, selective_scan_cuda)
_displaced: dict[str, ModuleType | None] = {}  # what stood in sys.modules under each name that `install` took


def install(force: bool = False) -> list[str]:
    """Places the packages in ``sys.modules``; returns the names of those it placed.

    A package that is really installed is left alone, unless `force`. Placing twice changes nothing.

    Example:
        >>> import seqkern.compat
        >>> with seqkern.compat.installed(force=True):
        ...     from causal_conv1d import causal_conv1d_fn
        >>> causal_conv1d_fn.__module__
        'seqkern.compat.causal_conv1d'
    """
    placed = []
    for source in _PACKAGES:
        package = source.__name__.rpartition(".")[2]
        if package in _displaced or (not force and importlib.util.find_spec(package) is not None):
            continue
        for name, contents in source.MODULES.items():
            parent, _, child = name.rpartition(".")
            is_package = any(other.startswith(f"{name}.") for other in source.MODULES)
            module = ModuleType(name, f"{source.__name__} in place of {name}.")
            module.__spec__ = ModuleSpec(name, loader=None, is_package=is_package)
            module.__version__ = source.VERSION
            names = contents if isinstance(contents, dict) else dict(zip(contents, contents, strict=True))
            module.__dict__.update({item: getattr(source, own) for item, own in names.items()})
            _displaced[name] = sys.modules.get(name)
            sys.modules[name] = module
            if is_package:
                module.__path__ = []
            if parent:
                setattr(sys.modules[parent], child, module)
        placed.append(package)
    return placed


def uninstall() -> None:
    """Undoes `install`. Modules that have imported a function meanwhile keep it."""
    while _displaced:
        name, module = _displaced.popitem()
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


@contextlib.contextmanager
def installed(force: bool = False) -> Iterator[None]:
    """`install` for the length of a ``with`` block."""
    install(force)
    try:
        yield
    finally:
        uninstall()
