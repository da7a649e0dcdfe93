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
from jax_ep._backends.primitive import native_call
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
from jax_ep._groups.group import Group, sms_of

_LAYOUTS = {"expert": 0, "token": 1}
# Leaves of a handle that tell of routes: of a group on one host, and of one that spans hosts.
_ROUTES = ("dest_row", "recv_rows")
_ENTRIES = ("recv_start", "recv_token", "recv_row")
_QUANTIZATIONS = {None: 0, "f32": 1, "ue8m0": 2}


def workspace_bytes(group: Group) -> int:
    """Device memory that ``group`` takes on each of its GPUs beyond XLA's; 0 on other platforms."""
    if group.backend != "cuda":
        return 0
    on_host = len(group.topology.hosts[0])
    used = gpu_side.library().workspace_bytes(on_host, group.latency_tokens, group.latency_hidden)
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
    shapes, absent = _handle_shapes(
        num_tokens, top_k, group=group, num_experts=num_experts, layout=layout, capacity=capacity
    )
    num_local = num_experts // group.size
    names = list(shapes)
    if _spans_hosts(group):
        shapes["scratch"] = (network.library().plan_scratch_size(num_local),)
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
        shapes["scratch"] = (scratch,)
    results = native_call(
        _target(group, "plan"),
        [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values()],
        topk_idx,
        _coords(group),
        **_attributes(group, num_experts, layout, config, op="plan", num_tokens=num_tokens),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
    )
    return _handle_of(
        results[: len(names)],
        names,
        absent,
        group=group,
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
        alignment=alignment,
    )


def _handle_shapes(
    num_tokens: int, top_k: int, *, group: Group, num_experts: int, layout: Layout, capacity: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, None]]:
    """Shapes of the int32 leaves of a handle, in the order of results; and those that are None."""
    num_local = num_experts // group.size
    num_rows = min(top_k, num_local) if layout == "expert" else 1
    shapes = {
        "topk_idx": (num_tokens, top_k),
        "dest_row": (num_tokens, top_k),
        "recv_rows": (group.size * num_tokens, num_rows),
        "recv_start": (group.size + 1,),
        "recv_token": (capacity,),
        "recv_row": (capacity,),
        "recv_src": (capacity,),
        "expert_idx": (capacity if layout == "token" else 0, top_k),
        "group_sizes": (num_local,),
        "counts": (num_local,),
        "demand": (num_local,),
        "num_dropped": (1,),
        "num_invalid": (1,),
    }
    absent = dict.fromkeys(_ROUTES if _spans_hosts(group) else _ENTRIES)
    return {name: shape for name, shape in shapes.items() if name not in absent}, absent


def _handle_of(
    results: Sequence[Array],
    names: Sequence[str],
    absent: dict[str, None],
    *,
    group: Group,
    **fields: Any,
) -> Handle:
    leaves: dict[str, Any] = dict(zip(names, results, strict=True)) | absent
    if fields["layout"] == "expert":
        leaves["expert_idx"] = None
    return Handle(**leaves, group_id=group.id, **fields)


