"""The step function: one token at a time it does what the whole does, in the rows that it is given."""

import pytest
import torch

from seqkern.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stepwise(case, device="cpu"):
    """Inputs of a plain forward call with a state in and out, which steps can follow; of some tokens in any case."""
    if case.inputs().sizes["L"] == 0:
        case = case.but(shape=case.operator.factors["shape"][0])
    case = case.but(packing="none", reverse=False, reset=False, initial_state=True, return_final_state=True)
    return case.inputs(device)


def fresh_state(inputs, dtype=None):
    """The parts of the initial state, contiguous, to be moved on."""
    dtype = dtype or inputs.accumulator
    return [part.to(dtype).clone(memory_format=torch.contiguous_format) for part in inputs.state]


def named(inputs, state):
    return dict(zip(inputs.operator.final_state, state, strict=True))


def test_steps_equal_the_whole(small_case, device):
    inputs = stepwise(small_case, device)
    state = fresh_state(inputs)
    ys = [inputs.step(t, state) for t in range(inputs.sizes["L"])]
    stepped = {"y": torch.stack(ys, dim=inputs.operator.axis("y", "L"))} | named(inputs, state)
    dtypes = (torch.float64, torch.float32)
    exact, plain = (inputs.to(dtype).outputs(inputs.operator.reference) for dtype in dtypes)
    assert all(y.dtype == inputs.dtype for y in ys)
    coarse = inputs.coarse if inputs.operator.steps_multiply else {}
    assert_close(stepped, exact, plain, {name: coarse[name] for name in stepped if name in coarse})


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_of_any_dtype(operator, device, dtype, state_dtype):
    inputs = stepwise(operator.case(dtype=dtype), device)
    states, ys = [fresh_state(inputs, state_dtype) for _ in range(3)], []
    ys.append(inputs.step(0, states[0]))
    for state, compute in zip(states[1:], (torch.float64, torch.float32), strict=True):
        ys.append(inputs.to(compute).step(0, state, operator.reference_step))
    assert all(part.dtype == state_dtype for part in states[0])
    stepped, exact, plain = ({"y": y} | named(inputs, state) for y, state in zip(ys, states, strict=True))
    assert_close(stepped, exact, plain)


def pool(state, rows):
    """A state pool of NaN, but for the named rows, which hold a state."""
    pool = [part.new_full((7, *part.shape[1:]), float("nan")) for part in state]
    for b, row in enumerate(rows):
        if row >= 0:
            for room, part in zip(pool, state, strict=True):
                room[row] = part[b]
    return pool


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [[4, 0, 6], [6, -1, 2], [-1, -5, -1]], ids=str)
def test_state_indices_pick_rows(operator, device, rows, index_dtype):
    _, *rest = operator.factors["shape"][0]
    inputs = stepwise(operator.case(shape=(3, *rest)), device)
    state = fresh_state(inputs)
    picked = pool(state, rows)
    y = inputs.step(0, state)
    indices = torch.tensor(rows, dtype=index_dtype, device=device)
    y_picked = inputs.step(0, picked, state_indices=indices)
    for b, row in enumerate(rows):
        assert torch.equal(y_picked[b], y[b] if row >= 0 else torch.zeros_like(y[b]))
    for moved, expected in zip(picked, pool(state, rows), strict=True):
        assert torch.equal(moved.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_state_is_updated_in_place_wherever_it_lies(operator, device, order):
    """In a view with any strides, and nowhere around it."""
    inputs = stepwise(operator.case(), device)
    state = fresh_state(inputs)
    rooms, views = zip(*(surrounded(part, order) for part in state), strict=True)
    addresses = [view.data_ptr() for view in views]
    assert torch.equal(inputs.step(0, views), inputs.step(0, state))
    assert [view.data_ptr() for view in views] == addresses and all(map(torch.equal, views, state))
    assert [room.isfinite().sum() for room in rooms] == [part.numel() for part in state]


def surrounded(part, order):
    """(room full of NaN, a copy of `part` inside with gaps), the first dimensions in that order of memory."""
    order = [*(i for i in order if i < part.dim()), *range(len(order), part.dim())]
    room = part.new_full([2 * part.shape[i] + 1 for i in order], float("nan"))
    view = room[(slice(1, None, 2),) * part.dim()].permute([order.index(i) for i in range(part.dim())])
    return room, view.copy_(part)


def test_a_step_changes_only_its_state(operator, device):
    inputs = stepwise(operator.case(layout="strided"), device)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    inputs.step(0, fresh_state(inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in inputs.tensors.items())


def test_step_with_a_gradient_raises(operator, device):
    """In grad mode, whichever tensor it is, before the state is touched."""
    inputs = stepwise(operator.case(), device)
    state = fresh_state(inputs)
    for name in inputs.tensors:
        tensors = {key: tensor.detach().clone().requires_grad_(key == name) for key, tensor in inputs.tensors.items()}
        taken = [part.clone().requires_grad_(key == name) for key, part in zip(operator.state, state, strict=True)]
        spoken = operator.spoken(name, operator.step_state)
        with pytest.raises(RuntimeError, match=f"^{operator}_step: {spoken} requires a gradient"):
            inputs.but(tensors).step(0, taken)
        assert all(map(torch.equal, taken, state))
        with torch.no_grad():
            inputs.but(tensors).step(0, taken)
        assert not all(map(torch.equal, taken, state))
