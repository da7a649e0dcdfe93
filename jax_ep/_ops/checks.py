"""Checks of the arguments of dispatch and combine, while tracing."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp

from jax_ep import _compat
from jax_ep._core import arguments, limits
from jax_ep._core.capacity import INT32_MAX, MAX_CAPACITY
from jax_ep._core.types import DispatchLayout, DropPolicy, Handle, Layout
from jax_ep._groups.group import Group

MAX_TOP_K = 32


def check_is_group(op: str, group: Any) -> None:
    """``group`` is a Group."""
    if not isinstance(group, Group):
        raise arguments.type_error(
            op,
            "group",
            "a Group",
            type(group).__name__,
            "make one with jax_ep.create_group(mesh, axis_name) outside jit",
        )


def check_group(op: str, group: Any) -> None:
    """``group`` is a Group, and the op is traced where every axis of its mesh is manual."""
    check_is_group(op, group)
    manual = _compat.manual_axes()
    missing = [name for name in group.mesh.axis_names if name not in manual]
    if missing:
        raise arguments.value_error(
            op,
            "group",
            f"a call where every axis of the mesh {group.mesh.axis_names} is manual",
            f"{tuple(manual)} as manual axes",
            "call it inside jax.shard_map over the whole mesh (all axes in axis_names), or use "
            "jax_ep.moe, which does that itself",
        )
    sizes = _compat.context_axis_sizes()
    own = dict(group.mesh.shape)
    if {name: sizes[name] for name in own} != own or len(sizes) != len(own):
        raise arguments.value_error(
            op,
            "group",
            f"a group of the mesh in use, {sizes}",
            f"one made on a mesh {own}",
            "make the group on the mesh that shard_map runs over",
        )


def check_topk_idx(op: str, topk_idx: Any, num_tokens: int) -> None:
    """``topk_idx`` is ``[T, K]`` integers with 1 ≤ K ≤ 32."""
    if not isinstance(topk_idx, jax.Array):
        raise arguments.type_error(
            op,
            "topk_idx",
            "an integer array [tokens, top_k] (or handle=)",
            type(topk_idx).__name__,
            "pass the expert ids that the router chose, or the handle of an earlier dispatch",
        )
    if not jnp.issubdtype(topk_idx.dtype, jnp.integer):
        raise arguments.type_error(
            op,
            "topk_idx",
            "an integer dtype such as int32",
            f"dtype {topk_idx.dtype}",
            "cast it with astype(jnp.int32)",
        )
    if topk_idx.ndim != 2 or topk_idx.shape[0] != num_tokens:
        raise arguments.value_error(
            op,
            "topk_idx",
            f"shape [tokens, top_k] with the {num_tokens} tokens of x",
            f"shape {topk_idx.shape}",
            "give each token one row of expert ids, -1 where it has fewer",
        )
    if not 1 <= topk_idx.shape[1] <= MAX_TOP_K:
        raise arguments.value_error(
            op,
            "topk_idx",
            f"1 to {MAX_TOP_K} experts a token",
            f"top_k {topk_idx.shape[1]}",
            f"route each token to at most {MAX_TOP_K} experts",
        )


def check_topk_weights(op: str, topk_weights: Any, shape: tuple[int, ...]) -> None:
    """``topk_weights`` is None, or float32 or narrower, of the shape of ``topk_idx``."""
    if topk_weights is None:
        return
    check_float_weights(op, "topk_weights", topk_weights)
    if topk_weights.shape != shape:
        raise arguments.value_error(
            op,
            "topk_weights",
            f"the shape of topk_idx, {shape}",
            f"shape {topk_weights.shape}",
            "give one weight for each expert id",
        )


def check_float_weights(op: str, argument: str, weights: Any) -> None:
    """``weights`` are floats that a cast to float32 does not change."""
    if not isinstance(weights, jax.Array) or weights.dtype not in arguments.ROW_DTYPES:
        raise arguments.type_error(
            op,
            argument,
            "an array of float32, bfloat16 or float16, or None",
            getattr(weights, "dtype", type(weights).__name__),
            "cast it with astype(jnp.float32)",
        )


def check_experts(op: str, num_experts: Any, top_k: int, group: Group) -> None:
    """``num_experts`` is a positive multiple of R and not below K."""
    check_num_experts(op, num_experts, group)
    if top_k > num_experts:
        raise arguments.value_error(
            op,
            "topk_idx",
            f"top_k of at most num_experts = {num_experts}",
            f"top_k {top_k}",
            "a token can go to each expert once",
        )


def check_num_experts(op: str, num_experts: Any, group: Group) -> None:
    """``num_experts`` is a positive multiple of R that the backend has room for."""
    if not arguments.is_int(num_experts):
        raise arguments.type_error(
            op,
            "num_experts",
            "a Python int (or handle=)",
            type(num_experts).__name__,
            "pass the number of experts over the whole group",
        )
    if num_experts < 1 or num_experts % group.size:
        raise arguments.value_error(
            op,
            "num_experts",
            f"a positive multiple of the group's {group.size} ranks",
            num_experts,
            "give every rank the same number of experts: add unused ones, and keep them out of "
            "router and loss with num_used_experts= of jax_ep.moe, its layers and jax_ep.routing",
        )
    on_gpus = group.backend == "cuda"
    most = limits.max_experts() if on_gpus else INT32_MAX
    if num_experts > most:
        raise arguments.value_error(
            op,
            "num_experts",
            f"at most {most}{' on GPUs' if on_gpus else ''}",
            num_experts,
            "use fewer experts, or backend='reference' for the group" if on_gpus else "use fewer",
        )


def check_layout(op: str, layout: object, alignment: Any) -> None:
    """``layout`` is known and ``alignment`` a positive int."""
    arguments.check_one_of(op, "layout", layout, get_args(DispatchLayout))
    if not arguments.is_int(alignment) or not 1 <= alignment <= INT32_MAX:
        raise arguments.value_error(
            op,
            "alignment",
            f"a positive int of at most {INT32_MAX}",
            repr(alignment),
            "use 1 for no padding, or 128",
        )


def check_capacity(op: str, capacity: Any, layout: Layout, alignment: int) -> None:
    """``capacity`` is a positive int, and a multiple of ``alignment`` in layout "expert"."""
    multiple = alignment if layout == "expert" else 1
    if not arguments.is_int(capacity) or capacity < multiple or capacity % multiple:
        raise arguments.value_error(
            op,
            "capacity",
            f"a Python int, a positive multiple of the alignment {multiple}"
            if layout == "expert"
            else "a positive int",
            repr(capacity),
            "leave it out for room that always suffices, or round it up",
        )


def check_bounds(
    op: str,
    capacity: Any,
    capacity_factor: object,
    rank_capacity_factor: object,
    layout: Layout,
    alignment: int,
) -> None:
    """Each bound on rows is a possible one, and ``capacity`` stands alone."""
    if capacity_factor is not None:
        check_capacity_factor(op, capacity_factor, layout, capacity)
    if rank_capacity_factor is not None:
        check_rank_capacity_factor(op, rank_capacity_factor, layout, capacity)
    if capacity is not None:
        check_capacity(op, capacity, layout, alignment)


def check_capacity_factor(
    op: str, capacity_factor: object, layout: Layout, capacity: object
) -> None:
    """``capacity_factor`` is a positive number, without ``capacity``, in layout "expert"."""
    _check_factor(op, "capacity_factor", capacity_factor, layout, capacity, "each expert")


def check_rank_capacity_factor(
    op: str, rank_capacity_factor: object, layout: Layout, capacity: object
) -> None:
    """``rank_capacity_factor`` is such a number too."""
    _check_factor(op, "rank_capacity_factor", rank_capacity_factor, layout, capacity, "each rank")


def check_drop_policy(op: str, drop_policy: Any, capacity_factor: object) -> None:
    """``drop_policy`` is known, and "score" has quotas."""
    arguments.check_one_of(op, "drop_policy", drop_policy, get_args(DropPolicy))
    if drop_policy == "score" and capacity_factor is None:
        raise arguments.value_error(
            op,
            "drop_policy",
            "'position' without capacity_factor, which sets the quotas of experts",
            "'score'",
            "pass capacity_factor=1.25, say",
        )


def check_drops_in_one_call(op: str, drop_policy: DropPolicy) -> None:
    """The counts of the handle cannot be corrected between the two calls of latency mode."""
    if drop_policy == "score":
        raise arguments.value_error(
            op,
            "drop_policy",
            "'position' in flight in latency mode",
            "'score'",
            "use dispatch in one call, or DispatchConfig(mode='throughput')",
        )


def _check_factor(
    op: str, name: str, factor: object, layout: Layout, capacity: object, whose: str
) -> None:
    if capacity is not None:
        raise arguments.value_error(
            op,
            name,
            f"one of capacity and {name}",
            "both",
            f"capacity is the number of rows of a rank, {name} a bound relative to the share that "
            f"{whose} has under even routing",
        )
    if layout != "expert":
        raise arguments.value_error(
            op,
            name,
            "None with layout='token', whose rows belong to no one expert",
            repr(factor),
            "bound the rows with capacity, or use layout='expert'",
        )
    if not isinstance(factor, (int, float)) or not 0 < factor <= INT32_MAX:
        raise arguments.value_error(
            op,
            name,
            f"a Python int or float, a positive number of at most {INT32_MAX}",
            repr(factor),
            f"1.0 gives {whose} room for its share under even routing",
        )


def check_int32_indices(op: str, *, sources: int, top_k: int, rows: int) -> None:
    """Row and slot numbers over the whole group fit int32."""
    if max(sources * top_k, rows) > MAX_CAPACITY:
        raise arguments.value_error(
            op,
            "x",
            f"ranks x tokens x top_k and ranks x capacity of at most {MAX_CAPACITY}",
            f"{sources * top_k} and {rows}",
            "send fewer tokens at a time or bound the capacity",
        )


def check_handle(op: str, handle: Any, group: Group) -> None:
    """``handle`` is a Handle that ``group`` made."""
    if not isinstance(handle, Handle):
        raise arguments.type_error(
            op,
            "handle",
            "a jax_ep.Handle",
            type(handle).__name__,
            "pass the .handle of what dispatch returned",
        )
    if handle.group_id != group.id:
        raise arguments.value_error(
            op,
            "handle",
            f"a handle of this group (id {group.id})",
            f"one of another group (id {handle.group_id})",
            "combine with the group that the dispatch was made with",
        )


def check_not_given(op: str, argument: str, value: object) -> None:
    """``value`` is None, since the handle already says it."""
    if value is not None:
        raise arguments.value_error(
            op,
            argument,
            "None together with handle=, which holds the routes",
            "a value",
            "leave it out, or leave the handle out to make a new plan",
        )


def check_as_in_handle(op: str, argument: str, value: object, fixed: object) -> None:
    """``value`` is None or what the handle says already."""
    if value is not None and (type(value) is not type(fixed) or value != fixed):
        raise arguments.value_error(
            op,
            argument,
            f"{fixed!r}, as the handle says, or None",
            repr(value),
            "leave it out, or leave the handle out to make a new plan",
        )
