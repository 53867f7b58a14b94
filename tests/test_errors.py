"""Bad input is refused in a sentence that names operator, argument, expected and given, before anything is written."""

import re

import pytest
import torch

from seqkern.testing import OPERATORS


def resized(tensor, at, change):
    shape = list(tensor.shape)
    shape[at] += change
    return tensor.new_ones(shape)


def clones(state):
    return [part.clone() for part in state]


def bad_tensors(inputs):
    """(argument, a tensor that does not fit it, what the message says), for every argument and dimension."""
    operator = inputs.operator
    derived = operator.state_sizes(operator.case().values | inputs.sizes).keys()
    of_state = {letter for name in operator.state for letter in operator.arguments[name].split()}
    known = {"N"} | derived & of_state
    free = derived - known
    for i, (name, letters) in enumerate(operator.arguments.items()):
        tensor = inputs.tensors[name]
        yield name, tensor[None], r"must be \(.*\), got \(1, .*\)"
        if name not in operator.broadcast:
            yield name, tensor[0], r"must be \(.*\), got \(.*\)"
        yield name, tensor.int(), "must be float32, bfloat16, float16 or float64, got int32"
        if i > 0:
            yield name, tensor.to("meta"), f"must be on the device of {inputs.data[0]}"
        for at, letter in enumerate(letters.split()):
            if letter in known:
                size = tensor.shape[at]
                for change in (1, 2 if name in operator.broadcast else -1):
                    expected, given = rf"\(.*={size}\b.*\)", rf"\(.*\b{size + change}\b.*\)"
                    yield name, resized(tensor, at, change), f"must be {expected}, got {given}"
        known |= set(letters.split()) - free


def test_tensors_that_do_not_fit(operator, device):
    inputs = operator.full_case().inputs()
    for name, tensor, message in bad_tensors(inputs):
        with pytest.raises(RuntimeError, match=rf"^{operator}: {operator.spoken(name)} {message}"):
            inputs.outputs(**{name: tensor})


def test_tensors_that_do_not_fit_a_step(operator, device):
    """Parameters and the state; the state, which the step would write, stays as it is."""
    inputs = operator.full_case().inputs()
    state = clones(inputs.state)
    for name, tensor, message in bad_tensors(inputs):
        if name in inputs.data or name in operator.state:
            continue
        with pytest.raises(RuntimeError, match=f"^{operator}_step: {name} {message}"):
            inputs.but({name: tensor}).step(0, state)
        assert all(map(torch.equal, state, inputs.state))
    for i, name in enumerate(operator.state):
        spoken = operator.spoken(name, operator.step_state)
        for bad, message in [
            (state[i][0], r"must be \(.*\), got \(.*\)"),
            (state[i][:, :-1], r"must be \(.*\), got \(.*\)"),
            (state[i].int(), "must be float32, bfloat16, float16 or float64, got int32"),
            (state[i].to("meta"), "must be on the device of"),
        ]:
            with pytest.raises(RuntimeError, match=f"^{operator}_step: {spoken} {message}"):
                inputs.step(0, [*state[:i], bad, *state[i + 1 :]])
            assert all(map(torch.equal, state, inputs.state))
    message = f"{operator.step_state} must have R=B=2 rows, got 1; pass state_indices to pick rows"
    with pytest.raises(RuntimeError, match=f"^{operator}_step: {message}"):
        inputs.step(0, [part[:-1] for part in state])


@pytest.mark.parametrize("indices", ["float", "long", "short", "beyond"])
def test_state_indices_that_do_not_fit(operator, device, indices, monkeypatch):
    monkeypatch.setenv("SEQKERN_CHECK", "1")  # CUDA kernels check values only on request
    inputs = operator.full_case().inputs()
    state, B = clones(inputs.state), inputs.sizes["B"]
    bad, message = {
        "float": (torch.zeros(B), "must be int32 or int64, got float32"),
        "long": (torch.arange(B + 1), rf"must be \(B={B},\), got \({B + 1},\)"),
        "short": (torch.arange(B - 1), rf"must be \(B={B},\), got \({B - 1},\)"),
        "beyond": (torch.full((B,), B), f"must be below R={B}, got {B}; negative rows are skipped"),
    }[indices]
    with pytest.raises(RuntimeError, match=f"^{operator}_step: state_indices {message}"):
        inputs.step(0, state, state_indices=bad.to(device))
    assert all(map(torch.equal, state, inputs.state))


