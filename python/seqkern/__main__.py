"""`python -m seqkern`: what was built, what this machine has, and whether the operators compute what they should."""

import platform
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

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


class Check(NamedTuple):
    """One call of an operator with states and gradients, and one step; `ops` is seqkern or seqkern.reference."""

    shapes: dict[str, tuple[int, ...]]  # of the tensors, by argument
    call: Callable[[ModuleType, dict[str, Tensor]], tuple[Tensor, ...]]
    step: Callable[..., Tensor]  # of ops, the tensors, and copies of those of the state
    state: tuple[str, ...] = ("initial_state",)

    def difference(self, device: torch.device) -> float:
        """The largest from the float64 reference, relative to the largest value of an output or gradient."""
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(shape, generator=generator).to(device) for name, shape in self.shapes.items()}
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        results = zip(self._run(seqkern, tensors), self._run(seqkern.reference, wide), strict=True)
        return max(((actual - exact).abs().max() / exact.abs().max()).item() for actual, exact in results)

    def _run(self, ops: ModuleType, tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        outputs = self.call(ops, leaves)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        state = [tensors[name].clone() for name in self.state]
        return [*outputs, *gradients, self.step(ops, tensors, *state), *state]


def _negative(x: Tensor) -> Tensor:
    return -x.abs()


def _attention(ops: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    log_decay = _negative(tensors["log_decay"])
    return ops.linear_attention(**tensors | {"log_decay": log_decay}, return_final_state=True)


def _attention_step(ops: ModuleType, tensors: dict[str, Tensor], state: Tensor) -> Tensor:
    q, k, v, log_decay = (tensors[name][:, 0] for name in ("q", "k", "v", "log_decay"))
    return ops.linear_attention_step(state, q, k, v, _negative(log_decay))


def _delta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"beta": 2 * tensors["beta"].sigmoid(), "log_decay": _negative(tensors["log_decay"])}


def _delta_step(ops: ModuleType, tensors: dict[str, Tensor], state: Tensor) -> Tensor:
    tensors = _delta(tensors)
    token = {name: tensors[name][:, 0] for name in ("q", "k", "v", "beta", "log_decay")}
    return ops.delta_rule_step(state, **token, qk_l2norm=True)


def _decaying(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"A": -tensors["A"].exp()}


def _scan_step(ops: ModuleType, tensors: dict[str, Tensor], state: Tensor) -> Tensor:
    tensors = _decaying(tensors)
    token = {name: tensors[name][..., 0] for name in ("u", "delta", "B", "C", "z")}
    parameters = {name: tensors[name] for name in ("A", "D", "delta_bias")}
    return ops.selective_scan_step(state, **token, **parameters, delta_softplus=True)


def _softmax(ops: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    state = (tensors["m"], tensors["n"].exp(), tensors["w"])
    o, final_state = ops.softmax_scan(tensors["s"], tensors["v"], state, return_final_state=True)
    return o, *final_state


def _softmax_step(ops: ModuleType, tensors: dict[str, Tensor], m: Tensor, n: Tensor, w: Tensor) -> Tensor:
    return ops.softmax_scan_step((m, n.exp_(), w), tensors["s"][:, 0], tensors["v"][:, 0])


def _ssd_step(ops: ModuleType, tensors: dict[str, Tensor], state: Tensor) -> Tensor:
    tensors = _decaying(tensors)
    token = {name: tensors[name][:, 0] for name in ("x", "dt", "B", "C", "z")}
    return ops.ssd_step(state, **token, A=tensors["A"], D=tensors["D"], dt_softplus=True)


def _mlstm(ops: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    inputs = [tensors[name] for name in "qkvif"]
    state = (tensors["C"], tensors["n"], tensors["m"])
    o, final_state = ops.mlstm(*inputs, initial_state=state, return_final_state=True)
    return o, *final_state


def _mlstm_step(ops: ModuleType, tensors: dict[str, Tensor], C: Tensor, n: Tensor, m: Tensor) -> Tensor:
    return ops.mlstm_step((C, n, m), *(tensors[name][:, 0] for name in "qkvif"))


def _elementwise(ops: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    state = (tensors["h"], tensors["c"], tensors["n"].exp(), tensors["m"])
    h, final_state = ops.elementwise_rnn(
        tensors["x"], tensors["weights"].tanh(), state, cell="slstm", return_final_state=True
    )
    return h, *final_state


def _elementwise_step(
    ops: ModuleType, tensors: dict[str, Tensor], h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> Tensor:
    x, weights = tensors["x"][:, 0], tensors["weights"].tanh()
    return ops.elementwise_rnn_step((h, c, n.exp_(), m), x, weights, cell="slstm")


def _rnn(ops: ModuleType, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    state = (tensors["h"], tensors["c"])
    h, final_state = ops.rnn(tensors["x"], tensors["R"] / 5, tensors["bias"], state, return_final_state=True)
    return h, *final_state


def _rnn_step(ops: ModuleType, tensors: dict[str, Tensor], h: Tensor, c: Tensor) -> Tensor:
    return ops.rnn_step((h, c), tensors["x"][:, 0], tensors["R"] / 5, tensors["bias"])


SELF_CHECKS = {
    "causal_conv1d": Check(
        {"x": (2, 40, 129), "weight": (40, 4), "bias": (40,), "initial_state": (2, 40, 3)},
        lambda ops, t: ops.causal_conv1d(**t, activation="silu", return_final_state=True),
        lambda ops, t, state: ops.causal_conv1d_step(t["x"][..., 0], state, t["weight"], t["bias"], "silu"),
    ),
    "delta_rule": Check(
        {"q": (2, 129, 2, 20), "k": (2, 129, 2, 20), "v": (2, 129, 4, 12), "beta": (2, 129, 4)}
        | {"log_decay": (2, 129, 4), "initial_state": (2, 4, 20, 12)},
        lambda ops, t: ops.delta_rule(**_delta(t), qk_l2norm=True, return_final_state=True),
        _delta_step,
    ),
    "elementwise_rnn": Check(
        {"x": (2, 129, 4, 40), "weights": (4, 40), "h": (2, 40), "c": (2, 40), "n": (2, 40), "m": (2, 40)},
        _elementwise,
        _elementwise_step,
        ("h", "c", "n", "m"),
    ),
    "linear_attention": Check(
        {"q": (2, 129, 2, 20), "k": (2, 129, 2, 20), "v": (2, 129, 4, 12), "log_decay": (2, 129, 4, 20)}
        | {"initial_state": (2, 4, 20, 12)},
        _attention,
        _attention_step,
    ),
    "linear_scan": Check(
        {"a": (2, 129, 40), "b": (2, 129, 40), "initial_state": (2, 40)},
        lambda ops, t: ops.linear_scan(**t | {"a": t["a"].sigmoid()}, return_final_state=True),
        lambda ops, t, state: ops.linear_scan_step(state, t["a"][:, 0], t["b"][:, 0]),
    ),
    "mlstm": Check(
        {"q": (2, 129, 2, 20), "k": (2, 129, 2, 20), "v": (2, 129, 2, 12), "i": (2, 129, 2), "f": (2, 129, 2)}
        | {"C": (2, 2, 20, 12), "n": (2, 2, 20), "m": (2, 2)},
        _mlstm,
        _mlstm_step,
        ("C", "n", "m"),
    ),
    "rnn": Check(
        {"x": (2, 33, 2, 4, 20), "R": (2, 4, 20, 20), "bias": (2, 4, 20), "h": (2, 2, 20), "c": (2, 2, 20)},
        _rnn,
        _rnn_step,
        ("h", "c"),
    ),
    "selective_scan": Check(
        {"u": (2, 40, 129), "delta": (2, 40, 129), "A": (40, 16), "B": (2, 2, 16, 129), "C": (2, 2, 16, 129)}
        | {"D": (40,), "z": (2, 40, 129), "delta_bias": (40,), "initial_state": (2, 40, 16)},
        lambda ops, t: ops.selective_scan(**_decaying(t), delta_softplus=True, return_last_state=True),
        _scan_step,
    ),
    "softmax_scan": Check(
        {"s": (2, 129, 4), "v": (2, 129, 4, 20), "m": (2, 4), "n": (2, 4), "w": (2, 4, 20)},
        _softmax,
        _softmax_step,
        ("m", "n", "w"),
    ),
    "ssd": Check(
        {"x": (2, 129, 4, 12), "dt": (2, 129, 4), "A": (4,), "B": (2, 129, 2, 20), "C": (2, 129, 2, 20), "D": (4,)}
        | {"z": (2, 129, 4, 12), "initial_state": (2, 4, 12, 20)},
        lambda ops, t: ops.ssd(**_decaying(t), dt_softplus=True, return_final_state=True),
        _ssd_step,
    ),
}
TOLERANCE = 1e-5  # float32 sums of a few hundred terms


def self_check() -> bool:
    """Runs every operator on every device against its reference; prints a line for each."""
    everything_ok = True
    for device in [torch.device("cpu"), *_gpus()]:
        for name, check in SELF_CHECKS.items():
            try:
                difference = check.difference(device)
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
