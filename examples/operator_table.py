"""What each operator of seqkern takes in a training step, beside plain PyTorch, on the very tensors of that step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import seqkern.nn
from seqkern.testing import interleaved

LAYERS = "conv mamba mamba2 _scan aaren elementwise rnn gla retnet mlstm delta".split()
CALLERS = [seqkern, *(getattr(seqkern.nn, name) for name in LAYERS)]  # modules that call operators

# ---- what one would write without seqkern, for the arguments that those layers give here


def plain_causal_conv1d(x, weight, bias, activation, *, dilation=1, **absent):
    padded = F.pad(x, ((weight.shape[1] - 1) * dilation, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=len(weight)))


def plain_causal_conv1d_step(x, conv_state, weight, bias, activation, *, dilation=1):
    history = torch.cat([conv_state, x[..., None]], dim=2)
    conv_state.copy_(history[..., 1:])
    y = (history[..., ::dilation] * weight).sum(-1)
    return F.silu(y if bias is None else y + bias).to(x.dtype)


def plain_selective_scan(u, delta, A, B, C, D, z, delta_bias, *flags, **absent):
    h, outputs = A.new_zeros(len(u), *A.shape), []
    for u_t, delta_t, B_t, C_t, z_t in zip(*(x.unbind(2) for x in (u, delta, B, C, z)), strict=True):
        h, y_t = plain_token(h, u_t, delta_t, A, B_t, C_t, D, z_t, delta_bias)
        outputs.append(y_t)
    return torch.stack(outputs, dim=2)


def plain_selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, *flags, **absent):
    h, y = plain_token(state, u, delta, A, B, C, D, z, delta_bias)
    state.copy_(h)
    return y


def plain_token(h, u, delta, A, B, C, D, z, delta_bias):
    delta = F.softplus(delta + delta_bias)
    h = torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
    y = (h @ C[..., None].to(h.dtype)).squeeze(-1) + D * u
    return h, (y * F.silu(z)).to(u.dtype)


def plain_linear_scan(a, b, initial_state, *, log_space=False, **absent):
    a = (a.exp() if log_space else a).expand_as(b)
    h, outputs = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(b.dtype)


def plain_linear_scan_step(state, a, b, *, log_space=False):
    state.copy_((a.exp() if log_space else a) * state + b)
    return state.to(b.dtype)


def plain_softmax_scan(s, v, initial_state, **absent):
    m, n, w = s.new_full(s[:, 0].shape, -torch.inf), torch.zeros_like(s[:, 0]), torch.zeros_like(v[:, 0])
    outputs = []
    for s_t, v_t in zip(s.unbind(1), v.unbind(1), strict=True):
        m, n, w = plain_softmax_token(m, n, w, s_t, v_t)
        outputs.append(w / n[..., None])
    return torch.stack(outputs, dim=1)


def plain_softmax_scan_step(state, s, v):
    for old, new in zip(state, plain_softmax_token(*state, s, v), strict=True):
        old.copy_(new)
    return (state[2] / state[1][..., None]).to(v.dtype)


def plain_softmax_token(m, n, w, s, v):
    top = torch.maximum(m, s)
    old, new = torch.exp(m - top), torch.exp(s - top)
    return top, old * n + new, old[..., None] * w + new[..., None] * v


def plain_elementwise_rnn(x, weights, initial_state, *, cell, **absent):
    wide = torch.promote_types(x.dtype, torch.float32)
    zeros = torch.zeros_like(x[:, 0, 0], dtype=wide)
    state, outputs = {"lstm": (zeros, zeros), "slstm": (zeros, zeros, zeros, zeros - torch.inf)}.get(cell, (zeros,)), []
    for x_t in x.unbind(1):
        state = plain_elementwise_token(state, x_t, weights, cell)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1).to(x.dtype)


def plain_elementwise_rnn_step(state, x, weights, *, cell):
    for old, new in zip(state, plain_elementwise_token(state, x, weights, cell), strict=True):
        old.copy_(new)
    return state[0].to(x.dtype)


def plain_elementwise_token(state, x, weights, cell):
    (h, *rest), x = state, x.to(state[0].dtype).unbind(1)
    if cell == "gru":
        z, r = torch.sigmoid(weights[0] * h + x[0]), torch.sigmoid(weights[1] * h + x[1])
        return ((1 - z) * h + z * torch.tanh(weights[2] * h * r + x[2]),)
    if cell == "lstm":
        (c,) = rest
        f = torch.sigmoid(weights[0] * h + weights[3] * c + x[0])
        c = f * c + (1 - f) * torch.tanh(weights[1] * h + x[1])
        return torch.sigmoid(weights[2] * h + weights[4] * c + x[2]) * torch.tanh(c), c
    if cell == "slstm":
        c, n, m = rest
        i, f, z, o = (a * h + gate for a, gate in zip(weights, x, strict=True))
        top = torch.maximum(F.logsigmoid(f) + m, i)
        old, new = torch.exp(F.logsigmoid(f) + m - top), torch.exp(i - top)
        c, n = old * c + new * torch.tanh(z), old * n + new
        return torch.sigmoid(o) * c / n, c, n, top
    return (torch.relu(weights[0] * h + x[0]),)  # indrnn


def plain_rnn(x, R, bias, initial_state, *, cell, **absent):
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(len(x), x.shape[2], R.shape[3], dtype=wide)
    c = torch.zeros_like(x[:, 0, :, 0], dtype=wide)
    state = {"lstm": (h, c), "slstm": (h, c, c, c - torch.inf), "gru": (h,)}[cell]
    outputs = []
    for x_t in x.unbind(1):
        state = plain_rnn_token(state, x_t, R, bias, cell)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1).to(x.dtype)


def plain_rnn_step(state, x, R, bias, *, cell, **absent):
    for old, new in zip(state, plain_rnn_token(state, x, R, bias, cell), strict=True):
        old.copy_(new)
    return state[0].to(x.dtype)


def plain_rnn_token(state, x, R, bias, cell):
    (h, *rest), x = state, x.to(state[0].dtype).unbind(2)
    u = torch.einsum("hgpq,bhq->bhgp", R, h)
    u = (u if bias is None else u + bias).unbind(2)
    if cell == "gru":
        r, z = torch.sigmoid(x[0] + u[0]), torch.sigmoid(x[1] + u[1])
        return ((1 - z) * torch.tanh(x[2] + r * u[2]) + z * h,)
    i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
    if cell == "lstm":
        (c,) = rest
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    c, n, m = rest  # slstm
    top = torch.maximum(F.logsigmoid(f) + m, i)
    old, new = torch.exp(F.logsigmoid(f) + m - top), torch.exp(i - top)
    c, n = old * c + new * torch.tanh(g), old * n + new
    return torch.sigmoid(o) * c / n, c, n, top


def plain_ssd(x, dt, A, B, C, D, z, *, dt_bias, **absent):
    h, outputs = A.new_zeros(len(x), *x.shape[2:], B.shape[-1]), []
    for x_t, dt_t, B_t, C_t, z_t in zip(*(t.unbind(1) for t in (x, dt, B, C, z)), strict=True):
        h, y_t = plain_ssd_token(h, x_t, dt_t, A, B_t, C_t, D, z_t, dt_bias)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1)


def plain_ssd_step(state, x, dt, A, B, C, D, z, *, dt_bias, **absent):
    h, y = plain_ssd_token(state, x, dt, A, B, C, D, z, dt_bias)
    state.copy_(h)
    return y


def plain_ssd_token(h, x, dt, A, B, C, D, z, dt_bias):
    dt = F.softplus(dt + dt_bias)
    h = torch.exp(dt * A)[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]  # one group
    y = (h @ C[..., None].to(h.dtype)).squeeze(-1) + D[:, None] * x
    return h, (y * F.silu(z)).to(x.dtype)


def plain_linear_attention(q, k, v, log_decay, **absent):
    S, outputs = log_decay.new_zeros(len(q), *q.shape[2:], v.shape[-1]), []
    decays = log_decay.expand(1, q.shape[1], -1) if log_decay.dim() == 1 else log_decay
    for tokens in zip(*(t.unbind(1) for t in (q, k, v, decays)), strict=True):
        S, o_t = plain_linear_attention_token(S, *tokens)
        outputs.append(o_t)
    return torch.stack(outputs, dim=1)


def plain_linear_attention_step(state, q, k, v, log_decay):
    S, o = plain_linear_attention_token(state, q, k, v, log_decay)
    state.copy_(S)
    return o


def plain_linear_attention_token(S, q, k, v, log_decay):
    decay = log_decay.exp()
    decay = decay[..., None] if decay.dim() == 3 else decay[..., None, None]  # for each key, or one for all
    S = decay * S + k[..., None] * v[..., None, :].to(S.dtype)
    return S, (q.shape[-1] ** -0.5 * (q[..., None, :].to(S.dtype) @ S).squeeze(-2)).to(v.dtype)


def plain_delta_rule(q, k, v, beta, *, log_decay, qk_l2norm, **absent):
    S, outputs = log_decay.new_zeros(*q[:, 0].shape, v.shape[-1]), []
    for tokens in zip(*(t.unbind(1) for t in (q, k, v, beta, log_decay)), strict=True):
        S, o_t = plain_delta_rule_token(S, *tokens)
        outputs.append(o_t)
    return torch.stack(outputs, dim=1)


def plain_delta_rule_step(state, q, k, v, beta, *, log_decay, qk_l2norm):
    S, o = plain_delta_rule_token(state, q, k, v, beta, log_decay)
    state.copy_(S)
    return o


def plain_delta_rule_token(S, q, k, v, beta, log_decay):
    q, k = (t.to(S.dtype) * (t.to(S.dtype).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    decay = log_decay.exp()
    S = (decay[..., None] if decay.dim() == 3 else decay[..., None, None]) * S
    u = beta[..., None] * (v - (k[..., None, :] @ S).squeeze(-2))
    S = S + k[..., None] * u[..., None, :]
    return S, (q.shape[-1] ** -0.5 * (q[..., None, :] @ S).squeeze(-2)).to(v.dtype)


def plain_mlstm(q, k, v, i, f, **absent):
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = q[:, 0].to(wide)  # (B, H, K)
    state = (
        heads.new_zeros(*heads.shape, v.shape[-1]),
        torch.zeros_like(heads),
        torch.full_like(heads[..., 0], -torch.inf),
    )
    outputs = []
    for tokens in zip(*(t.unbind(1) for t in (q, k, v, i, f)), strict=True):
        state, h_t = plain_mlstm_token(state, *tokens)
        outputs.append(h_t)
    return torch.stack(outputs, dim=1)


def plain_mlstm_step(state, *token):
    after, h = plain_mlstm_token(state, *token)
    for old, new in zip(state, after, strict=True):
        old.copy_(new)
    return h


def plain_mlstm_token(state, q, k, v, i, f):
    C, n, m = state
    q, k, dtype = q.to(C.dtype), k.to(C.dtype), v.dtype
    carried = F.logsigmoid(f.to(m.dtype)) + m
    top = torch.maximum(carried, i)
    old, new = torch.exp(carried - top), torch.exp(i - top)
    C = old[..., None, None] * C + (new[..., None] * k)[..., None] * v[..., None, :]
    n = old[..., None] * n + new[..., None] * k
    scale = q.shape[-1] ** -0.5
    divisor = torch.maximum((scale * (n * q).sum(-1)).abs(), torch.exp(-top))
    return (C, n, top), (scale * (q[..., None, :] @ C).squeeze(-2) / divisor[..., None]).to(dtype)


# ---- recording and timing


class Operator(NamedTuple):
    name: str
    plain: Callable
    passes: dict[str, Callable]  # what to time, by title: (call, function) -> results


class Call:
    """One call of an operator, without its final state: its arguments, and the gradient that came to its output."""

    def __init__(self, args: tuple, options: dict):
        self.args = [leaf(arg) for arg in args]
        self.options, self.dy = {name: leaf(option) for name, option in options.items()}, None

    def forward(self, function: Callable) -> list[Tensor]:
        with torch.no_grad():
            return [function(*self.args, **self.options)]

    def forward_backward(self, function: Callable) -> list[Tensor]:
        args = [leaf(arg, True) for arg in self.args]
        options = {name: leaf(option, True) for name, option in self.options.items()}
        y = function(*args, **options)
        leaves = [given for given in (*args, *options.values()) if isinstance(given, Tensor)]
        return [y, *torch.autograd.grad(y, leaves, self.dy)]


def leaf(given, requires_grad: bool = False):
    return given.detach().requires_grad_(requires_grad) if isinstance(given, Tensor) else given


TRAINING = {"forward": Call.forward, "forward + backward": Call.forward_backward}
OPERATORS = [
    Operator("causal_conv1d", plain_causal_conv1d, TRAINING),
    Operator("causal_conv1d_step", plain_causal_conv1d_step, {"step": Call.forward}),
    Operator("selective_scan", plain_selective_scan, TRAINING),
    Operator("selective_scan_step", plain_selective_scan_step, {"step": Call.forward}),
    Operator("linear_scan", plain_linear_scan, TRAINING),
    Operator("linear_scan_step", plain_linear_scan_step, {"step": Call.forward}),
    Operator("softmax_scan", plain_softmax_scan, TRAINING),
    Operator("softmax_scan_step", plain_softmax_scan_step, {"step": Call.forward}),
    Operator("elementwise_rnn", plain_elementwise_rnn, TRAINING),
    Operator("elementwise_rnn_step", plain_elementwise_rnn_step, {"step": Call.forward}),
    Operator("rnn", plain_rnn, TRAINING),
    Operator("rnn_step", plain_rnn_step, {"step": Call.forward}),
    Operator("ssd", plain_ssd, TRAINING),
    Operator("ssd_step", plain_ssd_step, {"step": Call.forward}),
    Operator("gla", plain_linear_attention, TRAINING),
    Operator("linear_attention", plain_linear_attention, TRAINING),
    Operator("linear_attention_step", plain_linear_attention_step, {"step": Call.forward}),
    Operator("delta_rule", plain_delta_rule, TRAINING),
    Operator("delta_rule_step", plain_delta_rule_step, {"step": Call.forward}),
    Operator("mlstm", plain_mlstm, TRAINING),
    Operator("mlstm_step", plain_mlstm_step, {"step": Call.forward}),
]


@contextlib.contextmanager
def recorded(operator: Operator):
    """The list of the operator's calls within the block."""
    calls, function = [], getattr(seqkern, operator.name)

    def record(*args, **options):
        result = function(*args, **options)
        y = result[0] if options.pop("return_final_state", False) else result
        calls.append(call := Call(args, options))
        if y.requires_grad:
            y.register_hook(lambda dy: setattr(call, "dy", dy))
        return result

    with contextlib.ExitStack() as patches:
        for module in CALLERS:
            if hasattr(module, operator.name):
                patches.enter_context(mock.patch.object(module, operator.name, record))
        yield calls


