"""Hand-written kernels for recurrent sequence models, for CPU and CUDA, as differentiable PyTorch functions."""

from importlib.metadata import version

from . import nn, ops, reference
from ._config import batch_invariant
from ._routes import pack_by_route
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from .ops.delta_rule import delta_rule, delta_rule_step
from .ops.elementwise_rnn import elementwise_rnn, elementwise_rnn_step
from .ops.linear_attention import gla, linear_attention, linear_attention_step, retention, rwkv6
from .ops.linear_scan import linear_scan, linear_scan_step
from .ops.mlstm import mlstm, mlstm_step
from .ops.rnn import rnn, rnn_step
from .ops.selective_scan import selective_scan, selective_scan_step
from .ops.softmax_scan import softmax_scan, softmax_scan_step
from .ops.ssd import ssd, ssd_step

__version__ = version("seqkern")
__all__ = [
    "__version__",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_rule",
    "delta_rule_step",
    "elementwise_rnn",
    "elementwise_rnn_step",
    "gla",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "mlstm",
    "mlstm_step",
    "nn",
    "pack_by_route",
    "reference",
    "retention",
    "rnn",
    "rnn_step",
    "rwkv6",
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
    "ssd",
    "ssd_step",
]

ops.register("seqkern")
