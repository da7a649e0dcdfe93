"""Ops of latency mode on GPUs in two calls, with their gradients, and what a ticket holds between them.

Gradients run the kernels of throughput mode, in line with the program, as those of ops in one call do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._backends import gpu_calls
from jax_ep._backends.primitive import behind_last_call
from jax_ep._core import arguments
from jax_ep._core.derivatives import Op, call
from jax_ep._core.types import Handle, Quantized
from jax_ep._ops import gradients
from jax_ep._ops.options import CombineOptions, DispatchOptions, PlanOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentDispatch:
    """A dispatch, with its plan, between its two calls.

    Attributes:
        sent: What the start call gave.
        work: What the done call comes behind, or None.
        x: The rows given.
        weights: As in ``dispatch``.
        topk_idx: As in ``dispatch``.
        plan_options: Static arguments of the plan.
        options: Static arguments of the dispatch.
    """

    sent: Int32[Array, "1"]
    work: Array | None
    x: Array | Quantized
    weights: Float32[Array, "tokens top_k"] | None
    topk_idx: Int32[Array, "tokens top_k"]
    plan_options: PlanOptions = dataclasses.field(metadata={"static": True})
    options: DispatchOptions = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SentCombine:
    """A combine between its two calls.

    Attributes:
        sent: What the start call gave.
        work: What the done call comes behind, or None.
        rows: As in ``combine``.
        weights: As in ``combine``.
        handle: As in ``combine``.
        options: Static arguments.
    """

    sent: Int32[Array, "1"]
    work: Array | None
    rows: Float[Array, "capacity hidden"]
    weights: Float32[Array, " capacity"] | None
    handle: Handle
    options: CombineOptions = dataclasses.field(metadata={"static": True})


Sent = SentDispatch | SentCombine


def dispatch_start(
    plan_options: PlanOptions,
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
) -> SentDispatch:
    """Send the ids and rows of this rank's tokens."""
    given = lax.stop_gradient((x, weights, topk_idx))
    sent = gpu_calls.dispatch_start(*given, **_both(plan_options, options))
    return SentDispatch(gradients.match(sent, x), None, x, weights, topk_idx, plan_options, options)


def dispatch_done(
    op: SentDispatch,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """The rows and the handle of a dispatch that was sent."""
    behind = lax.stop_gradient(op.work)
    given = (op.x, op.weights, op.topk_idx, op.sent, behind)
    tokens, weights, handle = call(_DispatchDone(op.plan_options, op.options), (), given)
    return tokens, weights, _named(handle)


def combine_start(
    options: CombineOptions,
    rows: Float[Array, "capacity hidden"],
    weights: Float32[Array, " capacity"] | None,
    handle: Handle,
) -> SentCombine:
    """Send the sums of this rank's rows to the homes of their tokens."""
    sent = gpu_calls.combine_start(
        *lax.stop_gradient((rows, weights)),
        handle,
        group=options.group,
        config=options.config,
        flight=options.flight,
    )
    return SentCombine(gradients.match(sent, rows), None, rows, weights, handle, options)


def combine_done(op: SentCombine) -> Float[Array, "tokens hidden"]:
    """The result of a combine that was sent."""
    behind = lax.stop_gradient(op.work)
    given = (op.rows, op.weights, op.handle, op.sent, behind)
    return call(_CombineDone(op.options), (), given)


def run_between(op: Sent, work: Any, args: tuple[Any, ...]) -> tuple[Sent, Any]:
    """``work(*args)`` behind the start call of ``op``; the new ``op`` is done behind the work.

    To JAX the work does not depend on the start call. Otherwise ``jax.checkpoint`` would start an op
    again to do the work again, and never finish it.
    """
    leaves, tree = jax.tree.flatten(args)
    leaves = behind_last_call([jnp.asarray(leaf) for leaf in leaves])
    results = work(*jax.tree.unflatten(tree, leaves))
    found = [leaf for leaf in jax.tree.leaves(results) if getattr(leaf, "size", 0) > 0]
    if not found:
        raise arguments.type_error(
            "Ticket.beside",
            "work",
            "a function that returns arrays with elements",
            type(results).__name__,
            "return what the work computes",
        )
    results, _ = lax.optimization_barrier((results, lax.stop_gradient(op.work)))
    behind = next(leaf for leaf in jax.tree.leaves(results) if leaf.size > 0)
    return dataclasses.replace(op, work=behind), results


def _both(plan_options: PlanOptions, options: DispatchOptions) -> dict[str, Any]:
    return plan_options.fields() | {
        "scale_format": options.scale_format,
        "dense_output": options.dense_output,
        "packs_scales": options.packs_scales,
        "flight": options.flight,
    }


@dataclasses.dataclass(frozen=True)
class _DispatchDone(Op):
    """What a dispatch that was sent gives, as a function of what was given to its start."""

    plan_options: PlanOptions
    options: DispatchOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        x, weights, topk_idx, sent, behind = fixed
        options = _both(self.plan_options, self.options)
        out = gpu_calls.dispatch_done(x, weights, topk_idx, sent, behind, **options)
        return gradients.match(out, x)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        rows, _, handle = results
        handle = _named(handle)  # here too, since this is what the backward pass keeps
        options = _in_line(self.options)
        found = gradients.dispatch_tangents(options, rows, tangents[:2], handle)
        return *found, jax.tree.map(lambda _: None, handle)


@dataclasses.dataclass(frozen=True)
class _CombineDone(Op):
    """What a combine that was sent gives, likewise."""

    options: CombineOptions

    def run(self, linear: Any, fixed: Any) -> Any:
        rows, weights, handle, sent, behind = fixed
        options = self.options
        y = gpu_calls.combine_done(
            rows,
            weights,
            handle,
            sent,
            behind,
            group=options.group,
            config=options.config,
            flight=options.flight,
        )
        return gradients.match(y, rows)

    def tangent(self, results: Any, linear: Any, fixed: Any, tangents: Any) -> Any:
        options = _in_line(self.options)
        return gradients.combine_tangents(options, fixed[:2], tangents[:2], fixed[2], like=results)


def _named(handle: Handle) -> Handle:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "jax_ep.handle"), handle)


def _in_line(options: Any) -> Any:
    """The same options for a gradient, which is not in flight."""
    return dataclasses.replace(options, flight=dataclasses.replace(options.flight, channel=0))
