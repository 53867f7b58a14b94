"""Competitors of rnn, as a layer of torch.nn or by itself, and of rnn_step."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence

from peers import Peer, compiled

SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})
LAYERS = {"lstm": "LSTM", "gru": "GRU", "elman_tanh": "RNN"}

# ---- layers


def layer(namespace, cell: str):
    """A layer of torch.nn or of seqkern.nn, as a function of its input and its weights."""
    modules = {}

    def function(input, batch_sizes=None, **weights):
        sizes = weights["weight_ih_l0"].shape[1], weights["weight_hh_l0"].shape[1]
        module = modules.setdefault(sizes, None) or _module(getattr(namespace, LAYERS[cell]), *sizes, weights)
        modules[sizes] = module.train(torch.is_grad_enabled())
        for name, weight in weights.items():
            module._parameters.pop(name, None)
            setattr(module, name, weight)  # torch.nn's also put it where they look for it
        h, _ = module(input if batch_sizes is None else PackedSequence(input, batch_sizes))
        return h if batch_sizes is None else h.data

    return function


def _module(kind, inputs: int, outputs: int, weights: dict):
    if "weight_hr_l0" not in weights:
        return kind(inputs, outputs, batch_first=True, device="meta")
    return kind(inputs, weights["weight_hr_l0"].shape[1], proj_size=outputs, batch_first=True, device="meta")


# ---- sLSTM by itself


def slstm(x, R, bias, state):
    h, c, n, m = state
    i, f, z, o = (x + (h.transpose(0, 1) @ R).transpose(0, 1).view_as(x) + bias).unbind(2)
    f = F.logsigmoid(f) + m
    m = torch.maximum(i, f)
    i, f = torch.exp(i - m), torch.exp(f - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def slstm_loop(step=slstm):
    def loop(x, R, bias, cell):
        zeros = x.new_zeros(x.shape[0], x.shape[2], x.shape[4])
        state, hs = (zeros, zeros, zeros, zeros - torch.inf), []
        R = R.flatten(1, 2).transpose(1, 2)  # (H, Q, G P)
        for x_t in x.unbind(1):
            state = step(x_t, R, bias, state)
            hs.append(state[0])
        return torch.stack(hs, dim=1)

    return loop


# ---- steps


def lstm_cell():
    """torch.lstm_cell multiplies the input as well: here its product is given, so the cell is written out."""

    def step(x, R, bias, state0, state1):
        B, _, G, P = x.shape
        u = torch.addmm(bias.view(-1), state0.view(B, P), R.view(G * P, P).t()) + x.view(B, G * P)
        i, f, g, o = u.chunk(4, dim=1)
        c = torch.sigmoid(f) * state1.view(B, P) + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        state0.copy_(h.view_as(state0))
        state1.copy_(c.view_as(state1))
        return h.view(B, 1, P)

    return step


def _options(cell, *more):
    return frozenset({cell, *more})


PEERS = (
    *(
        Peer("torch", lambda cell=cell: layer(torch.nn, cell), SEQUENCES, options=_options(cell, *more))
        for cell, more in (
            ("lstm", ()),
            ("gru", ()),
            ("elman_tanh", ()),
            ("lstm", ("packed",)),
            ("gru", ("packed",)),
            ("lstm", ("proj",)),
        )
    ),
    Peer("torch", slstm_loop, SEQUENCES, options=_options("slstm")),
    Peer("compiled", lambda: slstm_loop(compiled(slstm)()), SEQUENCES, options=_options("slstm"), compiles=True),
    Peer("torch", lstm_cell, STEP, options=_options("lstm")),
    Peer("compiled", lambda: torch.compile(lstm_cell()), STEP, options=_options("lstm"), compiles=True),
)
