"""Nonlinear recurrences without products of matrices over time: layers around `seqkern.elementwise_rnn`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._torch import accumulator
from ..ops._elementwise_rnn import CELLS
from ..ops.elementwise_rnn import elementwise_rnn, elementwise_rnn_step


class _Elementwise(nn.Module):
    """A projection of the token to the gates of a cell, and recurrent weights that act elementwise.

    The subclass names the cell, and says where parameters begin.
    """

    cell: str

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.hidden = dim, hidden or dim
        made_of = CELLS[self.cell]
        self.gates = made_of.gates
        self.empty = [-math.inf if part == "m" else 0.0 for part in made_of.published]
        self.in_proj = nn.Linear(dim, self.gates * self.hidden, device=device, dtype=dtype)  # gates in turn
        factory = {"device": device, "dtype": accumulator(self.in_proj.weight.dtype)}
        self.recurrent = nn.Parameter(torch.empty(made_of.weights, self.hidden, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def zero_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """Nothing has been seen: parts (B, hidden), float32 (float64 for float64 parameters)."""
        return tuple(self.recurrent.new_full((batch_size, self.hidden), start) for start in self.empty)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """x: (B, L, dim) -> y: (B, L, hidden), or (y, state) for the tokens that follow.

        Tokens where reset (B, L) is True start from nothing, whatever came before, a state included. cu_seqlens marks
        several sequences in a row, as in `seqkern.elementwise_rnn`; a state then has a row for each of them.
        """
        packing = {"reset": reset, "cu_seqlens": cu_seqlens}
        inputs = self._gates(x), self.recurrent, state
        return elementwise_rnn(*inputs, cell=self.cell, **packing, return_final_state=return_state)

    def step(self, x: Tensor, state: tuple[Tensor, ...], *, reset: Tensor | None = None) -> Tensor:
        """x: (B, dim), the next token -> y: (B, hidden); state moves on in place.

        Rows where reset (B,) is True start from nothing. Call under torch.no_grad().
        """
        if reset is not None:
            for part, start in zip(state, self.empty, strict=True):
                part.masked_fill_(reset[:, None], start)
        return elementwise_rnn_step(state, self._gates(x), self.recurrent, cell=self.cell)

    def _gates(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., G, hidden)
        return self.in_proj(x).unflatten(-1, (self.gates, self.hidden))

    def _rows(self, gate: int) -> slice:
        """Of in_proj, those of one gate."""
        return slice(gate * self.hidden, (gate + 1) * self.hidden)

    def extra_repr(self) -> str:
        return f"{self.dim}, hidden={self.hidden}"


class _ParaRNN(_Elementwise):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.dim + self.hidden))
        nn.init.uniform_(self.in_proj.weight, -bound, bound)
        nn.init.zeros_(self.in_proj.bias)
        self.in_proj.bias[self._rows(0)] = -torch.linspace(0, 1, self.hidden)
        nn.init.normal_(self.recurrent, std=2 / math.sqrt(5 * self.hidden))


class ParaGRU(_ParaRNN):
    r"""A GRU whose recurrent weights are vectors.

    .. math::
        z_t = \sigma(a_z \odot h_{t-1} + W_z x_t + b_z), \quad r_t = \sigma(a_r \odot h_{t-1} + W_r x_t + b_r), \\
        n_t = \tanh(a_n \odot h_{t-1} \odot r_t + W_n x_t + b_n), \quad
        h_t = (1 - z_t) \odot h_{t-1} + z_t \odot n_t

    Args:
        dim: size of a token.
        hidden: size of the output, which is the state; default dim.

    After [2510.21450]. Parameters: in_proj has the rows of W_z, W_r and W_n in turn, recurrent (3, hidden) is a_z, a_r,
    a_n and stays in float32 in a layer of 16 bits. They begin as released with the paper, for one head: W uniform
    within sqrt(6 / (dim + hidden)), a normal with deviation 2 / sqrt(5 hidden), b_z falling from 0 to -1 over the
    channels, and the other biases zero.

    A state is (h,).

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.ParaGRU(8)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    cell = "gru"


