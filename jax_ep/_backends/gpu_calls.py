"""Calls that only GPUs have: a dispatch with its plan in one, and both ops of latency mode in two.

In throughput mode the call with the plan is that of two kernels, of which the second begins while the
first one runs; in latency mode it is one kernel.

The first of the two calls sends what the peers need, and the second one waits for what they have sent.
Both are calls in line with the program, so nothing of the op holds an SM between them. Each channel has
an inbox of its own, so ops in flight are on different ones; but all calls come behind each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jax_ep._backends import calls, shapes_of
from jax_ep._backends.primitive import native_call
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.quantize import with_packed_scales
from jax_ep._core.types import (
    DispatchConfig,
    Handle,
    Layout,
    Quantized,
    ScaleFormat,
    UnusedRows,
    is_latency,
    keeps_unused,
)
from jax_ep._groups import gpu_side, tuning
from jax_ep._groups.group import Group

Rows = tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None, Handle]
Sent = Int32[Array, "1"]  # what a start call gives, for the done call

_SENT = jax.ShapeDtypeStruct((1,), jnp.int32)


def dispatch(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
    **options: Any,
) -> Rows:
    """``plan``, and ``dispatch`` along it, in one call. Options: as ``_attributes``."""
    if is_latency(options["config"]):
        return _receive("latency_dispatch", x, weights, topk_idx, (), **options)
    group: Group = options["group"]
    calls.check_no_absent(group, "dispatch")
    values = x.values if isinstance(x, Quantized) else x
    plan = gpu_side.plan_scratch_size(
        calls.LAYOUTS[options["layout"]],
        topk_idx.shape[0],
        topk_idx.shape[1],
        options["num_experts"],
        group.size,
    )
    casts = options["scale_format"] is not None
    sent = gpu_side.library().dispatch_scratch_size(*values.shape, 0) if casts else 0
    scratch = jax.ShapeDtypeStruct((-(-plan * 4 // 128) * 128 + sent,), jnp.uint8)
    groups = _packed_groups(**options)
    options["packs_scales"] = False  # the kernels of latency mode do it
    rows, row_weights, handle = _receive(
        "plan_dispatch", x, weights, topk_idx, (), [scratch], **options
    )
    if groups > 0:
        assert isinstance(rows, Quantized)  # for the type checker: _ops/quantized.py checks it
        rows = with_packed_scales(rows, groups)
    return rows, row_weights, handle


def dispatch_start(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
    **options: Any,
) -> Sent:
    """The first of two calls of the same."""
    capacity = np.int32(options["capacity"])
    (sent,) = _call(
        "latency_dispatch_start",
        [_SENT],
        *_operands(x, weights, topk_idx, options["group"]),
        **_attributes(x, topk_idx, **options),
        packed_scales=np.int32(options["packs_scales"]),
        capacity=capacity,
    )
    return sent


def dispatch_done(
    x: Array | Quantized,
    weights: Float32[Array, "tokens top_k"] | None,
    topk_idx: Int32[Array, "tokens top_k"],
    sent: Sent,
    work: Array | None,
    **options: Any,
) -> Rows:
    """The second one, with the operands of the first. It comes behind what gives ``work``."""
    behind = (sent, calls.optional(work))
    return _receive("latency_dispatch_done", x, weights, topk_idx, behind, **options)


def combine_start(
    rows: Array,
    row_weights: Float32[Array, " capacity"] | None,
    handle: Handle,
    *,
    group: Group,
    config: DispatchConfig | None,
    flight: Flight,
) -> Sent:
    """The first of two calls of a ``combine``, without values."""
    (sent,) = _call(
        "latency_combine_start",
        [_SENT],
        rows,
        calls.optional(row_weights),
        *calls.routes(handle, group),
        calls.coords(group),
        **_combine_attributes(rows, handle, group, config, flight),
    )
    return sent


def combine_done(
    rows: Array,
    row_weights: Float32[Array, " capacity"] | None,
    handle: Handle,
    sent: Sent,
    work: Array | None,
    *,
    group: Group,
    config: DispatchConfig | None,
    flight: Flight,
) -> Array:
    """The second one, with the operands of the first. It comes behind what gives ``work``."""
    (y,) = _call(
        "latency_combine_done",
        [jax.ShapeDtypeStruct((handle.topk_idx.shape[0], rows.shape[1]), rows.dtype)],
        rows,
        calls.optional(row_weights),
        *calls.routes(handle, group),
        calls.coords(group),
        sent,
        calls.optional(work),
        **_combine_attributes(rows, handle, group, config, flight),
    )
    return y


def _call(
    target: str,
    results: list[jax.ShapeDtypeStruct],
    *operands: Any,
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    **attributes: Any,
):
    """A call in line with the program, whatever its channel."""
    return native_call(
        f"jax_ep_{target}",
        results,
        *operands,
        scratch=scratch,
        ordered=True,
        in_line=True,
        **attributes,
    )


def _receive(
    target: str,
    x: Array | Quantized,
    weights: Array | None,
    topk_idx: Array,
    behind: tuple[Any, ...],
    scratch: Sequence[jax.ShapeDtypeStruct] = (),
    **options: Any,
) -> Rows:
    """A call that gives the rows and the handle of a dispatch."""
    group: Group = options["group"]
    fields = {name: options[name] for name in ("num_experts", "layout", "capacity")}
    shapes, absent = shapes_of.handle_shapes(
        *topk_idx.shape, num_ranks=group.size, spans_hosts=calls.spans_hosts(group), **fields
    )
    of_rows, quantized = shapes_of.row_shapes(
        x,
        weights,
        options["layout"],
        options["capacity"],
        scale_format=options["scale_format"],
        dense_output=options["dense_output"],
        packed_groups=_packed_groups(**options),
    )
    packs = np.int32(options["packs_scales"])
    of_target = {} if target == "plan_dispatch" else {"packed_scales": packs}
    tokens, row_scales, row_weights, *of_handle = _call(
        target,
        [*of_rows, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes.values())],
        *_operands(x, weights, topk_idx, group),
        *behind,
        scratch=scratch,
        **_attributes(x, topk_idx, **options),
        **of_target,
    )
    of_plan = {name: options[name] for name in ("alignment", "unused_rows", "masked")}
    handle = shapes_of.handle_of(
        of_handle, list(shapes), absent, group_id=group.id, **of_plan, **fields
    )
    out = Quantized(tokens, row_scales) if quantized else tokens
    return out, row_weights if weights is not None else None, handle


def _packed_groups(
    *, packs_scales: bool, masked: bool, num_experts: int, group: Group, **_: Any
) -> int:
    """Groups of rows whose scales are packed; 0 if scales are not packed."""
    if not packs_scales:
        return 0
    return num_experts // group.size if masked else 1


def _operands(
    x: Array | Quantized, weights: Array | None, topk_idx: Array, group: Group
) -> tuple[Any, ...]:
    """Those of a dispatch with its plan."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    return (
        values,
        calls.optional(scales),
        calls.optional(weights),
        topk_idx,
        calls.coords(group),
    )


