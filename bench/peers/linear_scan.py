"""Competitors of linear_scan and linear_scan_step."""

import torch
from torch._higher_order_ops.associative_scan import associative_scan

import seqkern
from peers import Missing, Peer, compiled, installed, module_of_sdist

FORWARD = frozenset({"forward"})
SEQUENCES = frozenset({"forward", "forward+backward"})
BOTH = SEQUENCES - FORWARD
STEP = frozenset({"step"})

# ---- torch


def loop(a, b, log_space=False):
    h, hs = 0, []
    for a_t, b_t in zip(*_tokens(a, b, log_space), strict=True):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs, dim=1)


def loop_in_place(a, b, log_space=False):
    hs = torch.empty_like(b)
    h = torch.zeros_like(b[:, 0])
    for a_t, b_t, h_t in zip(*_tokens(a, b, log_space), hs.unbind(1), strict=True):
        h = torch.addcmul(b_t, a_t, h, out=h_t)
    return hs


def _tokens(a, b, log_space):
    """a and b of every token. A constant a is one tensor, to which autograd then adds."""
    a = a.exp() if log_space else a
    return (a.unbind(1) if a.shape[1] > 1 else b.shape[1] * [a[:, 0]]), b.unbind(1)


def loop_compiled():
    """Sixteen tokens at a time under torch.compile."""
    step = compiled(_tokens_at_once)()

    def loop(a, b, log_space=False):
        h, hs = torch.zeros_like(b[:, 0]), []
        decays = a.split(16, dim=1) if a.shape[1] > 1 else b.shape[1] // 16 * [a]
        for a_t, b_t in zip(decays, b.split(16, dim=1), strict=True):
            h, h_t = step(h, a_t, b_t, log_space)
            hs.append(h_t)
        return torch.cat(hs, dim=1)

    return loop


def _tokens_at_once(h, a, b, log_space):
    a, hs = (a.exp() if log_space else a).expand(b.shape), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        hs.append(h)
    return h, torch.stack(hs, dim=1)


def chunks(a, b):
    """As many chunks side by side as are tokens in one, then their last states: two short loops. Doubles the work."""
    size = 1 << (b.shape[1].bit_length() // 2)
    a, b = (t.unflatten(1, (-1, size)) for t in (a, b))
    h, product, hs, products = torch.zeros_like(b[:, :, 0]), 1, [], []
    for a_t, b_t in zip(a.unbind(2), b.unbind(2), strict=True):
        h, product = a_t * h + b_t, a_t * product
        hs.append(h)
        products.append(product)
    entering = [torch.zeros_like(h[:, 0])]
    for product_c, h_c in zip(product.unbind(1), h.unbind(1), strict=True):
        entering.append(product_c * entering[-1] + h_c)
    entering = torch.stack(entering[:-1], dim=1)[:, :, None]
    return torch.addcmul(torch.stack(hs, dim=2), torch.stack(products, dim=2), entering).flatten(1, 2)


def loop_each(cu_seqlens, a, b):
    """A pack, one sequence after another."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([loop(*pieces) for pieces in zip(a.split(lengths, 1), b.split(lengths, 1), strict=True)], dim=1)


def associative_eager(a, b, log_space=False):
    """The parallel scan that torch has under development."""
    a = (a.exp() if log_space else a).expand(b.shape)
    return associative_scan(_combine, (a, b), dim=1, combine_mode="generic")[1]


def associative(a, b):
    return associative_scan(_combine, (a, b), dim=1, combine_mode="pointwise" if b.is_cuda else "generic")[1]


def _combine(left, right):
    return right[0] * left[0], right[0] * left[1] + right[1]


def step(state, a, b):
    return state.mul_(a).add_(b).to(b.dtype)


# ---- seqkern, and other projects


def one_thread():
    """seqkern, to show what the other threads add."""

    def function(**inputs):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return seqkern.linear_scan(**inputs)
        finally:
            torch.set_num_threads(threads)

    return function


def accelerated_scan_ref():
    """Its plain torch reference, a tree."""
    try:
        scan = installed("accelerated_scan.ref").scan
    except Missing:
        scan = module_of_sdist("accelerated_scan.ref").scan
    return _channels_first(scan)


def accelerated_scan():
    """Its Triton kernels, real or complex."""
    real, complex = (installed(f"accelerated_scan.{name}").scan for name in ("scalar", "complex"))
    return _channels_first(lambda a, b: (complex if a.is_complex() else real)(a, b))


def _channels_first(scan):
    """Time is the last dimension there: both inputs and the result are copied."""

    def function(a, b, log_space=False):
        a = (a.exp() if log_space else a).expand(b.shape)
        return scan(a.mT.contiguous(), b.mT.contiguous()).mT

    return function


# ---- who takes part where


def _constant(row):
    return "it would need a for every token" if row.variant == "constant a" else ""


CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
PACK = frozenset({"cu_seqlens"})
LONG = frozenset({"many tokens"})

PEERS = (
    Peer("torch", lambda: loop_in_place, FORWARD),
    Peer("torch", lambda: loop, BOTH),
    Peer("torch", lambda: loop_each, SEQUENCES, options=PACK),
    Peer("torch", lambda: chunks, SEQUENCES, options=LONG),
    Peer("torch", lambda: step, STEP),
    Peer("loop", lambda: loop_in_place, FORWARD, options=LONG, slow=True),
    Peer("compiled", loop_compiled, SEQUENCES, compiles=True),
    Peer("compiled", compiled(step), STEP, compiles=True),
    Peer("associative_scan", lambda: associative_eager, SEQUENCES, slow=True),
    Peer("associative_scan", lambda: associative_eager, SEQUENCES, options=LONG, slow=True),
    Peer("associative_scan compiled", compiled(associative), SEQUENCES, compiles=True),
    Peer("associative_scan compiled", compiled(associative), SEQUENCES, options=LONG, compiles=True),
    Peer("1 thread", one_thread, FORWARD, options=LONG, devices=CPU),
    Peer("accelerated_scan ref", accelerated_scan_ref, SEQUENCES, slow=True),
    Peer("accelerated_scan ref", accelerated_scan_ref, SEQUENCES, options=LONG, slow=True),
    Peer("accelerated_scan", accelerated_scan, SEQUENCES, devices=CUDA, unfit=_constant),
    Peer("accelerated_scan", accelerated_scan, SEQUENCES, options=LONG, devices=CUDA),
)
