"""Shapes of what native calls give: a handle, and the rows of a dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_ep._core.types import Handle, Layout, Quantized, ScaleFormat

# Leaves of a handle that tell of routes: of a group on one host, and of one that spans hosts.
ROUTES = ("dest_row", "recv_rows")
ENTRIES = ("recv_start", "recv_token", "recv_row")


def handle_shapes(
    num_tokens: int,
    top_k: int,
    *,
    num_ranks: int,
    spans_hosts: bool,
    num_experts: int,
    layout: Layout,
    capacity: int,
) -> tuple[dict[str, tuple[int, ...]], dict[str, None]]:
    """Shapes of the int32 leaves of a handle, in the order of results; and those that are None."""
    num_local = num_experts // num_ranks
    num_rows = min(top_k, num_local) if layout == "expert" else 1
    shapes = {
        "topk_idx": (num_tokens, top_k),
        "dest_row": (num_tokens, top_k),
        "recv_rows": (num_ranks * num_tokens, num_rows),
        "recv_start": (num_ranks + 1,),
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
    absent = dict.fromkeys(ROUTES if spans_hosts else ENTRIES)
    return {name: shape for name, shape in shapes.items() if name not in absent}, absent


def handle_of(
    results: Sequence[Array], names: Sequence[str], absent: dict[str, None], **fields: Any
) -> Handle:
    """The handle of ``results``, which are its leaves ``names``; ``fields`` are static."""
    leaves: dict[str, Any] = dict(zip(names, results, strict=True)) | absent
    if fields["layout"] == "expert":
        leaves["expert_idx"] = None
    return Handle(**leaves, **fields)


def row_shapes(
    x: Array | Quantized,
    weights: Array | None,
    layout: Layout,
    rows: int,
    *,
    scale_format: ScaleFormat | None,
    dense_output: bool,
    packed_groups: int = 0,
) -> tuple[list[jax.ShapeDtypeStruct], bool]:
    """What a dispatch gives: rows, scales and weights; and whether rows are quantized.

    Scales are packed for each of ``packed_groups`` groups of rows, unless that is 0.
    """
    values, scales = x if isinstance(x, Quantized) else (x, None)
    hidden = values.shape[1]
    quantized = scales is not None or (scale_format is not None and not dense_output)
    top_k = () if weights is None or layout == "expert" else (weights.shape[1],)
    row_dtype = jnp.float8_e4m3fn if quantized else values.dtype
    scales_of_rows = jax.ShapeDtypeStruct((rows, hidden // 128) if quantized else (0,), jnp.float32)
    if packed_groups > 0:
        words, lines = packed_groups * -(-hidden // 512), -(-rows // packed_groups // 4) * 4
        scales_of_rows = jax.ShapeDtypeStruct((words, lines), jnp.int32)
    return [
        jax.ShapeDtypeStruct((rows, hidden), row_dtype),
        scales_of_rows,
        jax.ShapeDtypeStruct((rows, *top_k) if weights is not None else (0,), jnp.float32),
    ], quantized
