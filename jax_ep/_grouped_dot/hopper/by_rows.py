"""The rows of each group times other rows of the group: the gradient of the matrices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_ep._grouped_dot.hopper.edges import clear_other_rows
from jax_ep._grouped_dot.hopper.launch import halves, launch, pad_rows
from jax_ep._grouped_dot.hopper.pipeline import (
    PART,
    Pipeline,
    Sum,
    ValueOf,
    memory_of_parts,
    parts,
    plgpu,
    share,
    write_zeros,
)
from jax_ep._grouped_dot.hopper.tile_table import STEP
from jax_ep._grouped_dot.hopper.tiles import Tiles, tiles_by_rows


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
    (out,) = _products(lhs, (d_out,), group_sizes, tiles, num_sms)
    return out


@functools.partial(jax.jit, static_argnames=("tiles", "num_sms"))
def pair_by_rows(
    lhs: jax.Array,
    d_outs: tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
) -> tuple[jax.Array, ...]:
    """``lhs.T @ d_out`` for both of two, in one pass over the rows."""
    return _products(lhs, d_outs, group_sizes, tiles, num_sms)


def _products(
    lhs: jax.Array,
    d_outs: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    tiles: Tiles | None,
    num_sms: int | None,
) -> tuple[jax.Array, ...]:
    product = functools.partial(
        _product, group_sizes=group_sizes, dtype=lhs.dtype, tiles=tiles, num_sms=num_sms
    )
    if lhs.dtype != jnp.float32:
        return product(lhs, d_outs)
    high, low = halves(lhs)
    d_highs, d_lows = zip(*map(halves, d_outs), strict=True)
    terms = (product(high, d_lows), product(low, d_highs), product(high, d_highs))
    return tuple(a + b + c for a, b, c in zip(*terms, strict=True))


def _product(
    lhs: jax.Array,
    d_outs: tuple[jax.Array, ...],
    *,
    group_sizes: jax.Array,
    dtype: Any,
    tiles: Tiles | None,
    num_sms: int | None,
) -> tuple[jax.Array, ...]:
    inner, outer, groups = lhs.shape[1], d_outs[0].shape[1], group_sizes.shape[0]
    tiles = tiles or tiles_by_rows(dtype, outer, results=len(d_outs))
    lhs, d_outs = pad_rows(lhs), tuple(map(pad_rows, d_outs))
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = ends - group_sizes.astype(jnp.int32)
    kernel = _Kernel(groups, len(lhs), inner, outer, len(d_outs), lhs.dtype, dtype, tiles)
    outs = (jax.ShapeDtypeStruct((groups, inner, outer), dtype),) * len(d_outs)
    return launch(kernel, starts, ends, lhs, *d_outs, outs=outs, num_sms=num_sms)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of the results for one group. Scalars on the GPU.

    Attributes:
        group: Which group.
        row: Which block of ``Tiles.m`` rows of the results.
        column: Which block of ``Tiles.n`` columns.
        start: The first row of the operands that is the group's.
        end: The row that follows the group's last one.
        begin: The row at which loads begin, a multiple of ``STEP``.
    """

    group: Any
    row: Any
    column: Any
    start: Any
    end: Any
    begin: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for operands of one kind.

    Attributes:
        groups: Number of groups.
        rows: Rows of the operands, which are summed.
        inner: Rows of the results.
        outer: Columns of the results.
        results: How many there are: operands that the transposed rows are multiplied with.
        operand_dtype: The dtype of the operands.
        dtype: The dtype of the results.
        tiles: How the work is cut.
    """

    groups: int
    rows: int
    inner: int
    outer: int
    results: int
    operand_dtype: Any
    dtype: Any
    tiles: Tiles

    def body(self, start_of, end_of, lhs_gmem, *arrays):
        """What each block of the GPU runs: tile after tile."""
        tiles, d_outs, outs = self.tiles, arrays[: self.results], arrays[self.results :]
        warpgroup = lax.axis_index("wg")
        grid = (self.inner // tiles.m, self.outer // tiles.n)
        size = grid[0] * grid[1]

        def run(allocations, out_smem):
            def sum_of(number):
                group = lax.div(number, size)
                row, column = plgpu.planar_snake(lax.rem(number, size), grid, 0, tiles.width)
                start, end = start_of[group], end_of[group]
                begin = lax.div(start, STEP) * STEP
                tile = _Tile(group, row, column, start, end, begin)
                write = functools.partial(self._write, tile, warpgroup, out_smem, outs)

                @pl.when((end == start) & (warpgroup < 2))
                def _nothing():
                    write_zeros(write, self.dtype)

                def operands(step):
                    # They may reach past the last row; what a load finds there is zeros.
                    rows = pl.ds(pl.multiple_of(begin + step * tiles.k, STEP), tiles.k)
                    columns = pl.ds(column * tiles.n, tiles.n)
                    return [
                        lhs_gmem.at[rows, pl.ds(row * tiles.m, tiles.m)],
                        *(d_out.at[rows, columns] for d_out in d_outs),
                    ]

                return Sum(
                    exists=end > start,
                    steps=lax.div(end - begin + tiles.k - 1, tiles.k),
                    operands=operands,
                    multiply=functools.partial(self._multiply, tile, warpgroup),
                    write=write,
                )

            pipeline.run(self.groups * size, sum_of, **allocations)

        pipeline = self._pipeline()
        pl.run_scoped(
            run,
            allocations=pipeline.allocations(),
            out_smem=memory_of_parts(2, self.dtype),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pipeline(self) -> Pipeline:
        """The sums over the rows of a group."""
        widths = (self.tiles.m, *[self.tiles.n] * self.results)
        blocks = [(self.tiles.k, width) for width in widths]
        return Pipeline(blocks, self.operand_dtype, self.dtype, self.tiles, self.results)

    def _multiply(self, tile: _Tile, warpgroup, step, lhs_smem, *others):
        """Multiply blocks, for this warpgroup's share of the tile."""
        *d_outs_smem, sums = others
        tiles = self.tiles
        first_row, first_column = share(tiles, warpgroup)
        lhs = lhs_smem.at[:, pl.ds(first_row, tiles.rows)] if tiles.split == "rows" else lhs_smem
        mine = [
            d_out if tiles.split == "rows" else d_out.at[:, pl.ds(first_column, tiles.columns)]
            for d_out in d_outs_smem
        ]
        begin = tile.begin + step * tiles.k

        # Blocks at the ends of a group also have rows of other groups, which may hold anything.
        # Where both warpgroups have a block in common, they write the same zeros.
        @pl.when((begin < tile.start) | (begin + tiles.k > tile.end))
        def _mask():
            for smem in (lhs, *mine):
                first = jnp.clip(tile.start - begin, 0, tiles.k)
                clear_other_rows(smem, first, jnp.clip(tile.end - begin, 0, tiles.k))
            plgpu.commit_smem()

        for total, d_out in zip(sums, mine, strict=True):
            plgpu.wgmma(total, lhs.transpose((1, 0)), d_out)

    def _write(self, tile: _Tile, warpgroup, smem, outs, value_of: ValueOf) -> None:
        """Write the tile, two parts at a time on their way."""
        tiles = self.tiles
        first_row, first_column = share(tiles, warpgroup)
        for index, (i, result, j) in enumerate(parts(tiles, self.results)):
            slot = index % 2
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            smem[warpgroup, slot] = value_of(result, slice(i, i + PART), slice(j, j + PART))
            plgpu.commit_smem()
            rows = pl.ds(tile.row * tiles.m + first_row + i, PART)
            columns = pl.ds(tile.column * tiles.n + first_column + j, PART)
            plgpu.copy_smem_to_gmem(
                smem.at[warpgroup, slot], outs[result].at[tile.group, rows, columns]
            )
