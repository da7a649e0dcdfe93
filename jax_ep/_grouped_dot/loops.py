"""The grouped products in plain JAX: loops over tiles of the rows of each group.

Their trip counts follow from the rows in use, so neither other groups' matrices nor unused rows cost
anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep import _compat

_TILE = 128  # rows; 64 to 256 are equally fast, more wastes work on groups of few rows


def rows_by_matrices(
    lhs: Float[Array, "rows inner"],
    rhs: Float[Array, "groups a b"],
    group_sizes: Int32[Array, " groups"],
    *,
    contract: int,
    clears: bool,
) -> Float[Array, "rows outer"]:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed.

    Rows past the last group are zeros, or NaN where they may be anything, so that tests notice who
    reads them.
    """
    rows, outer = lhs.shape[0], rhs.shape[2 - contract]
    out = _full((rows, outer), 0.0 if clears else jnp.nan, lhs.dtype, like=lhs)
    if rows == 0:
        return out

    def group(out: Array, operands: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = operands

        def tile(index: Array, out: Array) -> Array:
            first, mine = _tile(start, size, index, rows)
            block = lax.dynamic_slice_in_dim(lhs, first, len(mine))
            product = lax.dot_general(
                block,
                matrix,
                (((1,), (contract,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            # A tile at the end of its group reaches into rows that other groups write.
            before = lax.dynamic_slice_in_dim(out, first, len(mine))
            after = jnp.where(mine[:, None], product.astype(out.dtype), before)
            return lax.dynamic_update_slice_in_dim(out, after, first, axis=0)

        return _for_each_tile(size, rows, tile, out), None

    return lax.scan(group, out, (rhs, *_bounds(group_sizes)))[0]


def rows_by_rows(
    lhs: Float[Array, "rows inner"],
    d_out: Float[Array, "rows outer"],
    group_sizes: Int32[Array, " groups"],
) -> Float[Array, "groups inner outer"]:
    """``lhs.T @ d_out`` over the rows of each group."""
    (rows, inner), outer = lhs.shape, d_out.shape[1]
    if rows == 0:
        return _full((group_sizes.shape[0], inner, outer), 0.0, lhs.dtype, like=lhs)

    def group(_: None, bounds: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = bounds

        def tile(index: Array, total: Array) -> Array:
            first, mine = _tile(start, size, index, rows)
            block = lax.dynamic_slice_in_dim(lhs, first, len(mine))
            cotangent = lax.dynamic_slice_in_dim(d_out, first, len(mine))
            # Both are masked, because unused rows may hold NaN, which must not reach the sum.
            return total + lax.dot_general(
                jnp.where(mine[:, None], block, 0),
                jnp.where(mine[:, None], cotangent, 0),
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        total = _full((inner, outer), 0.0, jnp.float32, like=lhs)
        return None, _for_each_tile(size, rows, tile, total).astype(lhs.dtype)

    return lax.scan(group, None, _bounds(group_sizes))[1]


def _bounds(group_sizes: Int32[Array, " groups"]) -> tuple[Array, Array]:
    """First row and number of rows of each group."""
    return jnp.cumsum(group_sizes) - group_sizes, group_sizes


def _for_each_tile(
    size: Int32[Array, ""], rows: int, tile: Callable[[Array, Array], Array], carry: Array
) -> Array:
    """``carry = tile(index, carry)`` for each tile of a group of ``size`` rows."""
    height = min(_TILE, rows)
    # Computed, since vmap with spmd_axis_name fails on a constant where the bound is batched: a
    # constant has no mesh, so JAX cannot make it vary over the axis (0.10.2 to 0.12.0).
    first = size - size
    return lax.fori_loop(first, (size + height - 1) // height, tile, carry)


def _tile(
    start: Int32[Array, ""], size: Int32[Array, ""], index: Int32[Array, ""], rows: int
) -> tuple[Array, Array]:
    """First row of a tile, moved up so that it ends within the rows; and a mask of its own rows."""
    height = min(_TILE, rows)
    wanted = start + index * height
    first = jnp.minimum(wanted, rows - height)
    row = first + jnp.arange(height, dtype=jnp.int32)
    return first, (row >= wanted) & (row < start + size)


def _full(shape: tuple[int, ...], value: float, dtype: Any, *, like: Array) -> Array:
    return _compat.cast_varying(jnp.full(shape, value, dtype), _compat.varying_axes(like))
