"""The step function: one token at a time it does what the whole does, in the rows that it is given."""

import pytest
import torch

from seqkern.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stepwise(case, device="cpu"):
    """Inputs of a plain forward call with a state in and out, which steps can follow; of some tokens in any case."""
    if case.inputs().sizes["L"] == 0:
        case = case.but(shape=case.operator.factors["shape"][0])
    return case.but(packing="none", reverse=False, initial_state=True, return_final_state=True).inputs(device)


def fresh_state(inputs, dtype=None):
    return inputs.tensors["initial_state"].to(dtype or inputs.accumulator).clone(memory_format=torch.contiguous_format)


def test_steps_equal_the_whole(small_case, device):
    inputs = stepwise(small_case, device)
    state = fresh_state(inputs)
    ys = [inputs.step(t, state) for t in range(inputs.sizes["L"])]
    stepped = {"y": torch.stack(ys, dim=inputs.operator.axis("y", "L")), "final_state": state}
    dtypes = (torch.float64, torch.float32)
    exact, plain = (inputs.to(dtype).outputs(inputs.operator.reference) for dtype in dtypes)
    assert all(y.dtype == inputs.dtype for y in ys)
    assert_close(stepped, exact, plain)


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_of_any_dtype(operator, device, dtype, state_dtype):
    inputs = stepwise(operator.case(dtype=dtype), device)
    states, ys = [fresh_state(inputs, state_dtype) for _ in range(3)], []
    ys.append(inputs.step(0, states[0]))
    for state, compute in zip(states[1:], (torch.float64, torch.float32), strict=True):
        ys.append(inputs.to(compute).step(0, state, operator.reference_step))
    assert states[0].dtype == state_dtype
    stepped, exact, plain = ({"y": y, "state": state} for y, state in zip(ys, states, strict=True))
    assert_close(stepped, exact, plain)


def pool(inputs, rows):
    """A state pool of NaN, but for the named rows, which hold the inputs' states."""
    state = fresh_state(inputs)
    pool = torch.full((7, *state.shape[1:]), float("nan"), dtype=state.dtype, device=state.device)
    for b, row in enumerate(rows):
        if row >= 0:
            pool[row] = state[b]
    return pool


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [[4, 0, 6], [6, -1, 2], [-1, -5, -1]], ids=str)
def test_state_indices_pick_rows(operator, device, rows, index_dtype):
    _, *rest = operator.factors["shape"][0]
    inputs = stepwise(operator.case(shape=(3, *rest)), device)
    state, picked = fresh_state(inputs), pool(inputs, rows)
    expected = picked.clone()
    y = inputs.step(0, state)
    indices = torch.tensor(rows, dtype=index_dtype, device=device)
    y_picked = inputs.step(0, picked, state_indices=indices)
    for b, row in enumerate(rows):
        if row >= 0:
            expected[row] = state[b]
            assert torch.equal(y_picked[b], y[b])
        else:
            assert torch.equal(y_picked[b], torch.zeros_like(y[b]))
    assert torch.equal(picked.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)], ids=str)
def test_state_is_updated_in_place_wherever_it_lies(operator, device, order):
    """In a view with any strides, and nowhere around it."""
    inputs = stepwise(operator.case(), device)
    state = fresh_state(inputs)
    room = torch.full([2 * state.shape[i] + 1 for i in order], float("nan"), dtype=state.dtype, device=device)
    view = room[(slice(1, None, 2),) * state.dim()].permute([order.index(i) for i in range(state.dim())])
    view.copy_(state)
    address = view.data_ptr()
    assert torch.equal(inputs.step(0, view), inputs.step(0, state))
    assert view.data_ptr() == address and torch.equal(view, state)
    assert room.isfinite().sum() == state.numel()


def test_a_step_changes_only_its_state(operator, device):
    inputs = stepwise(operator.case(layout="strided"), device)
    before = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
    inputs.step(0, fresh_state(inputs))
    assert all(torch.equal(before[name], tensor) for name, tensor in inputs.tensors.items())


def test_step_with_a_gradient_raises(operator, device):
    """In grad mode, whichever tensor it is, before the state is touched."""
    inputs = stepwise(operator.case(), device)
    state = fresh_state(inputs)
    names = [name for name in inputs.tensors if name != "initial_state"]
    for name in [*names, operator.step_state]:
        tensors = {key: tensor.detach().clone().requires_grad_(key == name) for key, tensor in inputs.tensors.items()}
        taken = state.clone().requires_grad_(name == operator.step_state)
        with pytest.raises(RuntimeError, match=f"^{operator}_step: {name} requires a gradient"):
            inputs.but(tensors).step(0, taken)
        assert torch.equal(taken, state)
        with torch.no_grad():
            inputs.but(tensors).step(0, taken)
        assert not torch.equal(taken, state)
