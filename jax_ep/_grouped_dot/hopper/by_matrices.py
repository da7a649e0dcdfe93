"""Each row times the matrix of its group: the forward pass, and the gradient of the rows.

One kernel for three products: rows by one matrix of each group; the same rows by two; and the sum of
two rows, each by a matrix of its own, which is the gradient of rows that went into two products.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_ep._grouped_dot.hopper.edges import write_rows
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
from jax_ep._grouped_dot.hopper.tile_table import STEP, tile_table
from jax_ep._grouped_dot.hopper.tiles import Tiles, tiles_by_matrices


# Under jit, Pallas traces and lowers it (which takes a second) once for each shape in a program and
# not once for each call.
@functools.partial(jax.jit, static_argnames=("contract", "tiles", "num_sms", "clears"))
def rows_by_matrices(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    contract: int,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
    clears: bool = True,
) -> jax.Array:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed.

    Args:
        lhs: ``[rows, inner]``.
        rhs: ``[groups, a, b]``.
        group_sizes: ``[groups]`` int32.
        contract: 0 or 1: which of a and b is inner.
        tiles: How to cut the work; None picks by shape.
        num_sms: SMs that it may occupy; None for all.
        clears: Whether rows past the last group are zeros; else they are undefined.

    Returns:
        ``[rows, outer]`` in the dtype of ``lhs``.
    """
    dtype = lhs.dtype
    if dtype == jnp.float32:
        lhs, rhs = _in_halves(lhs, rhs, contract)
    (out,) = _product((lhs,), (rhs,), group_sizes, contract, dtype, tiles, num_sms, clears)
    return out


@functools.partial(jax.jit, static_argnames=("tiles", "num_sms", "clears"))
def rows_by_pair(
    lhs: jax.Array,
    rhs: tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
    clears: bool = True,
) -> tuple[jax.Array, ...]:
    """Each row times both matrices ``[inner, outer]`` of its group, in one pass over the rows."""
    dtype = lhs.dtype
    if dtype == jnp.float32:
        halved = [_in_halves(lhs, matrices, 0) for matrices in rhs]
        lhs, rhs = halved[0][0], (halved[0][1], halved[1][1])
    return _product((lhs,), rhs, group_sizes, 0, dtype, tiles, num_sms, clears)


@functools.partial(jax.jit, static_argnames=("tiles", "num_sms", "clears"))
def sum_of_pair(
    lhs: tuple[jax.Array, jax.Array],
    rhs: tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
    clears: bool = True,
) -> jax.Array:
    """The sum, in float32, of two products of rows with transposed matrices ``[outer, inner]``."""
    dtype = lhs[0].dtype
    if dtype == jnp.float32:
        halved = [_in_halves(*each, 1) for each in zip(lhs, rhs, strict=True)]
        rows = jnp.concatenate([rows for rows, _ in halved], axis=1)
        matrices = jnp.concatenate([matrices for _, matrices in halved], axis=2)
        return _product((rows,), (matrices,), group_sizes, 1, dtype, tiles, num_sms, clears)[0]
    (out,) = _product(lhs, rhs, group_sizes, 1, dtype, tiles, num_sms, clears)
    return out


def _in_halves(lhs: jax.Array, rhs: jax.Array, contract: int) -> tuple[jax.Array, jax.Array]:
    """bfloat16 operands with three times the inner channels, for a product of float32 ones.

    Three products of halves, each rounded to bfloat16: the sum is as exact as XLA's "bf16_3x".
    """
    high, low = halves(lhs)
    rhs_high, rhs_low = halves(rhs)
    return (
        jnp.concatenate([high, high, low], axis=1),
        jnp.concatenate([rhs_high, rhs_low, rhs_high], axis=1 + contract),
    )


