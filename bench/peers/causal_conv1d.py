"""Competitors of causal_conv1d and causal_conv1d_step."""

import torch
import torch.nn.functional as F

from peers import Missing, Peer, compiled, functions_of_sdist, installed, of_transformers

SEQUENCES = frozenset({"forward", "forward+backward"})
STEP = frozenset({"step"})

# ---- plain torch, and our own best loops


def conv1d(x, weight, bias, activation):
    D, W = weight.shape
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=W - 1, groups=D)[..., : x.shape[-1]])


def conv2d_channels_last(x, weight, bias, activation):
    """As an image of height 1, whose channels_last layout the library has kernels of its own for."""
    D, W = weight.shape
    image = x[:, :, None].contiguous(memory_format=torch.channels_last)
    return F.silu(F.conv2d(image, weight[:, None, None], bias, padding=(0, W - 1), groups=D)[:, :, 0, : x.shape[-1]])


def shifted(x, weight, bias, activation):
    """A sum of W shifted products, added up in place."""
    W = weight.shape[1]
    y = torch.addcmul(bias[:, None], x, weight[:, -1:])
    for shift in range(1, W):
        y[..., shift:].addcmul_(x[..., :-shift], weight[:, W - 1 - shift, None])
    return F.silu(y, inplace=True)


def shifted_padded(x, weight, bias, activation):
    """A sum of W shifted products in one expression, for torch.compile to fuse."""
    W, L = weight.shape[1], x.shape[-1]
    history = F.pad(x, (W - 1, 0))
    return F.silu(sum((weight[:, j, None] * history[..., j : j + L] for j in range(W)), bias[:, None]))


def conv1d_each(x, weight, bias, activation, cu_seqlens):
    """A pack, one sequence after another."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([conv1d(piece, weight, bias, activation) for piece in x.split(lengths, dim=-1)], dim=-1)


def shifted_masked(x, weight, bias, activation, cu_seqlens):
    """A pack at once: a product counts where both tokens belong to one sequence."""
    W, L = weight.shape[1], x.shape[-1]
    token = torch.arange(L, device=x.device)
    position = token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    y = bias[:, None] + weight[:, -1:] * x
    for shift in range(1, W):
        earlier = F.pad(x[..., :-shift], (shift, 0)) * (position >= shift)
        y = y + weight[:, W - 1 - shift, None] * earlier
    return F.silu(y)


def step(x, conv_state, weight, bias, activation):
    history = torch.cat([conv_state, x[..., None]], dim=-1)
    conv_state.copy_(history[..., 1:])
    return F.silu((history * weight).sum(-1) + bias)


def step_unrolled(x, conv_state, weight, bias, activation):
    """The same with column by column arithmetic, for torch.compile to fuse."""
    W = weight.shape[1]
    columns = [*conv_state.unbind(-1), x]
    y = F.silu(sum((weight[:, j] * columns[j] for j in range(W)), bias))
    conv_state.copy_(torch.stack(columns[1:], dim=-1))
    return y


# ---- other projects


def _reference_of_causal_conv1d(name: str):
    """Their plain torch reference, of the installed package or else of a source distribution."""
    try:
        return getattr(installed("causal_conv1d.causal_conv1d_interface"), name)
    except Missing:
        return functions_of_sdist("causal_conv1d/causal_conv1d_interface.py", (name,), {"torch": torch, "F": F})[0]


def _causal_conv1d_ref():
    function = _reference_of_causal_conv1d("causal_conv1d_ref")
    return lambda x, weight, bias, activation: function(x, weight, bias, activation=activation)


def _causal_conv1d_update_ref():
    function = _reference_of_causal_conv1d("causal_conv1d_update_ref")
    return lambda x, conv_state, weight, bias, activation: function(x, conv_state, weight, bias, activation)


def _causal_conv1d_fn():
    function = installed("causal_conv1d").causal_conv1d_fn
    return lambda x, weight, bias, activation: function(x, weight, bias, activation=activation)


def _causal_conv1d_update():
    function = installed("causal_conv1d").causal_conv1d_update
    return lambda x, conv_state, weight, bias, activation: function(x, conv_state, weight, bias, activation)


def _transformers_fn():
    function = of_transformers("causal_conv1d_fn")
    return lambda x, weight, bias, activation: function(x, weight, bias, activation=activation)


def _transformers_update():
    function = of_transformers("causal_conv1d_update")

    def update(x, conv_state, weight, bias, activation):
        return function(x[..., None], conv_state, weight, bias, activation)[..., 0]

    return update


CUDA = frozenset({"cuda"})
PACK = frozenset({"cu_seqlens"})

PEERS = (
    Peer("torch", lambda: conv1d, SEQUENCES),
    Peer("torch", lambda: conv1d_each, SEQUENCES, options=PACK),
    Peer("torch", lambda: step, STEP),
    Peer("compiled", compiled(conv1d), SEQUENCES, compiles=True),
    Peer("compiled", compiled(step_unrolled), STEP, compiles=True),
    Peer("channels-last", lambda: conv2d_channels_last, SEQUENCES),
    Peer("shifted", lambda: shifted, frozenset({"forward"})),
    Peer("shifted", lambda: shifted_padded, frozenset({"forward+backward"})),
    Peer("shifted", lambda: shifted_masked, SEQUENCES, options=PACK),
    Peer("shifted compiled", compiled(shifted_padded), SEQUENCES, compiles=True),
    Peer("causal-conv1d ref", _causal_conv1d_ref, SEQUENCES),
    Peer("causal-conv1d ref", _causal_conv1d_update_ref, STEP),
    Peer("causal-conv1d", _causal_conv1d_fn, SEQUENCES, devices=CUDA),
    Peer("causal-conv1d", _causal_conv1d_update, STEP, devices=CUDA),
    Peer("transformers", _transformers_fn, SEQUENCES),
    Peer("transformers", _transformers_update, STEP),
)
