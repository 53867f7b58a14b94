"""The recurrences in plain torch, the truth that kernels are tested against: same signatures, any dtype, slow."""

from .ops.causal_conv1d import reference as causal_conv1d
from .ops.causal_conv1d import reference_step as causal_conv1d_step
from .ops.delta_rule import reference as delta_rule
from .ops.delta_rule import reference_step as delta_rule_step
from .ops.elementwise_rnn import reference as elementwise_rnn
from .ops.elementwise_rnn import reference_step as elementwise_rnn_step
from .ops.linear_attention import reference as linear_attention
from .ops.linear_attention import reference_step as linear_attention_step
from .ops.linear_scan import reference as linear_scan
from .ops.linear_scan import reference_step as linear_scan_step
from .ops.mlstm import reference as mlstm
from .ops.mlstm import reference_step as mlstm_step
from .ops.rnn import reference as rnn
from .ops.rnn import reference_step as rnn_step
from .ops.selective_scan import reference as selective_scan
from .ops.selective_scan import reference_step as selective_scan_step
from .ops.softmax_scan import reference as softmax_scan
from .ops.softmax_scan import reference_step as softmax_scan_step
from .ops.ssd import reference as ssd
from .ops.ssd import reference_step as ssd_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_rule",
    "delta_rule_step",
    "elementwise_rnn",
    "elementwise_rnn_step",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "mlstm",
    "mlstm_step",
    "rnn",
    "rnn_step",
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
    "ssd",
    "ssd_step",
]
