"""The native backends: calls of their FFI targets.

The same target names, operands and attributes serve every platform; on GPUs some targets have a scratch
result more. A backend is a module with
``plan``, ``dispatch``, ``combine`` and ``combine_vjp``; ``jax_ep.reference`` is the other one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jax_ep._backends import calls, shapes_of
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import (
    DispatchConfig,
    Handle,
    Layout,
    Quantized,
    ScaleFormat,
    is_latency,
    without_latency,
)
from jax_ep._groups import gpu_side, network, tuning
from jax_ep._groups.group import Group


def workspace_bytes(group: Group) -> int:
    """Device memory that ``group`` takes on each of its GPUs beyond XLA's; 0 on other platforms."""
    if group.backend != "cuda":
        return 0
    channels = gpu_side.num_channels(group.topology, group.channels)
    latency = group.latency_tokens, group.latency_hidden
    used = gpu_side.library().workspace_bytes(channels, len(group.topology.hosts[0]), *latency)
    if calls.spans_hosts(group):
        hosts, settings = group.topology.hosts, network.settings_of(group.id)
        used += network.memory_bytes(settings, len(hosts), len(hosts[0]))
    return used


def plan(
    topk_idx: Int32[Array, "tokens top_k"],
    *,
    group: Group,
    num_experts: int,
    layout: Layout,
    capacity: int,
    alignment: int,
    expert_capacity: int,
    masked: bool = False,
    config: DispatchConfig | None = None,
) -> Handle:
    """See ``jax_ep.reference.plan``."""
    num_tokens, top_k = topk_idx.shape
    shapes, absent = shapes_of.handle_shapes(
        num_tokens,
        top_k,
        num_ranks=group.size,
        spans_hosts=calls.spans_hosts(group),
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
    )
    num_local = num_experts // group.size
    scratch = 0
    if calls.spans_hosts(group):
        scratch = network.library().plan_scratch_size(num_local)
    elif group.backend == "cuda":
        scratch = gpu_side.plan_scratch_size(
            calls.LAYOUTS[layout], num_tokens, top_k, num_experts, group.size
        )
    results = calls.call(
        group,
        "plan",
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values()],
        topk_idx,
        calls.coords(group),
        scratch=[jax.ShapeDtypeStruct((scratch,), jnp.int32)],
        **calls.attributes(group, num_experts, layout, config, op="plan", num_tokens=num_tokens),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
        masked=np.int32(masked),
    )
    return shapes_of.handle_of(
        results,
        list(shapes),
        absent,
        group_id=group.id,
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
        alignment=alignment,
    )


def dispatch(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    handle: Handle,
    *,
    group: Group,
    scale_format: ScaleFormat | None = None,
    dense_output: bool = True,
    config: DispatchConfig | None = None,
    flight: Flight = IN_LINE,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    rows, hidden = handle.capacity, values.shape[1]
    results, quantized = shapes_of.row_shapes(
        x, weights, handle.layout, rows, scale_format=scale_format, dense_output=dense_output
    )
    scratch = 0
    if group.backend == "cuda" and scale_format is not None:
        # Within a host, rows become dense on their way.
        dequantized = rows if dense_output and calls.spans_hosts(group) else 0
        scratch = gpu_side.library().dispatch_scratch_size(len(values), hidden, dequantized)
    tokens, row_scales, row_weights = calls.call(
        group,
        "dispatch",
        results,
        values,
        calls.optional(scales),
        calls.optional(weights),
        *calls.routes(handle, group),
        calls.coords(group),
        **calls.attributes(
            group,
            handle.num_experts,
            handle.layout,
            config,
            op="dispatch",
            num_tokens=len(values),
            hidden=hidden,
            rows=tuning.rows_name(values.dtype, scale_format, dense_output),
            flight=flight,
        ),
        scratch=[jax.ShapeDtypeStruct((scratch,), jnp.uint8)],
        quantization=np.int32(calls.QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
        unused_rows=np.int32(handle.keeps_unused),
    )
    out = Quantized(tokens, row_scales) if quantized else tokens
    return out, row_weights if weights is not None else None


def combine(
    rows: Array,
    row_weights: Float32[Array, " capacity"] | None,
    values: Float32[Array, "capacity *top_k"] | None,
    handle: Handle,
    *,
    group: Group,
    config: DispatchConfig | None = None,
    flight: Flight = IN_LINE,
) -> tuple[Array, Float32[Array, "tokens top_k"] | None]:
    """See ``jax_ep.reference.combine``."""
    num_tokens, top_k = handle.topk_idx.shape
    latency = is_latency(config) and group.backend == "cuda" and values is None
    results = [
        jax.ShapeDtypeStruct((num_tokens, rows.shape[1]), rows.dtype),
        jax.ShapeDtypeStruct((num_tokens, top_k) if values is not None else (0,), jnp.float32),
    ]
    y, home = calls.call(
        group,
        "latency_combine" if latency else "combine",
        results,
        rows,
        calls.optional(row_weights),
        calls.optional(values),
        *calls.routes(handle, group),
        calls.coords(group),
        **calls.attributes(
            group,
            handle.num_experts,
            handle.layout,
            config if latency else without_latency(config),
            op="combine",
            num_tokens=num_tokens,
            hidden=rows.shape[1],
            rows=tuning.rows_name(rows.dtype),
            flight=flight,
        ),
    )
    return y, home if values is not None else None


def combine_vjp(
    dy: Array,
    rows: Array,
    row_weights: Float32[Array, " capacity"],
    handle: Handle,
    *,
    group: Group,
    config: DispatchConfig | None = None,
    flight: Flight = IN_LINE,
) -> tuple[Array, Float32[Array, " capacity"]]:
    """See ``jax_ep.reference.combine_vjp``."""
    d_rows, d_weights = calls.call(
        group,
        "combine_vjp",
        [
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct(row_weights.shape, jnp.float32),
        ],
        dy,
        rows,
        row_weights,
        *calls.routes(handle, group),
        calls.coords(group),
        # Moves what a dispatch moves, and is tuned as one.
        **calls.attributes(
            group,
            handle.num_experts,
            handle.layout,
            config,
            op="dispatch",
            num_tokens=len(dy),
            hidden=rows.shape[1],
            rows=tuning.rows_name(rows.dtype),
            flight=flight,
        ),
        unused_rows=np.int32(handle.keeps_unused),
    )
    return d_rows, d_weights
