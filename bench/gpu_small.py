"""A short program for tools that watch kernels: every operator's small cases once (checkers), or its largest
benchmark row once (--largest, profilers). Results are compared with the reference, so that it fails by itself too."""

import argparse
import sys

import torch

from seqkern.testing import OPERATORS, compare


def merged(outputs: dict, gradients: dict) -> dict:
    return outputs | gradients


def small(device: str, limit: int) -> int:
    """The number of results that are too far off."""
    wrong = count = 0
    for operator in OPERATORS:
        for case in operator.small_cases[:limit]:
            inputs = case.inputs(device)
            cotangents = inputs.cotangents()
            outputs, grads = inputs.gradients(cotangents)
            exact, plain = (
                merged(*inputs.to(dtype).gradients(cotangents, operator.reference))
                for dtype in (torch.float64, torch.float32)
            )
            lines = compare(merged(outputs, grads), exact, plain, inputs.coarse)
            lines = [line for line in lines if not line.ok]
            for line in lines:
                print(f"{case}: {line}")
            wrong, count = wrong + len(lines), count + 1
    print(f"{count} small cases on {device}, {wrong} results too far off")
    return wrong


def largest(device: str) -> int:
    import cases
    from contest import Contest

    for op in cases.operators():
        rows = cases.rows(op, device)
        for kind in dict.fromkeys(row.kind for row in rows):
            row = max((row for row in rows if row.kind == kind), key=lambda row: row.bytes)
            with torch.no_grad():
                Contest(row).call(row.function)()
            print(row.label)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--limit", type=int, default=24, help="cases of each operator")
    parser.add_argument("--largest", action="store_true")
    arguments = parser.parse_args()
    sys.exit(largest(arguments.device) if arguments.largest else small(arguments.device, arguments.limit))
