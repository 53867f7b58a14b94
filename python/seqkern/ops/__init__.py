"""One module per operator: function, step function, reference, autograd, shapes for tracing."""

from . import (  # noqa: F401
    causal_conv1d,
    delta_rule,
    elementwise_rnn,
    linear_attention,
    linear_scan,
    mlstm,
    rnn,
    selective_scan,
    softmax_scan,
    ssd,
)

# Those with operators of their own: mlstm and ssd call those of linear_attention.
_OPERATORS = (
    causal_conv1d,
    delta_rule,
    elementwise_rnn,
    linear_attention,
    linear_scan,
    rnn,
    selective_scan,
    softmax_scan,
)


def register(namespace: str) -> None:
    """Teach torch the shapes and derivatives of every operator in torch.ops.<namespace>."""
    for operator in _OPERATORS:
        operator.register(namespace)
