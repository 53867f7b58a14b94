"""Installs one wheel beside several torch versions and computes with it under each.

python tools/two_torches.py dist/seqkern-*.whl [2.11.0 2.13.0 ...]     needs the network; exit code 1 on a difference

Every version gets a fresh virtual environment. torch is installed without the CUDA libraries it names; those it cannot
be imported without are added one by one.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# What `import torch` and seqkern need of torch's requirements when nothing runs on a GPU.
PURE = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy"]

# Distributions that hold the CUDA libraries of a torch wheel, by a word of the library's name.
CUDA = {
    "cudart": "nvidia-cuda-runtime",
    "cublas": "nvidia-cublas",
    "cudnn": "nvidia-cudnn-cu13",
    "cufft": "nvidia-cufft",
    "curand": "nvidia-curand",
    "cusolver": "nvidia-cusolver",
    "cusparseLt": "nvidia-cusparselt-cu13",
    "cusparse": "nvidia-cusparse",
    "nccl": "nvidia-nccl-cu13",
    "nvshmem": "nvidia-nvshmem-cu13",
    "nvrtc": "nvidia-cuda-nvrtc",
    "nvJitLink": "nvidia-nvjitlink",
    "nvToolsExt": "nvidia-nvtx",
    "cupti": "nvidia-cuda-cupti",
    "cufile": "nvidia-cufile",
}

PROGRAM = """
import hashlib, json, torch, seqkern
torch.manual_seed(0)
x = torch.randn(2, 48, 257, requires_grad=True)
weight, bias = torch.randn(48, 4, requires_grad=True), torch.randn(48, requires_grad=True)
y, state = seqkern.causal_conv1d(x, weight, bias, "silu", return_final_state=True)
grads = torch.autograd.grad(y.square().sum(), (x, weight, bias))
with torch.no_grad():
    step = seqkern.causal_conv1d_step(x[..., 0], state, weight, bias, "silu")
bits = {}
for name, tensor in zip(["y", "dx", "dweight", "dbias", "step", "state"], [y, *grads, step, state]):
    bits[name] = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:16]
expected = seqkern.reference.causal_conv1d(x.double(), weight.double(), bias.double(), "silu")
error = (y - expected).abs().max().item()
try:
    seqkern.causal_conv1d(x, weight[:, 0])
except RuntimeError as caught:
    message = str(caught).splitlines()[0]
print(json.dumps(dict(torch=torch.__version__, error=error, message=message, bits=bits)))
"""


def _pip(python, *arguments):
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)


def _import_torch(python):
    """Installs the CUDA libraries without which torch does not load."""
    for _ in range(len(CUDA)):
        result = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
        if result.returncode == 0:
            return
        library = re.search(r"lib(\w+)\.so[.\d]*: cannot open", result.stderr)
        name = next((dist for word, dist in CUDA.items() if library and word in library[1]), None)
        if name is None:
            sys.exit(result.stderr)
        print(f"  torch needs {name}", flush=True)
        _pip(python, "--no-deps", name)
    sys.exit(result.stderr)


def compute(wheel, version, folder):
    venv.create(folder, with_pip=True)
    python = str(Path(folder) / "bin" / "python")
    print(f"torch {version} and {wheel.name}", flush=True)
    _pip(python, "--no-deps", f"torch=={version}")
    _pip(python, *PURE)
    _pip(python, "--no-deps", str(wheel))
    _import_torch(python)
    result = subprocess.run([python, "-c", PROGRAM], capture_output=True, text=True, cwd=folder)
    if result.returncode != 0:
        sys.exit(f"torch {version}:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="*", default=["2.11.0", "2.13.0"])
    arguments = parser.parse_args()
    results = []
    for version in arguments.versions:
        with tempfile.TemporaryDirectory() as folder:
            results.append(compute(arguments.wheel.resolve(), version, folder))
    first = results[0]
    print(f"\n{'torch':<16}{'error against fp64':>20}   bits of " + ", ".join(first["bits"]))
    for result in results:
        same = "the same" if result["bits"] == first["bits"] else str(result["bits"])
        print(f"{result['torch']:<16}{result['error']:>20.1e}   {same}")
    for result in results:
        print(f"message under {result['torch']}: {result['message']}")
    sys.exit(any(result["bits"] != first["bits"] or result["error"] > 1e-5 for result in results))
