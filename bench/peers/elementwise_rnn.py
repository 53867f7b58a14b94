"""Competitors of elementwise_rnn and elementwise_rnn_step."""

import torch
import torch.nn.functional as F

from peers import Peer, compiled, installed

FORWARD = frozenset({"forward"})
SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})

# ---- torch: cells of the state, as a tuple


def gru(w, x, state):
    (h,) = state
    z, r = torch.sigmoid(w[0] * h + x[0]), torch.sigmoid(w[1] * h + x[1])
    return (torch.lerp(h, torch.tanh(w[2] * h * r + x[2]), z),)


def lstm(w, x, state):
    h, c = state
    f, g = torch.sigmoid(w[0] * h + w[3] * c + x[0]), torch.tanh(w[1] * h + x[1])
    c = torch.lerp(g, c, f)
    return torch.sigmoid(w[2] * h + w[4] * c + x[2]) * torch.tanh(c), c


def slstm(w, x, state):
    h, c, n, m = state
    i, f = w[0] * h + x[0], F.logsigmoid(w[1] * h + x[1]) + m
    m = torch.maximum(i, f)
    i, f = torch.exp(i - m), torch.exp(f - m)
    c, n = f * c + i * torch.tanh(w[2] * h + x[2]), f * n + i
    return torch.sigmoid(w[3] * h + x[3]) * c / n, c, n, m


def indrnn(w, x, state):
    return (torch.relu(w[0] * state[0] + x[0]),)


def elman(w, x, state):
    return (torch.tanh(w[0] * state[0] + x[0]),)


CELLS = {"gru": gru, "lstm": lstm, "slstm": slstm, "indrnn": indrnn, "elman": elman}
PARTS = {"gru": 1, "lstm": 2, "slstm": 4, "indrnn": 1, "elman": 1}


def empty(cell, x):
    zeros = x.new_zeros(x.shape[0], x.shape[-1], dtype=torch.float32)
    return (*(PARTS[cell] - 1) * (zeros,), zeros - torch.inf) if cell == "slstm" else PARTS[cell] * (zeros,)


def loop(x, weights, cell):
    step, state, hs = CELLS[cell], empty(cell, x), []
    for x_t in x.float().unbind(1):
        state = step(weights, x_t.unbind(1), state)
        hs.append(state[0])
    return torch.stack(hs, dim=1).to(x.dtype)


def loop_each(cu_seqlens, x, weights, cell):
    """A pack, one sequence after another."""
    pieces = x.split(cu_seqlens.diff().tolist(), 1)
    return torch.cat([loop(piece, weights, cell) for piece in pieces], dim=1)


def loop_compiled():
    """Sixteen tokens at a time under torch.compile."""
    step = compiled(_tokens_at_once)()

    def loop(x, weights, cell):
        state, hs = empty(cell, x), []
        for piece in x.split(16, dim=1):
            state, h = step(state, piece, weights, CELLS[cell])
            hs.append(h)
        return torch.cat(hs, dim=1).to(x.dtype)

    return loop


def _tokens_at_once(state, x, weights, cell):
    hs = []
    for x_t in x.float().unbind(1):
        state = cell(weights, x_t.unbind(1), state)
        hs.append(state[0])
    return state, torch.stack(hs, dim=1)


def step_of(cell):
    def step(x, weights, **state):
        parts = tuple(state.values())
        after = CELLS[cell](weights, x.float().unbind(1), parts)
        for part, value in zip(parts, after, strict=True):
            part.copy_(value)
        return after[0].to(x.dtype)

    return step


# ---- torch.nn, and other projects


def torch_gru():
    """torch.nn.GRU with matrices of which only the diagonal is not zero, whose products it computes all the same; what
    enters a gate goes through a matrix as well. Its update gate is 1 - z."""

    def function(x, weights, cell):
        B, _, _, D = x.shape
        eye, zero = torch.eye(D), torch.zeros(D, D)
        enters = torch.cat([torch.cat(row, 1) for row in ([zero, eye, zero], [-eye, zero, zero], [zero, zero, eye])])
        recurrent = torch.cat([torch.diag(weights[1]), torch.diag(-weights[0]), torch.diag(weights[2])])
        h0 = torch.zeros(1, B, D)
        return torch.gru(x.flatten(2), h0, [enters, recurrent], False, 1, 0.0, x.requires_grad, False, True)[0]

    return function


def pararnn():
    """pararnn-torch: Newton's method with a fixed number of iterations, in eager mode on a CPU, fused on CUDA. Without
    its projection of the input, which its backward cannot do without."""
    package = installed("pararnn")

    def function(x, weights, cell):
        D = x.shape[-1]
        gru = package.ParaGRU(3 * D, D, max_recurrent_norm=None, device=x.device)
        gru.W_x = torch.nn.Identity()
        for name, weight in zip(("a_z", "a_r", "a_n"), weights, strict=True):
            delattr(gru, name)
            setattr(gru, name, weight)
        return package.newton_apply(gru, x.flatten(2))

    return function


def _dense(row):
    return "matrices of 3 D by 3 D: in rows of at most 512 channels" if row.shape[-1] > 512 else ""


PEERS = (
    *(Peer("torch", lambda: loop, SEQUENCES, options=frozenset({cell}), slow=True) for cell in CELLS),
    Peer("torch", lambda: loop_each, SEQUENCES, options=frozenset({"gru", "cu_seqlens"})),
    *(Peer("torch", lambda cell=cell: step_of(cell), STEP, options=frozenset({cell})) for cell in CELLS),
    Peer("compiled", loop_compiled, SEQUENCES, options=frozenset({"gru"}), compiles=True),
    *(
        Peer("compiled", lambda cell=cell: torch.compile(step_of(cell)), STEP, options=frozenset({cell}), compiles=True)
        for cell in ("gru", "lstm")
    ),
    Peer("torch.nn.GRU", torch_gru, SEQUENCES, options=frozenset({"gru"}), slow=True, unfit=_dense),
    Peer("pararnn", pararnn, FORWARD, options=frozenset({"gru"}), slow=True),
)
