"""LSTM, GRU and RNN against torch.nn's, on torch's own inputs and others; SLSTM against its equations and itself."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from layers import DIM, B, L, small, some_state
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import module_inputs_torch_nn_LSTM, module_inputs_torch_nn_RNN_GRU

import seqkern.nn

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pair(kind, *args, dtype=torch.float64, **options):
    """torch's module and ours, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(*args, dtype=dtype, **options)
    ours = getattr(seqkern.nn, kind)(*args, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(*structures):
    """Those in outputs and arguments of a module, in order."""
    found = []
    for structure in structures:
        if isinstance(structure, torch.Tensor):
            found.append(structure)
        elif isinstance(structure, PackedSequence):
            found.append(structure.data)
        elif structure is not None:
            found += tensors(*structure)
    return found


def assert_same_results(theirs, ours, *args, **tolerances):
    """Outputs, and the gradients of parameters and of what requires one among the arguments."""
    results = []
    for module in (theirs, ours):
        outputs = module(*args)
        torch.manual_seed(1)
        leaves = [*module.parameters(), *(leaf for leaf in tensors(args) if leaf.requires_grad)]
        cotangents = [torch.randn_like(output) for output in tensors(outputs)]
        results.append((outputs, torch.autograd.grad(tensors(outputs), leaves, cotangents)))
    (wanted, wanted_grads), (outputs, grads) = results
    torch.testing.assert_close(outputs, wanted, **tolerances)
    for output, other in zip(tensors(outputs), tensors(wanted), strict=True):
        assert output.stride() == other.stride()
    torch.testing.assert_close(grads, wanted_grads, **tolerances)
    assert all(grad.abs().max() > 0 for grad in grads if grad.numel())


def random_hx(kind, layers, batch, P, Q=None, dtype=torch.float64):
    sizes = (Q or P, P) if kind == "LSTM" else (P,)
    parts = [torch.randn(layers, *batch, size, dtype=dtype, requires_grad=True) for size in sizes]
    return tuple(parts) if kind == "LSTM" else parts[0]


# ---- against torch.nn


def test_torchs_own_inputs(kind):
    """Of PyTorch's test suite, with the classes swapped."""
    options = dict(module_info=None, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    if kind == "LSTM":
        samples = module_inputs_torch_nn_LSTM(**options)
    else:
        is_rnn = kind == "RNN"
        samples = module_inputs_torch_nn_RNN_GRU(**options, is_rnn=is_rnn, with_packed_sequence=True)
    assert len(samples) >= 32
    for sample in samples:
        modules = pair(kind, *sample.constructor_input.args, **sample.constructor_input.kwargs)
        assert_same_results(*modules, *sample.forward_input.args, **sample.forward_input.kwargs)