def dispatch(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    handle: Handle,
    *,
    group: Group,
    scale_format: ScaleFormat | None = None,
    dense_output: bool = True,
    config: DispatchConfig | None = None,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    rows, hidden = handle.capacity, values.shape[1]
    results, quantized = _row_shapes(
        x, weights, handle.layout, rows, scale_format=scale_format, dense_output=dense_output
    )
    if group.backend == "cuda":
        scratch = gpu_side.library().dispatch_scratch_size(
            len(values), hidden, rows, scale_format is not None, dense_output
        )
        results.append(jax.ShapeDtypeStruct((scratch,), jnp.uint8))
    tokens, row_scales, row_weights = native_call(
        _target(group, "dispatch"),
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
        ),
        quantization=np.int32(_QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
    )[:3]
    out = Quantized(tokens, row_scales) if quantized else tokens
    return out, row_weights if weights is not None else None


def _row_shapes(
    x: Array | Quantized,
    weights: Array | None,
    layout: Layout,
    rows: int,
    *,
    scale_format: ScaleFormat | None,
    dense_output: bool,
) -> tuple[list[jax.ShapeDtypeStruct], bool]:
    """What a dispatch gives: rows, scales and weights; and whether rows are quantized."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    hidden = values.shape[1]
    quantized = scales is not None or (scale_format is not None and not dense_output)
    top_k = () if weights is None or layout == "expert" else (weights.shape[1],)
    row_dtype = jnp.float8_e4m3fn if quantized else values.dtype
    return [
        jax.ShapeDtypeStruct((rows, hidden), row_dtype),
        jax.ShapeDtypeStruct((rows, hidden // 128) if quantized else (0,), jnp.float32),
        jax.ShapeDtypeStruct((rows, *top_k) if weights is not None else (0,), jnp.float32),
    ], quantized


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
    scale_format: ScaleFormat | None,
    dense_output: bool,
    config: DispatchConfig,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]:
    """``plan``, and ``dispatch`` along it, in one launch of latency mode; on GPUs only."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    num_tokens, top_k = topk_idx.shape
    fields: dict[str, Any] = {"num_experts": num_experts, "layout": layout, "capacity": capacity}
    shapes, absent = _handle_shapes(num_tokens, top_k, group=group, **fields)
    of_rows, quantized = _row_shapes(
        x, weights, layout, capacity, scale_format=scale_format, dense_output=dense_output
    )
    results = native_call(
        "jax_ep_latency_dispatch",
        [*of_rows, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values())],
        values,
        _optional(scales),
        _optional(weights),
        topk_idx,
        _coords(group),
        **_attributes(group, num_experts, layout, config, op="dispatch", num_tokens=num_tokens),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
        quantization=np.int32(_QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
    )
    tokens, row_scales, row_weights, *of_handle = results
    handle = _handle_of(of_handle, list(shapes), absent, group=group, alignment=alignment, **fields)
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
) -> tuple[Array, Float32[Array, "tokens top_k"] | None]:
    """See ``jax_ep.reference.combine``."""
    num_tokens, top_k = handle.topk_idx.shape
    latency = is_latency(config) and group.backend == "cuda" and values is None
    results = [
        jax.ShapeDtypeStruct((num_tokens, rows.shape[1]), rows.dtype),
        jax.ShapeDtypeStruct((num_tokens, top_k) if values is not None else (0,), jnp.float32),
    ]
    y, home = native_call(
        _target(group, "latency_combine" if latency else "combine"),
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
) -> tuple[Array, Float32[Array, " capacity"]]:
    """See ``jax_ep.reference.combine_vjp``."""
    d_rows, d_weights = native_call(
        _target(group, "combine_vjp"),
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
        ),
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
) -> dict[str, Any]:
    requested = None if config is None else config.num_sms
    if is_latency(config):  # whose kernels take what they have use for
        num_sms = 0 if group.backend != "cuda" else requested or 0
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
        "num_sms": np.int32(num_sms),
    }


def _spans_hosts(group: Group) -> bool:
    return group.transport == "nvshmem"


def _target(group: Group, op: str) -> str:
    return f"jax_ep_network_{op}" if _spans_hosts(group) else f"jax_ep_{op}"


def _routes(handle: Handle, group: Group) -> tuple[Any, ...]:
    no_expert_idx = jax.ShapeDtypeStruct((0, handle.topk_idx.shape[1]), jnp.int32)
    names = _ENTRIES if _spans_hosts(group) else _ROUTES
    return (
        handle.topk_idx,
        *(getattr(handle, name) for name in names),
        handle.recv_src,
        no_expert_idx if handle.expert_idx is None else handle.expert_idx,
    )


def _optional(x: Array | None) -> Any:
    """``x``, or what stands for an absent operand."""
    return jax.ShapeDtypeStruct((0,), jnp.float32) if x is None else x
