"""Plan and dispatch of no tokens, which need no communication."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_ep._core.quantize import with_packed_scales
from jax_ep._core.types import Handle, Quantized
from jax_ep._ops.options import DispatchOptions, PlanOptions


def plan(options: PlanOptions, topk_idx: Int32[Array, "0 top_k"]) -> Handle:
    """The plan of no tokens."""
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


def dispatch(
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
        out = Quantized(jnp.zeros((rows, hidden), jnp.float8_e4m3fn), scales)
        if options.packs_scales:
            out = with_packed_scales(out, handle.group_sizes.shape[0] if handle.masked else 1)
        return out, row_weights
    return jnp.zeros((rows, hidden), values.dtype), row_weights
