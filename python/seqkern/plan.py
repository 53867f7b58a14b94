"""What an operator would launch for a shape on a GPU, and the bytes it moves; needs no GPU.

python -m seqkern.plan causal_conv1d --batch 1 --channels 1536 --length 2048 --width 4 --dtype bf16
"""

import argparse
import sys

try:
    from . import _C
except ImportError:
    _C = None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqkern.plan", description=__doc__.splitlines()[0])
    operators = parser.add_subparsers(dest="operator", required=True)

    conv = operators.add_parser("causal_conv1d")
    for name in ("batch", "channels", "length", "width"):
        conv.add_argument(f"--{name}", type=int, required=True)
    conv.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16", "fp64"])
    conv.add_argument("--dilation", type=int, default=1)
    conv.add_argument("--no-silu", dest="silu", action="store_false")
    conv.add_argument("--no-bias", dest="bias", action="store_false")
    conv.add_argument("--states", action="store_true", help="with initial and final state")
    conv.add_argument("--channels-last", action="store_true", help="memory order (B, L, D)")
    conv.set_defaults(plan=_C.plan_causal_conv1d)
    return parser


def main() -> None:
    if _C is None:
        sys.exit(
            "seqkern.plan needs seqkern._C, which was not built: install Python's headers (python3-dev) and reinstall"
        )
    arguments = vars(_parser().parse_args())
    operator, plan = arguments.pop("operator"), arguments.pop("plan")
    for call, facts in plan(**arguments).items():
        print(f"{operator} {call}")
        for name, value in facts.items():
            print(f"  {name:<20} {value:,}" if isinstance(value, int) else f"  {name:<20} {value}")


if __name__ == "__main__":
    main()
