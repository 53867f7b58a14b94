"""Layers around the operators: parameters and calls, no mathematics of their own. Time is the second dimension."""

from .conv import GatedConv

__all__ = ["GatedConv"]