def _attributes(
    x: Array | Quantized,
    topk_idx: Array,
    *,
    group: Group,
    num_experts: int,
    layout: Layout,
    capacity: int,
    alignment: int,
    expert_capacity: int,
    masked: bool,
    unused_rows: UnusedRows,
    scale_format: ScaleFormat | None,
    dense_output: bool,
    packs_scales: bool,
    config: DispatchConfig | None,
    flight: Flight = IN_LINE,
) -> dict[str, Any]:
    """Those of a dispatch with its plan: the options of both ops."""
    del capacity, packs_scales  # the results show these
    values = x.values if isinstance(x, Quantized) else x
    return {
        **calls.attributes(
            group,
            num_experts,
            layout,
            config,
            op="dispatch",
            num_tokens=topk_idx.shape[0],
            hidden=values.shape[1],
            rows=tuning.rows_name(values.dtype, scale_format, dense_output),
            flight=flight,
        ),
        "alignment": np.int32(alignment),
        "expert_capacity": np.int32(expert_capacity),
        "masked": np.int32(masked),
        "quantization": np.int32(calls.QUANTIZATIONS[scale_format]),
        "dense_output": np.int32(dense_output),
        "unused_rows": np.int32(keeps_unused(unused_rows, alignment, masked)),
    }


def _combine_attributes(
    rows: Array, handle: Handle, group: Group, config: DispatchConfig | None, flight: Flight
) -> dict[str, Any]:
    return calls.attributes(
        group,
        handle.num_experts,
        handle.layout,
        config,
        op="combine",
        num_tokens=handle.topk_idx.shape[0],
        hidden=rows.shape[1],
        rows=tuning.rows_name(rows.dtype),
        flight=flight,
    )
