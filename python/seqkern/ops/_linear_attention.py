"""The kernels of linear_attention as a differentiable function, which linear_attention, ssd and mlstm share.

Tensors come as in NAMES, options as in Options. Kernels compute y and its gradients; forward mode and second
derivatives are in `_linear_attention_plain.Call`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from .._recurrence import given, num_states, spread, tangents_of
from .._torch import accumulator, check_devices, needs_graph, requires_grad, vmap_over_channels
from ._linear_attention_plain import (
    DELTA,
    EXP,
    KEY,
    MAX,
    NAMES,
    NONE,
    STATE,
    SUM,
    TOKEN,
    UNNORMALIZED,
    Call,
    Options,
)

NUM_TENSORS = len(NAMES)
NUM_PACKED = NUM_TENSORS + 2  # with cu_seqlens and seq_idx
NUM_OPTIONS = len(Options._fields)
GRADIENTS = ("dy", "dS", "dz", "dm", "o", "denominators", "maxima")  # what a backward is given before the tensors
NUM_GRADIENTS = len(GRADIENTS)


def attend(
    tensors: tuple[Tensor | None, ...], packing: tuple, options: Options, return_final_state: bool
) -> tuple[Tensor, ...]:
    """y, then the parts of the final state where it is asked for."""
    args = (*tensors, *packing, *options, not settings.batch_invariant, return_final_state)
    if needs_graph(*tensors):
        outputs = _Attention.apply(*args)
    else:
        outputs = library.ops.linear_attention_fwd(*args, requires_grad(*tensors))
    return tuple(outputs[: 1 + len(options.parts) * return_final_state])


def attend_step(
    state: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...], options: Options, state_indices: Tensor | None
) -> Tensor:
    """The next token, of the tensors in NAMES before the state, moves the parts of the state on in place."""
    S, z, m = (*state, None, None)[:3]
    return library.ops.linear_attention_step(S, z, m, *tensors, state_indices, *options[:-1])


def joined(outputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """y and the parts of a state as functions return them."""
    y, *parts = outputs
    if not parts:
        return y
    return y, parts[0] if len(parts) == 1 else tuple(parts)


def parts_of(op: str, name: str, state: tuple | Tensor | None, letters: str) -> tuple:
    """S, z and m of a state that is None, a tensor, or as many tensors as there are letters."""
    if state is None:
        return None, None, None
    if len(letters) == 1:
        if not isinstance(state, Tensor):
            raise RuntimeError(f"{op}: {name} must be a tensor, got {_count(state)}")
        return state, None, None
    if not isinstance(state, (tuple, list)) or len(state) != len(letters):
        expected = f"the {('two', 'three')[len(letters) - 2]} tensors ({', '.join(letters)})"
        raise RuntimeError(f"{op}: {name} must be {expected}, got {_count(state)}")
    return (*state, None)[:3]


def _count(state) -> str:
    return f"{len(state)} of them" if isinstance(state, (tuple, list)) else f"a {type(state).__name__}"


class _Attention(torch.autograd.Function):
    """Tensors as in NAMES, packing and options -> (y[, final state][, o][, denominators][, maxima])."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.linear_attention_fwd(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*_keep(ctx, inputs, output))
        ctx.mark_non_differentiable(*output[ctx.num_differentiable :])
        ctx.num_outputs = len(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, *others):
        args = _backward_arguments(ctx, dy, *others[: ctx.num_differentiable - 1])
        if needs_graph(*args[:4], *args[NUM_GRADIENTS : NUM_GRADIENTS + NUM_TENSORS]):
            grads = _AttentionBackward.apply(*args)
        else:
            grads = library.ops.linear_attention_bwd(*args)
        return *spread(NAMES, grads, args[NUM_GRADIENTS:]), *[None] * (4 + NUM_OPTIONS)

    @staticmethod
    def jvp(ctx, *tangents):
        tensors = ctx.saved_tensors[3:]
        yt, final = _call(tensors, ctx.options).jvp(tangents_of(NAMES, tensors, tangents))
        derivatives = (yt.to(tensors[2].dtype), *final.values())[: ctx.num_differentiable]
        return *derivatives, *[None] * (ctx.num_outputs - len(derivatives))

    @staticmethod
    def vmap(info, in_dims, *args):
        options, return_final_state = _options(args), args[-1]
        num_kept = _has_o(args, options) + options.normalizer
        out_axes = [2] + [1] * len(options.parts) * return_final_state + [2] * num_kept
        return vmap_over_channels(_Attention, info, in_dims, args, _head_axes(NAMES, in_dims, args), out_axes)


