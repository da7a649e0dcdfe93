"""How many rows a rank has room for, and how its experts share that room."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from jax_ep._core.types import Layout

INT32_MAX = 2**31 - 1
MAX_CAPACITY = INT32_MAX - 1  # one more stands for "too many"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def lossless_capacity(
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    layout: Layout,
    alignment: int,
) -> int:
    """The number of rows of a rank that suffices for any routing.

    In layout "token" each of the R·T tokens of the group has at most one row. In layout "expert"
    each has at most N = min(K, L) rows on this rank. At most min(L, R·T·N) groups are padded, each
    by at most ``alignment - 1`` rows.
    """
    if layout == "token":
        return num_ranks * num_tokens
    rows = num_ranks * num_tokens * min(top_k, num_local_experts)
    padding = min(num_local_experts, rows) * (alignment - 1)
    return round_up(rows + padding, alignment)


def rows_per_expert(
    *, capacity_factor: float, num_ranks: int, num_tokens: int, top_k: int, num_experts: int
) -> int:
    """Rows that one expert keeps: ``capacity_factor`` times its share under even routing."""
    return math.ceil(capacity_factor * num_ranks * num_tokens * top_k / num_experts)


def rows_per_rank(
    *, rank_capacity_factor: float, num_tokens: int, top_k: int, alignment: int
) -> int:
    """Rows that one rank keeps: ``rank_capacity_factor`` times its share under even routing."""
    return round_up(math.ceil(rank_capacity_factor * num_tokens * top_k), alignment)


def share_room(
    wanted: Int32[Array, "ranks local_experts"], capacity: int, alignment: int
) -> Int32[Array, "ranks local_experts"]:
    """How many of the rows that they want the experts of each rank keep.

    If not all fit, every expert keeps what it wants up to a level, which is the highest multiple of
    ``alignment`` for which all groups fit. What is left goes to the experts with the lowest ids that
    want more, ``alignment`` rows to each.

    Args:
        wanted: Rows of each local expert, of every rank.
        capacity: Rows of a rank, a multiple of ``alignment``, at most ``MAX_CAPACITY``.
        alignment: Groups are padded to a multiple of it.
    """
    too_many = np.uint32(capacity + 1)
    padded = (jnp.minimum(wanted, capacity).astype(jnp.uint32) + (alignment - 1)) // alignment
    sizes = jnp.where(wanted > capacity, too_many, padded * np.uint32(alignment))

    def sum_at(level: UInt32[Array, " ranks"]) -> UInt32[Array, " ranks"]:
        bounded = jnp.minimum(sizes, level[:, None])
        # No sum passes capacity + 1, so none overflows.
        return lax.reduce(
            bounded, np.uint32(0), lambda a, b: jnp.minimum(a + b, too_many), dimensions=(1,)
        )

    # No loop of JAX's: under vmap with spmd_axis_name, one that reads arrays from outside fails (0.10.2
    # to 0.12.0).
    most = capacity // alignment
    low = sizes[:, 0] - sizes[:, 0]  # in groups of the alignment; those of ``low`` fit
    high = low + np.uint32(most)
    for _ in range(most.bit_length()):
        middle = high - (high - low) // 2
        fits = sum_at(middle * np.uint32(alignment)) <= capacity
        high = jnp.where(fits, high, jnp.maximum(middle, 1) - 1)
        low = jnp.where(fits, middle, low)
    level = low * np.uint32(alignment)
    left = (np.uint32(capacity) - sum_at(level)) // np.uint32(alignment)
    want_more = sizes > level[:, None]
    order = jnp.cumsum(want_more, axis=1, dtype=jnp.uint32)
    more = want_more & (order <= left[:, None])
    limit = level[:, None] + jnp.where(more, np.uint32(alignment), np.uint32(0))
    return jnp.minimum(wanted, limit.astype(jnp.int32))
