"""The schedule of the product with matrices: a table of tiles that XLA makes of the group sizes.

With the table, rows past the last group cost only the writing of zeros. A block with rows of two
groups is computed once for each of them, and each tile writes its own rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tile_table(group_sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, ...]:
    """For each tile of rows: its group (−1: rows of none), block of rows, first and end row.

    Groups follow each other; a block of ``tile`` rows stands in the table once for each group that it
    has rows of. Entries past the last tile have first = end.
    """
    groups = group_sizes.shape[0]
    sizes = jnp.concatenate([group_sizes, jnp.maximum(rows - group_sizes.sum(), 0)[None]])
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first_block = starts // tile
    counts = jnp.where(sizes > 0, (ends - 1) // tile - first_block + 1, 0)
    table_ends = jnp.cumsum(counts)
    index = jnp.arange(-(-rows // tile) + groups + 1, dtype=jnp.int32)
    group = (index[:, None] >= table_ends[None, :]).sum(axis=1, dtype=jnp.int32)
    exists = group <= groups
    group = jnp.minimum(group, groups)
    block = first_block[group] + index - (table_ends - counts)[group]
    first = jnp.maximum(starts[group], block * tile)
    end = jnp.where(exists, jnp.minimum(ends[group], (block + 1) * tile), first)
    group = jnp.where(group == groups, -1, group)
    return tuple(x.astype(jnp.int32) for x in (group, block, first, end))
