"""The examples run to their end, on a small text and for a few steps, and say what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# The seqkern that these tests import is the one to run: setting up another is no part of an example's work.
RUN = """
import runpy, sys, types
sys.modules["bootstrap"] = types.SimpleNamespace(ensure=lambda *extras: None)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(example, *arguments, cwd):
    command = [sys.executable, "-c", RUN, str(EXAMPLES / example), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other are slow on a busy machine
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def train_text(tmp_path_factory):
    """Runs train_text.py from another folder on a small text."""
    folder = tmp_path_factory.mktemp("train_text")
    (folder / "text.txt").write_text("How many more times must the wheel go round? " * 200)
    arguments = "--steps 3 --text text.txt --sample-length 30 --prompt the --batch 2 --length 64".split()

    def call(*more):
        return run("train_text.py", *arguments, *more, cwd=folder)

    return call


@pytest.fixture(scope="module")
def output(train_text):
    return train_text()


def sample_of(output):
    return re.search(r"^--- written one token at a time\n(.*)\n---$", output, re.MULTILINE | re.DOTALL)[1]


def rows_of(output):
    """The operator table: (operator, pass, calls, seqkern ms, PyTorch ms, difference)."""
    row = r"^(\w+) +(forward|forward \+ backward|step) +(\d+) +([\d.]+) +([\d.]+) +[\d.]+x +(\S+)$"
    return re.findall(row, output, re.MULTILINE)


def validation_loss(output):
    return float(re.search(r"^validation loss ([\d.]+) nats/byte", output, re.MULTILINE)[1])


def titles_of(*operators):
    """The first two columns of that table for these operators."""
    passes = [("{}", "forward"), ("{}", "forward + backward"), ("{}_step", "step")]
    return [(name.format(operator), title) for operator in operators for name, title in passes]


def losses_of(output):
    """Of the first step and of the last, for every training."""
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) nats/byte .* bytes/s", output)]
    return list(zip(losses[::3], losses[2::3], strict=True))  # three lines for three steps


def test_train_text(output):
    [(first, last)] = losses_of(output)
    assert last < first
    assert validation_loss(output) < last

    sample = sample_of(output)
    assert sample.startswith("the") and len(sample.encode(errors="replace")) >= 33

    logits = re.search(r"step by step against at once: (\S+)", output)
    assert float(logits[1]) < 1e-4

    rows = rows_of(output)
    assert [row[:2] for row in rows] == titles_of("causal_conv1d", "selective_scan")
    for *_, calls, ours_ms, plain_ms, difference in rows:
        assert int(calls) > 0 and float(ours_ms) > 0 and float(plain_ms) > 0 and float(difference) < 1e-4


def test_train_text_repeats_with_a_seed(train_text, output):
    again = train_text()
    assert sample_of(output) == sample_of(again)
    assert re.search("validation loss .*", output)[0] == re.search("validation loss .*", again)[0]


def test_train_text_in_bfloat16(train_text, output):
    """It learns as much."""
    half = train_text("--dtype", "bfloat16")
    assert len(rows_of(half)) == 6
    assert abs(validation_loss(half) - validation_loss(output)) < 0.05


def test_train_text_with_a_convolution(train_text):
    output = train_text("--mixer", "conv")
    assert float(re.search(r"step by step against at once: (\S+)", output)[1]) < 1e-4
    assert len(rows_of(output)) == 3


SCANS = {
    **dict.fromkeys(["mingru", "minlstm", "lru", "rglru", "s5", "hgrn"], "linear_scan"),
    "aaren": "softmax_scan",
    **dict.fromkeys(["para_gru", "para_lstm", "slstm_diag", "indrnn"], "elementwise_rnn"),
    **dict.fromkeys(["lstm", "gru", "slstm"], "rnn"),
}


@pytest.mark.parametrize("mixer", SCANS)
def test_train_text_with_a_scan(train_text, mixer):
    output = train_text("--mixer", mixer)
    [(first, last)] = losses_of(output)
    assert last < first
    assert float(re.search(r"step by step against at once: (\S+)", output)[1]) < 1e-4
    rows = rows_of(output)
    assert [row[:2] for row in rows] == titles_of(SCANS[mixer])
    assert all(float(row[-1]) < 1e-4 for row in rows)


