"""Layers around the operators: parameters and calls, no mathematics of their own. Time is the second dimension."""

from .aaren import Aaren
from .conv import GatedConv
from .delta import KDA, GatedDeltaNet
from .elementwise import IndRNN, ParaGRU, ParaLSTM, SLSTMDiag
from .gla import GLA
from .hgrn import HGRN, HGRNLowerBounds
from .lru import LRU
from .mamba import Mamba
from .mamba2 import Mamba2
from .mingru import MinGRU, MinLSTM
from .mlstm import MLSTM
from .retnet import RetNet
from .rglru import RGLRU
from .rnn import GRU, LSTM, RNN, SLSTM, convert
from .s5 import S5

__all__ = [
    "GLA",
    "GRU",
    "HGRN",
    "KDA",
    "LRU",
    "LSTM",
    "MLSTM",
    "RGLRU",
    "RNN",
    "S5",
    "SLSTM",
    "Aaren",
    "GatedConv",
    "GatedDeltaNet",
    "HGRNLowerBounds",
    "IndRNN",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "ParaGRU",
    "ParaLSTM",
    "RetNet",
    "SLSTMDiag",
    "convert",
]
