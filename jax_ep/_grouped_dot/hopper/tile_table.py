"""The schedule of products with matrices: a table of tiles that XLA makes of the group sizes.

With the table, rows past the last group cost only the writing of zeros, or nothing. The tiles of a
group begin where the group does, so only its last one may have rows of the next group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

STEP = 8  # rows: the tiles of shared memory, at multiples of which loads begin


def tile_table(
    group_sizes: jax.Array, rows: int, tile: int, *, with_unused: bool
) -> tuple[jax.Array, ...]:
    """For each tile of rows: its group (−1: rows of none), the row it begins at, first and end row.

    Groups follow each other. The first tile of a group begins at the last multiple of ``STEP`` rows
    that is not past the group's first row, the next ones ``tile`` rows further on. Entries past the
    last tile have first = end.

    Args:
        group_sizes: ``[groups]`` int32.
        rows: Number of rows.
        tile: Rows of a tile, a multiple of ``STEP``.
        with_unused: Whether rows past the last group have tiles.
    """
    groups = group_sizes.shape[0]
    unused = jnp.maximum(rows - group_sizes.sum(), 0) if with_unused else jnp.zeros((), jnp.int32)
    sizes = jnp.concatenate([group_sizes, unused[None].astype(group_sizes.dtype)])
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    begins = starts // STEP * STEP
    counts = jnp.where(sizes > 0, (ends - begins - 1) // tile + 1, 0)
    table_ends = jnp.cumsum(counts)
    most = (rows + (STEP - 2) * (groups + 1)) // tile + groups + 1
    index = jnp.arange(most, dtype=jnp.int32)
    group = (index[:, None] >= table_ends[None, :]).sum(axis=1, dtype=jnp.int32)
    exists = group <= groups
    group = jnp.minimum(group, groups)
    begin = begins[group] + (index - (table_ends - counts)[group]) * tile
    first = jnp.maximum(starts[group], begin)
    end = jnp.where(exists, jnp.minimum(ends[group], begin + tile), first)
    group = jnp.where(group == groups, -1, group)
    return tuple(x.astype(jnp.int32) for x in (group, begin, first, end))
