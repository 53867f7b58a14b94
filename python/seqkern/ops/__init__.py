"""One module per operator: function, step function, reference, autograd, shapes for tracing."""

from . import causal_conv1d, linear_scan, selective_scan, softmax_scan

_OPERATORS = (causal_conv1d, linear_scan, selective_scan, softmax_scan)


def register(namespace: str) -> None:
    """Teach torch the shapes and derivatives of every operator in torch.ops.<namespace>."""
    for operator in _OPERATORS:
        operator.register(namespace)