def _product(
    lhs: tuple[jax.Array, ...],
    rhs: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    contract: int,
    dtype: Any,
    tiles: Tiles | None,
    num_sms: int | None,
    clears: bool,
) -> tuple[jax.Array, ...]:
    """One result of a product or of a sum of products, or one for each of two matrices."""
    (rows, inner), outer = lhs[0].shape, rhs[0].shape[2 - contract]
    results = len(rhs) - len(lhs) + 1
    tiles = tiles or tiles_by_matrices(dtype, inner, outer, terms=len(lhs), results=results)
    lhs = tuple(map(pad_rows, lhs))
    table = tile_table(group_sizes, len(lhs[0]), tiles.m, with_unused=clears)
    kernel = _Kernel(
        contract, inner, outer, len(table[0]), len(lhs), results, lhs[0].dtype, dtype, tiles
    )
    outs = (jax.ShapeDtypeStruct((len(lhs[0]), outer), dtype),) * results
    found = launch(kernel, *table, *lhs, *rhs, outs=outs, num_sms=num_sms)
    return tuple(out[:rows] for out in found)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of the results, as scalars on the GPU: an entry of the table of tiles, and columns.

    Attributes:
        begin: The row that it begins at.
        first: Its first row, from there.
        end: The row from there that follows its last one.
        column: Which block of ``Tiles.n`` columns it has.
    """

    begin: Any
    first: Any
    end: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class _Out:
    """What a warpgroup writes to.

    Attributes:
        gmem: The results.
        smem: Slots for parts on their way to a result.
        warpgroup: Which warpgroup it is.
    """

    gmem: Any
    smem: Any
    warpgroup: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for operands of one kind.

    Attributes:
        contract: The axis of the matrices that is summed.
        inner: Channels that are summed.
        outer: Columns of the results.
        num_tiles: Entries of the table of tiles.
        terms: Products that are added up, each of rows and matrices of its own.
        results: Matrices of each group that the same rows are multiplied with.
        operand_dtype: The dtype of rows and matrices.
        dtype: The dtype of the results.
        tiles: How the work is cut.
    """

    contract: int
    inner: int
    outer: int
    num_tiles: int
    terms: int
    results: int
    operand_dtype: Any
    dtype: Any
    tiles: Tiles

    def body(self, group_of, begin_of, first_of, end_of, *arrays):
        """What each block of the GPU runs: tile after tile."""
        tiles, pipeline = self.tiles, self._pipeline()
        lhs, rhs = arrays[: self.terms], arrays[self.terms : -self.results]
        warpgroup = lax.axis_index("wg")
        grid = (self.num_tiles, self.outer // tiles.n)

        def run(allocations, out_smem):
            out = _Out(arrays[-self.results :], out_smem, warpgroup)

            def sum_of(number):
                index, column = plgpu.planar_snake(number, grid, 1, tiles.width)
                group = group_of[index]
                begin = pl.multiple_of(begin_of[index], STEP)
                first, end = first_of[index] - begin, end_of[index] - begin
                write = functools.partial(self._write, _Tile(begin, first, end, column), out)

                @pl.when((end > first) & (group < 0) & (warpgroup < 2))
                def _nothing():
                    write_zeros(write, self.dtype)

                def operands(step):
                    inner = pl.ds(step * tiles.k, tiles.k)
                    outer = pl.ds(column * tiles.n, tiles.n)
                    at = (outer, inner) if self.contract else (inner, outer)
                    return [
                        *(rows.at[pl.ds(begin, tiles.m), inner] for rows in lhs),
                        *(matrices.at[group].at[at] for matrices in rhs),
                    ]

                return Sum(
                    exists=(end > first) & (group >= 0),
                    steps=self.inner // tiles.k,
                    operands=operands,
                    multiply=functools.partial(self._multiply, warpgroup),
                    write=write,
                )

            pipeline.run(grid[0] * grid[1], sum_of, **allocations)

        pl.run_scoped(
            run,
            allocations=pipeline.allocations(),
            out_smem=memory_of_parts(self._slots, self.dtype),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _pipeline(self) -> Pipeline:
        """The sums over the inner channels."""
        tiles = self.tiles
        matrix = (tiles.n, tiles.k) if self.contract else (tiles.k, tiles.n)
        blocks = [(tiles.m, tiles.k)] * self.terms + [matrix] * (self.terms + self.results - 1)
        return Pipeline(blocks, self.operand_dtype, self.dtype, tiles, self.results)

    def _multiply(self, warpgroup, _, *blocks_and_sums):
        """Multiply blocks, for this warpgroup's share of the tile."""
        *blocks, sums = blocks_and_sums
        first_row, first_column = share(self.tiles, warpgroup)
        columns = pl.ds(first_column, self.tiles.columns)
        lhs, rhs = blocks[: self.terms], blocks[self.terms :]
        for i, matrix in enumerate(rhs):
            rows, total = lhs[i % self.terms], sums[i % self.results]
            if self.tiles.split == "rows":
                rows = rows.at[pl.ds(first_row, self.tiles.rows)]
                mine = matrix.transpose((1, 0)) if self.contract else matrix
            else:
                mine = (
                    matrix.at[columns].transpose((1, 0)) if self.contract else matrix.at[:, columns]
                )
            plgpu.wgmma(total, rows, mine)

    def _write(self, tile: _Tile, out: _Out, value_of: ValueOf) -> None:
        """Write the rows that are the tile's."""
        first_row, first_column = share(self.tiles, out.warpgroup)
        for index, (i, result, j) in enumerate(parts(self.tiles, self.results)):
            value = value_of(result, slice(i, i + PART), slice(j, j + PART))
            columns = pl.ds(tile.column * self.tiles.n + first_column + j, PART)
            of = out.gmem[result].at[:, columns]
            self._write_part(tile, out, of, first_row + i, index % self._slots, value)

    def _write_part(self, tile: _Tile, out: _Out, gmem: Any, i: Any, slot: int, value: Any) -> None:
        """Write the tile's own rows of ``value``, the part that begins at row i of the tile."""
        first = jnp.clip(tile.first - i, 0, PART)
        end = jnp.clip(tile.end - i, 0, PART)
        rows = pl.ds(pl.multiple_of(tile.begin + i, STEP), PART)

        @pl.when(end - first == PART)
        def _all():
            plgpu.wait_smem_to_gmem(self._slots - 1, wait_read_only=True)
            out.smem[out.warpgroup, slot] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.smem.at[out.warpgroup, slot], gmem.at[rows])

        @pl.when((end > first) & (end - first < PART))
        def _some():
            write_rows(gmem.at[rows], value, first, end)

    @property
    def _slots(self) -> int:
        # Parts of the same rows take the slots in turn and begin with the first slot, because the
        # parts of other rows may be left out.
        of_a_row = self.results * self.tiles.columns // PART
        return self.tiles.slots if of_a_row % self.tiles.slots == 0 else 1
