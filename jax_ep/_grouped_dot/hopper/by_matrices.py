"""Each row times the matrix of its group: the forward pass, and the gradient of the rows."""

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
from jax_ep._grouped_dot.hopper.tile_table import tile_table
from jax_ep._grouped_dot.hopper.tiles import Tiles, default_tiles


# Under jit, Pallas traces and lowers it (which takes a second) once for each shape in a program and
# not once for each call.
@functools.partial(jax.jit, static_argnames=("contract", "tiles", "num_sms"))
def rows_by_matrices(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    contract: int,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed.

    Args:
        lhs: ``[rows, inner]``.
        rhs: ``[groups, a, b]``.
        group_sizes: ``[groups]`` int32.
        contract: 0 or 1: which of a and b is inner.
        tiles: How to cut the work; None picks by shape.
        num_sms: SMs that it may occupy; None for all.

    Returns:
        ``[rows, outer]`` in the dtype of ``lhs``; zeros past the last group.
    """
    dtype = lhs.dtype
    if dtype == jnp.float32:
        # Three products of halves, each rounded to bfloat16: the sum is as exact as XLA's "bf16_3x".
        high, low = halves(lhs)
        rhs_high, rhs_low = halves(rhs)
        lhs = jnp.concatenate([high, high, low], axis=1)
        rhs = jnp.concatenate([rhs_high, rhs_low, rhs_high], axis=1 + contract)
    return _product(lhs, rhs, group_sizes, contract, dtype, tiles, num_sms)


def _product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    contract: int,
    dtype: Any,
    tiles: Tiles | None,
    num_sms: int | None,
) -> jax.Array:
    (rows, inner), outer = lhs.shape, rhs.shape[2 - contract]
    tiles = (tiles or default_tiles(dtype, by_matrices=True)).for_columns(outer)
    lhs = pad_rows(lhs)
    table = tile_table(group_sizes, len(lhs), tiles.m)
    kernel = _Kernel(contract, inner, outer, len(table[0]), lhs.dtype, dtype, tiles)
    out_type = jax.ShapeDtypeStruct((len(lhs), outer), dtype)
    return launch(kernel, out_type, *table, lhs, rhs, num_sms=num_sms)[:rows]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of the result, as scalars on the GPU: an entry of the table of tiles, and columns.

    Attributes:
        group: Its matrix; −1 if there is none, and the result is zeros.
        block: Which block of ``Tiles.m`` rows it lies in.
        first: Its first row there.
        end: The row there that follows its last one.
        column: Which block of ``Tiles.n`` columns it has.
    """

    group: Any
    block: Any
    first: Any
    end: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class _Out:
    """What a warpgroup writes to.

    Attributes:
        gmem: The result.
        smem: Slots for parts on their way to the result.
        some_smem: Room for a part of which only some rows are written.
        warpgroup: Which warpgroup it is.
    """

    gmem: Any
    smem: Any
    some_smem: Any
    warpgroup: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for operands of one kind.

    Attributes:
        contract: The axis of the matrices that is summed.
        inner: Channels that are summed.
        outer: Columns of the result.
        num_tiles: Entries of the table of tiles.
        operand_dtype: The dtype of rows and matrices.
        dtype: The dtype of the result.
        tiles: How the work is cut.
    """

    contract: int
    inner: int
    outer: int
    num_tiles: int
    operand_dtype: Any
    dtype: Any
    tiles: Tiles

    def body(self, group_of, block_of, first_of, end_of, lhs_gmem, rhs_gmem, out_gmem):
        """What each block of the GPU runs: tile after tile."""
        tiles, pipeline = self.tiles, self._pipeline()
        warpgroup = lax.axis_index("wg")
        columns = pl.ds(warpgroup * tiles.half, tiles.half)
        grid = (self.num_tiles, self.outer // tiles.n)

        def run(allocations, out_smem, some_smem):
            out = _Out(out_gmem, out_smem, some_smem, warpgroup)

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
            def _tile(loop_info: plgpu.NDLoopInfo):
                index, column = plgpu.planar_snake(loop_info.index[0], grid, 1, tiles.width)
                group = group_of[index]
                block = block_of[index]
                first = first_of[index] - block * tiles.m
                end = end_of[index] - block * tiles.m
                tile = _Tile(group, block, first, end, column)
                write = functools.partial(self._write, tile, out)

                @pl.when((end > first) & (group >= 0))
                def _product():
                    at = pl.ds(column * tiles.n, tiles.n)
                    matrix = rhs_gmem.at[group]
                    pipeline.sum(
                        functools.partial(self._multiply, columns),
                        lhs_gmem.at[pl.ds(block * tiles.m, tiles.m), :],
                        matrix.at[at, :] if self.contract else matrix.at[:, at],
                        allocations=allocations,
                        write=write,
                    )

                @pl.when((end > first) & (group < 0) & (warpgroup < 2))
                def _nothing():
                    write_zeros(write, self.dtype)

        pl.run_scoped(
            run,
            allocations=pipeline.allocations(lhs_gmem, rhs_gmem.at[0]),
            out_smem=memory_of_parts(self._slots, self.dtype),
            some_smem=plgpu.SMEM((2, PART, PART), self.dtype),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pipeline(self) -> Pipeline:
        """The sum over the inner channels."""
        tiles, dtype = self.tiles, self.operand_dtype
        rows = load((tiles.m, tiles.k), lambda k: (0, k), dtype, tiles)
        if self.contract:
            matrix = load((tiles.n, tiles.k), lambda k: (0, k), dtype, tiles)
        else:
            matrix = load((tiles.k, tiles.n), lambda k: (k, 0), dtype, tiles)
        return Pipeline(self.inner // tiles.k, [rows, matrix], self.dtype, tiles)

    def _multiply(self, columns, _, lhs_smem, rhs_smem, acc_ref):
        """Multiply blocks; ``columns`` are this warpgroup's."""
        mine = rhs_smem.at[columns].transpose((1, 0)) if self.contract else rhs_smem.at[:, columns]
        plgpu.wgmma(acc_ref, lhs_smem, mine)
        plgpu.wgmma_wait(self.tiles.lag)
        return acc_ref

    def _write(self, tile: _Tile, out: _Out, value_of: Callable[[slice, slice], Any]) -> None:
        """Write the rows that are the tile's, from ``value_of(rows, columns)``."""
        for index, (i, j) in enumerate(parts(self.tiles)):
            value = value_of(slice(i, i + PART), slice(j, j + PART))
            self._write_part(tile, out, i, j, index % self._slots, value)

    def _write_part(self, tile: _Tile, out: _Out, i: int, j: int, slot: int, value: Any) -> None:
        """Write the tile's own rows of ``value``, the part that begins at row i and column j."""
        tiles, warpgroup = self.tiles, out.warpgroup
        columns = pl.ds(tile.column * tiles.n + warpgroup * tiles.half + j, PART)
        first = jnp.clip(tile.first - i, 0, PART)
        count = jnp.clip(tile.end - i, 0, PART) - first

        @pl.when(count == PART)
        def _all():
            plgpu.wait_smem_to_gmem(self._slots - 1, wait_read_only=True)
            out.smem[warpgroup, slot] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out.smem.at[warpgroup, slot],
                out.gmem.at[pl.ds(tile.block * tiles.m + i, PART), columns],
            )

        @pl.when((count > 0) & (count < PART))
        def _some():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out.some_smem[warpgroup] = value
            plgpu.commit_smem()
            # A copy has a fixed number of rows, so there is one copy for each bit of the count.
            done = first
            for length in (PART >> bit for bit in range(1, PART.bit_length())):

                @pl.when(count & length != 0)
                def _copy(done=done, length=length):
                    plgpu.copy_smem_to_gmem(
                        out.some_smem.at[warpgroup].at[pl.ds(done, length)],
                        out.gmem.at[pl.ds(tile.block * tiles.m + i + done, length), columns],
                    )

                done = done + (count & length)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @property
    def _slots(self) -> int:
        # Parts of the same rows take the slots in turn and begin with the first slot, because the
        # parts of other rows may be left out.
        return self.tiles.slots if self.tiles.half // PART % self.tiles.slots == 0 else 1
