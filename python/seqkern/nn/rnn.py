"""Recurrent networks with matrices between the units: torch.nn's, and the sLSTM, around `seqkern.rnn`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._torch import accumulator
from ..ops.rnn import rnn, rnn_step

__all__ = ["GRU", "LSTM", "RNN", "SLSTM", "convert"]

State = tuple[Tensor, ...]

# ---- torch.nn's modules


class _DropIn(nn.RNNBase):
    """Parameters, checks of arguments and their messages are RNNBase's, what a module computes is here.

    Not a subclass of torch.nn's own LSTM, GRU or RNN, which torch.compile refuses to trace.
    """

    original: type[nn.RNNBase]
    cells: dict[str, str]  # of `seqkern.rnn`, by RNNBase's mode
    zoneout, recurrent_dropout, grad_clip = 0.0, 0.0, None  # of what `convert` has made

    def __init__(
        self,
        mode: str,
        *args,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        grad_clip: float | None = None,
        **kwargs,
    ):
        super().__init__(mode, *args, **kwargs)
        self.zoneout, self.recurrent_dropout, self.grad_clip = zoneout, recurrent_dropout, grad_clip

    def forward(self, input: Tensor | PackedSequence, hx=None):
        """As torch.nn's: input (L, B, input_size), (B, L, input_size) with batch_first, (L, input_size), or a pack."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        dims = input.dim()
        if dims not in (2, 3) or (hx is not None and any(part.dim() != dims for part in self._parts(hx))):
            return self.original.forward(self, input, hx)  # says what is wrong
        if dims == 3:
            y, parts = self._layers(input, self._checked(input, hx), time_first=not self.batch_first)
            return y, self._hx(parts)
        batch = 0 if self.batch_first else 1
        hx = None if hx is None else self._hx(tuple(part.unsqueeze(1) for part in self._parts(hx)))
        y, hx = self.forward(input.unsqueeze(batch), hx)
        return y.squeeze(batch), self._hx(tuple(part.squeeze(1) for part in self._parts(hx)))

    def _forward_packed(self, input: PackedSequence, hx):
        x, batch_sizes, to_sorted, from_sorted = input
        parts = self._checked(x, None if hx is None else self.permute_hidden(hx, to_sorted), batch_sizes)
        cu_seqlens, order, place = (indices.to(x.device) for indices in _sequences(batch_sizes))
        y, parts = self._layers(x.index_select(0, order)[None], parts, cu_seqlens=cu_seqlens)
        y = PackedSequence(y[0].index_select(0, place), batch_sizes, to_sorted, from_sorted)
        return y, self.permute_hidden(self._hx(parts), from_sorted)

    def _layers(
        self, x: Tensor, hx: State | None, *, time_first: bool = False, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Checked arguments, x (B, L, input_size) or, with time_first, (L, B, input_size) -> y, parts of hx."""
        directions, all_weights, dtype, finals = 1 + self.bidirectional, self.all_weights, x.dtype, []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for reverse in range(directions):
                k = len(finals)
                state = None if hx is None else tuple(part[k].unsqueeze(1) for part in hx)
                y, final = self._direction(x, all_weights[k], state, reverse == 1, time_first, cu_seqlens)
                outputs.append(y)
                finals.append(final)
            x = y if directions == 1 else torch.cat(outputs, dim=-1)
        return x, tuple(_stacked(parts).to(dtype) for parts in zip(*finals, strict=True))

    def _direction(
        self,
        x: Tensor,
        weights: list[Tensor],
        state: State | None,
        reverse: bool,
        time_first: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, State]:
        """One direction of a layer: `seqkern.rnn` with one head."""
        w_ih, w_hh, *others = weights
        b_ih, b_hh = others[:2] if self.bias else (None, None)
        if self.bias and self.mode != "GRU":  # which has a product between them
            b_ih, b_hh = None, b_ih + b_hh  # spares a pass over all gates, and one over their gradient
        P, Q = self.hidden_size, w_hh.shape[1]
        G = w_hh.shape[0] // P
        gates = F.linear(x, w_ih, b_ih)
        gates = gates.view(*gates.shape[:2], 1, G, P)
        h, final = rnn(
            gates.transpose(0, 1) if time_first else gates,
            w_hh.view(1, G, P, Q),
            None if b_hh is None else b_hh.view(1, G, P),
            state,
            cell=self.cells[self.mode],
            proj=others[-1].unsqueeze(0) if self.proj_size else None,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            grad_clip=self.grad_clip,
            training=self.training,
            return_final_state=True,
        )
        y = h.squeeze(2)
        return y.transpose(0, 1) if time_first else y, final

    def _checked(self, x: Tensor, hx, batch_sizes: Tensor | None = None) -> State | None:
        """The parts of hx, after RNNBase's checks of batched arguments."""
        if x.dtype != self._flat_weights[0].dtype:
            self._update_flat_weights()  # torch.func.functional_call may have put others in the parameters' place
        if hx is None:
            self.check_input(x, batch_sizes)
            return None
        self.check_forward_args(x, hx, batch_sizes)
        return self._parts(hx)

    def _parts(self, hx) -> State:
        return (hx,)

    def _hx(self, parts: State):
        return parts[0]

    def extra_repr(self) -> str:
        named = [(name, getattr(self, name)) for name in ("zoneout", "recurrent_dropout", "grad_clip")]
        changed = [f", {name}={value}" for name, value in named if value != getattr(_DropIn, name)]
        return super().extra_repr() + "".join(changed)


def _stacked(finals: tuple[Tensor, ...]) -> Tensor:
    """(k, N, P) of k states (N, 1, P)."""
    finals = [final.transpose(0, 1) for final in finals]
    return finals[0] if len(finals) == 1 else torch.cat(finals)


def _sequences(batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a PackedSequence: cu_seqlens, the token of the pack at each place of its sequences in a row, and the opposite.

    Its sequences are ordered by length, the longest first; of token t it has batch_sizes[t].
    """
    L, N, total = len(batch_sizes), int(batch_sizes[0]), int(batch_sizes.sum())
    ends = batch_sizes - torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])  # sequences of length t + 1
    lengths = torch.arange(1, L + 1).repeat_interleave(ends).flip(0)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    places = torch.arange(total)
    t = places - cu_seqlens[:-1].repeat_interleave(lengths)
    order = (batch_sizes.cumsum(0) - batch_sizes)[t] + torch.arange(N).repeat_interleave(lengths)
    return cu_seqlens, order, torch.empty_like(order).scatter_(0, order, places)


class LSTM(_DropIn):
    """torch.nn.LSTM by the kernels of `seqkern.rnn`.

    Args:
        *args, **kwargs: those of torch.nn.LSTM.
        zoneout, recurrent_dropout, grad_clip: of `seqkern.rnn`, in every layer. The first two act in training; at
            inference the output of an LSTM with zoneout is the mean.

    Arguments, parameters and their names, results, errors and initial values are those of torch.nn.LSTM: multiple
    layers with dropout between them, both directions, projections, batch_first, a PackedSequence, input without a batch
    dimension. It compiles without a graph break, and has second derivatives, forward mode and torch.func.vmap.
    Sequences may be empty. TorchScript does not know it.

    Example:
        >>> import torch, seqkern.nn
        >>> theirs, ours = torch.nn.LSTM(8, 16, 2, bidirectional=True), seqkern.nn.LSTM(8, 16, 2, bidirectional=True)
        >>> ours.load_state_dict(theirs.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(5, 3, 8)
        >>> y, (h, c) = ours(x)
        >>> torch.allclose(y, theirs(x)[0], atol=1e-5), h.shape
        (True, torch.Size([4, 3, 16]))
    """

    original, cells = nn.LSTM, {"LSTM": "lstm"}
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def _parts(self, hx: State) -> State:
        return hx

    def _hx(self, parts: State) -> State:
        return parts


class GRU(_DropIn):
    """torch.nn.GRU by the kernels of `seqkern.rnn`; see `LSTM`.

    Args:
        *args, **kwargs: those of torch.nn.GRU.
        zoneout, recurrent_dropout, grad_clip: as in `LSTM`.

    Example:
        >>> import torch, seqkern.nn
        >>> y, h = seqkern.nn.GRU(8, 16, batch_first=True)(torch.randn(3, 5, 8))
        >>> y.shape, torch.equal(y[:, -1], h[0])
        (torch.Size([3, 5, 16]), True)
    """

    original, cells = nn.GRU, {"GRU": "gru"}

    def __init__(self, *args, **kwargs):
        _forbid_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)


class RNN(_DropIn):
    """torch.nn.RNN by the kernels of `seqkern.rnn`; see `LSTM`.

    Args:
        *args, **kwargs: those of torch.nn.RNN.
        zoneout, recurrent_dropout, grad_clip: as in `LSTM`.

    Example:
        >>> import torch, seqkern.nn
        >>> y, h = seqkern.nn.RNN(8, 16, nonlinearity="relu")(torch.randn(5, 3, 8))
        >>> y.shape, torch.equal(y[-1], h[0])
        (torch.Size([5, 3, 16]), True)
    """

    original, cells = nn.RNN, {"RNN_TANH": "elman_tanh", "RNN_RELU": "elman_relu"}

    def __init__(self, *args, **kwargs):
        _forbid_proj_size(kwargs)
        if len(args) > 3:
            self.nonlinearity, args = args[3], (*args[:3], *args[4:])
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


def _forbid_proj_size(kwargs: dict) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def convert(model: nn.Module) -> nn.Module:
    """Makes every torch.nn.LSTM, GRU and RNN in a model seqkern's, in place, and returns the model.

    Parameters, hooks and options stay. Modules of classes derived from torch's stay what they are.

    Example:
        >>> import torch, seqkern.nn
        >>> model = seqkern.nn.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GRU(8, 16)))
        >>> type(model[1]) is seqkern.nn.GRU
        True
    """
    ours = {drop_in.original: drop_in for drop_in in (LSTM, GRU, RNN)}
    for module in model.modules():
        if type(module) in ours:
            module.__class__ = ours[type(module)]
    return model


# ---- the sLSTM


class SLSTM(nn.Module):
    r"""The sLSTM, an LSTM with exponential input gates and a normaliser, whose units see each other within a head.

    .. math::
        i_t = \exp(R_i h_{t-1} + W_i x_t + b_i), \quad f_t = \sigma(R_f h_{t-1} + W_f x_t + b_f), \\
        z_t = \tanh(R_z h_{t-1} + W_z x_t + b_z), \quad o_t = \sigma(R_o h_{t-1} + W_o x_t + b_o), \\
        c_t = f_t \odot c_{t-1} + i_t \odot z_t, \quad n_t = f_t \odot n_{t-1} + i_t, \quad h_t = o_t \odot c_t / n_t

    Args:
        dim: size of a token.
        num_heads: blocks that R has on its diagonal.
        hidden: size of the output, of all heads together; default dim.
        zoneout, recurrent_dropout, grad_clip: of `seqkern.rnn`. The first two act in training; at inference the output
            of a layer with zoneout is the mean.
        layer, depth: which layer this is, counted from 0, and how many the model has. The later, the more units begin
            with a long memory.

    After [2405.04517 sec. 2.2]. Parameters: in_proj has a row of W for every head, gate (i, f, z, o) and unit in turn,
    recurrent (H, 4, P, P) is R, output before input, and bias (H, 4, P) is b, which stays in float32 in a layer of 16
    bits. They begin as released with the paper: W normal with variance 2 / (5 dim), R zero, and biases zero but for
    b_f = 5 - 12 u^(0.3 + 1.3 layer / (depth - 1)), with u from 0 to 1 over the units of a head.

    A state is (h, c, n, m), each (B, H, P), as that of `seqkern.rnn`, where exp(m) scales c and n.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.SLSTM(8, num_heads=2, layer=1, depth=4)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        hidden: int | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        grad_clip: float | None = None,
        layer: int = 0,
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = hidden or dim
        if hidden % num_heads:
            raise ValueError(f"SLSTM: hidden={hidden} must be a multiple of num_heads={num_heads}")
        self.dim, self.num_heads, self.head_size = dim, num_heads, hidden // num_heads
        self.zoneout, self.recurrent_dropout, self.grad_clip = zoneout, recurrent_dropout, grad_clip
        self.layer, self.depth = layer, depth
        self.in_proj = nn.Linear(dim, 4 * hidden, bias=False, device=device, dtype=dtype)
        P, weight = self.head_size, self.in_proj.weight
        self.recurrent = nn.Parameter(weight.new_empty(num_heads, 4, P, P))
        self.bias = nn.Parameter(weight.new_empty(num_heads, 4, P, dtype=accumulator(weight.dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj.weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        power = 0.3 + 1.3 * self.layer / max(self.depth - 1, 1)
        self.bias[:, 1] = 5 - 12 * torch.linspace(0, 1, self.head_size, device=self.bias.device) ** power

    def zero_state(self, batch_size: int) -> State:
        """Nothing has been seen: parts (B, H, P), float32 (float64 for float64 parameters)."""
        shape = batch_size, self.num_heads, self.head_size
        return tuple(self.bias.new_full(shape, start) for start in (0.0, 0.0, 0.0, -math.inf))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """x: (B, L, dim) -> y: (B, L, hidden), or (y, state) for the tokens that follow.

        Tokens where reset (B, L) is True start from nothing, whatever came before, a state included. cu_seqlens marks
        several sequences in a row, as in `seqkern.rnn`; a state then has a row for each of them.
        """
        options = {
            **{"cell": "slstm", "cu_seqlens": cu_seqlens, "reset": reset, "training": self.training},
            **{"zoneout": self.zoneout, "recurrent_dropout": self.recurrent_dropout, "grad_clip": self.grad_clip},
        }
        outputs = rnn(self._gates(x), self.recurrent, self.bias, state, **options, return_final_state=return_state)
        return (outputs[0].flatten(2), outputs[1]) if return_state else outputs.flatten(2)

    def step(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> Tensor:
        """x: (B, dim), the next token -> y: (B, hidden); state moves on in place, as at inference.

        Rows where reset (B,) is True start from nothing. Call under torch.no_grad().
        """
        if reset is not None:
            for part, start in zip(state, (0.0, 0.0, 0.0, -math.inf), strict=True):
                part.masked_fill_(reset[:, None, None], start)
        gates = self._gates(x)
        return rnn_step(state, gates, self.recurrent, self.bias, cell="slstm", zoneout=self.zoneout).flatten(1)

    def _gates(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., H, G, P)
        return self.in_proj(x).unflatten(-1, (self.num_heads, 4, self.head_size))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, hidden={self.num_heads * self.head_size}"
