"""Hand-written kernels for recurrent sequence models, for CPU and CUDA, as differentiable PyTorch functions."""

from importlib.metadata import version

from . import nn, ops, reference
from ._config import batch_invariant
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from .ops.linear_scan import linear_scan, linear_scan_step
from .ops.selective_scan import selective_scan, selective_scan_step
from .ops.softmax_scan import softmax_scan, softmax_scan_step

__version__ = version("seqkern")
__all__ = [
    "__version__",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_step",
    "linear_scan",
    "linear_scan_step",
    "nn",
    "reference",
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
]

ops.register("seqkern")