def run_all(run: Callable, function: Callable, calls: list[Call]) -> list[Tensor]:
    return [result for call in calls for result in run(call, function)]


def print_table(step: Callable[[], object], device: str) -> None:
    """Runs `step`, a training step and whatever else calls operators, and times their calls on the tensors they had."""
    print(f"{'operator':<22}{'pass':<20}{'calls':>5}{'seqkern ms':>12}{'PyTorch ms':>12}{'ratio':>8}{'difference':>12}")
    for operator in OPERATORS:
        with recorded(operator) as calls:
            step()
        functions = {"seqkern": getattr(seqkern, operator.name), "PyTorch": operator.plain}
        for title, run in operator.passes.items() if calls else ():
            # Copies, because a step changes the state it is given.
            results = [run_all(run, function, copy.deepcopy(calls)) for function in functions.values()]
            difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))
            timed = {name: partial(run_all, run, function, calls) for name, function in functions.items()}
            times = interleaved(timed, rounds=5, device=device)
            ours, plain = (times[name].median_us / 1000 for name in functions)
            row = f"{operator.name:<22}{title:<20}{len(calls):>5}{ours:>12.3f}{plain:>12.3f}{plain / ours:>7.1f}x"
            print(f"{row}{difference:>12.1e}", flush=True)
    print("Times: all calls of one training step, and of one token for each row of its batch.")
    print("Difference: the largest, relative to the largest value of each result, gradients included.")
