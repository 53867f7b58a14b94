"""`python -m seqkern`: what was built, what this machine has, and whether the operators compute what they should."""

import platform
import sys
from collections.abc import Callable

import torch

import seqkern
from seqkern._load import library

try:
    from . import _C
except ImportError as error:  # only build facts and plans are missing without it
    _C, _missing = None, error


def _facts() -> dict[str, str]:
    facts = {
        "seqkern": seqkern.__version__,
        "library": str(library.path),
        "torch": f"{torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
    }
    if _C is None:
        facts["build"] = f"unknown: seqkern._C is missing ({_missing})"
        facts["processor"] = f"{torch.get_num_threads()} threads"
    else:
        build = _C.build_info()
        kernels = f"CPU and CUDA {build['cuda']} ({' '.join(build['archs'])})" if build["cuda"] else "CPU kernels only"
        facts["build"] = f"{kernels}, g++ {build['compiler']}, headers of torch {build['torch']}"
        facts["processor"] = (
            f"instruction set {_C.isa()} of {', '.join(_C.isas())} (SEQKERN_ISA chooses), "
            f"{torch.get_num_threads()} threads"
        )
    facts["GPUs"] = ", ".join(map(_describe, _gpus())) or "none"
    return facts


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _describe(gpu: torch.device) -> str:
    limits = torch.cuda.get_device_properties(gpu)
    return f"{gpu} {limits.name} (sm_{limits.major}{limits.minor}, {limits.multi_processor_count} SMs)"


def _causal_conv1d(device: torch.device) -> float:
    """Largest difference from the float64 reference over forward, backward and step, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, weight, bias, state, dy = random(2, 40, 129), random(40, 4), random(40), random(2, 40, 3), random(2, 40, 129)

    def run(function: Callable, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        y, final_state = function(*inputs[:3], "silu", initial_state=inputs[3], return_final_state=True)
        return y, final_state, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    actual = run(seqkern.causal_conv1d, x, weight, bias, state)
    expected = run(seqkern.reference.causal_conv1d, *(tensor.double() for tensor in (x, weight, bias, state)))
    with torch.no_grad():
        states = state.clone(), state.double()
        actual += (seqkern.causal_conv1d_step(x[..., 0], states[0], weight, bias, "silu"), states[0])
        wide = (x[..., 0].double(), states[1], weight.double(), bias.double(), "silu")
        expected += (seqkern.reference.causal_conv1d_step(*wide), states[1])
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


SELF_CHECKS = {"causal_conv1d": _causal_conv1d}
TOLERANCE = 1e-5  # float32 sums of a few hundred terms


def self_check() -> bool:
    """Runs every operator on every device against its reference; prints a line for each."""
    everything_ok = True
    for device in [torch.device("cpu"), *_gpus()]:
        for name, check in SELF_CHECKS.items():
            try:
                difference = check(device)
                ok, detail = difference < TOLERANCE, f"relative difference {difference:.1e}"
            except Exception as error:
                ok, detail = False, f"{type(error).__name__}: {error}"
            print(f"{'ok' if ok else 'FAILED':<8}{name} on {device}: {detail}")
            everything_ok &= ok
    return everything_ok


if __name__ == "__main__":
    for name, text in _facts().items():
        print(f"{name:<12}{text}")
    sys.exit(not self_check())
