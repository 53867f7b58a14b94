"""What an operator would launch for a shape on a GPU, and the bytes it moves; needs no GPU.

python -m seqkern.plan causal_conv1d --batch 1 --channels 1536 --length 2048 --width 4 --dtype bf16
python -m seqkern.plan selective_scan --batch 1 --channels 1536 --length 2048 --states 16 --dtype bf16
python -m seqkern.plan linear_scan --batch 4 --length 4096 --channels 1024 --dtype bf16
python -m seqkern.plan elementwise_rnn --batch 1 --length 16384 --channels 512 --cell gru --dtype bf16
python -m seqkern.plan rnn --batch 16 --heads 12 --size 64 --cell lstm --dtype bf16
python -m seqkern.plan softmax_scan --batch 1 --length 2048 --heads 16 --size 64 --dtype bf16
python -m seqkern.plan linear_attention --batch 1 --length 2048 --heads 8 --keys 128 --size 128 --decay key --dtype bf16
python -m seqkern.plan delta_rule --batch 1 --length 2048 --heads 8 --keys 128 --size 128 --decay token --dtype bf16
python -m seqkern.plan ssd --batch 1 --length 2048 --heads 24 --size 64 --states 128 --dtype bf16
python -m seqkern.plan mlstm --batch 8 --length 8192 --heads 16 --keys 128 --size 256 --dtype bf16
"""

import argparse
import sys

try:
    from . import _C
except ImportError:
    _C = None


def _plan_ssd(heads, groups, states, **options):
    return _C.plan_linear_attention(
        heads=groups, value_heads=heads, keys=states, decay="delta", value_major=True, **options
    )


def _plan_mlstm(**options):
    return _C.plan_linear_attention(decay="exp", **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqkern.plan", description=__doc__.splitlines()[0])
    operators = parser.add_subparsers(dest="operator", required=True)

    def operator(name, plan, *sizes, length=None):
        parsed = operators.add_parser(name)
        for size in ("batch", *sizes):
            parsed.add_argument(f"--{size}", type=int, required=True)
        parsed.add_argument("--length", type=int, required=length is None, default=length)
        parsed.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16", "fp64"])
        parsed.set_defaults(plan=plan)
        return parsed

    conv = operator("causal_conv1d", _C.plan_causal_conv1d, "channels", "width")
    conv.add_argument("--channels-last", action="store_true", help="memory order (B, L, D)")
    conv.add_argument("--dilation", type=int, default=1)
    conv.add_argument("--no-silu", dest="silu", action="store_false")
    conv.add_argument("--no-bias", dest="bias", action="store_false")
    conv.add_argument("--states", action="store_true", help="with initial and final state")

    scan = operator("selective_scan", _C.plan_selective_scan, "channels", "states")
    scan.add_argument("--channels-last", action="store_true", help="memory order (B, L, D)")
    scan.add_argument("--groups", type=int, default=1, help="of B and C")
    scan.add_argument("--complex", action="store_true", help="complex A")
    scan.add_argument("--constant", action="store_true", help="B and C of shape (D, N)")
    scan.add_argument("--two-exp", action="store_true", help='transition "two_exp_minus_one"')
    scan.add_argument("--no-gate", dest="gate", action="store_false", help="without z")
    scan.add_argument("--no-checkpoints", dest="checkpoints", action="store_false", help="no backward follows")
    scan.add_argument("--batch-invariant", dest="split_time", action="store_false", help="time is not cut")

    affine = operator("linear_scan", _C.plan_linear_scan, "channels")
    for size in ("batch", "time", "channels"):
        affine.add_argument(f"--constant-over-{size}", action="store_true", help="size of a: 1")
    affine.add_argument("--complex", action="store_true")
    affine.add_argument("--log-space", action="store_true")
    affine.add_argument("--reset", action="store_true")
    affine.add_argument("--states", action="store_true", help="with initial and final state")
    affine.add_argument("--batch-invariant", dest="split_time", action="store_false", help="time is not cut")

    rnn = operator("elementwise_rnn", _C.plan_elementwise_rnn, "channels")
    rnn.add_argument("--cell", default="gru", choices=["gru", "lstm", "slstm", "indrnn", "elman"])
    rnn.add_argument("--solver", default="auto", choices=["auto", "serial", "newton", "shooting"])
    rnn.add_argument("--max-sweeps", type=int, default=0, help="0: the solver's own")
    rnn.add_argument("--reset", action="store_true")
    rnn.add_argument("--states", action="store_true", help="with initial and final state")
    rnn.add_argument("--no-checkpoints", dest="checkpoints", action="store_false", help="no backward follows")
    rnn.add_argument("--batch-invariant", dest="split_time", action="store_false", help="time is not cut")

    dense = operator("rnn", _C.plan_rnn, "heads", "size", length=1024)
    dense.add_argument("--cell", default="lstm", choices=["lstm", "gru", "slstm", "elman_tanh", "elman_relu"])
    dense.add_argument("--outputs", type=int, default=0, help="of proj; 0: without")
    dense.add_argument("--shared-bytes", type=int, default=227 << 10, help="of a block; default: H200")
    dense.add_argument("--multiprocessors", type=int, default=132, help="default: H200")

    softmax = operator("softmax_scan", _C.plan_softmax_scan, "heads", "size")
    softmax.add_argument("--states", action="store_true", help="with initial and final state")
    softmax.add_argument("--no-normalizers", dest="normalizers", action="store_false", help="no backward follows")
    softmax.add_argument("--batch-invariant", dest="split_time", action="store_false", help="time is not cut")

    attention = operator("linear_attention", _C.plan_linear_attention, "heads", "keys", "size")
    attention.add_argument("--decay", default="none", choices=["none", "head", "token", "key"], help="one for each")
    attention.add_argument("--normalize", action="store_true")
    attention.add_argument("--read-previous", action="store_true", help='read="previous"')
    attention.add_argument("--bonus", action="store_true")
    ssd = operator("ssd", _plan_ssd, "heads", "size", "states")
    ssd.add_argument("--groups", type=int, default=1, help="of B and C")
    ssd.add_argument("--no-skip", dest="skip", action="store_false", help="without D")
    ssd.add_argument("--gate", action="store_true", help="with z")
    mlstm = operator("mlstm", _plan_mlstm, "heads", "keys", "size")
    delta = operator("delta_rule", _C.plan_delta_rule, "heads", "keys", "size")
    delta.add_argument("--decay", default="none", choices=["none", "token", "key"], help="one for each")
    delta.add_argument("--erase-key", action="store_true")
    for parsed in (attention, delta):
        parsed.add_argument("--value-heads", type=int, default=0, help="a multiple of heads; 0: as many")
    for parsed in (attention, mlstm, delta):
        parsed.add_argument("--states", action="store_true", help="with initial and final state")
    for parsed in (attention, ssd, mlstm, delta):
        parsed.add_argument("--no-backward", dest="backward", action="store_false", help="no backward follows")
        parsed.add_argument("--batch-invariant", dest="split_time", action="store_false", help="time is not cut")
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
