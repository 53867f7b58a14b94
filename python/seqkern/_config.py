"""Settings that change what a call does, scoped by context managers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Settings(threading.local):
    batch_invariant = False


settings = _Settings()


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within this context results do not depend on how a batch is put together, bitwise.

    A sequence then gives the same bits alone, as one row of a larger batch, packed behind others with ``cu_seqlens``,
    and with any number of threads. Operators whose plan would split time differently by batch size stop doing so.
    ``causal_conv1d`` has this property always. Weight gradients are sums over the batch and depend on it.

    Example:
        >>> import torch, seqkern
        >>> x, weight = torch.randn(2, 3, 8), torch.randn(3, 4)
        >>> with seqkern.batch_invariant():
        ...     torch.equal(seqkern.causal_conv1d(x, weight)[:1], seqkern.causal_conv1d(x[:1], weight))
        True
    """
    previous, settings.batch_invariant = settings.batch_invariant, True
    try:
        yield
    finally:
        settings.batch_invariant = previous
