"""LSTM, GRU and RNN against torch.nn's, on PyTorch's own inputs and others; SLSTM against its equations and itself."""

import copy
import io
import math
import sys
import types
import unittest
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layers import DIM, B, L, small, some_state
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import seqkern.nn

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pair(kind, *args, dtype=torch.float64, device="cpu", own=(), **options):
    """torch's module and ours, which alone has the options `own`, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(*args, dtype=dtype, **options)
    ours = getattr(seqkern.nn, kind)(*args, dtype=dtype, **options, **dict(own))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device), ours.to(device)


def some_hx(kind, *shape, proj_size=0, device="cpu"):
    """Leaves that require a gradient, (layers * directions, B, hidden)."""
    sizes = {"LSTM": (proj_size or shape[-1], shape[-1])}.get(kind, shape[-1:])
    parts = [torch.randn(*shape[:-1], n, dtype=torch.float64, device=device, requires_grad=True) for n in sizes]
    return tuple(parts) if kind == "LSTM" else parts[0]


def tensors(*structures):
    """Those in arguments and outputs of a module, in order."""
    found = []
    for structure in structures:
        if isinstance(structure, torch.Tensor):
            found.append(structure)
        elif isinstance(structure, PackedSequence):
            found.append(structure.data)
        elif structure is not None:
            found += tensors(*structure)
    return found


def gradients(outputs, *leaves, **options):
    torch.manual_seed(1)
    cotangents = [torch.randn(output.shape, dtype=output.dtype) for output in tensors(outputs)]  # whatever its strides
    return torch.autograd.grad(tensors(outputs), leaves, cotangents, **options)


def assert_same_results(theirs, ours, *args):
    """Outputs, and gradients of the parameters and of the arguments that ask for them."""
    wanted, outputs = theirs(*args), ours(*args)
    torch.testing.assert_close(outputs, wanted)
    leaves = [leaf for leaf in tensors(args) if leaf.requires_grad]
    wanted_grads = gradients(wanted, *theirs.parameters(), *leaves)
    torch.testing.assert_close(gradients(outputs, *ours.parameters(), *leaves), wanted_grads)


# ---- against torch.nn


@pytest.fixture
def module_inputs(monkeypatch):
    """PyTorch's test suite has them. Importing it asks for a package, and forbids setting flags: not here."""
    monkeypatch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    monkeypatch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal import common_modules

    def inputs_of(kind):
        options = {"module_info": None, "device": "cpu", "dtype": torch.float64, "requires_grad": True}
        if kind == "LSTM":
            return common_modules.module_inputs_torch_nn_LSTM(**options, training=True)
        options |= {"is_rnn": kind == "RNN", "with_packed_sequence": True}
        return common_modules.module_inputs_torch_nn_RNN_GRU(**options, training=True)

    return inputs_of


def test_pytorchs_own_inputs(module_inputs, kind):
    samples = module_inputs(kind)
    assert len(samples) >= 32
    for sample in samples:
        modules = pair(kind, *sample.constructor_input.args, **sample.constructor_input.kwargs)
        assert_same_results(*modules, *sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("batch_first", [False, True], ids=["LB", "BL"])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_layers_of_both_directions(device, kind, batch_first, proj_size):
    if proj_size and kind != "LSTM":
        return
    options = {"bidirectional": True, "batch_first": batch_first, **({"proj_size": proj_size} if proj_size else {})}
    modules = pair(kind, 5, 7, 2, device=device, **options)
    x = torch.randn(5, 6, 4, dtype=torch.float64, device=device).permute(1, 2, 0).requires_grad_()  # any strides
    batch = 6 if batch_first else 4
    assert_same_results(*modules, x)
    assert_same_results(*modules, x, some_hx(kind, 4, batch, 7, proj_size=proj_size, device=device))


@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["any order", "sorted"])
def test_packed_sequences(device, kind, enforce_sorted):
    lengths = (6, 4, 4, 1) if enforce_sorted else (4, 1, 6, 4)
    modules = pair(kind, 3, 4, 2, bidirectional=True, device=device)
    sequences = [torch.randn(n, 3, dtype=torch.float64, device=device, requires_grad=True) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted)
    assert_same_results(*modules, packed)
    assert_same_results(*modules, packed, some_hx(kind, 4, 4, 4, device=device))
    y, _ = modules[1](packed)
    assert pad_packed_sequence(y)[1].tolist() == list(lengths)


