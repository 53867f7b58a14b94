"""The table of cases covers what it promises."""

import itertools

import pytest
import torch


@pytest.mark.parametrize("table", ["cases", "small_cases", "tiny_cases"])
def test_every_pair_of_values_occurs(operator, table):
    cases = getattr(operator, table)
    factors = {name: {case[name] for case in cases} for name in operator.factors}
    if table == "cases":
        assert factors == {name: set(values) for name, values in operator.factors.items()}
    for a, b in itertools.combinations(factors, 2):
        seen = {(case[a], case[b]) for case in cases}
        assert len(seen) == len(factors[a]) * len(factors[b]), f"{a} and {b}"


def test_every_operator_varies_dtype_direction_packing_and_state(operator):
    assert operator.factors.keys() >= {"dtype", "parameter_dtype", "reverse", "packing", "initial_state", "layout"}
    assert set(operator.factors["packing"]) >= {"none", "cu_seqlens"}
    assert set(operator.factors["dtype"]) == {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def test_cases_repeat(operator):
    case = operator.case(dtype=torch.float64)
    first, second = case.inputs(), case.inputs()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_packs_have_empty_sequences(operator):
    bounds = operator.case(packing="cu_seqlens").inputs().options["cu_seqlens"].tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert lengths[0] == lengths[-1] == 0 and 0 in lengths[1:-1] and max(lengths) > 1


def test_uninitialised_memory_is_poisoned():
    made = [torch.empty(7), torch.ones(3).new_empty(7), torch.empty(7, dtype=torch.bfloat16)]
    assert all(tensor.isnan().all() for tensor in made)
