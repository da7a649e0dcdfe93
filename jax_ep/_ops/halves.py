"""Ops of latency mode on GPUs in two calls, with their gradients, and what a ticket holds between them.

Gradients run the kernels of throughput mode, in line with the program, as those of ops in one call do.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from jax_ep import _compat
from jax_ep._backends import latency
from jax_ep._core import arguments
from jax_ep._core.types import Handle, Quantized
from jax_ep._ops import gradients
from jax_ep._ops.gradients import CombineOptions, DispatchOptions, PlanOptions


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
    sent = latency.dispatch_start(*given, **_both(plan_options, options))
    return SentDispatch(gradients.match(sent, x), None, x, weights, topk_idx, plan_options, options)


def dispatch_done(
    op: SentDispatch,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """The rows and the handle of a dispatch that was sent."""
    behind = lax.stop_gradient(op.work)
    tokens, weights, handle = _dispatch(
        op.plan_options, op.options, op.x, op.weights, op.topk_idx, op.sent, behind
    )
    return tokens, weights, _named(handle)


def combine_start(
    options: CombineOptions,
    rows: Float[Array, "capacity hidden"],
    weights: Float32[Array, " capacity"] | None,
    handle: Handle,
) -> SentCombine:
    """Send the sums of this rank's rows to the homes of their tokens."""
    sent = latency.combine_start(
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
    return _combine(op.options, op.rows, op.weights, op.handle, op.sent, behind)


def run_between(op: Sent, work: Any, args: tuple[Any, ...]) -> tuple[Sent, Any]:
    """``work(*args)`` behind the start call of ``op``; the new ``op`` is done behind the work."""
    ties = lax.stop_gradient((op.sent, op.work))
    args, _ = lax.optimization_barrier((args, ties))
    results = work(*args)
    found = [leaf for leaf in jax.tree.leaves(results) if getattr(leaf, "size", 0) > 0]
    if not found:
        raise arguments.type_error(
            "Ticket.beside",
            "work",
            "a function that returns arrays with elements",
            type(results).__name__,
            "return what the work computes",
        )
    results = lax.optimization_barrier(results)
    behind = next(leaf for leaf in jax.tree.leaves(results) if leaf.size > 0)
    return dataclasses.replace(op, work=behind), results


def _both(plan_options: PlanOptions, options: DispatchOptions) -> dict[str, Any]:
    return gradients.fields(plan_options) | {
        "scale_format": options.scale_format,
        "dense_output": options.dense_output,
        "flight": options.flight,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(plan_options, options, x, weights, topk_idx, sent, work):
    out = latency.dispatch_done(x, weights, topk_idx, sent, work, **_both(plan_options, options))
    return gradients.match(out, x)


def _dispatch_fwd(plan_options, options, x, weights, topk_idx, sent, work):
    out = _dispatch(plan_options, options, x, weights, topk_idx, sent, work)
    tokens, row_weights, handle = out
    handle = _named(handle)  # here too, since this is what the backward pass keeps
    return (tokens, row_weights, handle), handle


@_compat.backward
def _dispatch_bwd(plan_options, options, handle, cotangents):
    del plan_options
    return *gradients.dispatch_bwd(_in_line(options), handle, cotangents[:2]), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(options, rows, weights, handle, sent, work):
    y = latency.combine_done(
        rows,
        weights,
        handle,
        sent,
        work,
        group=options.group,
        config=options.config,
        flight=options.flight,
    )
    return gradients.match(y, rows)


def _combine_fwd(options, rows, weights, handle, sent, work):
    y = _combine(options, rows, weights, handle, sent, work)
    return y, (None if weights is None else (rows, weights), handle)


@_compat.backward
def _combine_bwd(options, residuals, dy):
    weighted, handle = residuals
    if weighted is None:
        d_rows, _, _ = gradients.combine_bwd(_in_line(options), handle, (dy, None))
        return d_rows, None, None, None, None
    d_rows, d_weights, _ = gradients.combine_weighted_bwd(
        _in_line(options), (*weighted, handle), dy
    )
    return d_rows, d_weights, None, None, None


_combine.defvjp(_combine_fwd, _combine_bwd)


def _named(handle: Handle) -> Handle:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "jax_ep.handle"), handle)


def _in_line(options: Any) -> Any:
    """The same options for a gradient, which is not in flight."""
    return dataclasses.replace(options, flight=dataclasses.replace(options.flight, channel=0))
