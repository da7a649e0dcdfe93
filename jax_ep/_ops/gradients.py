"""The four pure ops over any backend, with their gradients.

``plan`` is an op of its own. ``dispatch`` with weights and ``combine`` with values are each other's
transposes, so the backward of each is the other one. The handle is their only residual.

Calls without tokens (T = 0) are answered here, outside the custom gradients: there is nothing to
communicate, and residuals without elements crash XLA's partitioner (Shardy, jaxlib 0.11.2).
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32, Int32

from jax_ep import _compat, reference
from jax_ep._backends import latency, native
from jax_ep._core.batching import batched_alike
from jax_ep._core.capacity import INT32_MAX
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import (
    DispatchConfig,
    Handle,
    Layout,
    Quantized,
    ScaleFormat,
    UnusedRows,
    is_latency,
    without_latency,
)
from jax_ep._groups.group import Group
from jax_ep._ops import gpu_room

_BACKENDS: dict[str, types.ModuleType] = {"reference": reference, "cpu": native, "cuda": native}


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Static arguments of one plan, by the names that backends give them.

    Attributes:
        group: The group.
        num_experts: Over the whole group.
        layout: "expert" or "token".
        capacity: Rows of each rank.
        alignment: Group sizes are multiples of it.
        expert_capacity: Rows that an expert keeps at most.
        masked: Whether every expert has ``alignment`` rows; kept in the handle.
        config: How to use the machine.
        unused_rows: What rows past the last group hold; kept in the handle.
    """

    group: Group
    num_experts: int
    layout: Layout
    capacity: int
    alignment: int
    expert_capacity: int = INT32_MAX
    masked: bool = False
    config: DispatchConfig | None = None
    unused_rows: UnusedRows = "zero"


@dataclasses.dataclass(frozen=True)
class DispatchOptions:
    """Static arguments of one dispatch.

    Attributes:
        group: The group.
        row_dtype: Dtype of the rows given.
        scale_format: None, or how rows are quantized on their way.
        dense_output: With ``scale_format``: whether rows are given back in ``row_dtype``.
        config: How to use the machine.
        flight: How to issue the op, and the op that its gradient is.
    """

    group: Group
    row_dtype: Any
    scale_format: ScaleFormat | None = None
    dense_output: bool = True
    config: DispatchConfig | None = None
    flight: Flight = IN_LINE


@dataclasses.dataclass(frozen=True)
class CombineOptions:
    """Static arguments of one combine.

    Attributes:
        group: The group.
        config: How to use the machine.
        flight: How to issue the op, and the op that its gradient is.
    """

    group: Group
    config: DispatchConfig | None = None
    flight: Flight = IN_LINE


def plan(options: PlanOptions, topk_idx: Int32[Array, "tokens top_k"]) -> Handle:
    """See ``jax_ep.reference.plan``."""
    (topk_idx,) = vary_together(options.group, topk_idx)
    if topk_idx.shape[0] == 0:
        handle = _empty_plan(options, topk_idx)
    else:
        arguments = fields(options) | {"config": without_latency(options.config)}
        unused_rows = arguments.pop("unused_rows")
        handle = _BACKENDS[options.group.backend].plan(topk_idx, **arguments)
        handle = dataclasses.replace(handle, unused_rows=unused_rows, masked=options.masked)
    return match(handle, topk_idx)


