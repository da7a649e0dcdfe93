"""The native backends: calls of their FFI targets.

The same target names, operands and attributes serve every platform; on GPUs some targets have a scratch
result more. A backend is a module with
``plan``, ``dispatch``, ``combine`` and ``combine_vjp``; ``jax_ep.reference`` is the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from jax_ep import _compat
from jax_ep._backends import shapes_of
from jax_ep._backends.primitive import native_call
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import (
    DispatchConfig,
    Handle,
    Layout,
    Quantized,
    ScaleFormat,
    UnusedRows,
    is_latency,
    keeps_unused,
    without_latency,
)
from jax_ep._groups import gpu_side, network, tuning
from jax_ep._groups.group import Group, sms_of

_LAYOUTS = {"expert": 0, "token": 1}
_QUANTIZATIONS = {None: 0, "f32": 1, "ue8m0": 2}


def workspace_bytes(group: Group) -> int:
    """Device memory that ``group`` takes on each of its GPUs beyond XLA's; 0 on other platforms."""
    if group.backend != "cuda":
        return 0
    channels = gpu_side.num_channels(group.topology, group.channels)
    latency = group.latency_tokens, group.latency_hidden
    used = gpu_side.library().workspace_bytes(channels, len(group.topology.hosts[0]), *latency)
    if _spans_hosts(group):
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
    config: DispatchConfig | None = None,
) -> Handle:
    """See ``jax_ep.reference.plan``."""
    num_tokens, top_k = topk_idx.shape
    shapes, absent = shapes_of.handle_shapes(
        num_tokens,
        top_k,
        num_ranks=group.size,
        spans_hosts=_spans_hosts(group),
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
    )
    num_local = num_experts // group.size
    scratch = 0
    if _spans_hosts(group):
        scratch = network.library().plan_scratch_size(num_local)
    elif group.backend == "cuda":
        scratch = gpu_side.library().plan_scratch_size(
            _LAYOUTS[layout], num_tokens, top_k, num_experts, group.size
        )
        if scratch < 0:
            raise ValueError(
                "jax_ep.dispatch: argument num_experts: expected a plan that shared memory of GPUs "
                f"has room for, got {num_experts} experts, {top_k} a token, on {group.size} ranks; "
                "use fewer of them, or make the group with backend='reference'."
            )
    results = _call(
        group,
        "plan",
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values()],
        topk_idx,
        _coords(group),
        scratch=[jax.ShapeDtypeStruct((scratch,), jnp.int32)],
        **_attributes(group, num_experts, layout, config, op="plan", num_tokens=num_tokens),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
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
    if group.backend == "cuda":
        scratch = gpu_side.library().dispatch_scratch_size(
            len(values), hidden, rows, scale_format is not None, dense_output
        )
    tokens, row_scales, row_weights = _call(
        group,
        "dispatch",
        results,
        values,
        _optional(scales),
        _optional(weights),
        *_routes(handle, group),
        _coords(group),
        **_attributes(
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
        quantization=np.int32(_QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
        unused_rows=np.int32(handle.keeps_unused),
    )
    out = Quantized(tokens, row_scales) if quantized else tokens
    return out, row_weights if weights is not None else None


def latency_dispatch(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
    *,
    group: Group,
    num_experts: int,
    layout: Layout,
    capacity: int,
    alignment: int,
    expert_capacity: int,
    unused_rows: UnusedRows,
    scale_format: ScaleFormat | None,
    dense_output: bool,
    config: DispatchConfig,
    flight: Flight = IN_LINE,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """``plan``, and ``dispatch`` along it, in one launch of latency mode; on GPUs only."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    num_tokens, top_k = topk_idx.shape
    fields: dict[str, Any] = {"num_experts": num_experts, "layout": layout, "capacity": capacity}
    shapes, absent = shapes_of.handle_shapes(
        num_tokens, top_k, num_ranks=group.size, spans_hosts=_spans_hosts(group), **fields
    )
    of_rows, quantized = shapes_of.row_shapes(
        x, weights, layout, capacity, scale_format=scale_format, dense_output=dense_output
    )
    results = _call(
        group,
        "latency_dispatch",
        [*of_rows, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values())],
        values,
        _optional(scales),
        _optional(weights),
        topk_idx,
        _coords(group),
        **_attributes(
            group, num_experts, layout, config, op="dispatch", num_tokens=num_tokens, flight=flight
        ),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
        quantization=np.int32(_QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
        unused_rows=np.int32(keeps_unused(unused_rows, alignment)),
    )
    tokens, row_scales, row_weights, *of_handle = results
    of_plan = {"group_id": group.id, "alignment": alignment, "unused_rows": unused_rows}
    handle = shapes_of.handle_of(of_handle, list(shapes), absent, **of_plan, **fields)
    out = Quantized(tokens, row_scales) if quantized else tokens
    return out, row_weights if weights is not None else None, handle


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
    y, home = _call(
        group,
        "latency_combine" if latency else "combine",
        results,
        rows,
        _optional(row_weights),
        _optional(values),
        *_routes(handle, group),
        _coords(group),
        **_attributes(
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
    d_rows, d_weights = _call(
        group,
        "combine_vjp",
        [
            jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            jax.ShapeDtypeStruct(row_weights.shape, jnp.float32),
        ],
        dy,
        rows,
        row_weights,
        *_routes(handle, group),
        _coords(group),
        # Moves what a dispatch moves, and is tuned as one.
        **_attributes(
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


def _coords(group: Group) -> Int32[Array, "2"]:
    """This rank within its group, and which of the groups side by side it is."""
    rank = lax.axis_index(group.axis_names)
    others = group.other_axes
    instance = lax.axis_index(others) if others else jnp.int32(0)
    axes = frozenset(_compat.varying_axes(rank) | _compat.varying_axes(instance))
    return jnp.stack([_compat.cast_varying(rank, axes), _compat.cast_varying(instance, axes)])


def _attributes(
    group: Group,
    num_experts: int,
    layout: Layout,
    config: DispatchConfig | None,
    *,
    op: tuning.TunedOp,
    num_tokens: int,
    hidden: int = 0,
    rows: str = "",
    flight: Flight = IN_LINE,
) -> dict[str, Any]:
    requested = None if config is None else config.num_sms
    if is_latency(config):  # 0: as many as the kernels have use for
        num_sms = 0 if group.backend != "cuda" else requested or flight.most_sms or 0
    else:
        num_sms = sms_of(
            group,
            op=op,
            layout=layout,
            rows=rows,
            hidden=hidden,
            num_tokens=num_tokens,
            requested=requested,
        )
    return {
        "num_ranks": np.int32(group.size),
        "num_experts": np.int32(num_experts),
        "layout": np.int32(_LAYOUTS[layout]),
        "group_id": np.int64(group.id),
        "timeout_ms": np.int64(min(group.timeout * 1000, 2**62)),
        "num_sms": np.int32(num_sms if flight.most_sms is None else min(num_sms, flight.most_sms)),
        "channel": np.int32(flight.channel),
    }


def _spans_hosts(group: Group) -> bool:
    return group.transport == "nvshmem"


def _call(
    group: Group,
    op: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    **attributes: Any,
) -> list[Array]:
    """The call of an op; scratch memory is what the target takes on GPUs."""
    on_gpus = group.backend == "cuda"
    target = f"jax_ep_network_{op}" if _spans_hosts(group) else f"jax_ep_{op}"
    if on_gpus and attributes["channel"] > 0:
        target += "_async"  # not for command buffers
    return native_call(
        target,
        results,
        *operands,
        scratch=scratch if on_gpus else (),
        ordered=on_gpus,
        **attributes,
    )


def _routes(handle: Handle, group: Group) -> tuple[Any, ...]:
    no_expert_idx = jax.ShapeDtypeStruct((0, handle.topk_idx.shape[1]), jnp.int32)
    names = shapes_of.ENTRIES if _spans_hosts(group) else shapes_of.ROUTES
    return (
        handle.topk_idx,
        *(getattr(handle, name) for name in names),
        handle.recv_src,
        no_expert_idx if handle.expert_idx is None else handle.expert_idx,
    )


def _optional(x: Array | None) -> Any:
    """``x``, or what stands for an absent operand."""
    return jax.ShapeDtypeStruct((0,), jnp.float32) if x is None else x