class _AttentionBackward(torch.autograd.Function):
    """GRADIENTS, then tensors as in NAMES, packing and options -> gradients of the tensors given."""

    @staticmethod
    def forward(*args):
        kept = (t if t is None else t.contiguous() for t in args[5:7])  # mapped ones may not be
        return tuple(library.ops.linear_attention_bwd(*args[:5], *kept, *args[NUM_GRADIENTS:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.constants = inputs[NUM_GRADIENTS + NUM_PACKED :]
        ctx.options = _options(inputs[NUM_GRADIENTS:])
        tensors = inputs[: NUM_GRADIENTS + NUM_PACKED]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dy, y> + <dfinal, final>, so v^T of its Jacobian is
        the gradient of the directional derivative of phi along v."""
        tensors = ctx.saved_tensors[NUM_GRADIENTS:]
        dy, dS, *_ = ctx.saved_tensors
        g_dy, g_dfinal, grads = _second_order(ctx, spread(NAMES, cotangents, tensors))
        g_dfinal = [g_dfinal.get(name) if dS is not None else None for name in STATE]
        nothing = [None] * (2 + len(ctx.constants))
        return g_dy.to(dy.dtype), *g_dfinal, None, None, None, *(grads.get(name) for name in NAMES), *nothing

    @staticmethod
    def jvp(ctx, dy_t, dS_t, dz_t, dm_t, o_t, denominators_t, maxima_t, *tangents):
        """The map is linear in dy and dfinal, and a gradient, with a symmetric Jacobian, in the rest, of which o,
        denominators and maxima are functions."""
        dy, _, _, _, *kept = ctx.saved_tensors
        *_, along = _second_order(ctx, tangents)
        dy_t = torch.zeros_like(dy) if dy_t is None else dy_t
        dfinal_t = _all_or_none((dS_t, dz_t, dm_t), kept[3:], ctx.options)
        grads = _AttentionBackward.apply(dy_t, *dfinal_t, *kept, *ctx.constants)
        return tuple(grad + gradient for grad, gradient in zip(grads, along.values(), strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        in_axes = _head_axes((*GRADIENTS, *NAMES), in_dims, args)
        out_axes = [
            axis for axis, t in zip(in_axes[NUM_GRADIENTS:], args[NUM_GRADIENTS:], strict=False) if t is not None
        ]
        return vmap_over_channels(_AttentionBackward, info, in_dims, args, in_axes, out_axes)


def _options(args) -> Options:
    return Options(*args[NUM_PACKED : NUM_PACKED + NUM_OPTIONS])


def _keep(ctx, inputs, output):
    """What the backward needs: o, denominators and maxima, None where there is none, and the tensors."""
    tensors, options, return_final_state = inputs[:NUM_PACKED], _options(inputs), inputs[NUM_PACKED + NUM_OPTIONS + 1]
    ctx.options, ctx.constants = options, inputs[NUM_PACKED : NUM_PACKED + NUM_OPTIONS + 1]
    ctx.num_differentiable = 1 + len(options.parts) * return_final_state
    kept, has_o = list(output[ctx.num_differentiable :]), _has_o(tensors, options)
    ctx.was_kept = len(kept) == has_o + options.normalizer
    o = None if options.normalizer == UNNORMALIZED else output[0]
    if has_o and ctx.was_kept:
        o = kept.pop(0)
    saved = (o, *kept, *[None] * (2 - len(kept)), *tensors)
    ctx.save_for_backward(*saved)
    return saved


def _has_o(tensors, options: Options) -> bool:
    """Whether o is kept: something reads it that cannot do with y."""
    skip, gate = tensors[8:10]
    return gate is not None or (skip is not None and options.normalizer != UNNORMALIZED)


def _backward_arguments(ctx, dy, *dfinal):
    tensors = ctx.saved_tensors[3:]
    dy = torch.zeros_like(tensors[2]) if dy is None else dy
    return dy, *_all_or_none(dfinal, tensors, ctx.options), *ctx.saved_tensors, *ctx.constants


def _all_or_none(dfinal, tensors, options):
    """Gradients of S, z and m, of which zeros replace those that are missing, unless they all are."""
    if all(part is None for part in dfinal):
        return None, None, None
    shapes = state_shapes(tensors[0], tensors[2], tensors[NUM_TENSORS], options)
    dtype = accumulator(tensors[2].dtype)
    parts = [
        tensors[2].new_zeros(shape, dtype=dtype) if part is None else part
        for part, shape in zip(dfinal, shapes, strict=False)
    ]
    return (*parts, None, None)[:3]


def state_shapes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options) -> list[tuple[int, ...]]:
    """Of the parts of a state."""
    rows, HV, K, V = num_states(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3]
    S = (rows, HV, V, K) if options.value_major else (rows, HV, K, V)
    return [S, (rows, HV, K), (rows, HV)][: len(options.parts)]


def _call(tensors, options: Options) -> Call:
    return Call(given(NAMES, tensors), tensors[NUM_TENSORS:NUM_PACKED], options)


def _second_order(ctx, tangents):
    dy, *dfinal = ctx.saved_tensors[:4]
    tensors = ctx.saved_tensors[NUM_GRADIENTS:]
    parts = None if dfinal[0] is None else dict(zip(ctx.options.parts, dfinal, strict=False))
    return _call(tensors, ctx.options).second_order(tangents_of(NAMES, tensors, tangents), dy, parts)


def _head_axes(names, in_dims, args):
    """Where the arguments of an autograd function have their heads, without a mapped dimension."""
    first, second = {"A", "bias", "bonus", "skip"}, {"dS", "dz", "dm", *STATE}
    axes = []
    for name, t, dim in zip(names, args, in_dims, strict=False):
        constant = name in first or (name == "decay" and t is not None and t.dim() - (dim is not None) == 1)
        axes.append(0 if constant else 1 if name in second else 2)
    return axes


# What the arguments before the state are called where errors name them, after the function.
PUBLIC_NAMES = dict.fromkeys(
    (NONE, TOKEN, KEY), ("linear_attention", "q", "k", "v", "log_decay", "input", "A", "bias", "bonus", "skip", "gate")
)
PUBLIC_NAMES[DELTA] = ("ssd", "C", "B", "x", "dt", "input", "A", "dt_bias", "bonus", "D", "z")
PUBLIC_NAMES[EXP] = ("mlstm", "q", "k", "v", "f", "i", "A", "bias", "bonus", "skip", "gate")


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(tensors, options, step=False, **others):
        op, *names = PUBLIC_NAMES[options.form]
        state = "state" if step else "initial_state"
        letters = {UNNORMALIZED: (), SUM: "Sz", MAX: "Cnm"}[options.normalizer]
        names += [f"{state}'s {letter}" for letter in letters] or [state]
        first, v = names.pop(2), tensors[2]
        named = dict(zip(names, (*tensors[:2], *tensors[3:NUM_TENSORS]), strict=False))
        packing = dict(zip(("cu_seqlens", "seq_idx"), tensors[NUM_TENSORS:], strict=True))
        check_devices(f"{op}_step" if step else op, **{first: v}, **named, **packing, **others)

    def fwd(*args):
        tensors, options = args[:NUM_PACKED], _options(args)
        return_final_state, keep = args[-2:]
        check(tensors, options)
        q, _, v, *_ = tensors
        dtype = accumulator(v.dtype)
        outputs = [v.new_empty(v.shape)]
        if return_final_state:
            shapes = state_shapes(q, v, tensors[NUM_TENSORS], options)
            outputs += [v.new_empty(shape, dtype=dtype) for shape in shapes]
        if keep:
            outputs += [v.new_empty(v.shape)] * _has_o(tensors, options)
            outputs += [v.new_empty(v.shape[:3], dtype=dtype) for _ in range(options.normalizer)]
        return outputs

    def bwd(*args):
        tensors = args[NUM_GRADIENTS : NUM_GRADIENTS + NUM_PACKED]
        check(tensors, _options(args[NUM_GRADIENTS:]), **dict(zip(GRADIENTS, args, strict=False)))
        return [t.new_empty(t.shape) for t in tensors[:NUM_TENSORS] if t is not None]

    def step(S, z, m, q, k, v, decay, input, A, bias, bonus, skip, gate, state_indices, form, *options):
        tensors = (q, k, v, decay, input, A, bias, bonus, skip, gate, S, z, m, None, None)
        check(tensors, Options(form, *options), step=True, state_indices=state_indices)
        return v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, output)

    def backward(ctx, grads):
        if not ctx.was_kept:
            raise RuntimeError("linear_attention_fwd: a gradient needs keep=True")
        args = _backward_arguments(ctx, *grads[: ctx.num_differentiable])
        grads = ops.linear_attention_bwd(*args)
        return *spread(NAMES, grads, args[NUM_GRADIENTS:]), *[None] * (5 + NUM_OPTIONS)

    torch.library.register_fake(f"{namespace}::linear_attention_fwd", fwd)
    torch.library.register_fake(f"{namespace}::linear_attention_bwd", bwd)
    torch.library.register_fake(f"{namespace}::linear_attention_step", step)
    torch.library.register_autograd(f"{namespace}::linear_attention_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::linear_attention_bwd",
        lambda ctx, cotangents: _AttentionBackward.backward(ctx, *cotangents),
        setup_context=_AttentionBackward.setup_context,
    )
