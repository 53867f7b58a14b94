"""What recurrences promise about time, packing and batches, mostly to the last bit."""

import itertools
import math

import pytest
import torch

import seqkern
from seqkern._sequences import runs

pytestmark = pytest.mark.usefixtures("batch_invariant")


def assert_bitwise(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(*(same_nan(t[name]) for t in (actual, expected))), name


def same_nan(tensor):
    """Bits as integers, with one pattern for every NaN."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize]
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().view(width)


def with_state(case):
    """The same case, with a state in and out."""
    return case.but(initial_state=True, return_final_state=True)


def per_row(operator, values):
    """Those outputs and gradients that belong to one sequence of a batch or pack; others are sums over several."""
    shapes = operator.outputs | {f"d{name}": letters for name, letters in operator.arguments.items()}
    letters = {name: set(shapes[name].split()) for name in values}
    return {name: value for name, value in values.items() if "N" in letters[name] or {"B", "L"} <= letters[name]}


def results(inputs, cotangents):
    outputs, grads = inputs.gradients(cotangents)
    return per_row(inputs.operator, outputs | grads)


def axis(operator, name, letter):
    """As Operator.axis, for gradients too."""
    known = operator.arguments | operator.outputs
    return operator.axis(name if name in known else name.removeprefix("d"), letter)


def take(operator, values, letter, index):
    """Batch rows, rows of states or a stretch of time of everything that has that dimension."""
    cut = {}
    for name, value in values.items():
        at = axis(operator, name, letter)
        cut[name] = value if at is None else value.movedim(at, 0)[index].movedim(0, at)
    return cut


def test_split_and_carry_equals_whole(small_case, device):
    """In two calls, the state carried over and gradients flowing back through it."""
    inputs = with_state(small_case).but(packing="none", dtype=torch.float64, parameter_dtype="same").inputs(device)
    operator, L = inputs.operator, inputs.sizes["L"]
    cotangents = inputs.cotangents()
    outputs, grads = inputs.gradients(cotangents)
    for cut in sorted({0, 1, L // 2, L} & set(range(L + 1))):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        whole = inputs.but(leaves)
        parts = [whole.tokens(0, cut), whole.tokens(cut, L)]
        order = [1, 0] if inputs.options["reverse"] else [0, 1]
        pieces, state = [None, None], whole.state
        for i in order:
            pieces[i] = parts[i].with_state(state).outputs()
            state = [pieces[i][name] for name in operator.final_state]
        joined = {"y": torch.cat([p["y"] for p in pieces], operator.axis("y", "L"))}
        joined |= dict(zip(operator.final_state, state, strict=True))
        carried = torch.autograd.grad(
            list(joined.values()),
            list(leaves.values()),
            list(cotangents.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for name in outputs:
            torch.testing.assert_close(joined[name], outputs[name], rtol=1e-10, atol=1e-10, msg=name)
        for name, grad in zip(leaves, carried, strict=True):
            torch.testing.assert_close(grad, grads[f"d{name}"], rtol=1e-10, atol=1e-10, msg=f"d{name} cut at {cut}")


def test_packed_equals_separate(case, device):
    inputs = with_state(case).but(packing="cu_seqlens").inputs(device)
    operator, cotangents = inputs.operator, inputs.cotangents()
    packed = results(inputs, cotangents)
    bounds = inputs.options["cu_seqlens"].tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = inputs.tokens(begin, end).rows("N", slice(n, n + 1)).but(cu_seqlens=None)
        share = take(operator, take(operator, cotangents, "L", slice(begin, end)), "N", slice(n, n + 1))
        part = take(operator, take(operator, packed, "L", slice(begin, end)), "N", slice(n, n + 1))
        assert_bitwise(part, results(alone, share))


@pytest.mark.seq_idx
def test_seq_idx_equals_separate(case, device):
    inputs = with_state(case).but(packing="seq_idx").inputs(device)
    operator, seq_idx, reverse = inputs.operator, inputs.options["seq_idx"], inputs.options["reverse"]
    B, L = seq_idx.shape
    cotangents = inputs.cotangents()
    packed = results(inputs, cotangents)
    for run in runs(B, L, None, seq_idx, reverse):
        row, time = slice(run.b, run.b + 1), slice(run.begin, run.end)

        def part(values, row=row, time=time):
            return take(operator, take(operator, take(operator, values, "L", time), "B", row), "N", row)

        alone = inputs.tokens(run.begin, run.end).rows("B", row).rows("N", row).but(seq_idx=None)
        alone = alone if run.initial is not None else alone.with_state(alone.empty_state)
        share, outside = part(cotangents), []
        if run.final is None:
            share |= {name: torch.zeros_like(share[name]) for name in operator.final_state}
            outside += operator.final_state
        if run.initial is None:
            outside += [f"d{name}" for name in operator.state]
        actual, expected = (
            {name: value for name, value in values.items() if name not in outside}
            for values in (part(packed), results(alone, share))
        )
        assert_bitwise(actual, expected)


@pytest.mark.seq_idx
def test_padding_is_zero_and_has_no_effect(operator, device):
    inputs = operator.case(packing="seq_idx", initial_state=True, return_final_state=True).inputs(device)
    padding = inputs.options["seq_idx"] < 0
    cotangents = inputs.cotangents()

    def poisoned(values):
        """NaN at every padding token."""
        return {name: mask(operator, name, value, padding, torch.nan) for name, value in values.items()}

    outputs, grads = inputs.gradients(cotangents)
    dirty = inputs.but(poisoned({name: inputs.tensors[name] for name in inputs.data}))
    dirty_outputs, dirty_grads = dirty.gradients(poisoned(cotangents))
    assert_bitwise(dirty_outputs, outputs)
    assert_bitwise(dirty_grads, grads)
    for name, value in (outputs | grads).items():
        if axis(operator, name, "L") is not None:
            assert torch.equal(mask(operator, name, value, padding, 0), value), name


def mask(operator, name, value, tokens, fill):
    """`value` with `fill` where the (B, L) mask is true, unchanged if it has no time."""
    b, t = axis(operator, name, "B"), axis(operator, name, "L")
    if t is None:
        return value
    rest = value.dim() - 2
    spread = tokens.reshape(*tokens.shape, *[1] * rest)
    return value.masked_fill(spread.movedim((0, 1), (b, t)), fill)


def test_batch_size_and_position_change_nothing(case, device):
    inputs = with_state(case).but(packing="none").inputs(device)
    operator, cotangents = inputs.operator, inputs.cotangents()
    together = results(inputs, cotangents)

    def row(values, b):
        index = slice(b, b + 1)
        return take(operator, take(operator, values, "B", index), "N", index)

    for b in range(inputs.sizes["B"]):
        index = slice(b, b + 1)
        assert_bitwise(results(inputs.rows("B", index).rows("N", index), row(cotangents, b)), row(together, b))

    order = torch.randperm(inputs.sizes["B"], generator=torch.Generator().manual_seed(0))
    shuffled = take(operator, take(operator, cotangents, "B", order), "N", order)
    expected = take(operator, take(operator, together, "B", order), "N", order)
    assert_bitwise(results(inputs.rows("B", order).rows("N", order), shuffled), expected)


def flipped(operator, values):
    return {
        name: value if axis(operator, name, "L") is None else value.flip(axis(operator, name, "L"))
        for name, value in values.items()
    }


def test_reverse_is_forward_on_flipped_time(case, device):
    """Bitwise, parameter gradients to rounding: their sum runs the other way."""
    inputs = with_state(case).but(packing="none", layout="contiguous").inputs(device)
    operator, cotangents = inputs.operator, inputs.cotangents()
    mirrored = inputs.flipped().but(reverse=not inputs.options["reverse"])
    actual = flipped(operator, results(mirrored, flipped(operator, cotangents)))
    assert_bitwise(actual, results(inputs, cotangents))


def test_reverse_of_packs(operator, device):
    """Sequences stay where they are; only time within them runs backwards."""
    inputs = operator.case(packing="cu_seqlens", initial_state=True, return_final_state=True).inputs(device)
    L, bounds = inputs.sizes["L"], inputs.options["cu_seqlens"]
    mirrored = inputs.flipped().but(
        {name: inputs.tensors[name].flip(0) for name in operator.state},
        reverse=True,
        cu_seqlens=(L - bounds).flip(0),
    )
    outputs = flipped(operator, mirrored.outputs())
    outputs |= {name: outputs[name].flip(0) for name in operator.final_state}
    assert_bitwise(outputs, inputs.outputs())


def test_a_changed_token_changes_nothing_before_it(small_case, device):
    inputs = small_case.but(packing="none", initial_state=True).inputs(device)  # the first token may read nothing else
    operator, L = inputs.operator, inputs.sizes["L"]
    before = inputs.outputs()["y"]
    time = operator.axis("y", "L")
    for t in range(L):
        changed = {}
        for name in inputs.data:
            changed[name] = inputs.tensors[name].clone()
            changed[name].select(operator.axis(name, "L"), t).add_(1)
        after = inputs.but(changed).outputs()["y"]
        begin, length = (t + 1, L - t - 1) if inputs.options["reverse"] else (0, t)
        assert torch.equal(after.narrow(time, begin, length), before.narrow(time, begin, length))
        reach = 2 if inputs.options.get("read") == "previous" else 1  # a token then reads what those before it left
        begin = max(t + 1 - reach, 0) if inputs.options["reverse"] else t
        touched = [y.narrow(time, begin, min(reach, L - begin)) for y in (after, before)]
        assert inputs.sizes["B"] == 0 or not torch.equal(*touched)


def test_a_changed_cotangent_changes_no_gradient_behind_it(operator, device):
    """Causality of the backward: dy at t reaches dx at t and before."""
    inputs = operator.case(initial_state=True).inputs(device)
    cotangents = inputs.cotangents()
    _, before = inputs.gradients(cotangents)
    t = inputs.sizes["L"] // 2
    cotangents["y"].select(operator.axis("y", "L"), t).add_(1)
    _, after = inputs.gradients(cotangents)
    for name in inputs.data:
        time = operator.axis(name, "L")
        behind = [grads[f"d{name}"].narrow(time, t + 1, inputs.sizes["L"] - t - 1) for grads in (before, after)]
        assert torch.equal(*behind)
        assert not torch.equal(before[f"d{name}"].select(time, t), after[f"d{name}"].select(time, t))


# Where time runs backwards NaN alone shows which tokens are reached: what becomes of infinity is the same arithmetic.
@pytest.mark.parametrize("reverse, bad", [(False, math.nan), (True, math.nan), (False, math.inf), (False, -math.inf)])
def test_nan_and_inf_stay_in_their_sequence(operator, device, packed_as, reverse, bad):
    options = {"activation": "silu"} if "activation" in operator.factors else {}
    case = operator.full_case(packing=packed_as, reverse=reverse, **options)
    inputs = case.inputs(device)
    cotangents = inputs.cotangents()
    clean = results(inputs, cotangents)
    B, L = inputs.sizes["B"], inputs.sizes["L"]
    everything = runs(B, L, inputs.options.get("cu_seqlens"), inputs.options.get("seq_idx"), reverse)
    run = max(everything, key=lambda run: run.end - run.begin)
    t = (run.begin + run.end) // 2
    hit = torch.zeros(B, L, dtype=torch.bool, device=device)
    hit[run.b, t] = True
    for name in inputs.data:
        sick_inputs = inputs.but({name: mask(operator, name, inputs.tensors[name], hit, bad)})
        outputs, grads = sick_inputs.gradients(cotangents)
        sick = per_row(operator, outputs | grads)
        exact, exact_grads = sick_inputs.to(torch.float64).gradients(cotangents, operator.reference)

        own = torch.zeros(B, L, dtype=torch.bool, device=device)
        own[run.b, run.begin : run.end] = True
        before = torch.zeros_like(own)
        passed = (run.end - 1 - t if reverse else t - run.begin) // operator.chunk * operator.chunk
        before[run.b, slice(run.end - passed, run.end) if reverse else slice(run.begin, run.begin + passed)] = True
        # Other sequences, outputs and gradients alike, and earlier outputs of this one (those of earlier chunks): the
        # same bits.
        for key, value in sick.items():
            if axis(operator, key, "L") is not None:
                may_differ = own & ~before if key in operator.outputs else own
                unchanged = ({key: mask(operator, key, v, may_differ, 0)} for v in (value, clean[key]))
                assert_bitwise(*unchanged)
            elif axis(operator, key, "N") is not None:
                mine = run.initial if key.startswith("d") else run.final
                others = [n for n in range(inputs.sizes["N"]) if n != mine]
                assert_bitwise({key: value[others]}, {key: clean[key][others]})
        # A finite number stands only where the truth is finite, and is then right. (What the derivative is at infinity
        # is a matter of the formula.)
        assert exact["y"].isfinite().all() == (bad in operator.harmless.get(name, ()))
        for key, value in (outputs | grads if bad != bad else outputs).items():
            truth, finite = (exact | exact_grads)[key], value.isfinite()
            assert not (finite & ~truth.isfinite()).any(), key
            torch.testing.assert_close(value[finite].double(), truth[finite], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("factors", [{}, {"layout": "transposed"}, {"packing": "cu_seqlens"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_run_to_run_and_thread_count(operator, factors, dtype):
    """Bitwise, parameter gradients included, at a size that is worth dividing."""
    sizes = {"B": 2, "L": 5000}
    shape = tuple(sizes.get(letter, 16) for letter in operator.shape.split())
    inputs = operator.case(shape=shape, dtype=dtype, initial_state=True, return_final_state=True, **factors).inputs()
    cotangents = inputs.cotangents()
    threads = torch.get_num_threads()
    try:
        seen = []
        for count in (1, 1, 2, 3, 2):
            torch.set_num_threads(count)
            outputs, grads = inputs.gradients(cotangents)
            seen.append(outputs | grads)
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert_bitwise(other, seen[0])


def test_batch_invariant_is_scoped():
    from seqkern._config import settings

    assert settings.batch_invariant
    with seqkern.batch_invariant():
        assert settings.batch_invariant
    assert settings.batch_invariant