PACKINGS = {
    "starts late": ({"cu_seqlens": [1, 34]}, "cu_seqlens must start at 0 and end at L=34, got 1 and 34"),
    "ends early": ({"cu_seqlens": [0, 33]}, "cu_seqlens must start at 0 and end at L=34, got 0 and 33"),
    "ends late": ({"cu_seqlens": [0, 35]}, "cu_seqlens must start at 0 and end at L=34, got 0 and 35"),
    "decreases": ({"cu_seqlens": [0, 9, 7, 34]}, "cu_seqlens must not decrease, got 9 then 7 at 2"),
    "negative": ({"cu_seqlens": [0, -1, 34]}, "cu_seqlens must not decrease, got 0 then -1 at 1"),
    "empty": ({"cu_seqlens": []}, r"cu_seqlens must be \(N \+ 1,\) with at least one element, got \(0,\)"),
    "two dimensions": ({"cu_seqlens": [[0, 34]]}, r"cu_seqlens must be \(N \+ 1,\), got \(1, 2\)"),
}
SEQ_IDS = {
    "both": ({"cu_seqlens": [0, 34], "seq_idx": [[0] * 34]}, "cu_seqlens and seq_idx exclude each other"),
    "ids short": ({"seq_idx": [[0] * 33]}, r"seq_idx must be \(B=1, L=34\), got \(1, 33\)"),
    "ids flat": ({"seq_idx": [0] * 34}, r"seq_idx must be \(B=1, L=34\), got \(34,\)"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packings_that_do_not_fit(operator, device, packing, monkeypatch):
    monkeypatch.setenv("SEQKERN_CHECK", "1")  # CUDA kernels check values only on request
    refuses_packing(operator, device, *PACKINGS[packing])


@pytest.mark.seq_idx
@pytest.mark.parametrize("packing", SEQ_IDS)
def test_ids_that_do_not_fit(operator, device, packing):
    refuses_packing(operator, device, *SEQ_IDS[packing])


def refuses_packing(operator, device, options, message):
    inputs = operator.case(packing="cu_seqlens", return_final_state=True).inputs(device)
    assert inputs.sizes["L"] == 34
    given = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in options.items()}
    with pytest.raises(RuntimeError, match=f"^{operator}: {message}"):
        inputs.but(**({"cu_seqlens": None} | given)).outputs()


def test_packings_of_other_dtypes_and_batches(operator, device):
    inputs = operator.case().inputs(device)
    B, L = inputs.sizes["B"], inputs.sizes["L"]
    bounds = torch.tensor([0, L], device=device)
    with pytest.raises(RuntimeError, match=f"^{operator}: cu_seqlens needs a batch of B=1, got B={B}; concatenate"):
        inputs.but(cu_seqlens=bounds).outputs()
    with pytest.raises(RuntimeError, match=f"^{operator}: cu_seqlens must be int32 or int64, got float32"):
        inputs.rows("B", slice(0, 1)).but(cu_seqlens=bounds.float()).outputs()


@pytest.mark.seq_idx
def test_ids_of_other_dtypes_and_devices(operator, device):
    inputs = operator.case().inputs(device)
    ids = torch.zeros(inputs.sizes["B"], inputs.sizes["L"], dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=f"^{operator}: seq_idx must be int32, got int64; convert it with .int()"):
        inputs.but(seq_idx=ids).outputs()
    with pytest.raises(RuntimeError, match=f"^{operator}: seq_idx must be on the device of"):
        inputs.but(seq_idx=ids.int().to("meta")).outputs()


def test_a_gradient_that_does_not_fit(operator, device, record):
    """The backward checks what it is given as the forward does."""
    bwd, (dy, *rest) = next(call for call in record(operator.case(), device) if call[0].name().endswith("_bwd"))
    name = bwd._schema.arguments[0].name.rstrip("_")
    for bad, message in [
        (dy[..., 1:], r"must be \(.*\), got \(.*\)"),
        (dy.double(), r"must have the dtype of \w+ \(float32\), got float64"),
        (dy.to("meta"), "must be on the device of"),
    ]:
        with pytest.raises(RuntimeError, match=f"^{operator}: {name} {message}"):
            bwd(bad, *rest)


A_DECAY = r"must be \(B=2 or 1, L=17 or 1, D=3 or 1\)"
META_RESET = torch.zeros(2, 17, dtype=torch.bool, device="meta")
A_TRIPLE = r"must be the three tensors \(m, n, w\)"
A_PAIR, A_CELL = r"must be the two tensors \(S, z\)", r"must be the three tensors \(C, n, m\)"
A_STATE = r"must be the tuple \(h, c, n, m\) of cell 'slstm'"
BAD_CELL = "cell must be one of gru, lstm, slstm, indrnn, elman, got 'rnn'"
BAD_RNN = "cell must be one of lstm, gru, slstm, elman_tanh, elman_relu, got 'rnn'"
DRAWING, A_SEED = {"training": True, "zoneout": 0.5}, "must be an int, None, or a tensor of one int64"
BAD_READ = 'read must be "current" or "previous", got \'next\''
BAD_LIMIT = r"dt_limit must be two numbers \(low, high\) with low <= high, got"
HEADS = "must have a number of heads that is a multiple of the heads of"
BAD_TRANSITION = 'transition must be "exp" or "two_exp_minus_one", got \'tanh\''

# What is particular to an operator: (options, tensors by a function of the inputs, error, message).
PARTICULAR = {
    "causal_conv1d": [
        ({"activation": "relu"}, None, ValueError, 'activation must be None, "silu" or "swish", got \'relu\''),
        ({"dilation": 0}, None, RuntimeError, "dilation must be 1 to .*, got 0"),
        ({"dilation": -1}, None, RuntimeError, "dilation must be 1 to .*, got -1"),
        ({}, lambda i: {"weight": torch.ones(3, 0)}, RuntimeError, "the width W of weight must be 1 to 64, got 0"),
        ({}, lambda i: {"weight": torch.ones(3, 65)}, RuntimeError, "the width W of weight must be 1 to 64, got 65"),
        ({}, lambda i: {"weight": torch.ones(32, 4)}, RuntimeError, r"weight must be \(D=3, W\), got \(32, 4\)"),
    ],
    "selective_scan": [
        ({"transition": "tanh"}, None, ValueError, BAD_TRANSITION),
        (
            {},
            lambda i: {"B": torch.ones(2, 2, 16, 17)},
            RuntimeError,
            "B must have a number of groups G that divides D=3, got G=2",
        ),
        (
            {},
            lambda i: {"C": torch.ones(2, 0, 16, 17)},
            RuntimeError,
            "C must have a number of groups G that divides D=3, got G=0",
        ),
        ({}, lambda i: {"B": torch.ones(3, 15)}, RuntimeError, r"B must be \(D=3, N=16\), got \(3, 15\)"),
        ({}, lambda i: {"C": torch.ones(2, 16, 18)}, RuntimeError, r"C must be \(B=2, N=16, L=17\), got \(2, 16, 18\)"),
        ({}, lambda i: {"B": torch.ones(16)}, RuntimeError, r"B must be \(B=2, G, N=16, L=17\), got \(16,\)"),
    ],
    "delta_rule": [
        ({}, lambda i: {"q": torch.ones(2, 17, 3, 5)}, RuntimeError, f"v {HEADS} q, H=3, got HV=4"),
        ({}, lambda i: {"log_decay": torch.ones(4)}, RuntimeError, r"log_decay must be \(.*\), got \(4,\)"),
        (
            {},
            lambda i: {"log_decay": torch.ones(2, 17, 4, 6)},
            RuntimeError,
            r"log_decay must be \(B=2, L=17, HV=4, K=5\), got \(2, 17, 4, 6\)",
        ),
        (
            {},
            lambda i: {"erase_key": torch.ones(2, 17, 4, 5)},
            RuntimeError,
            r"erase_key must be \(B=2, L=17, H=2, K=5\), got \(2, 17, 4, 5\)",
        ),
        (
            {},
            lambda i: {"erase_key": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"erase_key must have the dtype of v \(float32\), got float16",
        ),
    ],
    "elementwise_rnn": [
        ({"cell": "rnn"}, None, ValueError, BAD_CELL),
        (
            {"solver": "deer"},
            None,
            ValueError,
            "solver must be one of auto, serial, newton, shooting, got 'deer'",
        ),
        ({"on_fail": "ignore"}, None, ValueError, 'on_fail must be "repair", "raise" or "warn", got \'ignore\''),
        ({"atol": -1.0}, None, ValueError, "atol must be at least 0, or None, got -1.0"),
        ({"atol": float("nan")}, None, ValueError, "atol must be at least 0, or None, got nan"),
        ({"max_sweeps": 0}, None, ValueError, "max_sweeps must be at least 1, or None, got 0"),
        ({"initial_state": torch.zeros(2, 3)}, None, RuntimeError, f"initial_state {A_STATE}, got 1 of them"),
        ({"initial_state": torch.zeros(4, 2, 3)[0:3].unbind()}, None, RuntimeError, f"initial_state {A_STATE}, got 3"),
        ({"cell": "gru"}, None, RuntimeError, r"x must be \(B, L, G=3, D\), got \(2, 17, 4, 3\)"),
        ({}, lambda i: {"weights": torch.ones(3, 3)}, RuntimeError, r"weights must be \(W=4, D=3\), got \(3, 3\)"),
        ({"reset": torch.zeros(2, 17)}, None, RuntimeError, "reset must be bool, got float32; convert it with .bool()"),
        ({"reset": torch.zeros(17) > 0}, None, RuntimeError, r"reset must be \(B=2, L=17\), got \(17,\)"),
        ({"reset": META_RESET}, None, RuntimeError, "reset must be on the device of x"),
    ],
    "rnn": [
        ({"cell": "rnn"}, None, ValueError, BAD_RNN),
        (
            {"cell": "gru", "proj": torch.ones(3, 4, 5)},
            None,
            ValueError,
            "proj must be None for cell 'gru', whose units",
        ),
        ({"zoneout": 1.0}, None, ValueError, "zoneout must be at least 0 and below 1, got 1.0"),
        ({"zoneout": -0.1}, None, ValueError, "zoneout must be at least 0 and below 1, got -0.1"),
        ({"recurrent_dropout": 1}, None, ValueError, "recurrent_dropout must be at least 0 and below 1, got 1"),
        ({"recurrent_dropout": float("nan")}, None, ValueError, "recurrent_dropout must be at least 0 .*, got nan"),
        ({"grad_clip": -1.0}, None, ValueError, "grad_clip must be at least 0, or None, got -1.0"),
        (DRAWING | {"seed": torch.zeros(())}, None, RuntimeError, f"seed {A_SEED}, got float32 \\(\\)"),
        (DRAWING | {"seed": torch.zeros(2).long()}, None, RuntimeError, f"seed {A_SEED}, got int64 \\(2,\\)"),
        (DRAWING | {"seed": torch.zeros(1).long().to("meta")}, None, RuntimeError, "seed must be on the device of x"),
        ({"initial_state": torch.zeros(2, 3, 5)}, None, RuntimeError, f"initial_state {A_STATE}, got 1 of them"),
        ({"cell": "gru"}, None, RuntimeError, r"x must be \(B, L, H, G=3, P\), got \(2, 17, 3, 4, 5\)"),
        (
            {},
            lambda i: {"R": torch.ones(3, 4, 5, 4)},
            RuntimeError,
            r"R must be \(H=3, G=4, P=5, Q=5\), got \(3, 4, 5, 4\)",
        ),
        (
            {"proj": torch.ones(3, 4, 5)},
            lambda i: {"R": torch.ones(3, 4, 5, 3)},
            RuntimeError,
            r"proj must be \(H=3, Q=3, P=5\), got \(3, 4, 5\)",
        ),
        ({"bias": torch.ones(3, 3, 5)}, None, RuntimeError, r"bias must be \(H=3, G=4, P=5\), got \(3, 3, 5\)"),
        ({"reset": torch.zeros(2, 17)}, None, RuntimeError, "reset must be bool, got float32; convert it with .bool()"),
        ({"reset": torch.zeros(17) > 0}, None, RuntimeError, r"reset must be \(B=2, L=17\), got \(17,\)"),
        ({"reset": META_RESET}, None, RuntimeError, "reset must be on the device of x"),
    ],
    "linear_attention": [
        ({"read": "next"}, None, ValueError, BAD_READ),
        ({"bonus": torch.ones(2, 5)}, None, ValueError, 'bonus needs read="previous", got read="current"'),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, None, RuntimeError, f"initial_state {A_PAIR}, got a Tensor"),
        ({"initial_state": (torch.zeros(2, 4, 5, 3),)}, None, RuntimeError, f"initial_state {A_PAIR}, got 1 of them"),
        (
            {"initial_state": (torch.zeros(2, 4, 5, 3),), "normalize": False},
            None,
            RuntimeError,
            "initial_state must be a tensor, got 1 of them",
        ),
        (
            {},
            lambda i: {"k": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"k must have the dtype of v \(float32\), got",
        ),
        ({}, lambda i: {"q": torch.ones(2, 17, 3, 5)}, RuntimeError, f"v {HEADS} q, H=3, got HV=4"),
        ({}, lambda i: {"log_decay": torch.ones(17, 4)}, RuntimeError, r"log_decay must be \(.*\), got \(17, 4\)"),
        ({}, lambda i: {"log_decay": torch.ones(5)}, RuntimeError, r"log_decay must be \(HV=4,\), got \(5,\)"),
    ],
    "mlstm": [
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, None, RuntimeError, f"initial_state {A_CELL}, got a Tensor"),
        (
            {},
            lambda i: {"k": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"k must have the dtype of v \(float32\), got",
        ),
        ({}, lambda i: {"q": torch.ones(2, 17, 3, 5)}, RuntimeError, f"v {HEADS} q, H=3, got HV=4"),
        ({}, lambda i: {"i": torch.ones(2, 17, 4, 5)}, RuntimeError, r"i must be \(B=2, L=17, HV=4\), got"),
    ],
    "ssd": [
        ({"dt_limit": (1.0, 0.0)}, None, ValueError, BAD_LIMIT),
        ({"dt_limit": 0.1}, None, ValueError, BAD_LIMIT),
        (
            {"initial_state": (torch.zeros(2, 4, 3, 5),)},
            None,
            RuntimeError,
            "initial_state must be a tensor, got 1 of them",
        ),
        (
            {},
            lambda i: {"B": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"B must have the dtype of x \(float32\), got",
        ),
        ({}, lambda i: {"C": torch.ones(2, 17, 3, 5)}, RuntimeError, f"x {HEADS} C, G=3, got H=4"),
        ({}, lambda i: {"D": torch.ones(4, 2)}, RuntimeError, r"D must be \(H=4, P=3\), got \(4, 2\)"),
    ],
    "linear_scan": [
        ({"reset": torch.zeros(2, 17)}, None, RuntimeError, "reset must be bool, got float32; convert it with .bool()"),
        (
            {"reset": torch.zeros(17, dtype=torch.bool)},
            None,
            RuntimeError,
            r"reset must be \(B=2, L=17\), got \(17,\)",
        ),
        ({"reset": META_RESET}, None, RuntimeError, "reset must be on the device of b"),
        ({}, lambda i: {"a": torch.ones(3, 1, 3)}, RuntimeError, f"a {A_DECAY}, got \\(3, 1, 3\\)"),
        ({}, lambda i: {"a": torch.ones(4)}, RuntimeError, f"a {A_DECAY}, got \\(1, 1, 4\\)"),
    ],
    "softmax_scan": [
        ({"initial_state": torch.zeros(2, 3)}, None, RuntimeError, f"initial_state {A_TRIPLE}, got a Tensor"),
        ({"initial_state": (torch.zeros(2, 3),)}, None, RuntimeError, f"initial_state {A_TRIPLE}, got 1 of them"),
    ],
}
PARTICULAR_STEP = {
    "causal_conv1d": [
        ({"activation": "relu"}, {}, ValueError, 'activation must be None, "silu" or "swish", got \'relu\''),
        ({"dilation": 0}, {}, RuntimeError, "dilation must be 1 to .*, got 0"),
        ({"dilation": 2}, {}, RuntimeError, r"conv_state must have at least \(W-1\)\*dilation=6 columns, got 3"),
        ({}, {"weight": torch.ones(3, 65)}, RuntimeError, "the width W of weight must be 1 to 64, got 65"),
    ],
    "selective_scan": [
        ({"transition": "tanh"}, {}, ValueError, BAD_TRANSITION),
        (
            {},
            {"B": torch.ones(2, 2, 16, 17)},
            RuntimeError,
            "B must have a number of groups G that divides D=3, got G=2",
        ),
        ({}, {"C": torch.ones(2, 1, 15, 17)}, RuntimeError, r"C must be \(B=2, G, N=16\), got \(2, 1, 15\)"),
    ],
    "delta_rule": [
        (
            {},
            {"q": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"q must have the dtype of v \(float32\), got float16",
        ),
        ({}, {"beta": torch.ones(2, 17, 3)}, RuntimeError, r"beta must be \(B=2, HV=4\), got \(2, 3\)"),
        ({}, {"log_decay": torch.ones(2, 17, 3)}, RuntimeError, r"log_decay must be \(B=2, HV=4\), got \(2, 3\)"),
        (
            {},
            {"erase_key": torch.ones(2, 17, 2, 4)},
            RuntimeError,
            r"erase_key must be \(B=2, H=2, K=5\), got \(2, 2, 4\)",
        ),
    ],
    "elementwise_rnn": [
        ({"cell": "rnn"}, {}, ValueError, BAD_CELL),
        ({"cell": "gru"}, {}, RuntimeError, r"state must be the tuple \(h,\) of cell 'gru', got 4 of them"),
        ({}, {"x": torch.ones(2, 17, 3, 3)}, RuntimeError, r"x must be \(B, G=4, D\), got \(2, 3, 3\)"),
        ({}, {"weights": torch.ones(4, 2)}, RuntimeError, r"weights must be \(W=4, D=3\), got \(4, 2\)"),
    ],
    "rnn": [
        ({"cell": "rnn"}, {}, ValueError, BAD_RNN),
        ({"cell": "gru", "proj": torch.ones(3, 4, 5)}, {}, ValueError, "proj must be None for cell 'gru'"),
        ({"cell": "gru"}, {}, RuntimeError, r"state must be the tuple \(h,\) of cell 'gru', got 4 of them"),
        ({"zoneout": 1.5}, {}, ValueError, "zoneout must be at least 0 and below 1, got 1.5"),
        ({}, {"x": torch.ones(2, 17, 3, 3, 5)}, RuntimeError, r"x must be \(B, H, G=4, P\), got \(2, 3, 3, 5\)"),
        ({}, {"R": torch.ones(3, 4, 4, 5)}, RuntimeError, r"R must be \(H=3, G=4, P=5, Q=5\), got \(3, 4, 4, 5\)"),
        ({"bias": torch.ones(4, 5)}, {}, RuntimeError, r"bias must be \(H=3, G=4, P=5\), got \(4, 5\)"),
    ],
    "linear_attention": [
        ({"read": "next"}, {}, ValueError, BAD_READ),
        ({"bonus": torch.ones(2, 5)}, {}, ValueError, 'bonus needs read="previous", got read="current"'),
        ({"normalize": False}, {}, RuntimeError, "state must be a tensor, got 2 of them"),
        (
            {},
            {"q": torch.ones(2, 17, 2, 5).half()},
            RuntimeError,
            r"q must have the dtype of v \(float32\), got float16",
        ),
        ({}, {"k": torch.ones(2, 17, 2, 4)}, RuntimeError, r"k must be \(B=2, H=2, K=5\), got \(2, 2, 4\)"),
        ({}, {"log_decay": torch.ones(2, 17, 3)}, RuntimeError, r"log_decay must be \(B=2, HV=4\), got \(2, 3\)"),
    ],
    "mlstm": [
        ({}, {"i": torch.ones(2, 17, 3)}, RuntimeError, r"i must be \(B=2, HV=4\), got \(2, 3\)"),
        (
            {},
            {"v": torch.ones(2, 17, 4, 2)},
            RuntimeError,
            r"state's C must be \(R, HV=4, K=5, V=2\), got \(2, 4, 5, 3\)",
        ),
    ],
    "ssd": [
        ({"dt_limit": (1.0, 0.0)}, {}, ValueError, BAD_LIMIT),
        ({}, {"dt": torch.ones(2, 17, 3)}, RuntimeError, r"dt must be \(B=2, H=4\), got \(2, 3\)"),
        ({}, {"B": torch.ones(2, 17, 2, 4)}, RuntimeError, r"B must be \(B=2, G=2, N=5\), got \(2, 2, 4\)"),
    ],
    "linear_scan": [
        ({}, {"a": torch.ones(2, 17, 4)}, RuntimeError, r"a must be \(B=2 or 1, D=3 or 1\), got \(2, 4\)"),
        ({}, {"b": torch.ones(2, 17, 4)}, RuntimeError, r"a must be \(B=2 or 1, D=4 or 1\), got \(2, 3\)"),
        ({}, {"b": torch.ones(2, 17, 3).int()}, RuntimeError, "b must be float32, .*, got int32"),
    ],
    "softmax_scan": [
        ({}, {"s": torch.ones(2, 17, 4)}, RuntimeError, r"s must be \(B=2, H=3\), got \(2, 4\)"),
        ({}, {"v": torch.ones(2, 17, 3, 4)}, RuntimeError, r"state's w must be \(R=2, H=3, V=4\), got \(2, 3, 5\)"),
    ],
}


def test_particular_options(operator, device):
    for options, tensors, error, message in PARTICULAR[operator.name]:
        inputs = operator.case(return_final_state=True).inputs(device)
        given = {name: tensor.to(device) for name, tensor in (tensors(inputs) if tensors else {}).items()}
        with pytest.raises(error, match=f"^{operator}: {message}"):
            inputs.but(given, **options).outputs()


def test_particular_options_of_the_step(operator, device):
    for options, tensors, error, message in PARTICULAR_STEP[operator.name]:
        inputs = operator.case(initial_state=True).inputs(device)
        state = clones(inputs.state)
        given = {name: tensor.to(device) for name, tensor in tensors.items()}
        with pytest.raises(error, match=f"^{operator}_step: {message}"):
            inputs.but(given).step(0, state, **options)
        assert all(map(torch.equal, state, inputs.state))


def test_every_operator_lists_its_options():
    assert PARTICULAR.keys() == PARTICULAR_STEP.keys() == {operator.name for operator in OPERATORS}


def test_messages_are_one_sentence_about_shapes(operator):
    """The example of the style: who, what, expected, given."""
    inputs = operator.full_case().inputs()
    with pytest.raises(RuntimeError) as raised:
        inputs.outputs(**{name: tensor[None] for name, tensor in inputs.tensors.items()})
    assert re.fullmatch(
        rf"{operator}: \w+ must be \([A-Z0-9=, ]+\), got \([0-9, ]+\)", str(raised.value).splitlines()[0]
    )