def dispatch(
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    handle: Handle,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``. Gradient: straight-through where rows are quantized."""
    if handle.topk_idx.shape[0] == 0:
        return match(_empty_dispatch(options, x, weights, handle), x)
    return _dispatch(options, x, weights, handle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(options, x, weights, handle):
    backend = _BACKENDS[options.group.backend]
    out = backend.dispatch(
        x,
        weights,
        handle,
        group=options.group,
        scale_format=options.scale_format,
        dense_output=options.dense_output,
        **_how(options, without_latency(options.config)),
    )
    return match(out, x)


def _dispatch_fwd(options, x, weights, handle):
    return _dispatch(options, x, weights, handle), handle


@_compat.backward
def dispatch_bwd(options, handle, cotangents):
    d_rows, d_row_weights = cotangents
    if not isinstance(d_rows, Quantized):
        what = "for gradients on GPUs"
        gpu_room.check_sums_fit("dispatch", "x", d_rows, handle.layout, options.group, what)
        transpose = CombineOptions(options.group, without_latency(options.config), options.flight)
        d_tokens, d_weights = combine(transpose, d_rows, d_row_weights, handle)
        return d_tokens, d_weights, None
    # Nothing flows back through the rows themselves, because refuse_gradient forbids it.
    num_tokens, (_, hidden) = handle.topk_idx.shape[0], d_rows.values.shape
    d_values = jnp.zeros((num_tokens, hidden), options.row_dtype)
    d_x: Array | Quantized = d_values
    if options.row_dtype == jnp.float8_e4m3fn:
        no_scales = jnp.zeros((num_tokens, d_rows.scales.shape[1]), jnp.float32)
        d_x = Quantized(d_values, no_scales)
    no_rows = match(jnp.zeros((handle.capacity, 0), jnp.float32), d_rows)
    transpose = CombineOptions(options.group, without_latency(options.config), options.flight)
    _, d_weights = combine(transpose, no_rows, d_row_weights, handle)
    return match(d_x, d_rows), d_weights, None


_dispatch.defvjp(_dispatch_fwd, dispatch_bwd)


def plan_and_dispatch(
    plan_options: PlanOptions,
    options: DispatchOptions,
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """``plan`` and ``dispatch`` in one launch; see ``takes_one_launch``. Gradients: as ``dispatch``."""
    return _plan_and_dispatch(plan_options, options, x, weights, topk_idx)


def takes_one_launch(group: Group, config: DispatchConfig | None, num_tokens: int) -> bool:
    """Whether a dispatch makes its plan in the same launch: on GPUs in latency mode."""
    return is_latency(config) and group.backend == "cuda" and num_tokens > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _plan_and_dispatch(plan_options, options, x, weights, topk_idx):
    out = latency.dispatch(
        x,
        weights,
        topk_idx,
        **fields(plan_options),
        scale_format=options.scale_format,
        dense_output=options.dense_output,
        flight=options.flight,
    )
    return match(out, x)


def _plan_and_dispatch_fwd(plan_options, options, x, weights, topk_idx):
    tokens, row_weights, handle = _plan_and_dispatch(plan_options, options, x, weights, topk_idx)
    # Named here too, since this is what the backward pass keeps.
    handle = jax.tree.map(lambda leaf: checkpoint_name(leaf, "jax_ep.handle"), handle)
    return (tokens, row_weights, handle), handle


@_compat.backward
def _plan_and_dispatch_bwd(plan_options, options, handle, cotangents):
    del plan_options
    return dispatch_bwd(options, handle, cotangents[:2])


_plan_and_dispatch.defvjp(_plan_and_dispatch_fwd, _plan_and_dispatch_bwd)


def fields(options: PlanOptions) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def combine(
    options: CombineOptions,
    rows: Array,
    values: Float32[Array, "capacity *top_k"] | None,
    handle: Handle,
) -> tuple[Array, Float32[Array, "tokens top_k"] | None]:
    """See ``jax_ep.reference.combine``, without row weights."""
    num_tokens, top_k = handle.topk_idx.shape
    if num_tokens == 0:
        home = None if values is None else jnp.zeros((0, top_k), jnp.float32)
        return match((jnp.zeros((0, rows.shape[1]), rows.dtype), home), rows)
    return _combine(options, rows, values, handle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(options, rows, values, handle):
    backend, how = _BACKENDS[options.group.backend], _how(options, options.config)
    results = backend.combine(rows, None, values, handle, group=options.group, **how)
    return match(results, rows)


def _combine_fwd(options, rows, values, handle):
    return _combine(options, rows, values, handle), handle


@_compat.backward
def combine_bwd(options, handle, cotangents):
    dy, d_home = cotangents
    config = without_latency(options.config)
    transpose = DispatchOptions(options.group, dy.dtype, config=config, flight=options.flight)
    d_rows, d_values = dispatch(transpose, dy, d_home, handle)
    return d_rows, d_values, None


_combine.defvjp(_combine_fwd, combine_bwd)


def combine_weighted(
    options: CombineOptions, rows: Array, row_weights: Float32[Array, " capacity"], handle: Handle
) -> Array:
    """See ``jax_ep.reference.combine``, with row weights; keeps rows and weights for backward."""
    if handle.topk_idx.shape[0] == 0:
        return match(jnp.zeros((0, rows.shape[1]), rows.dtype), rows)
    return _combine_weighted(options, rows, row_weights, handle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_weighted(options, rows, row_weights, handle):
    backend, how = _BACKENDS[options.group.backend], _how(options, options.config)
    y, _ = backend.combine(rows, row_weights, None, handle, group=options.group, **how)
    return match(y, rows)


def _combine_weighted_fwd(options, rows, row_weights, handle):
    return _combine_weighted(options, rows, row_weights, handle), (rows, row_weights, handle)


@_compat.backward
def combine_weighted_bwd(options, residuals, dy):
    rows, row_weights, handle = residuals
    group = options.group
    gpu_room.check_weighted_gradient_fits("combine", "rows", rows, group)
    backend = _BACKENDS[group.backend]
    how = _how(options, without_latency(options.config))
    gradients = backend.combine_vjp(dy, rows, row_weights, handle, group=group, **how)
    return *match(gradients, rows), None


_combine_weighted.defvjp(_combine_weighted_fwd, combine_weighted_bwd)


def _how(
    options: DispatchOptions | CombineOptions, config: DispatchConfig | None
) -> dict[str, Any]:
    """The arguments of a backend's functions that change no results; XLA alone issues the reference."""
    how: dict[str, Any] = {"config": config}
    is_reference = _BACKENDS[options.group.backend] is reference
    return how if is_reference else how | {"flight": options.flight}


@jax.custom_vjp
def refuse_gradient(q: Quantized) -> Quantized:
    """``q`` itself; differentiating through it is an error while tracing."""
    return q


def _refuse_gradient_fwd(q):
    return q, None


def _refuse_gradient_bwd(_, cotangent):
    raise TypeError(
        "jax_ep.dispatch: Quantized rows have no gradient (a float8_e4m3fn cotangent would be "
        "useless). Pass x as bfloat16, float16 or float32 with quantization='fp8' and "
        "output='dense', whose gradient is straight-through; or cut the gradient with "
        "jax.lax.stop_gradient."
    )


refuse_gradient.defvjp(_refuse_gradient_fwd, _refuse_gradient_bwd)


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


def match(results: Any, like: Any) -> Any:
    """Cast results to vary over the axes that ``like`` varies over."""
    axes = _compat.varying_axes(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda leaf: _compat.cast_varying(leaf, axes), results)


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
        group_sizes=zeros((num_local,)) + (options.alignment if options.masked else 0),
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
        masked=options.masked,
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