ATTENTION = {
    "mamba2": ["causal_conv1d", "causal_conv1d_step", "ssd", "ssd_step"],
    "gla": ["gla", "linear_attention_step"],
    "retnet": ["linear_attention", "linear_attention_step"],
    "gated_delta_net": ["causal_conv1d", "causal_conv1d_step", "delta_rule", "delta_rule_step"],
    "kda": ["causal_conv1d", "causal_conv1d_step", "delta_rule", "delta_rule_step"],
    "mlstm": ["causal_conv1d", "causal_conv1d_step", "mlstm", "mlstm_step"],
}


@pytest.mark.parametrize("mixer", ATTENTION)
def test_train_text_with_linear_attention(train_text, mixer):
    output = train_text("--mixer", mixer)
    [(first, last)] = losses_of(output)
    assert last < first
    assert float(re.search(r"step by step against at once: (\S+)", output)[1]) < 1e-4
    rows = rows_of(output)
    passes = {True: ["step"], False: ["forward", "forward + backward"]}
    assert [row[:2] for row in rows] == [(op, p) for op in ATTENTION[mixer] for p in passes[op.endswith("_step")]]
    assert all(float(row[-1]) < 1e-4 for row in rows)


def test_train_text_refuses_a_text_that_is_too_short(tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(AssertionError, match=r"train_text: text\.txt has 9 bytes"):
        run("train_text.py", "--text", "text.txt", cwd=tmp_path)


def test_rat(tmp_path):
    (tmp_path / "text.txt").write_text("How many more times must the wheel go round? " * 200)
    output = run("rat.py", *"--steps 3 --text text.txt --batch 2 --length 64".split(), cwd=tmp_path)
    differences = re.findall(r"^chunks of (\d+): differs from the same written out by (\S+)$", output, re.MULTILINE)
    assert [chunk for chunk, _ in differences] == ["1", "16", "64"]
    assert all(float(difference) < 1e-12 for _, difference in differences)
    trainings = losses_of(output)
    assert len(trainings) == 3 and all(last < first for first, last in trainings)
    rows = re.findall(r"^ +(\d+) +(\d+) +([\d.]+) nats/byte +\d+ s$", output, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "64"), ("16", "4"), ("64", "1")]


@pytest.mark.slow
def test_parity_needs_negative_decays(tmp_path):
    output = run("parity.py", cwd=tmp_path)
    rows = re.findall(r"^ *(\d+) bits +([\d.]+) % +([\d.]+) %", output, re.MULTILINE)
    accuracies = {int(length): (float(signed), float(positive)) for length, signed, positive in rows}
    assert list(accuracies) == [20, 40, 80, 160]
    signed, positive = accuracies[80]  # twice the length of the training
    assert signed >= 99 and positive <= 60
    assert (tmp_path / "parity.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_state_tracking(tmp_path):
    """With short strings. Twice as long ones are no trouble, but for the linear layer."""
    output = run("state_tracking.py", *"--steps 100 --batch 32 --length 8".split(), cwd=tmp_path)
    assert "right answers after        4 digits       8 digits      16 digits      32 digits" in output
    rows = re.findall(r"^(.+), (\w+) +[\d.]+ % +[\d.]+ % +([\d.]+) % +[\d.]+ %$", output, re.MULTILINE)
    accuracies = {row[:2]: float(row[2]) for row in rows}
    layers = ["LSTM", "GRU", "sLSTM", "MinGRU"]
    assert list(accuracies) == [(task, layer) for task in ("parity", "sum modulo 5") for layer in layers]
    for (task, layer), accuracy in accuracies.items():
        low, high = {"parity": (65, 95), "sum modulo 5": (40, 70)}[task]
        assert accuracy <= low if layer == "MinGRU" else accuracy >= high
    assert (tmp_path / "state_tracking.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
