"""The native backend: loads the library, registers its FFI targets and calls them.

The same target names, operands and attributes serve every platform. A backend is a module with
``plan``, ``dispatch``, ``combine`` and ``combine_vjp``; ``jax_ep.reference`` is the other one.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from jax_ep import _compat
from jax_ep._types import Handle, Layout, Quantized, ScaleFormat
from jax_ep._version import __version__

if TYPE_CHECKING:
    from jax_ep._group import Group

_LAYOUTS = {"expert": 0, "token": 1}
_QUANTIZATIONS = {None: 0, "f32": 1, "ue8m0": 2}
_PLATFORM = "cpu"


@functools.cache
def why_unavailable() -> str | None:
    """None once the native CPU library is loaded and registered, else the reason why not."""
    try:
        library: Any = importlib.import_module("jax_ep._cpu")
    except ImportError as error:
        return f"the native CPU library did not load ({error}); reinstall jax_ep"
    built = library.build_info()["version"]
    if built != __version__:
        return (
            f"the native CPU library is of version {built} and the package of {__version__}; "
            "reinstall jax_ep"
        )
    jax.devices(_PLATFORM)  # XLA's CPU client must be up before targets with state are registered.
    _compat.register_ffi_types(library.types(), platform=_PLATFORM)
    for name, handlers in library.targets().items():
        jax.ffi.register_ffi_target(name, handlers, platform=_PLATFORM)
    return None


def plan(
    topk_idx: Int32[Array, "tokens top_k"],
    *,
    group: Group,
    num_experts: int,
    layout: Layout,
    capacity: int,
    alignment: int,
    expert_capacity: int,
) -> Handle:
    """See ``jax_ep.reference.plan``."""
    num_tokens, top_k = topk_idx.shape
    num_local = num_experts // group.size
    num_rows = min(top_k, num_local) if layout == "expert" else 1
    shapes = [
        (num_tokens, top_k),
        (num_tokens, top_k),
        (group.size * num_tokens, num_rows),
        (capacity,),
        (capacity if layout == "token" else 0, top_k),
        (num_local,),
        (num_local,),
        (num_local,),
        (1,),
        (1,),
    ]
    leaves = _call(
        "jax_ep_plan",
        [_compat.result_type(topk_idx, shape, jnp.int32) for shape in shapes],
        topk_idx,
        _coords(group),
        **_attributes(group, num_experts, layout),
        alignment=np.int32(alignment),
        expert_capacity=np.int32(expert_capacity),
    )
    topk, dest_row, recv_rows, recv_src, expert_idx, group_sizes, counts, demand = leaves[:8]
    num_dropped, num_invalid = leaves[8:]
    return Handle(
        topk_idx=topk,
        dest_row=dest_row,
        recv_rows=recv_rows,
        recv_src=recv_src,
        expert_idx=expert_idx if layout == "token" else None,
        group_sizes=group_sizes,
        counts=counts,
        demand=demand,
        num_dropped=num_dropped,
        num_invalid=num_invalid,
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
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """See ``jax_ep.reference.dispatch``."""
    values, scales = x if isinstance(x, Quantized) else (x, None)
    rows, hidden, top_k = handle.capacity, values.shape[1], handle.topk_idx.shape[1]
    quantized = scales is not None or (scale_format is not None and not dense_output)
    weights_shape = (rows,) if handle.layout == "expert" else (rows, top_k)
    row_dtype = jnp.float8_e4m3fn if quantized else values.dtype
    tokens, row_scales, row_weights = _call(
        "jax_ep_dispatch",
        [
            _compat.result_type(values, (rows, hidden), row_dtype),
            _compat.result_type(values, (rows, hidden // 128) if quantized else (0,), jnp.float32),
            _compat.result_type(
                values, weights_shape if weights is not None else (0,), jnp.float32
            ),
        ],
        values,
        _optional(scales),
        _optional(weights),
        *_routes(handle),
        _coords(group),
        **_attributes(group, handle.num_experts, handle.layout),
        quantization=np.int32(_QUANTIZATIONS[scale_format]),
        dense_output=np.int32(dense_output),
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
) -> tuple[Array, Float32[Array, "tokens top_k"] | None]:
    """See ``jax_ep.reference.combine``."""
    num_tokens, top_k = handle.topk_idx.shape
    y, home = _call(
        "jax_ep_combine",
        [
            _compat.result_type(rows, (num_tokens, rows.shape[1]), rows.dtype),
            _compat.result_type(
                rows, (num_tokens, top_k) if values is not None else (0,), jnp.float32
            ),
        ],
        rows,
        _optional(row_weights),
        _optional(values),
        *_routes(handle),
        _coords(group),
        **_attributes(group, handle.num_experts, handle.layout),
    )
    return y, home if values is not None else None


def combine_vjp(
    dy: Array,
    rows: Array,
    row_weights: Float32[Array, " capacity"],
    handle: Handle,
    *,
    group: Group,
) -> tuple[Array, Float32[Array, " capacity"]]:
    """See ``jax_ep.reference.combine_vjp``."""
    d_rows, d_weights = _call(
        "jax_ep_combine_vjp",
        [
            _compat.result_type(rows, rows.shape, rows.dtype),
            _compat.result_type(rows, row_weights.shape, jnp.float32),
        ],
        dy,
        rows,
        row_weights,
        *_routes(handle),
        _coords(group),
        **_attributes(group, handle.num_experts, handle.layout),
    )
    return d_rows, d_weights


def _call(target: str, results: list[Any], *operands: Array, **attributes: Any) -> Any:
    # Pure on purpose: XLA may merge, drop or move calls only in the one program that all ranks
    # share, and a side effect would keep jax.checkpoint from differentiating them.
    call = jax.ffi.ffi_call(target, results, has_side_effect=False, vmap_method="sequential")
    return call(*operands, **attributes)


def _coords(group: Group) -> Int32[Array, "2"]:
    """This rank within its group, and which of the groups side by side it is."""
    rank = lax.axis_index(group.axis_names)
    others = group.other_axes
    instance = lax.axis_index(others) if others else jnp.int32(0)
    axes = frozenset(_compat.varying_axes(rank) | _compat.varying_axes(instance))
    return jnp.stack([_compat.cast_varying(rank, axes), _compat.cast_varying(instance, axes)])


def _attributes(group: Group, num_experts: int, layout: Layout) -> dict[str, Any]:
    return {
        "num_ranks": np.int32(group.size),
        "num_experts": np.int32(num_experts),
        "layout": np.int32(_LAYOUTS[layout]),
        "group_id": np.int64(group.id),
        "timeout_ms": np.int64(min(group.timeout * 1000, 2**62)),
    }


def _routes(handle: Handle) -> tuple[Array, ...]:
    return (
        handle.topk_idx,
        handle.dest_row,
        handle.recv_rows,
        handle.recv_src,
        _no_expert_idx(handle) if handle.expert_idx is None else handle.expert_idx,
    )


def _no_expert_idx(handle: Handle) -> Int32[Array, "0 top_k"]:
    # Made here, not kept in the handle: as a residual of shard_map, an array without elements
    # crashes XLA's partitioner (Shardy, jaxlib 0.11.2).
    return jnp.zeros((0, handle.topk_idx.shape[1]), jnp.int32)


def _optional(x: Array | None) -> Array:
    """``x``, or the zero-element array that stands for an absent operand."""
    return jnp.zeros((0,), jnp.float32) if x is None else x
