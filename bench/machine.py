"""Facts that a figure means nothing without: machine, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("seqkern", "torch", "numpy", "triton", "transformers")
PACKAGES += ("causal_conv1d", "mamba_ssm", "mambapy", "fla_core", "pararnn-torch")


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"^(?:model name|Model)\s*:\s*(.*)", text, re.MULTILINE)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def folder(device: str) -> str:
    """The device as a folder's name, such as nvidia-h200 or cpu-intel-xeon-2-threads."""
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu", "", device_name(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device == "cuda" else f"cpu-{name}-{torch.get_num_threads()}-threads"


def facts(device: str) -> dict:
    return {
        "device": device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "isa": _isa(),
        "cuda": _cuda_facts() if device == "cuda" else None,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        **commit(),
    }


def commit() -> dict:
    """The commit the repository is at, and whether files differ from it. Both None outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    return {"commit": head, "dirty": None if head is None else bool(_git("status", "--porcelain"))}


def _cuda_facts() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "runtime": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
    }


def _isa() -> str | None:
    """The instruction set of seqkern's CPU kernels, where the module that knows it was built."""
    try:
        from seqkern import _C
    except ImportError:
        return None
    return _C.isa()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
