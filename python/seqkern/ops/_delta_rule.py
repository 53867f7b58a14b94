"""The kernels of delta_rule as a differentiable function, its reference, and its derivatives of higher order.

Tensors come as in NAMES, options as in Options. Kernels compute o and its gradients; forward mode and second
derivatives are in `DeltaRule`, in plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._config import settings
from .._load import library
from .._recurrence import Recurrence, Tensors, given, num_states, per_value_head, spread, tangents_of, widest
from .._torch import accumulator, check_devices, needs_graph, requires_grad, vmap_over_channels

NAMES = ("q", "k", "erase", "v", "beta", "decay", "S")
GRADIENTS = ("dO", "u", "dS")  # what a backward is given before the tensors
PUBLIC_NAMES = {"erase": "erase_key", "decay": "log_decay", "S": "initial_state"}  # where they are others
NUM_TENSORS, NUM_GRADIENTS = len(NAMES), len(GRADIENTS)
NORM_EPS = 1e-6  # kNormEps in csrc/delta_rule/params.h


class Options(NamedTuple):
    """What the kernels are told, in their order."""

    normalize: bool
    scale: float
    reverse: bool = False


def attend(
    tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, options: Options, return_final_state: bool
) -> tuple[Tensor, ...]:
    """o, then the final state where it is asked for."""
    args = (*tensors, cu_seqlens, *options, not settings.batch_invariant, return_final_state)
    if needs_graph(*tensors):
        outputs = _DeltaRule.apply(*args)
    else:
        outputs = library.ops.delta_rule_fwd(*args, requires_grad(*tensors))
    return tuple(outputs[: 1 + return_final_state])


def attend_step(
    state: Tensor, tensors: tuple[Tensor | None, ...], options: Options, state_indices: Tensor | None
) -> Tensor:
    """The next token, of the tensors in NAMES before the state, moves the state on in place."""
    return library.ops.delta_rule_step(state, *tensors, state_indices, *options[:2])


class DeltaRule(Recurrence):
    """A call in plain torch, token by token."""

    def __init__(self, tensors: Tensors, cu_seqlens: Tensor | None, options: Options, dtype: torch.dtype | None = None):
        self.options = options
        self.shape_of_state = (tensors["q"].shape[3], tensors["v"].shape[3])  # (K, V)
        tokens = tensors.keys() - {"S"}
        super().__init__(tensors, tokens, {"S": 0.0}, (cu_seqlens, None), options.reverse, dtype)

    def shapes_of_state(self) -> dict[str, tuple[int, ...]]:
        return {"S": self.shape_of_state}

    def chunk(self, state: Tensors, x: Tensors) -> tuple[Tensor, Tensors]:
        q, k = (normalized(x[name]) if self.options.normalize else x[name] for name in "qk")
        e = x.get("erase", k)
        q, k, e = (per_value_head(t, self.value_heads, 2).unbind(1) for t in (q, k, e))  # (R, HV, K) each
        decays = [None] * len(q)
        if "decay" in x:
            per_key = x["decay"] if x["decay"].dim() == 4 else x["decay"][..., None]
            decays = per_key.exp()[..., None].unbind(1)

        S, outputs = state["S"], []
        for q_t, k_t, e_t, v_t, beta_t, decay_t in zip(
            q, k, e, x["v"].unbind(1), x["beta"][..., None].unbind(1), decays, strict=True
        ):
            S = S if decay_t is None else decay_t * S  # [decay]
            u_t = beta_t * (v_t - _read(S, e_t))  # [erase]
            S = S + k_t[..., None] * u_t[..., None, :]  # [write]
            outputs.append(self.options.scale * _read(S, q_t))  # [read]
        return torch.stack(outputs, dim=1), {"S": S}


def _read(S: Tensor, key: Tensor) -> Tensor:
    """S^T key."""
    return (key[..., None, :] @ S).squeeze(-2)


def normalized(x: Tensor) -> Tensor:
    """[norm]"""
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def plain(
    tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, options: Options, return_final_state: bool
) -> tuple[Tensor, ...]:
    """What `attend` computes, in the widest dtype of the tensors."""
    named = given(NAMES, tensors)
    o, final = DeltaRule(named, cu_seqlens, options, widest(named)).run()
    v = named["v"]
    return (o.to(v.dtype), final["S"].to(accumulator(v.dtype)))[: 1 + return_final_state]


def plain_step(
    state: Tensor, tensors: tuple[Tensor | None, ...], options: Options, state_indices: Tensor | None
) -> Tensor:
    """What `attend_step` does."""
    o = torch.zeros_like(tensors[NAMES.index("v")])
    for b, row in enumerate(range(len(o)) if state_indices is None else state_indices.tolist()):
        if row < 0:
            continue
        token = [t if t is None else t[b : b + 1, None] for t in tensors]
        o_b, after = plain((*token, state[row : row + 1]), None, options, True)
        o[b], state[row] = o_b[0, 0], after[0]
    return o


class _DeltaRule(torch.autograd.Function):
    """Tensors as in NAMES, packing and options -> (o[, final state], u)."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.delta_rule_fwd(*args, True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*_keep(ctx, inputs, output))
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx, dO, *others):
        args = _backward_arguments(ctx, dO, *others)
        if needs_graph(args[0], *args[2 : NUM_GRADIENTS + NUM_TENSORS]):
            grads = _DeltaRuleBackward.apply(*args)
        else:
            grads = library.ops.delta_rule_bwd(*args)
        return *spread(NAMES, grads, args[NUM_GRADIENTS:]), *[None] * 6

    @staticmethod
    def jvp(ctx, *tangents):
        _, *tensors = ctx.saved_tensors
        call = _call(tensors, ctx.constants)
        o_t, final_t = call.jvp(tangents_of(NAMES, tensors, tangents))
        derivatives = [o_t.to(call.given["v"].dtype), final_t["S"]][: 1 + ctx.return_final_state]
        return *derivatives, None

    @staticmethod
    def vmap(info, in_dims, *args):
        out_axes = [2] + [1] * args[-1] + [2]
        return vmap_over_channels(_DeltaRule, info, in_dims, args, _head_axes(NAMES), out_axes)


