"""Layers around the operators: parameters and calls, no mathematics of their own. Time is the second dimension."""

from .aaren import Aaren
from .conv import GatedConv
from .hgrn import HGRN, HGRNLowerBounds
from .lru import LRU
from .mamba import Mamba
from .mingru import MinGRU, MinLSTM
from .rglru import RGLRU
from .s5 import S5

__all__ = ["HGRN", "LRU", "RGLRU", "S5", "Aaren", "GatedConv", "HGRNLowerBounds", "Mamba", "MinGRU", "MinLSTM"]
