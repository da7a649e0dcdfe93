"""The specification of dispatch and combine, in pure JAX over XLA's own collectives.

It runs on every platform, under ``shard_map``, and serves as the fallback where there are no native
kernels. Every backend gives the same bits as this module gives on CPU, and JAX can differentiate
through it, which is what the custom gradients are tested against.

Symbols: T tokens, H hidden, K top-k, E experts, R ranks, L = E / R local experts, C capacity,
M = min(K, L) in layout "expert" and 1 in layout "token".

XLA may drop f32→bf16→f32 pairs, contract multiply-adds and rewrite divisions. Where bits must be
fixed, values pass through an ``optimization_barrier`` or ``reduce_precision``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jax_ep._core.capacity import share_room
from jax_ep._core.numerics import keep, round_to
from jax_ep._core.quantize import dequantize, quantize
from jax_ep._core.quota import sanitise
from jax_ep._core.types import DispatchConfig, Handle, Layout, Quantized, ScaleFormat

if TYPE_CHECKING:
    from jax_ep._groups.group import Group

_INT32_MAX = jnp.iinfo(jnp.int32).max
_LANES = 256


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
    """Give every (token, k) its destination row.

    Rows are ordered by (local expert, source rank, source token) in layout "expert" and by
    (source rank, source token) in layout "token".

    Args:
        topk_idx: ``[T, K]`` int32 expert ids, −1 for none.
        group: The group; must be called where its axes are manual.
        num_experts: E, a multiple of R.
        layout: "expert" (one row per token and local expert) or "token" (one per token and rank).
        capacity: Rows C of each rank; a multiple of ``alignment`` in layout "expert".
        alignment: Each expert's group is padded to a multiple of it (layout "expert").
        expert_capacity: Rows that one expert keeps at most (layout "expert").
        masked: Whether every expert has ``alignment`` rows, used or not, and C is L times that.
        config: Has no meaning here.

    Returns:
        The handle.
    """
    topk_idx, num_invalid = sanitise(topk_idx, num_experts)
    num_tokens, top_k = topk_idx.shape
    num_local = num_experts // group.size
    rank = lax.axis_index(group.axis_names)
    routes = lax.all_gather(topk_idx, group.axis_names).reshape(-1, top_k)  # [R·T, K]
    owner = jnp.where(routes >= 0, routes // num_local, -1)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    wanted = (routes[:, :, None] == experts[None, None]).any(axis=1)  # [R·T, E]
    demand = wanted.sum(axis=0, dtype=jnp.int32).reshape(group.size, num_local)
    if layout == "expert":
        counts = share_room(jnp.minimum(demand, expert_capacity), capacity, alignment)
        group_sizes = (counts + alignment - 1) // alignment * alignment
        if masked:
            group_sizes = jnp.full_like(counts, alignment)
        starts = jnp.cumsum(group_sizes, axis=1) - group_sizes
        position = jnp.take_along_axis(_exclusive_cumsum(wanted), jnp.maximum(routes, 0), axis=1)
        kept = (routes >= 0) & (position < counts.reshape(-1)[routes])
        dest_row = jnp.where(kept, starts.reshape(-1)[routes] + position, -1)  # [R·T, K]
        num_rows = min(top_k, num_local)
    else:
        ranks = jnp.arange(group.size, dtype=jnp.int32)
        present = (owner[:, :, None] == ranks[None, None]).any(axis=1)  # [R·T, R]
        position = jnp.take_along_axis(_exclusive_cumsum(present), jnp.maximum(owner, 0), axis=1)
        kept = (routes >= 0) & (position < capacity)
        dest_row = jnp.where(kept, position, -1)
        kept_pairs = kept[:, :, None] & (routes[:, :, None] == experts[None, None])
        counts = kept_pairs.any(axis=1).sum(axis=0, dtype=jnp.int32).reshape(demand.shape)
        group_sizes = counts
        num_rows = 1
    here = kept & (owner == rank)
    by_expert = jnp.sort(jnp.where(here, dest_row, _INT32_MAX), axis=1)[:, :num_rows]
    recv_rows = jnp.where(by_expert == _INT32_MAX, -1, by_expert)
    recv_src, expert_idx = _sources(routes, dest_row, here, layout, capacity, num_local)
    spans_hosts = len(group.topology.hosts) > 1
    start, token, row = _entries(recv_rows, group.size, capacity) if spans_hosts else (None,) * 3
    own = lax.dynamic_slice_in_dim(dest_row, rank * num_tokens, num_tokens)
    return Handle(
        topk_idx=topk_idx,
        dest_row=None if spans_hosts else own,
        recv_rows=None if spans_hosts else recv_rows,
        recv_start=start,
        recv_token=token,
        recv_row=row,
        recv_src=recv_src,
        expert_idx=expert_idx,
        group_sizes=group_sizes[rank],
        counts=counts[rank],
        demand=demand[rank],
        num_dropped=(demand[rank].sum() - counts[rank].sum())[None],
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
    config: DispatchConfig | None = None,
) -> tuple[Array | Quantized, Float32[Array, "capacity *top_k"] | None]:
    """Bring each row of ``x`` to the ranks of its experts.

    Args:
        x: ``[T, H]`` rows or ``Quantized`` rows.
        weights: ``[T, K]`` float32 that travel with the rows, or None.
        handle: The plan.
        group: The group of the plan.
        scale_format: None sends rows as they are; "f32" or "ue8m0" sends them as float8_e4m3fn.
        dense_output: With ``scale_format``: rows come back in the dtype of ``x``.
        config: Has no meaning here.

    Returns:
        ``[C, H]`` rows (unused ones zero, or NaN where they are undefined) and their weights, ``[C]``
        in layout "expert", ``[C, K]`` in layout "token", or None.
    """
    if scale_format is not None and not isinstance(x, Quantized):
        quantized = quantize(x, scale_format=scale_format)
        moved, row_weights = dispatch(quantized, weights, handle, group=group)
        assert isinstance(moved, Quantized)
        return (dequantize(moved, x.dtype) if dense_output else moved), row_weights
    x = lax.optimization_barrier(x)  # so that the way x was computed does not matter
    used = handle.recv_src >= 0
    slot = jnp.maximum(handle.recv_src, 0)
    token = slot // handle.topk_idx.shape[1] if handle.layout == "expert" else slot

    def fetch(values: Array, unused: float = 0.0) -> Array:
        everyone = _all_gather(values, group).reshape(group.size * len(values), values.shape[1])
        rows = jnp.take(everyone, token, axis=0, mode="clip")
        return jnp.where(used[:, None], rows, jnp.asarray(unused, rows.dtype))

    values, scales = x if isinstance(x, Quantized) else (x, None)
    rows = fetch(values, jnp.nan if handle.keeps_unused else 0.0)
    out = rows if scales is None else Quantized(rows, fetch(scales))
    if weights is None:
        return out, None
    if handle.expert_idx is not None:
        return out, jnp.where(handle.expert_idx >= 0, fetch(weights), 0.0)
    everyone = _all_gather(weights, group).reshape(-1)
    return out, jnp.where(used, jnp.take(everyone, slot, mode="clip"), 0.0)


def combine(
    rows: Array,
    row_weights: Float32[Array, " capacity"] | None,
    values: Float32[Array, "capacity *top_k"] | None,
    handle: Handle,
    *,
    group: Group,
    config: DispatchConfig | None = None,
) -> tuple[Array, Float32[Array, "tokens top_k"] | None]:
    """Bring the rows of each token home and sum them.

    Each rank sums its rows of a token in float32, by ascending local expert, and rounds the sum to
    the row dtype; the home rank adds those in float32, by ascending rank, and rounds again. Where the
    group spans hosts, the sums of each host's ranks are added and rounded first, and home adds those
    of the hosts.

    Args:
        rows: ``[C, H]`` bf16, f16 or f32.
        row_weights: ``[C]`` float32 factors of the rows, or None (layout "expert").
        values: ``[C]`` (layout "expert") or ``[C, K]`` (layout "token") float32 that travel home
            unsummed, or None.
        handle: The plan.
        group: The group of the plan.
        config: Has no meaning here.

    Returns:
        ``[T, H]`` sums in the row dtype, and ``[T, K]`` values (0 where a pair has no row) or None.
    """
    # Rows are rounded before they are summed, so no product that made them is fused into the sum.
    rows, row_weights = lax.optimization_barrier((rows, row_weights))
    zero = _zero(handle)
    num_tokens, top_k = handle.topk_idx.shape
    recv_rows = handle.recv_rows
    if recv_rows is None:
        recv_rows = _rows_of_sources(handle, group.size)
    sources, num_rows = recv_rows.shape
    # Behind a barrier, because XLA would replace 0 + x by x, whose zero may be negative.
    total = lax.optimization_barrier(jnp.zeros((sources, rows.shape[1]), jnp.float32))
    for m in range(num_rows):
        index = recv_rows[:, m]
        term = keep(jnp.take(rows, index, axis=0, mode="clip").astype(jnp.float32), zero)
        if row_weights is not None:
            factor = jnp.take(row_weights, index, mode="clip")
            term = keep(term * factor[:, None], zero)
        total = total + jnp.where((index >= 0)[:, None], term, 0.0)
    partial = round_to(total, rows.dtype)
    arrived = _all_to_all(partial.reshape(group.size, num_tokens, -1), group)
    of_hosts = [_rounded_sum([arrived[rank] for rank in ranks]) for ranks in group.topology.hosts]
    y = of_hosts[0] if len(of_hosts) == 1 else _rounded_sum(of_hosts)
    if values is None:
        return y, None
    used = handle.recv_src >= 0
    if handle.expert_idx is None:
        target = jnp.where(used, handle.recv_src, sources * top_k)
        sent = jnp.zeros((sources * top_k,), jnp.float32).at[target].set(values, mode="drop")
    else:
        target = jnp.where(used, handle.recv_src, sources)
        masked = jnp.where(handle.expert_idx >= 0, values, 0.0)
        sent = jnp.zeros((sources, top_k), jnp.float32).at[target].set(masked, mode="drop")
    arrived = _all_to_all(sent.reshape(group.size, num_tokens, top_k), group)
    owner = jnp.maximum(handle.topk_idx, 0) // (handle.num_experts // group.size)
    home = jnp.take_along_axis(arrived, owner[None], axis=0)[0]
    return y, jnp.where(handle.topk_idx >= 0, home, 0.0)  # and a dropped row has sent zeros


def combine_vjp(
    dy: Array,
    rows: Array,
    row_weights: Float32[Array, " capacity"],
    handle: Handle,
    *,
    group: Group,
    config: DispatchConfig | None = None,
) -> tuple[Array, Float32[Array, " capacity"]]:
    """Gradients of ``combine`` with ``row_weights`` (layout "expert").

    ``d_rows[c] = w[c] · dy[source of c]`` and ``d_weights[c] = <rows[c], dy[source of c]>``. The dot
    product has a fixed order: 256 lanes, lane j adds the products of channels j, j + 256, … one by
    one, then the lanes are added in a tree by halves.

    Args:
        dy: ``[T, H]`` cotangent of the sums.
        rows: ``[C, H]`` the rows that were combined.
        row_weights: ``[C]`` their factors.
        handle: The plan.
        group: The group of the plan.
        config: Has no meaning here.

    Returns:
        ``[C, H]`` in the row dtype and ``[C]`` float32; for unused rows as in ``dispatch``.
    """
    rows, row_weights = lax.optimization_barrier((rows, row_weights))  # as in combine
    arrived, _ = dispatch(dy, None, handle, group=group)
    assert isinstance(arrived, jax.Array)
    used = handle.recv_src >= 0
    gradient = arrived.astype(jnp.float32)
    weighted = keep(gradient * row_weights[:, None], _zero(handle))
    d_rows = jnp.where(used[:, None], round_to(weighted, rows.dtype), arrived.astype(rows.dtype))
    products = keep(gradient * rows.astype(jnp.float32), _zero(handle))
    missing = -products.shape[1] % _LANES
    blocks = jnp.pad(products, ((0, 0), (0, missing))).reshape(len(products), -1, _LANES)
    # Zeros that are computed from the products: under vmap with spmd_axis_name JAX fails on a scan that
    # begins with a constant (0.10.2 to 0.12.0).
    never = (products[0, 0] != products[0, 0]) & False
    lanes = lax.broadcast(never.astype(jnp.float32), (len(products), _LANES))
    lanes, _ = lax.scan(lambda acc, block: (acc + block, None), lanes, blocks.swapaxes(0, 1))
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lax.optimization_barrier(lanes[:, :half] + lanes[:, half:])
    return d_rows, jnp.where(used, lanes[:, 0], 0.0)


def _rounded_sum(terms: list[Array]) -> Array:
    """The sum of arrays of one dtype, one after the other in float32, rounded to that dtype."""
    total = lax.optimization_barrier(jnp.zeros(terms[0].shape, jnp.float32))
    for term in terms:
        total = total + term.astype(jnp.float32)
    return round_to(total, terms[0].dtype)


def _zero(handle: Handle) -> Int32[Array, ""]:
    """A zero that the compiler cannot foresee, because it comes from a source row (at least -1)."""
    return jnp.maximum(-1 - handle.recv_src[0], 0)


def _exclusive_cumsum(flags: Bool[Array, "sources columns"]) -> Int32[Array, "sources columns"]:
    flags = flags.astype(jnp.int32)
    return jnp.cumsum(flags, axis=0) - flags


def _sources(
    routes: Int32[Array, "sources top_k"],
    dest_row: Int32[Array, "sources top_k"],
    here: Bool[Array, "sources top_k"],
    layout: Layout,
    capacity: int,
    num_local: int,
) -> tuple[Int32[Array, " capacity"], Int32[Array, "capacity top_k"] | None]:
    """The inverse of ``dest_row`` on this rank: the source of each row, and its local experts."""
    sources, top_k = routes.shape
    target = jnp.where(here, dest_row, capacity)  # C: dropped by the scatter
    slot = jnp.arange(sources * top_k, dtype=jnp.int32).reshape(sources, top_k)
    source = slot if layout == "expert" else slot // top_k
    empty = jnp.full((capacity,), -1, jnp.int32)
    recv_src = empty.at[target.reshape(-1)].set(source.reshape(-1), mode="drop")
    if layout == "expert":
        return recv_src, None
    local = jnp.where(here, routes % num_local, -1)
    expert_idx = jnp.take(local, jnp.maximum(recv_src, 0), axis=0, mode="clip")
    return recv_src, jnp.where((recv_src >= 0)[:, None], expert_idx, -1)


def _entries(
    recv_rows: Int32[Array, "sources rows_per_source"], num_ranks: int, capacity: int
) -> tuple[Int32[Array, " ranks_and_1"], Int32[Array, " capacity"], Int32[Array, " capacity"]]:
    """``recv_start``, ``recv_token`` and ``recv_row`` of a handle, from its rows by source."""
    sources, num_rows = recv_rows.shape
    used = recv_rows.reshape(-1) >= 0
    before = jnp.cumsum(used, dtype=jnp.int32)
    target = jnp.where(used, before - 1, capacity)  # C: dropped by the scatter
    token = jnp.repeat(jnp.arange(sources, dtype=jnp.int32) % (sources // num_ranks), num_rows)
    empty = jnp.full((capacity,), -1, jnp.int32)
    ends = before.reshape(num_ranks, -1)[:, -1]
    return (
        jnp.concatenate([jnp.zeros_like(ends[:1]), ends]),
        empty.at[target].set(token, mode="drop"),
        empty.at[target].set(recv_rows.reshape(-1), mode="drop"),
    )


def _rows_of_sources(handle: Handle, num_ranks: int) -> Int32[Array, "sources rows_per_source"]:
    """``recv_rows`` of a handle that has entries."""
    assert handle.recv_start is not None
    assert handle.recv_token is not None and handle.recv_row is not None
    num_tokens, top_k = handle.topk_idx.shape
    width = min(top_k, handle.num_experts // num_ranks) if handle.layout == "expert" else 1
    entry = jnp.arange(len(handle.recv_row), dtype=jnp.int32)
    rank = jnp.searchsorted(handle.recv_start, entry, side="right").astype(jnp.int32) - 1
    used = handle.recv_row >= 0
    source = jnp.where(used, rank * num_tokens + handle.recv_token, num_ranks * num_tokens)
    is_first = jnp.concatenate([jnp.ones_like(used[:1]), source[1:] != source[:-1]])
    place = entry - lax.cummax(jnp.where(is_first, entry, 0))
    rows = jnp.full((num_ranks * num_tokens, width), -1, jnp.int32)
    return rows.at[source, place].set(handle.recv_row, mode="drop")


def _all_gather(x: Array, group: Group) -> Array:
    """``[R, ...]`` of every rank's ``x``; 8-bit floats travel as bytes, which every transport has."""
    if x.dtype.itemsize == 1:
        gathered = lax.all_gather(lax.bitcast_convert_type(x, jnp.uint8), group.axis_names)
        return lax.bitcast_convert_type(gathered, x.dtype)
    return lax.all_gather(x, group.axis_names)


def _all_to_all(x: Array, group: Group) -> Array:
    """Row d of ``x`` goes to rank d; row s of the result came from rank s."""
    return lax.all_to_all(x, group.axis_names, split_axis=0, concat_axis=0)