def test_dropout_between_layers(kind):
    theirs, ours = pair(kind, 3, 4, 3, dropout=0.5)
    x, outputs = torch.randn(5, 2, 3, dtype=torch.float64), []
    for module in (theirs, ours):
        torch.manual_seed(3)
        outputs.append((module(x), module.eval()(x), module(x)))
    torch.testing.assert_close(outputs[1], outputs[0])
    training, inference, again = outputs[1]
    assert not torch.equal(training[0], inference[0]) and torch.equal(inference[0], again[0])


def test_empty_batches_and_sequences(kind):
    """torch.nn refuses the latter; the state passes."""
    theirs, ours = pair(kind, 3, 4, 2)
    x = torch.randn(5, 0, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    hx = some_hx(kind, 2, 2, 4)
    y, state = ours(torch.randn(0, 2, 3, dtype=torch.float64), hx)
    assert y.shape == (0, 2, 4)
    torch.testing.assert_close(state, hx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(kind, dtype):
    exact, ours = pair(kind, DIM, 8, 2, batch_first=True)
    x = torch.randn(B, L, DIM, dtype=torch.float64)
    wanted, ours = exact(x), ours.to(dtype)
    outputs = ours(x.to(dtype))
    for output, value in zip(tensors(outputs), tensors(wanted), strict=True):
        assert output.dtype == dtype
        assert (output.double() - value).abs().max() < {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 0.03)
    assert {grad.dtype for grad in gradients(outputs, *ours.parameters())} == {dtype}


def test_autocast(kind):
    exact, ours = pair(kind, DIM, 8, dtype=torch.float32)
    x = torch.randn(L, B, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ours(x)
    assert y.dtype == torch.bfloat16 and {part.dtype for part in tensors(state)} == {torch.float32}
    wanted, _ = exact(x)
    assert (y - wanted).abs().max() < 0.03
    grads, wanted_grads = gradients(y.float(), *ours.parameters()), gradients(wanted, *exact.parameters())
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == torch.float32 and (grad - wanted_grad).abs().max() < 0.1 * wanted_grad.abs().max()


def error_of(call):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        call()
    return caught.type, str(caught.value)


def test_errors_of_the_constructor_are_torchs(kind):
    wrong = [
        ((0, 4), {}),
        ((3, 0), {}),
        ((3, 4.0), {}),
        ((3, 4, 0), {}),
        ((3, 4), {"bias": 1}),
        ((3, 4), {"batch_first": 1}),
        ((3, 4), {"dropout": 2}),
        ((3, 4), {"proj_size": 4}),
        ((3, 4), {"nonlinearity": "gelu"}),
    ]
    for args, options in wrong:
        wanted, error = (error_of(partial(getattr(nn, kind), *args, **options)) for nn in (torch.nn, seqkern.nn))
        assert error == wanted
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(seqkern.nn, kind)(3, 4, dropout=0.5)


def test_errors_of_arguments_are_torchs(kind):
    theirs, ours = pair(kind, 3, 4)

    def zeros(*shape, dtype=torch.float64):
        return torch.zeros(shape, dtype=dtype)

    def hx(*shape):
        return (zeros(*shape), zeros(*shape)) if kind == "LSTM" else zeros(*shape)

    wrong = [
        (zeros(3),),
        (zeros(5, 2, 1, 3),),
        (zeros(5, 2, 4),),
        (zeros(5, 2, 3, dtype=torch.float32),),
        (zeros(5, 2, 3), hx(1, 4)),
        (zeros(5, 3), hx(1, 1, 4)),
        (zeros(5, 2, 3), hx(1, 2, 5)),
        (zeros(5, 2, 3), hx(1, 3, 4)),
    ]
    if kind != "LSTM":  # torch.nn's does not look at packs
        wrong += [(pack_sequence([zeros(5, 2)]),), (pack_sequence([zeros(5, 3)]), hx(1, 2, 4))]
    for args in wrong:
        assert error_of(partial(ours, *args)) == error_of(partial(theirs, *args))


# ---- options that torch lacks


def test_zoneout_is_a_mean_at_inference(kind):
    theirs, ours = pair(kind, 3, 4, batch_first=True, own={"zoneout": 0.25})
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    state, outputs = some_hx(kind, 1, 2, 4), []
    y, last = ours.eval()(x, state)
    for x_t in x.split(1, dim=1):
        old = tensors(state)[0]
        _, state = theirs(x_t, state)
        h, *c = tensors(state)
        h = 0.25 * old + 0.75 * h
        state = (h, *c) if kind == "LSTM" else h
        outputs.append(h[0])
    torch.testing.assert_close((y, last), (torch.stack(outputs, dim=1), state))


def test_random_options_act_in_training_alone(kind):
    theirs, _ = pair(kind, 3, 4, 2)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for option in ("zoneout", "recurrent_dropout"):
        _, ours = pair(kind, 3, 4, 2, own={option: 0.5})
        torch.manual_seed(0)
        first, other = ours(x), ours(x)
        torch.manual_seed(0)
        torch.testing.assert_close(ours(x), first, rtol=0, atol=0)
        assert not torch.equal(first[0], other[0])
        again, inference = ours.eval()(x), ours(x)
        torch.testing.assert_close(again, inference, rtol=0, atol=0)
        if option == "recurrent_dropout":
            torch.testing.assert_close(inference, theirs(x))


def test_grad_clip(kind):
    """Of what flows back into a state; the forward is as it was."""
    theirs, ours = pair(kind, 3, 4, own={"grad_clip": 1e-3})
    x, hx = torch.randn(5, 2, 3, dtype=torch.float64), some_hx(kind, 1, 2, 4)
    outputs, wanted = ours(x, hx), theirs(x, hx)
    torch.testing.assert_close(outputs, wanted)
    (grad, *_), (wanted_grad, *_) = gradients(outputs, *tensors(hx)), gradients(wanted, *tensors(hx))
    assert grad.abs().max() == 1e-3 < wanted_grad.abs().max()


def test_tells_its_options(kind):
    theirs, ours = pair(kind, 3, 4, 2)
    assert repr(ours) == repr(theirs)
    module = getattr(seqkern.nn, kind)(3, 4, zoneout=0.1, recurrent_dropout=0.2, grad_clip=1.0)
    assert repr(module) == f"{kind}(3, 4, zoneout=0.1, recurrent_dropout=0.2, grad_clip=1.0)"


# ---- torch's ways to use a module


def test_convert():
    class Own(torch.nn.GRU):
        pass

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.lstm = torch.nn.RNN(3, 4, nonlinearity="relu"), torch.nn.LSTM(4, 4, 2, bidirectional=True)
            self.grus = torch.nn.ModuleList([torch.nn.GRU(8, 5), Own(5, 5)])
            self.again = self.rnn

        def forward(self, x):
            x = self.lstm(self.rnn(x)[0])[0]
            for gru in self.grus:
                x = gru(x)[0]
            return x

    torch.manual_seed(0)
    theirs = Model().double()
    hooked = []
    theirs.rnn.register_forward_hook(lambda module, *_: hooked.append(type(module)))
    ours = copy.deepcopy(theirs)
    assert seqkern.nn.convert(ours) is ours and seqkern.nn.convert(ours) is ours
    types_of = [type(module) for module in (ours.rnn, ours.lstm, ours.grus[0], ours.grus[1])]
    assert types_of == [seqkern.nn.RNN, seqkern.nn.LSTM, seqkern.nn.GRU, Own] and ours.again is ours.rnn
    assert_same_results(theirs, ours, torch.randn(5, 2, 3, dtype=torch.float64))
    assert hooked == [torch.nn.RNN, seqkern.nn.RNN] and repr(ours) == repr(theirs)
    assert type(seqkern.nn.convert(torch.nn.LSTM(3, 4))) is seqkern.nn.LSTM


def test_saves_and_copies(kind):
    theirs, ours = pair(kind, 3, 4, 2, bidirectional=True, own={"zoneout": 0.5})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    converted = seqkern.nn.convert(copy.deepcopy(theirs)).eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for module in (ours.eval(), converted):
        (file := io.BytesIO()), torch.save(module, file)
        file.seek(0)
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert type(other) is type(module) and other.zoneout == module.zoneout
            torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


def test_uses_the_parameters_it_has(kind):
    """Those that took the place of the first ones, for good or for a call, with their dtype."""
    theirs, ours = pair(kind, 3, 4, dtype=torch.float32)
    other, _ = pair(kind, 3, 4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    outputs = torch.func.functional_call(ours, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(outputs, other(x))
    torch.testing.assert_close(ours(x.float()), theirs(x.float()))
    for name, parameter in other.named_parameters():
        setattr(ours, name, parameter)
    torch.testing.assert_close(ours(x), other(x))


def test_compiles_without_a_break(kind):
    _, ours = pair(kind, 3, 4, bidirectional=True, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 7):
        x = torch.randn(length, 2, 3)
        outputs, wanted = compiled(x), ours(x)
        torch.testing.assert_close(outputs, wanted)
        grads = (gradients(results, *ours.parameters()) for results in (outputs, wanted))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_vmap_over_parameters_and_inputs(kind):
    modules = [pair(kind, 3, 4, 2)[1] for _ in range(2)]
    with torch.no_grad():
        for parameter in modules[1].parameters():
            parameter.neg_()
    parameters, _ = torch.func.stack_module_state(modules)
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    outputs = torch.vmap(lambda given, x: torch.func.functional_call(modules[0], given, (x,)))(parameters, x)
    for n, module in enumerate(modules):
        torch.testing.assert_close([part[n] for part in tensors(outputs)], tensors(module(x[n])))


def test_second_derivatives_and_forward_mode(kind):
    theirs, ours = pair(kind, 3, 4, 2)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        first = gradients(module(leaf)[0], leaf, *module.parameters(), create_graph=True)
        second = gradients(first, leaf, *module.parameters())
        results.append((first, second, torch.func.jvp(lambda x, module=module: module(x)[0], (x,), (tangent,))))
    torch.testing.assert_close(*reversed(results))


# ---- the sLSTM

HEADS, HIDDEN = 2, 10


def slstm(device="cpu", dtype=torch.float32, **options):
    return small(lambda **f: seqkern.nn.SLSTM(DIM, HEADS, hidden=HIDDEN, **options, **f), device, dtype)


def textbook(layer, x, state):
    """The published equations without a scale: exp(m) is multiplied in."""
    h, c, n, m = state
    c, n, outputs = c * m.exp(), n * m.exp(), []
    for x_t in x.unbind(1):
        gates = F.linear(x_t, layer.in_proj.weight).view(-1, HEADS, 4, HIDDEN // HEADS)
        i, f, z, o = (gates + torch.einsum("hgpq,bhq->bhgp", layer.recurrent, h) + layer.bias).unbind(2)
        i, f, z, o = i.exp(), torch.sigmoid(f), torch.tanh(z), torch.sigmoid(o)
        c, n = f * c + i * z, f * n + i
        h = o * c / n
        outputs.append(h.flatten(1))
    return torch.stack(outputs, dim=1), (h, c, n, torch.zeros_like(m))


def meaning(y, state):
    """The numbers that a state stands for, which may have any scale."""
    h, c, n, m = state
    return [y, h, c / n, m + n.log()]


def assert_same(outputs, wanted, **tolerances):
    """Of (y, state)."""
    torch.testing.assert_close(meaning(*outputs), meaning(*wanted), **tolerances)


def test_slstm_computes_the_published_layer(device):
    layer, x = slstm(device, torch.float64)
    h, c, n, m = some_state(layer, B)
    state = h, 3 * c, 3 * n, m - 0.5  # another scale
    for part in (x, *state):
        part.requires_grad_()
    outputs, wanted = layer(x, state, return_state=True), textbook(layer, x, state)
    assert_same(outputs, wanted)
    leaves = [*layer.parameters(), x, *state]
    grads = gradients(meaning(*outputs), *leaves)
    torch.testing.assert_close(grads, gradients(meaning(*wanted), *leaves))
    assert all(grad.abs().max() > 0 for grad in grads)


def test_slstm_begins_with_nothing():
    layer, x = slstm(dtype=torch.float64)
    zeros = layer.zero_state(B)
    outputs = layer(x, return_state=True)
    assert_same(outputs, textbook(layer, x, zeros))
    assert_same(outputs, layer(x, zeros, return_state=True))
    for first, last in zip(zeros, outputs[1], strict=True):
        assert first.shape == last.shape and first.dtype == last.dtype


def test_slstm_steps_equal_the_whole(device):
    layer, x = slstm(device, zoneout=0.2)
    layer.eval()
    before = some_state(layer, B)
    whole = layer(x, before, return_state=True)
    state = tuple(map(torch.clone, before))
    with torch.no_grad():
        steps = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], dim=1)
    assert_same((steps, state), whole, rtol=1e-4, atol=1e-5)


def test_slstm_parts_equal_the_whole():
    """The state carries values and gradients from one part to the next; a part may be empty."""
    layer, x = slstm(dtype=torch.float64)
    state, ys = None, []
    for part in x.split([1, 6, 0, 4], dim=1):
        y, state = layer(part, state, return_state=True)
        ys.append(y)
    outputs, whole = meaning(torch.cat(ys, dim=1), state), meaning(*layer(x, return_state=True))
    torch.testing.assert_close(outputs, whole)
    torch.testing.assert_close(*(gradients(results, *layer.parameters()) for results in (outputs, whole)))


def test_slstm_packed_and_reset_equal_separate():
    """Nothing passes a boundary or a reset: no state, were it NaN, and no gradient."""
    layer, x = slstm(dtype=torch.float64)
    x = x[:1].requires_grad_()
    before = some_state(layer, 3)
    for part in before:
        part[2] = torch.nan
    reset = torch.zeros(1, L, dtype=torch.bool)
    reset[0, [2, 6]] = True  # within the first sequence, and where the third begins; the second is empty
    packing = {"reset": reset, "cu_seqlens": torch.tensor([0, 6, 6, 11])}
    y, state = layer(x, before, **packing, return_state=True)

    own = tuple(part[:1] for part in before)
    first, second, third = layer(x[:, :2], own), layer(x[:, 2:6], return_state=True), layer(x[:, 6:], return_state=True)
    wanted = torch.cat([first, second[0], third[0]], dim=1)
    used, ends = (tuple(part[[0, 2]] for part in state), tuple(map(torch.cat, zip(second[1], third[1], strict=True))))
    assert_same((y, used), (wanted, ends))
    assert_same((y, tuple(part[1:2] for part in state)), (y, tuple(part[1:2] for part in before)))
    leaves = [*layer.parameters(), x]
    torch.testing.assert_close(gradients(meaning(y, used), *leaves), gradients(meaning(wanted, ends), *leaves))

    moving = tuple(part[2:].clone() for part in before)
    with torch.no_grad():
        steps = [layer.step(x[:, t], moving, reset=reset[:, t]) for t in range(6, L)]
    torch.testing.assert_close(torch.stack(steps, dim=1), y[:, 6:].detach())


def test_slstm_options_act_in_training():
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}):
        layer, x = slstm(**options)
        torch.manual_seed(0)
        first, other = layer(x), layer(x)
        torch.manual_seed(0)
        assert torch.equal(layer(x), first) and not torch.equal(first, other)
        assert torch.equal(layer.eval()(x), layer(x))
    layer, x = slstm(grad_clip=1e-3)
    before = tuple(part.requires_grad_() for part in some_state(layer, B))
    assert gradients(layer(x, before), before[0])[0].abs().max() == torch.tensor(1e-3)


def test_slstm_initial_values():
    torch.manual_seed(0)
    layer = seqkern.nn.SLSTM(32, 2, hidden=1024, layer=1, depth=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"recurrent": (2, 4, 512, 512), "bias": (2, 4, 512), "in_proj.weight": (4096, 32)}
    weight = layer.in_proj.weight.detach().double()
    deviation = math.sqrt(2 / (5 * 32))
    assert abs(weight.mean()) < 4 * deviation / math.sqrt(weight.numel())
    assert abs(weight.std() / deviation - 1) < 4 / math.sqrt(2 * weight.numel())
    i, f, z, o = layer.bias.unbind(1)
    torch.testing.assert_close(f, (5 - 12 * torch.linspace(0, 1, 512) ** 0.95).expand(2, 512))
    assert not any(part.any() for part in (i, z, o, layer.recurrent))
    assert seqkern.nn.SLSTM(4, 4).bias[:, :, 0].tolist() == [[0, 5, 0, 0]] * 4
    with pytest.raises(ValueError, match="SLSTM: hidden=10 must be a multiple of num_heads=4"):
        seqkern.nn.SLSTM(8, hidden=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_slstm_dtypes(dtype):
    """Half precision is for data and weights: biases and states stay in float32."""
    layer, x = slstm(dtype=dtype)
    y, state = layer(x, return_state=True)
    with torch.no_grad():
        step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == dtype == layer.recurrent.dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert {part.dtype for part in (*state, *layer.zero_state(B), layer.bias)} == {wide}
    wanted, _ = textbook(layer.double(), x.double(), layer.zero_state(B))
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}.get(dtype, 1e-5)
    for result, exact in ((y, wanted), (step, wanted[:, 0])):
        assert (result.double() - exact).abs().max() < tolerance * wanted.abs().max()


def test_slstm_autocast():
    layer, x = slstm()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        with torch.no_grad():
            step = layer.step(x[:, 0], layer.zero_state(B))
    assert y.dtype == step.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    expected = layer(x)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert (step - y[:, 0]).abs().max() < 0.03 * expected.abs().max()


def test_slstm_compiles_without_a_break():
    layer, x = slstm()
    torch._dynamo.reset()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 5] = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, wanted = (call(x, reset=reset, return_state=True) for call in (compiled, layer))
    assert_same(outputs, wanted)
    grads = (gradients(meaning(*results), *layer.parameters()) for results in (outputs, wanted))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    moved, plain = (tuple(part.detach().clone() for part in wanted[1]) for _ in range(2))
    with torch.no_grad():
        outputs = step(x[:, 0], moved, reset=reset[:, 5]), layer.step(x[:, 0], plain, reset=reset[:, 5])
    assert_same((outputs[0], moved), (outputs[1], plain))
