"""Layers around the operators: parameters and calls, no mathematics of their own. Time is the second dimension."""

from .conv import GatedConv
from .mamba import Mamba

__all__ = ["GatedConv", "Mamba"]