class _DeltaRuleBackward(torch.autograd.Function):
    """GRADIENTS, then tensors as in NAMES, packing and options -> gradients of the tensors given."""

    @staticmethod
    def forward(*args):
        return tuple(library.ops.delta_rule_bwd(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.constants = inputs[NUM_GRADIENTS + NUM_TENSORS + 1 :]
        tensors = inputs[: NUM_GRADIENTS + NUM_TENSORS + 1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """With v the cotangents, the map is the gradient of phi = <dO, o> + <dS, final>, so v^T of its Jacobian is the
        gradient of the directional derivative of phi along v."""
        dO, _, dS, *tensors = ctx.saved_tensors
        g_dO, g_final, grads = _second_order(ctx, spread(NAMES, cotangents, tensors))
        g_dS = None if dS is None else g_final["S"]
        return g_dO.to(dO.dtype), None, g_dS, *(grads.get(name) for name in NAMES), *[None] * 5

    @staticmethod
    def jvp(ctx, dO_t, u_t, dS_t, *tangents):
        """The map is linear in dO and dS, and a gradient, with a symmetric Jacobian, in the rest, of which u is a
        function."""
        dO, *kept = ctx.saved_tensors
        *_, along = _second_order(ctx, tangents)
        dO_t = torch.zeros_like(dO) if dO_t is None else dO_t
        grads = _DeltaRuleBackward.apply(dO_t, kept[0], dS_t, *kept[2:], *ctx.constants)
        return tuple(grad + gradient for grad, gradient in zip(grads, along.values(), strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        axes, tensors = _head_axes((*GRADIENTS, *NAMES)), args[NUM_GRADIENTS:]
        out_axes = [axis for axis, t in zip(axes[NUM_GRADIENTS:], tensors, strict=False) if t is not None]
        return vmap_over_channels(_DeltaRuleBackward, info, in_dims, args, axes, out_axes)


def _keep(ctx, inputs, output):
    """What the backward needs: u, and the tensors with cu_seqlens."""
    tensors, constants = inputs[: NUM_TENSORS + 1], inputs[NUM_TENSORS + 1 :]
    ctx.constants, ctx.return_final_state = constants[:4], constants[4]  # options, split_time
    ctx.was_kept = len(output) == 2 + ctx.return_final_state
    saved = (output[-1], *tensors)
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    return saved


def _backward_arguments(ctx, dO, *others):
    u, *tensors = ctx.saved_tensors
    dO = torch.zeros_like(tensors[NAMES.index("v")]) if dO is None else dO
    return dO, u, others[0] if ctx.return_final_state else None, *tensors, *ctx.constants


def _call(tensors, constants) -> DeltaRule:
    return DeltaRule(given(NAMES, tensors), tensors[NUM_TENSORS], Options(*constants[:3]))


def _second_order(ctx, tangents):
    dO, _, dS, *tensors = ctx.saved_tensors
    final = None if dS is None else {"S": dS}
    return _call(tensors, ctx.constants).second_order(tangents_of(NAMES, tensors, tangents), dO, final)


def _head_axes(names) -> list[int]:
    """Where the arguments have their heads, without a mapped dimension."""
    return [1 if name in ("S", "dS") else 2 for name in names]


def register(namespace: str) -> None:
    """Shapes for tracing, and derivatives under torch.compile, of the operators in `namespace`."""
    ops = getattr(torch.ops, namespace)

    def check(op, tensors, **others):
        named = {PUBLIC_NAMES.get(name, name): t for name, t in zip(NAMES, tensors, strict=False)}
        check_devices(op, v=named.pop("v"), **named, **others)

    def u_of(v):
        return v.new_empty(v.shape, dtype=torch.float32 if v.dtype == torch.float16 else v.dtype)

    def fwd(*args):
        tensors, return_final_state, keep = args[:NUM_TENSORS], *args[-2:]
        check("delta_rule", tensors, cu_seqlens=args[NUM_TENSORS])
        q, v = tensors[0], tensors[NAMES.index("v")]
        outputs = [v.new_empty(v.shape)]
        if return_final_state:
            shape = (num_states(v, args[NUM_TENSORS]), v.shape[2], q.shape[3], v.shape[3])
            outputs.append(v.new_empty(shape, dtype=accumulator(v.dtype)))
        return [*outputs, u_of(v)] if keep else outputs

    def bwd(dO, u, dS, *args):
        tensors = args[:NUM_TENSORS]
        check("delta_rule", tensors, cu_seqlens=args[NUM_TENSORS], dO=dO, u=u, dfinal_state=dS)
        return [t.new_empty(t.shape) for t in tensors if t is not None]

    def step(S, *args):
        *tensors, state_indices, _, _ = args
        check("delta_rule_step", tensors, state=S, state_indices=state_indices)
        v = tensors[NAMES.index("v")]
        return v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        _keep(ctx, inputs, output)

    def backward(ctx, grads):
        if not ctx.was_kept:
            raise RuntimeError("delta_rule_fwd: a gradient needs keep=True")
        args = _backward_arguments(ctx, *grads)
        return *spread(NAMES, ops.delta_rule_bwd(*args), args[NUM_GRADIENTS:]), *[None] * 7

    torch.library.register_fake(f"{namespace}::delta_rule_fwd", fwd)
    torch.library.register_fake(f"{namespace}::delta_rule_bwd", bwd)
    torch.library.register_fake(f"{namespace}::delta_rule_step", step)
    torch.library.register_autograd(f"{namespace}::delta_rule_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{namespace}::delta_rule_bwd",
        lambda ctx, cotangents: _DeltaRuleBackward.backward(ctx, *cotangents),
        setup_context=_DeltaRuleBackward.setup_context,
    )
