"""The four pure ops over any backend, with their derivatives.

``plan`` is an op of its own. ``dispatch`` with weights and ``combine`` with values are each other's
transposes (``linear.py``), so the backward of each is the other one. The handle is their only residual.

Calls without tokens (T = 0) are answered here, outside the ops: there is nothing to communicate, and
residuals without elements crash XLA's partitioner (Shardy, jaxlib 0.11.2).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jax_ep import _compat
from jax_ep._core.batching import batched_alike
from jax_ep._core.derivatives import bilinear, call
from jax_ep._core.types import DispatchConfig, Handle, Quantized, is_latency, without_latency
from jax_ep._groups.group import Group
from jax_ep._ops import linear
from jax_ep._ops.options import (
    CombineOptions,
    DispatchOptions,
    PlanOptions,
    backend_of,
    match,
)


def plan(options: PlanOptions, topk_idx: Int32[Array, "tokens top_k"]) -> Handle:
    """See ``jax_ep.reference.plan``."""
    (topk_idx,) = vary_together(options.group, topk_idx)
    if topk_idx.shape[0] == 0:
        handle = _empty_plan(options, topk_idx)
    else:
        arguments = options.fields() | {"config": without_latency(options.config)}
        unused_rows = arguments.pop("unused_rows")
        handle = backend_of(options.group).plan(topk_idx, **arguments)
        handle = dataclasses.replace(handle, unused_rows=unused_rows)
    return match(handle, topk_idx)


def dispatch(
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    handle: Handle,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``. Derivatives: straight-through where rows are quantized."""
    if handle.topk_idx.shape[0] == 0:
        return match(_empty_dispatch(options, x, weights, handle), x)
    if isinstance(x, Quantized) or options.scale_format is not None:
        return call(linear.DispatchOf8Bits(options), (), (x, weights, handle))
    return call(linear.Dispatch(options), (x, weights), (handle,))


def plan_and_dispatch(
    plan_options: PlanOptions,
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """``plan`` and ``dispatch`` in one launch; see ``takes_one_launch``. Derivatives: as there."""
    return call(linear.PlanAndDispatch(plan_options, options), (), (x, weights, topk_idx))


def takes_one_launch(group: Group, config: DispatchConfig | None, num_tokens: int) -> bool:
    """Whether a dispatch makes its plan in the same launch: on GPUs in latency mode."""
    return is_latency(config) and group.backend == "cuda" and num_tokens > 0


def combine(options: CombineOptions, rows: Array, handle: Handle) -> Array:
    """See ``jax_ep.reference.combine``, without row weights and values."""
    if handle.topk_idx.shape[0] == 0:
        return match(jnp.zeros((0, rows.shape[1]), rows.dtype), rows)
    return call(linear.Combine(options), (rows, None), (handle,))[0]


def combine_weighted(
    options: CombineOptions, rows: Array, row_weights: Float32[Array, " capacity"], handle: Handle
) -> Array:
    """See ``jax_ep.reference.combine``, with row weights; keeps rows and weights for backward."""
    if handle.topk_idx.shape[0] == 0:
        return match(jnp.zeros((0, rows.shape[1]), rows.dtype), rows)
    return bilinear(linear.CombineWeighted(options), rows, row_weights, handle)


def vary_together(group: Group, *operands: Any) -> tuple[Any, ...]:
    """Cast all operands to vary over the axes of any of them and of the group.

    If all operands of an op vary over the same axes, so do its results. And the transpose of the
    cast sums the cotangents of an operand that was the same on several ranks. ``vmap`` over an axis
    of the mesh batches all of them or none.
    """
    if not _compat.tracks_varying_axes(group.axis_names):
        return operands
    operands = batched_alike(*operands)
    axes = frozenset(group.axis_names).union(*map(_compat.varying_axes, jax.tree.leaves(operands)))
    return jax.tree.map(lambda leaf: _compat.cast_varying(leaf, axes), operands)


def _empty_plan(options: PlanOptions, topk_idx: Int32[Array, "0 top_k"]) -> Handle:
    """The plan of no tokens, which needs no communication."""
    top_k, layout, capacity = topk_idx.shape[1], options.layout, options.capacity
    num_local = options.num_experts // options.group.size
    none = functools.partial(jnp.full, fill_value=-1, dtype=jnp.int32)
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    width = min(top_k, num_local) if layout == "expert" else 1
    spans_hosts = len(options.group.topology.hosts) > 1
    return Handle(
        topk_idx=topk_idx,
        dest_row=None if spans_hosts else none((0, top_k)),
        recv_rows=None if spans_hosts else none((0, width)),
        recv_start=zeros((options.group.size + 1,)) if spans_hosts else None,
        recv_token=none((capacity,)) if spans_hosts else None,
        recv_row=none((capacity,)) if spans_hosts else None,
        recv_src=none((capacity,)),
        expert_idx=none((capacity, top_k)) if layout == "token" else None,
        group_sizes=zeros((num_local,)),
        counts=zeros((num_local,)),
        demand=zeros((num_local,)),
        num_dropped=zeros((1,)),
        num_invalid=zeros((1,)),
        group_id=options.group.id,
        num_experts=options.num_experts,
        layout=layout,
        capacity=capacity,
        alignment=options.alignment,
        unused_rows=options.unused_rows,
    )


def _empty_dispatch(
    options: DispatchOptions, x: Array | Quantized, weights: Array | None, handle: Handle
) -> tuple[Array | Quantized, Array | None]:
    """The results of a dispatch of no tokens: all rows are unused."""
    values = x.values if isinstance(x, Quantized) else x
    rows, hidden = handle.capacity, values.shape[1]
    row_weights = None
    if weights is not None:
        shape = (rows,) if handle.layout == "expert" else (rows, weights.shape[1])
        row_weights = jnp.zeros(shape, jnp.float32)
    if isinstance(x, Quantized) or (options.scale_format is not None and not options.dense_output):
        scales = jnp.zeros((rows, hidden // 128), jnp.float32)
        return Quantized(jnp.zeros((rows, hidden), jnp.float8_e4m3fn), scales), row_weights
    return jnp.zeros((rows, hidden), values.dtype), row_weights
