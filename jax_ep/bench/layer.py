"""A whole MoE layer, the same one in several implementations (*arms*).

All get the routing, send tokens to their experts, put them through SwiGLU experts and bring the
weighted sum home. They differ in who moves the rows:

* "jax_ep": ``jax_ep.dispatch`` and ``jax_ep.combine``.
* "ragged_all_to_all": rows sorted by expert, one for each (token, expert), exchanged by
  ``jax.lax.ragged_all_to_all``, sorted again by local expert; and the same way back. With XLA's
  decomposer flag, which makes it faster, as an arm of its own.
* "all_to_all": the same with as many slots for each pair of ranks as the fullest pair needs.
* "jax_ep in chunks": the first with the tokens in two chunks, each in flight over the other's experts
  (suite "overlap"). It sums one number over the ranks, because XLA hides ops only in programs that hold
  a collective of its own.
* "jax_ep in chunks, one after the other": the same chunks with no op in flight, each like the first
  arm. What the arm above takes less than this is what it hides.
* "plain": ragged_all_to_all with ``jax.lax.ragged_dot`` in place of ``jax_ep.grouped_dot``.

Parts of a layer, forward and backward, are no arms, because they compute something else:

* "products", a floor: the layer's nine products alone, as dense ones of groups of one size. A layer in
  line takes at least as long as they and its rows on the link.
* "ops in chunks": the plans, dispatches and combines of the chunks alone, in line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

import jax_ep
from jax_ep.bench.cases import Capacity
from jax_ep.bench.peers import DECOMPOSER

NUM_CHUNKS = 2
GroupedDot = Callable[[Array, Array, Array], Array]


class Experts(NamedTuple):
    """The experts of one rank: L of them, hidden H, width F."""

    gate: Float[Array, "local hidden width"]
    up: Float[Array, "local hidden width"]
    down: Float[Array, "local width hidden"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of a layer.

    Attributes:
        group: The group of ranks.
        experts: E over all of them.
        capacity: Rows that a rank receives at most; None has room for any routing.
        pair_capacity: Rows that one rank sends to one other at most.
        config: For jax_ep's ops.
    """

    group: jax_ep.Group
    experts: int
    capacity: int | None
    pair_capacity: int
    config: jax_ep.DispatchConfig | None = None


Inputs = tuple[
    Float[Array, "tokens hidden"], Int32[Array, "tokens top_k"], Float32[Array, "tokens top_k"]
]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One implementation.

    Attributes:
        name: The name in its records.
        layer: A function of inputs, experts and sizes that gives ``[T, H]``.
        compiler_options: As in ``Case``.
        capacity: "default" gives it room for any routing.
    """

    name: str
    layer: Callable[[Inputs, Experts, Sizes], Array]
    compiler_options: str = ""
    capacity: Capacity = "exact"


def with_jax_ep(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer on dispatch and combine."""
    out = _dispatched(inputs, sizes)
    assert out.weights is not None
    rows = jax_ep.grouped_mlp(
        out.tokens,
        *experts,
        out.group_sizes,
        row_weights=out.weights,
        unused_rows="undefined",  # combine does not read them
    )
    return jax_ep.combine(rows, out.handle, group=sizes.group, config=sizes.config)


def _dispatched(inputs: Inputs, sizes: Sizes) -> jax_ep.Dispatched:
    x, topk_idx, topk_weights = inputs
    return jax_ep.dispatch(
        x,
        topk_idx,
        topk_weights,
        group=sizes.group,
        num_experts=sizes.experts,
        alignment=1,
        capacity=sizes.capacity,
        unused_rows="undefined",  # the experts go by group sizes
        config=sizes.config,
    )


