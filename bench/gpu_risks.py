"""What can go wrong between a library with its own static CUDA runtime and the torch that loads it: one line for each.

    python3 bench/gpu_risks.py [--device cpu] [--json FILE]

On the CPU, streams and graphs are stood in for by calls in order: that tries this file, not the library.
"""

import argparse
import ctypes
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


class NotHere(Exception):
    """A risk that this machine cannot have."""


class Gpu:
    """What the checks need of CUDA."""

    device = "cuda"

    def delay(self) -> None:
        """Keeps the current stream busy for some ten milliseconds."""
        torch.cuda._sleep(20_000_000)

    def stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        return torch.cuda.stream(stream)

    def event(self):
        return torch.cuda.Event()

    def capture(self, call: Callable):
        from measure import captured

        return captured(call)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]


class StandIn:
    """The same on the CPU, where everything happens at once."""

    device = "cpu"

    def delay(self) -> None:
        pass

    def stream(self):
        return self

    def on(self, stream):
        return self

    def event(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def capture(self, call: Callable):
        call()
        return call

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 0


def load(gpu) -> str:
    """The library loads beside this torch, and serves the device."""
    import seqkern
    from seqkern._load import library

    assert library.ops.causal_conv1d_fwd is not None
    runtimes = sorted({line.split("/")[-1].strip() for line in _maps() if "libcudart" in line})
    beside = f"beside torch's {', '.join(runtimes)}" if runtimes else "no shared CUDA runtime in this process"
    if gpu.device == "cuda":
        _random("cuda", (1, 2, 8))  # torch's context first, so that the library's adds to it
    return f"seqkern {seqkern.__version__}, torch {torch.__version__}, {beside}"


def versions(gpu) -> str:
    """The driver is new enough for the CUDA runtime inside the library, and the device's code is in it."""
    from seqkern import _C

    build = _C.build_info()
    if build["cuda"] is None:
        assert gpu.device == "cpu", "this build has no CUDA kernels"
        raise NotHere("built without CUDA")
    built = tuple(int(part) for part in build["cuda"].split(".")[:2])
    if gpu.device == "cpu":
        raise NotHere(f"CUDA {build['cuda']} for {' '.join(build['archs'])}, no driver here")
    driver = ctypes.c_int()
    assert ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver)) == 0
    supports = (driver.value // 1000, driver.value % 1000 // 10)
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    text = (
        f"runtime {build['cuda']}, driver supports {supports[0]}.{supports[1]}, torch's runtime {torch.version.cuda}, "
    )
    text += f"device sm_{capability}, built for {' '.join(build['archs'])}"
    assert supports[0] >= built[0], text
    return text


def one_context(gpu) -> str:
    """The library's runtime shares torch's context: a second one would cost hundreds of megabytes."""
    x, weight = _random(gpu.device, (1, 64, 256), (64, 4))
    gpu.synchronize()
    before = gpu.free_bytes()
    _conv(x, weight)
    gpu.synchronize()
    used = (before - gpu.free_bytes()) / 2**20
    assert used < 150, f"the first launch took {used:.0f} MB of the device's memory"
    return f"the first launch took {used:.0f} MB"


def numerics(gpu) -> str:
    """Forward, gradients and step of every operator agree with the float64 reference."""
    from seqkern.testing import OPERATORS

    errors = {}
    for operator in OPERATORS:
        inputs = _full_case(operator, 129).inputs(gpu.device)
        exact, cotangents = inputs.to(torch.float64), inputs.cotangents()
        actual = _everything(inputs, cotangents)
        expected = _everything(exact, cotangents, operator.reference, operator.reference_step)
        errors[operator.name] = max(_error(actual[name], expected[name]) for name in expected)
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert max(errors.values()) < 1e-4, f"largest relative errors: {text}"
    return f"largest relative errors: {text}"


def _full_case(operator, length: int):
    """All options at once, two rows of some tokens."""
    sizes = {"B": 2, "L": length}
    return operator.full_case(shape=tuple(sizes.get(letter, 40) for letter in operator.shape.split()))


def _everything(inputs, cotangents: dict, function=None, step=None) -> dict[str, torch.Tensor]:
    """Outputs, gradients, and one step from the initial state."""
    outputs, gradients = inputs.gradients(cotangents, function)
    state = {f"next {name}": tensor.clone() for name, tensor in zip(inputs.operator.state, inputs.state, strict=True)}
    return outputs | gradients | {"token": inputs.step(0, list(state.values()), step)} | state


def side_stream(gpu) -> str:
    """On a side stream the kernel waits for the work queued there, and an event makes the main stream wait for it."""
    real, weight = _random(gpu.device, (4, 256, 4096), (256, 4))
    expected = _conv(real, weight)
    x = torch.full_like(real, float("nan"))
    gpu.synchronize()
    side, done = gpu.stream(), gpu.event()
    with gpu.on(side):
        gpu.delay()
        x.copy_(real)
        y = _conv(x, weight)  # on another stream it would read NaN
        done.record()
    done.wait()
    copy = y.clone()
    gpu.synchronize()
    assert torch.equal(copy, expected), "the result differs: the kernel ran out of order"
    return "kernel after the side stream's work, main stream after the event"


def main_stream(gpu) -> str:
    """The other way: the main stream's kernel runs while a side stream is busy, and after an event waits for it."""
    real, weight = _random(gpu.device, (4, 256, 4096), (256, 4))
    expected = _conv(real, weight)
    x = torch.full_like(real, float("nan"))
    gpu.synchronize()
    side, ready = gpu.stream(), gpu.event()
    with gpu.on(side):
        gpu.delay()
        x.copy_(real)
        ready.record()
    ready.wait()
    y = _conv(x, weight)
    gpu.synchronize()
    assert torch.equal(y, expected), "the result differs: the kernel did not wait for the event"
    return "kernel after the event"


def backward_stream(gpu) -> str:
    """Autograd runs a backward on the stream of its forward; the library must follow."""
    x, weight, dy = _random(gpu.device, (4, 256, 4096), (256, 4), (4, 256, 4096))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(_conv(x, weight), x, dy)
    gpu.synchronize()
    side, done = gpu.stream(), gpu.event()
    with gpu.on(side):
        gpu.delay()
        y = _conv(x, weight)
        (dx,) = torch.autograd.grad(y, x, dy)
        done.record()
    done.wait()
    gpu.synchronize()
    assert torch.equal(dx, expected), "the gradient differs"
    return "gradient bitwise that of the main stream"


def graph(gpu) -> str:
    """Forward, backward and step of every operator are captured in a CUDA graph; a replay computes with new values."""
    from seqkern.testing import OPERATORS

    for operator in OPERATORS:
        case = _full_case(operator, 300)
        inputs = case.inputs(gpu.device)
        cotangents = inputs.cotangents()
        results = {name: value.clone() for name, value in _everything(inputs, cotangents).items()}

        def call():
            for name, value in _everything(inputs, cotangents).items():  # noqa: B023
                results[name].copy_(value)  # noqa: B023

        replay = gpu.capture(call)
        for seed in (1, 2):
            for name, value in case.inputs(gpu.device, seed).tensors.items():
                inputs.tensors[name].copy_(value)
            replay()
            gpu.synchronize()
            replayed = {name: value.clone() for name, value in results.items()}
            call()
            gpu.synchronize()
            for name, value in replayed.items():
                assert torch.equal(value, results[name]), f"{operator}: {name} of the replay differs from a plain call"
    return "two replays with new values, bitwise those of plain calls"


def second_device(gpu) -> str:
    """Tensors on another device run there, and the current device stays."""
    if gpu.device == "cpu" or torch.cuda.device_count() < 2:
        raise NotHere("fewer than two CUDA devices")
    x, weight = _random("cuda:1", (2, 64, 300), (64, 4))
    y = _conv(x, weight)
    assert y.device == x.device and torch.cuda.current_device() == 0
    error = _error(y, _conv(x.to("cuda:0"), weight.to("cuda:0")).to("cuda:1"))
    assert error == 0, f"cuda:1 differs from cuda:0 by {error:.1e}"
    return "cuda:1 bitwise cuda:0, current device unchanged"


RISKS = (load, versions, one_context, numerics, side_stream, main_stream, backward_stream, graph, second_device)


def _conv(x, weight):
    import seqkern

    return seqkern.causal_conv1d(x, weight, None, "silu")


def _random(device: str, *shapes, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def _maps() -> list[str]:
    maps = Path("/proc/self/maps")
    return maps.read_text().splitlines() if maps.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu = Gpu() if arguments.device == "cuda" else StandIn()
    lines = []
    for risk in RISKS:
        start = time.monotonic()
        try:
            verdict, detail = "PASS", risk(gpu)
        except NotHere as reason:
            verdict, detail = "N/A", str(reason)
        except Exception as error:
            verdict, detail = "FAIL", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        lines.append({"risk": risk.__name__, "verdict": verdict, "detail": detail, "seconds": time.monotonic() - start})
        print(f"{verdict:<5}{risk.__name__:<17}{detail}", flush=True)
        if arguments.json:  # after each, since the next may hang
            arguments.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return any(line["verdict"] == "FAIL" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