class ParaLSTM(_ParaRNN):
    r"""An LSTM whose recurrent weights are vectors, with one gate to keep and to let in, and peepholes.

    .. math::
        f_t = \sigma(a_f \odot h_{t-1} + c_f \odot c_{t-1} + W_f x_t + b_f), \quad
        g_t = \tanh(a_g \odot h_{t-1} + W_g x_t + b_g), \quad
        c_t = f_t \odot c_{t-1} + (1 - f_t) \odot g_t, \\
        o_t = \sigma(a_o \odot h_{t-1} + c_o \odot c_t + W_o x_t + b_o), \quad h_t = o_t \odot \tanh(c_t)

    Args:
        dim: size of a token.
        hidden: size of the output; default dim.

    After [2510.21450]. Parameters: in_proj has the rows of W_f, W_g and W_o in turn, recurrent (5, hidden) is a_f, a_g,
    a_o, c_f, c_o. They begin as those of `ParaGRU`, with b_f for b_z. A state is (h, c).

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.ParaLSTM(8, 12)
        >>> y, (h, c) = layer(torch.randn(2, 5, 8), return_state=True)
        >>> y.shape, torch.equal(y[:, -1], h)
        (torch.Size([2, 5, 12]), True)
    """

    cell = "lstm"


class SLSTMDiag(_Elementwise):
    r"""The sLSTM, an LSTM with exponential input gates and a normaliser, whose recurrent weights are vectors.

    .. math::
        i_t = \exp(a_i \odot h_{t-1} + W_i x_t + b_i), \quad f_t = \sigma(a_f \odot h_{t-1} + W_f x_t + b_f), \\
        z_t = \tanh(a_z \odot h_{t-1} + W_z x_t + b_z), \quad o_t = \sigma(a_o \odot h_{t-1} + W_o x_t + b_o), \\
        c_t = f_t \odot c_{t-1} + i_t \odot z_t, \quad n_t = f_t \odot n_{t-1} + i_t, \quad h_t = o_t \odot c_t / n_t

    Args:
        dim: size of a token.
        hidden: size of the output; default dim.
        layer, depth: which layer this is, counted from 0, and how many the model has. The later, the more channels
            begin with a long memory.

    After [2405.04517 sec. 2.2], where a block of recurrent weights mixes the channels of a head; here each sees itself.
    Parameters: in_proj has the rows of W_i, W_f, W_z and W_o in turn, recurrent (4, hidden) is a_i, a_f, a_z, a_o and
    stays in float32 in a layer of 16 bits. They begin as released with the paper: W normal with variance 2 / (5 dim), a
    zero, and biases zero but for b_f = 5 - 12 u^(0.3 + 1.3 layer / (depth - 1)), with u from 0 to 1 over the channels.

    A state is (h, c, n, m) as that of `seqkern.elementwise_rnn`, where exp(m) scales c and n.

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.SLSTMDiag(8, layer=1, depth=4)
        >>> x = torch.randn(2, 5, 8)
        >>> y, state = layer(x[:, :4], return_state=True)
        >>> with torch.no_grad():
        ...     last = layer.step(x[:, 4], state)
        >>> torch.allclose(last, layer(x)[:, 4], atol=1e-5)
        True
    """

    cell = "slstm"

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        layer: int = 0,
        depth: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.layer, self.depth = layer, depth
        super().__init__(dim, hidden, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.in_proj.weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.zeros_(self.in_proj.bias)
        power = 0.3 + 1.3 * self.layer / max(self.depth - 1, 1)
        self.in_proj.bias[self._rows(1)] = 5 - 12 * torch.linspace(0, 1, self.hidden) ** power
        nn.init.zeros_(self.recurrent)


class IndRNN(_Elementwise):
    r"""The independently recurrent network: every channel sees its own past alone.

    .. math:: h_t = \phi(a \odot h_{t-1} + W x_t + b)

    Args:
        dim: size of a token.
        hidden: size of the output, which is the state; default dim.
        activation: phi, "relu" or "tanh".
        length: of the sequences to train on, in tokens. Recurrent weights multiply a state by 2 at most over so many.

    After [1803.04831]: a, the parameter recurrent (1, hidden), is at first uniform between 0 and 2^(1 / length), and in
    training kept within that by `constrain` after every step of the optimizer. It is not for weight decay, and stays in
    float32 in a layer of 16 bits. W and b begin as torch.nn.Linear has them. A state is (h,).

    Example:
        >>> import torch, seqkern.nn
        >>> layer = seqkern.nn.IndRNN(8, length=100)
        >>> layer(torch.randn(2, 5, 8)).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str = "relu",
        length: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        cells = {"relu": "indrnn", "tanh": "elman"}
        if activation not in cells:
            raise ValueError(f"IndRNN: activation must be 'relu' or 'tanh', got {activation!r}")
        self.cell, self.activation, self.bound = cells[activation], activation, 2 ** (1 / length)
        super().__init__(dim, hidden, device=device, dtype=dtype)
        self.recurrent._no_weight_decay = True

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        nn.init.uniform_(self.recurrent, 0, self.bound)

    @torch.no_grad()
    def constrain(self) -> None:
        """Brings recurrent weights back between -2^(1 / length) and 2^(1 / length)."""
        self.recurrent.clamp_(-self.bound, self.bound)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
