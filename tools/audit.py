"""Audits the operator library: whether one binary really serves every torch >= 2.11, every Python and every machine.

python tools/audit.py [_ops.so] [--objects build]     exit code 1 if a check fails

With torch-abi-audit installed it also looks up every torch symbol's first version; without it that line says so.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch_home

ROOT = Path(__file__).resolve().parent.parent
NEEDED = r"lib(torch|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux.*"
ISA_OBJECTS = "**/cpu_*.dir/**/*.o"


class Check(NamedTuple):
    name: str
    ok: bool
    detail: str


def _lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check_dynamic_section(library):
    entries = _lines("readelf", "--dynamic", "--wide", str(library))
    needed = [re.search(r"\[(.*)\]", line)[1] for line in entries if "(NEEDED)" in line]
    strangers = [name for name in needed if not re.fullmatch(NEEDED, name)]
    yield Check("needs libtorch.so and the C/C++ runtime", "libtorch.so" in needed and not strangers, ", ".join(needed))
    paths = [line.strip() for line in entries if "(RPATH)" in line or "(RUNPATH)" in line]
    yield Check("has no library search path", not paths, ", ".join(paths))


def check_undefined_symbols(library):
    """Every symbol from outside is a versioned one of the C/C++ runtime or a C function of torch's stable ABI."""
    symbols = [line.split()[-1] for line in _lines("nm", "--dynamic", "--undefined-only", str(library))]
    python = [name for name in symbols if re.match(r"_?Py", name)]
    yield Check("no Python symbols", not python, ", ".join(python))
    torch = [name for name in symbols if re.match(r"(aoti_)?torch_", name)]
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    strangers = [name for name in symbols if "@" not in name and name not in {*torch, *weak}]
    yield Check("only the stable C functions of torch", not strangers, ", ".join(strangers) or f"{len(torch)} used")
    versions = (_newest(kind, symbols) for kind in ("GLIBC", "GLIBCXX"))
    yield Check("oldest runtime that serves", True, ", ".join(versions))


def _newest(kind, symbols):
    versions = re.findall(rf"@{kind}_([\d.]+)", " ".join(symbols))
    return f"{kind} {max(versions, key=lambda version: [int(n) for n in version.split('.')], default='any')}"


def check_exports(library):
    exported = [line.split()[-1] for line in _lines("nm", "--dynamic", "--defined-only", str(library))]
    yield Check("exports nothing", not exported, ", ".join(exported))


def check_build_paths(library):
    """Messages carry __FILE__, which must be relative to the sources or to torch's headers."""
    ours = {str(ROOT), str(Path.home()), sys.prefix, "site-packages", "build-via-sdist", "/tmp/pip-"} - {"/"}
    leaks = sorted({line for line in _lines("strings", "-n", "6", str(library)) if any(path in line for path in ours)})
    yield Check("no path of the build machine", not leaks, "; ".join(leaks[:5]))


def check_mmx(library):
    """A function that leaves MMX registers in use makes the caller's x87 arithmetic, such as fmod, return NaN."""
    used = [line.strip() for line in _lines("objdump", "-d", "--no-show-raw-insn", str(library)) if "%mm" in line]
    yield Check("uses no MMX register", not used, "; ".join(used[:3]))


def check_torch_versions(library):
    name = "torch-abi-audit finds a stable ABI of torch 2.11"
    if importlib.util.find_spec("torch_abi_audit") is None:
        yield Check(name, True, "not looked up: torch-abi-audit is not installed")
        return
    report = json.loads("\n".join(_lines(sys.executable, "-m", "torch_abi_audit.cli", "--json", str(library))))
    torch = report["bundled_libs"][0]["torch"]
    minimum = tuple(map(int, (torch["min_torch_version"] or "99.0").split(".")[:2]))
    ok = torch["stable"] and not torch["unstable_symbols"] and not torch["unknown_shim_symbols"]
    detail = ", ".join(torch["unstable_symbols"] + torch["unknown_shim_symbols"]) or (
        f"{torch['stable_shim_count']} functions, minimum torch {torch['min_torch_version']}"
    )
    yield Check(name, ok and minimum <= torch_home.MINIMUM, detail)


def check_isa_objects(folder):
    """Objects of one instruction set define their table of kernels and nothing else that another could pick up."""
    objects = sorted(Path(folder).glob(ISA_OBJECTS))
    leaks = set()
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path))[1]
        for line in _lines("nm", "--demangle", "--defined-only", "--extern-only", str(path)):
            _, kind, name = line.split(maxsplit=2)
            is_table = kind in "DRB" and name.endswith(f"::{isa}::kernels")
            is_pointer = name.startswith("DW.ref.")  # to a function of the C++ runtime: data, not code
            if not (is_table or is_pointer):
                leaks.add(f"{path.name} ({isa}): {kind} {name}")
    detail = "; ".join(sorted(leaks)) or f"{len(objects)} objects"
    yield Check("instruction sets share no code", bool(objects) and not leaks, detail)


def audit(library, objects=None):
    yield from check_dynamic_section(library)
    yield from check_undefined_symbols(library)
    yield from check_exports(library)
    yield from check_build_paths(library)
    yield from check_mmx(library)
    yield from check_torch_versions(library)
    if objects is not None:
        yield from check_isa_objects(objects)
    yield Check("size", True, f"{Path(library).stat().st_size / 1024:.0f} KiB")


def _installed():
    package = importlib.util.find_spec("seqkern")
    for folder in package.submodule_search_locations if package else []:
        if (Path(folder) / "_ops.so").exists():
            return Path(folder) / "_ops.so"
    sys.exit("audit: seqkern is not installed in this Python; give the path of _ops.so")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, help="default: the installed one")
    parser.add_argument("--objects", help="build folder, to check the objects of each instruction set as well")
    arguments = parser.parse_args()
    checks = list(audit(arguments.library or _installed(), arguments.objects))
    for check in checks:
        print(f"{'ok    ' if check.ok else 'FAILED'}  {check.name}{': ' + check.detail if check.detail else ''}")
    sys.exit(not all(check.ok for check in checks))