def chunks_in_line(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer on two chunks of the tokens, one after the other, with room for any routing."""
    sizes = dataclasses.replace(sizes, capacity=None)
    return jnp.concatenate([with_jax_ep(chunk, experts, sizes) for chunk in _chunks(inputs)])


def ops_in_chunks(inputs: Inputs, sizes: Sizes) -> Array:
    """The ops of ``chunks_in_line`` alone: rows come home as they went, and weights count a little."""
    sizes = dataclasses.replace(sizes, capacity=None)
    ys = []
    for chunk in _chunks(inputs):
        out = _dispatched(chunk, sizes)
        assert out.weights is not None
        y = jax_ep.combine(out.tokens, out.handle, group=sizes.group, config=sizes.config)
        # Their gradient travels home with the rows, as it does in the layer.
        ys.append(y.at[0, 0].add(out.weights[0].astype(y.dtype)))
    return jnp.concatenate(ys)


def _chunks(inputs: Inputs) -> list[Any]:
    from jax_ep._moe.exchange import chunk_sizes

    sizes = chunk_sizes(len(inputs[0]), NUM_CHUNKS)
    first, second, third = (lax.split(array, sizes) for array in inputs)
    return list(zip(first, second, third, strict=True))


def in_chunks(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer on dispatch and combine in flight; both chunks have room for any routing."""
    from jax_ep._moe.exchange import exchange
    from jax_ep._moe.experts import Beside, apply_experts, products
    from jax_ep._moe.params import MoEParams

    router = jnp.zeros((experts.gate.shape[1], sizes.experts))  # which nothing reads
    params = MoEParams(router, *experts)

    def through(out: jax_ep.Dispatched, beside: Beside) -> Array:
        dots = products(None, beside, experts.gate.shape[-1])
        return apply_experts(out, params, dots, jax.nn.silu)

    out = exchange(
        *inputs,
        through,
        in_flight=True,
        num_chunks=NUM_CHUNKS,
        group=sizes.group,
        num_experts=sizes.experts,
        alignment=1,
        unused_rows="undefined",  # the experts go by group sizes
        config=sizes.config,
    )
    # 0. XLA hides latency only in programs with a collective of its own, and drops sums over one rank.
    total = lax.psum(out.num_dropped.astype(out.y.dtype), sizes.group.axis_names)
    if sizes.group.size == 1:
        total = lax.ppermute(total, sizes.group.axis_names, [(0, 0)])
    return out.y.at[0, 0].add(total[0])


def with_ragged_all_to_all(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer on ``jax.lax.ragged_all_to_all``, with our grouped matmul."""
    return _over_ragged_all_to_all(inputs, experts, sizes, jax_ep.grouped_dot)


def plain(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer as one would write it with JAX alone."""
    return _over_ragged_all_to_all(inputs, experts, sizes, lax.ragged_dot)


def _over_ragged_all_to_all(
    inputs: Inputs, experts: Experts, sizes: Sizes, grouped_dot: GroupedDot
) -> Array:
    x, topk_idx, topk_weights = inputs
    axis, ranks = sizes.group.axis_names[0], sizes.group.size
    rank = lax.axis_index(axis)
    order, counts = _sorted_pairs(topk_idx, sizes)
    rows_of = counts.reshape(ranks, ranks, -1).sum(axis=-1)  # [source, destination]
    sent, received = rows_of[rank], rows_of[:, rank]
    sent_from = jnp.cumsum(sent) - sent
    received_at = jnp.cumsum(received) - received
    lands_at = (jnp.cumsum(rows_of, axis=0) - rows_of)[rank]  # my rows' first place there
    comes_back_to = (jnp.cumsum(rows_of, axis=1) - rows_of)[:, rank]

    rows = jnp.take(x, order // topk_idx.shape[1], axis=0)
    room = jnp.zeros((sizes.capacity, x.shape[1]), x.dtype)
    rows = lax.ragged_all_to_all(rows, room, sent_from, sent, lands_at, received, axis_name=axis)
    # They came by (source, local expert).
    mine = lax.dynamic_slice_in_dim(counts.reshape(ranks, ranks, -1), rank, 1, axis=1)[
        :, 0
    ]  # [source, local expert]
    local = jnp.tile(jnp.arange(mine.shape[1], dtype=jnp.int32), ranks)
    expert = jnp.repeat(local, mine.reshape(-1), total_repeat_length=sizes.capacity)
    expert = jnp.where(jnp.arange(sizes.capacity) < mine.sum(), expert, mine.shape[1])
    rows = _through_experts(rows, expert, mine.sum(axis=0), experts, grouped_dot)
    home = jnp.zeros((topk_idx.size, x.shape[1]), x.dtype)
    home = lax.ragged_all_to_all(
        rows, home, received_at, received, comes_back_to, sent, axis_name=axis
    )
    return _weighted_sum(jnp.take(home, jnp.argsort(order), axis=0), topk_weights)


def with_all_to_all(inputs: Inputs, experts: Experts, sizes: Sizes) -> Array:
    """The layer on ``jax.lax.all_to_all``: as many slots for every pair of ranks."""
    x, topk_idx, topk_weights = inputs
    axis, ranks, slots = sizes.group.axis_names[0], sizes.group.size, sizes.pair_capacity
    num_local = sizes.experts // ranks
    rank = lax.axis_index(axis)
    order, counts = _sorted_pairs(topk_idx, sizes)
    sent = counts[rank].reshape(ranks, num_local).sum(axis=-1)
    expert = jnp.take(topk_idx.reshape(-1), order)
    to = jnp.where(expert >= 0, expert // num_local, 0)
    place = jnp.arange(order.shape[0], dtype=jnp.int32) - jnp.take(jnp.cumsum(sent) - sent, to)
    slot = jnp.where(expert >= 0, to * slots + place, ranks * slots)  # past the end: dropped

    def exchange(rows: Array) -> Array:
        return lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)

    rows = jnp.take(x, order // topk_idx.shape[1], axis=0)
    buffer = jnp.zeros((ranks * slots, x.shape[1]), x.dtype).at[slot].set(rows, mode="drop")
    empty = jnp.full((ranks * slots,), num_local, jnp.int32)
    local = exchange(empty.at[slot].set(expert % num_local, mode="drop"))
    mine = lax.dynamic_slice_in_dim(counts, rank * num_local, num_local, axis=1)
    rows = _through_experts(exchange(buffer), local, mine.sum(axis=0), experts, jax_ep.grouped_dot)
    home = jnp.take(exchange(rows), slot, axis=0, mode="fill", fill_value=0)
    return _weighted_sum(jnp.take(home, jnp.argsort(order), axis=0), topk_weights)


def _sorted_pairs(topk_idx: Array, sizes: Sizes) -> tuple[Array, Array]:
    """(token, k) pairs by expert, those without one last; ``[R, E]`` pairs of each rank and expert."""
    flat = topk_idx.reshape(-1)
    expert = jnp.where(flat >= 0, flat, sizes.experts)
    counts = jnp.zeros((sizes.experts,), jnp.int32).at[expert].add(1, mode="drop")
    return jnp.argsort(expert, stable=True), lax.all_gather(counts, sizes.group.axis_names[0])


def _through_experts(
    rows: Array, expert: Array, group_sizes: Array, experts: Experts, grouped_dot: GroupedDot
) -> Array:
    """The experts' outputs for rows in any order; those of no expert come last and give zeros."""
    order = jnp.argsort(expert, stable=True)
    rows = jnp.take(rows, order, axis=0)
    gated = _gated(rows, experts, group_sizes, grouped_dot).astype(rows.dtype)
    used = jnp.arange(rows.shape[0]) < group_sizes.sum()
    out = jnp.where(used[:, None], grouped_dot(gated, experts.down, group_sizes), 0)
    return jnp.take(out, jnp.argsort(order), axis=0)


def _gated(
    rows: Array, experts: Experts, group_sizes: Array, grouped_dot: GroupedDot
) -> Float32[Array, "rows width"]:
    gate = grouped_dot(rows, experts.gate, group_sizes).astype(jnp.float32)
    return jax.nn.silu(gate) * grouped_dot(rows, experts.up, group_sizes).astype(jnp.float32)


def _weighted_sum(rows: Array, topk_weights: Array) -> Array:
    """``[T, H]`` from the rows of all (token, k)."""
    weighted = rows.astype(jnp.float32).reshape(*topk_weights.shape, -1) * topk_weights[..., None]
    return weighted.sum(axis=1).astype(rows.dtype)


PRODUCTS = "products"


def dense_products(
    rows: Float[Array, "local rows hidden"],
    gated: Float[Array, "local rows width"],
    experts: Experts,
) -> tuple[Array, Array, Array]:
    """The products of the experts, each with as many rows; nothing stands between them."""
    up, down = "lrh,lhf->lrf", "lrf,lfh->lrh"
    return (
        jnp.einsum(up, rows, experts.gate),
        jnp.einsum(up, rows, experts.up),
        jnp.einsum(down, gated, experts.down),
    )


ARMS = (
    Arm("jax_ep", with_jax_ep),
    Arm("jax_ep", with_jax_ep, capacity="default"),
    Arm("all_to_all", with_all_to_all),
    Arm("ragged_all_to_all, decomposer", with_ragged_all_to_all, DECOMPOSER),
    Arm("ragged_all_to_all", with_ragged_all_to_all),
    Arm("plain, decomposer", plain, DECOMPOSER),
    Arm("plain", plain),
)
CHUNKS = Arm("jax_ep in chunks", in_chunks, capacity="default")
IN_LINE = Arm("jax_ep in chunks, one after the other", chunks_in_line, capacity="default")
BY_NAME = {arm.name: arm for arm in (*ARMS, CHUNKS, IN_LINE)}
OPS_IN_CHUNKS = "ops in chunks"
# What says how much a layer in chunks hides; the last one is that.
CHUNKED = ("jax_ep", IN_LINE.name, OPS_IN_CHUNKS, CHUNKS.name)
