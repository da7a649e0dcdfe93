"""The rows of each group times other rows of the group: the gradient of the matrices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_ep._grouped_dot.hopper.launch import halves, launch, pad_rows
from jax_ep._grouped_dot.hopper.pipeline import (
    PART,
    Pipeline,
    load,
    memory_of_parts,
    parts,
    plgpu,
    write_zeros,
)
from jax_ep._grouped_dot.hopper.tiles import Tiles, default_tiles


@functools.partial(jax.jit, static_argnames=("tiles", "num_sms"))
def rows_by_rows(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: jax.Array,
    *,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """``lhs.T @ d_out`` over the rows of each group.

    Args:
        lhs: ``[rows, inner]``.
        d_out: ``[rows, outer]``.
        group_sizes: ``[groups]`` int32.
        tiles: How to cut the work; None picks by shape.
        num_sms: SMs that it may occupy; None for all.

    Returns:
        ``[groups, inner, outer]`` in the dtype of ``lhs``; zeros for empty groups.
    """
    product = functools.partial(
        _product, group_sizes=group_sizes, dtype=lhs.dtype, tiles=tiles, num_sms=num_sms
    )
    if lhs.dtype == jnp.float32:
        high, low = halves(lhs)
        d_high, d_low = halves(d_out)
        return product(high, d_low) + product(low, d_high) + product(high, d_high)
    return product(lhs, d_out)


def _product(
    lhs: jax.Array,
    d_out: jax.Array,
    *,
    group_sizes: jax.Array,
    dtype: Any,
    tiles: Tiles | None,
    num_sms: int | None,
) -> jax.Array:
    inner, outer, groups = lhs.shape[1], d_out.shape[1], group_sizes.shape[0]
    tiles = (tiles or default_tiles(dtype, by_matrices=False)).for_columns(outer)
    lhs, d_out = pad_rows(lhs), pad_rows(d_out)
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = ends - group_sizes.astype(jnp.int32)
    kernel = _Kernel(groups, len(lhs), inner, outer, lhs.dtype, dtype, tiles)
    out_type = jax.ShapeDtypeStruct((groups, inner, outer), dtype)
    return launch(kernel, out_type, starts, ends, lhs, d_out, num_sms=num_sms)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of the result for one group. Scalars on the GPU.

    Attributes:
        group: Which group.
        row: Which block of ``Tiles.m`` rows of the result.
        column: Which block of ``Tiles.n`` columns.
        start: The first row of the operands that is the group's.
        end: The row that follows the group's last one.
        first_block: Which block of ``Tiles.k`` rows of the operands the group begins in.
    """

    group: Any
    row: Any
    column: Any
    start: Any
    end: Any
    first_block: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for operands of one kind.

    Attributes:
        groups: Number of groups.
        rows: Rows of both operands, which are summed.
        inner: Rows of the result.
        outer: Columns of the result.
        operand_dtype: The dtype of the operands.
        dtype: The dtype of the result.
        tiles: How the work is cut.
    """

    groups: int
    rows: int
    inner: int
    outer: int
    operand_dtype: Any
    dtype: Any
    tiles: Tiles

    def body(self, start_of, end_of, lhs_gmem, d_out_gmem, out_gmem):
        """What each block of the GPU runs: tile after tile."""
        tiles = self.tiles
        warpgroup = lax.axis_index("wg")
        columns = pl.ds(warpgroup * tiles.half, tiles.half)
        grid = (self.inner // tiles.m, self.outer // tiles.n)
        size = grid[0] * grid[1]

        def run(allocations, out_smem):
            @plgpu.nd_loop((self.groups * size,), collective_axes="sm")
            def _tile(loop_info: plgpu.NDLoopInfo):
                index = loop_info.index[0]
                group = lax.div(index, size)
                row, column = plgpu.planar_snake(lax.rem(index, size), grid, 0, tiles.width)
                start, end = start_of[group], end_of[group]
                first_block = lax.div(start, tiles.k)
                steps = lax.div(end + tiles.k - 1, tiles.k) - first_block
                tile = _Tile(group, row, column, start, end, first_block)
                write = functools.partial(self._write, tile, warpgroup, out_smem, out_gmem)

                @pl.when(end > start)
                def _product():
                    # The slice may reach past the last row; blocks there are never loaded.
                    at = pl.ds(pl.multiple_of(first_block * tiles.k, tiles.k), self.rows)
                    self._pipeline(steps).sum(
                        functools.partial(self._multiply, tile, columns),
                        lhs_gmem.at[at, pl.ds(row * tiles.m, tiles.m)],
                        d_out_gmem.at[at, pl.ds(column * tiles.n, tiles.n)],
                        allocations=allocations,
                        write=write,
                    )

                @pl.when((end == start) & (warpgroup < 2))
                def _nothing():
                    write_zeros(write, self.dtype)

        most_steps = self.rows // tiles.k + 2
        pl.run_scoped(
            run,
            allocations=self._pipeline(most_steps).allocations(lhs_gmem, d_out_gmem),
            out_smem=memory_of_parts(2, self.dtype),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pipeline(self, steps: Any) -> Pipeline:
        """The sum over the rows of a group."""
        loads = [
            load((self.tiles.k, width), lambda k: (k, 0), self.operand_dtype, self.tiles)
            for width in (self.tiles.m, self.tiles.n)
        ]
        return Pipeline(steps, loads, self.dtype, self.tiles)

    def _multiply(self, tile: _Tile, columns, indices, lhs_smem, d_out_smem, acc_ref):
        """Multiply blocks; ``columns`` are this warpgroup's."""
        rows = self.tiles.k
        begin = (tile.first_block + indices[0]) * rows
        mine = d_out_smem.at[:, columns]

        # Blocks at the ends of a group also have rows of other groups, which may hold anything.
        # Both warpgroups write the same zeros.
        @pl.when((begin < tile.start) | (begin + rows > tile.end))
        def _mask():
            for smem in (lhs_smem, mine):
                row = begin + plgpu.layout_cast(
                    lax.broadcasted_iota(jnp.int32, smem.shape, 0), plgpu.Layout.WGMMA
                )
                value = smem[...]
                smem[...] = jnp.where(
                    (row >= tile.start) & (row < tile.end), value, jnp.zeros_like(value)
                )
            plgpu.commit_smem()

        plgpu.wgmma(acc_ref, lhs_smem.transpose((1, 0)), mine)
        plgpu.wgmma_wait(self.tiles.lag)
        return acc_ref

    def _write(
        self, tile: _Tile, warpgroup, smem, gmem, value_of: Callable[[slice, slice], Any]
    ) -> None:
        """Write the tile from ``value_of(rows, columns)``, two parts at a time on their way."""
        tiles = self.tiles
        for index, (i, j) in enumerate(parts(tiles)):
            slot = index % 2
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            smem[warpgroup, slot] = value_of(slice(i, i + PART), slice(j, j + PART))
            plgpu.commit_smem()
            rows = pl.ds(tile.row * tiles.m + i, PART)
            columns = pl.ds(tile.column * tiles.n + warpgroup * tiles.half + j, PART)
            plgpu.copy_smem_to_gmem(smem.at[warpgroup, slot], gmem.at[tile.group, rows, columns])
