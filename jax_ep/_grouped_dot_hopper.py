"""Grouped matmuls as kernels for Hopper GPUs, in Pallas's Mosaic GPU dialect.

Both kernels are persistent: one block a streaming multiprocessor, in which one warpgroup loads tiles
and two multiply, as in JAX's own matmul for Hopper (``hopper_matmul_mgpu``), whose pipeline they use.
What they add is the schedule: a table, made by XLA from the group sizes, says for each tile of rows
which group it belongs to. So rows past the last group cost nothing but the zeros that are written
there.

Rows of a tile that belong to two groups are computed once for each, and each writes its own.

This is the only module that knows Pallas, whose GPU interface is experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jax_ep import _compat, _numerics

plgpu: Any = mosaic_gpu  # experimental, and its annotations do not hold

_EPILOGUE = 64  # rows and columns that a warpgroup writes at a time
_MEMORY_REGISTERS = 40  # of the warpgroup that loads, as in JAX's matmul
_ROW_MULTIPLE = 8  # rows of a tile in shared memory


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work.

    Attributes:
        m: Rows of the result that a block computes at a time.
        n: Columns of the result, of both warpgroups together.
        k: Channels or rows that are summed at a time.
        steps: Loads that are under way.
        lag: Multiplications that are still under way when the next one begins.
        slots: Parts of the result that a warpgroup has on their way out (product with matrices).
        width: Tiles of columns (rows, for the gradient of the matrices) that blocks walk over before
            they turn to the next rows, for the sake of the L2 cache.
    """

    m: int = 128
    n: int = 256
    k: int = 128
    steps: int = 2
    lag: int = 0
    slots: int = 1
    width: int = 8

    def for_columns(self, columns: int) -> Tiles:
        """These, if they divide the columns, else with the least number of columns there is."""
        return self if columns % self.n == 0 else dataclasses.replace(self, n=128)


def _default_tiles(dtype: Any, *, by_matrices: bool) -> Tiles:
    """What was the fastest of what fits shared memory together with the results on their way out."""
    if dtype == jnp.float32:
        return Tiles(k=64, steps=3)
    return Tiles(k=64, steps=3, slots=2) if by_matrices else Tiles()


def why_not(dtype: Any, rows: int, inner: int, outer: int) -> str | None:
    """Why the kernels cannot multiply ``[rows, inner]`` with ``[groups, inner, outer]``, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"there are none for {dtype}"
    if inner % 128 or outer % 128:
        return f"they need multiples of 128 channels, not {inner} and {outer}"
    if rows == 0:
        return "there are no rows"
    return None


# Traced and lowered, which takes Pallas a second, once for each shape in a program, not once a call.
@functools.partial(jax.jit, static_argnames=("contract", "tiles"))
def rows_by_matrices(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    contract: int,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Each row times its group's matrix; ``contract`` is the axis of the matrix that is summed.

    Args:
        lhs: ``[rows, inner]``.
        rhs: ``[groups, a, b]``.
        group_sizes: ``[groups]`` int32.
        contract: 0 or 1: which of a and b is inner.
        tiles: How to cut the work; None picks by shape.

    Returns:
        ``[rows, outer]`` in the dtype of ``lhs``; zeros past the last group.
    """
    if lhs.dtype == jnp.float32:
        # Three products of halves, each rounded to bfloat16: the sum is as exact as XLA's "bf16_3x".
        high, low = _halves(lhs)
        rhs_high, rhs_low = _halves(rhs)
        return _rows_by_matrices(
            jnp.concatenate([high, high, low], axis=1),
            jnp.concatenate([rhs_high, rhs_low, rhs_high], axis=1 + contract),
            group_sizes,
            contract,
            jnp.float32,
            tiles,
        )
    return _rows_by_matrices(lhs, rhs, group_sizes, contract, lhs.dtype, tiles)


@functools.partial(jax.jit, static_argnames=("tiles",))
def rows_by_rows(
    lhs: jax.Array, d_out: jax.Array, group_sizes: jax.Array, *, tiles: Tiles | None = None
) -> jax.Array:
    """``lhs.T @ d_out`` over the rows of each group.

    Args:
        lhs: ``[rows, inner]``.
        d_out: ``[rows, outer]``.
        group_sizes: ``[groups]`` int32.
        tiles: How to cut the work; None picks by shape.

    Returns:
        ``[groups, inner, outer]`` in the dtype of ``lhs``; zeros for empty groups.
    """
    product = functools.partial(_rows_by_rows, group_sizes=group_sizes, tiles=tiles)
    if lhs.dtype == jnp.float32:
        high, low = _halves(lhs)
        d_high, d_low = _halves(d_out)
        dtype = jnp.float32
        small = product(high, d_low, dtype=dtype) + product(low, d_high, dtype=dtype)
        return small + product(high, d_high, dtype=dtype)
    return product(lhs, d_out, dtype=lhs.dtype)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x`` as the sum of two bfloat16 arrays, up to 2⁻¹⁶ of it."""
    high = _numerics.round_to(x, jnp.bfloat16)  # a pair of casts XLA would drop
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _tile_table(group_sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, ...]:
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


def _transforms(tile_k: int, dtype: Any) -> tuple[Any, ...]:
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(tile_k * width * 8)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)


def _launch(body: Any, out: Any, *operands: jax.Array) -> jax.Array:
    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=(_compat.num_multiprocessors(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # Pallas loses track of the mesh axes that its operands vary over.
    axes = frozenset[str]().union(*map(_compat.varying_axes, operands))
    return _compat.cast_varying(kernel(*operands), axes)


def _rows_by_matrices(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    contract: int,
    dtype: Any,
    tiles: Tiles | None,
) -> jax.Array:
    rows, inner = lhs.shape
    outer = rhs.shape[2 - contract]
    tiles = (tiles or _default_tiles(dtype, by_matrices=True)).for_columns(outer)
    padded = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    lhs = jnp.pad(lhs, ((0, padded - rows), (0, 0)))
    table = _tile_table(group_sizes, padded, tiles.m)
    num_tiles = table[0].shape[0]
    half = tiles.n // 2  # columns of one warpgroup
    # Parts of one row block take the slots in turn, beginning with the first: blocks may be left out.
    slots = tiles.slots if half // _EPILOGUE % tiles.slots == 0 else 1
    transforms = _transforms(tiles.k, lhs.dtype)

    def body(group_of, block_of, first_of, end_of, lhs_gmem, rhs_gmem, out_gmem):
        warpgroup = lax.axis_index("wg")
        columns = pl.ds(warpgroup * half, half)

        def pipeline(multiply, context):
            matrix_block = (tiles.n, tiles.k) if contract else (tiles.k, tiles.n)
            return plgpu.emit_pipeline_warp_specialized(
                multiply,
                grid=(inner // tiles.k,),
                memory_registers=_MEMORY_REGISTERS,
                in_specs=[
                    plgpu.BlockSpec(
                        (tiles.m, tiles.k),
                        lambda k: (0, k),
                        transforms=transforms,
                        memory_space=plgpu.SMEM,
                        delay_release=tiles.lag,
                    ),
                    plgpu.BlockSpec(
                        matrix_block,
                        (lambda k: (0, k)) if contract else (lambda k: (k, 0)),
                        transforms=_transforms(matrix_block[1], lhs.dtype),
                        memory_space=plgpu.SMEM,
                        delay_release=tiles.lag,
                    ),
                ],
                wg_axis="wg",
                num_compute_wgs=2,
                max_concurrent_steps=tiles.steps,
                compute_context=context,
            )

        def ignore(*_, **__):
            return None

        def run(allocations, out_smem, part_smem):
            @plgpu.nd_loop((num_tiles * (outer // tiles.n),), collective_axes="sm")
            def _tile(loop_info: plgpu.NDLoopInfo):
                row_tile, column_tile = plgpu.planar_snake(
                    loop_info.index[0], (num_tiles, outer // tiles.n), 1, tiles.width
                )
                group = group_of[row_tile]
                block = block_of[row_tile]
                first = first_of[row_tile] - block * tiles.m
                end = end_of[row_tile] - block * tiles.m

                def write(value_of):
                    """Write the rows that are this tile's, from ``value_of(rows, columns)``."""
                    for part, (i, j) in enumerate(
                        itertools.product(range(0, tiles.m, _EPILOGUE), range(0, half, _EPILOGUE))
                    ):
                        slot = part % slots
                        value = value_of(slice(i, i + _EPILOGUE), slice(j, j + _EPILOGUE))
                        at = pl.ds(column_tile * tiles.n + warpgroup * half + j, _EPILOGUE)
                        low = jnp.clip(first - i, 0, _EPILOGUE)
                        count = jnp.clip(end - i, 0, _EPILOGUE) - low

                        @pl.when(count == _EPILOGUE)
                        def _whole(value=value, at=at, i=i, slot=slot):
                            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                            out_smem[warpgroup, slot] = value
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(
                                out_smem.at[warpgroup, slot],
                                out_gmem.at[pl.ds(block * tiles.m + i, _EPILOGUE), at],
                            )

                        @pl.when((count > 0) & (count < _EPILOGUE))
                        def _part(value=value, at=at, i=i, low=low, count=count):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            part_smem[warpgroup] = value
                            plgpu.commit_smem()
                            # A copy has a fixed number of rows: one for each bit of the count.
                            done = low
                            length = _EPILOGUE // 2
                            while length:

                                @pl.when(count & length != 0)
                                def _copy(done=done, length=length):
                                    plgpu.copy_smem_to_gmem(
                                        part_smem.at[warpgroup].at[pl.ds(done, length)],
                                        out_gmem.at[pl.ds(block * tiles.m + i + done, length), at],
                                    )

                                done = done + (count & length)
                                length //= 2
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when((end > first) & (group >= 0))
                def _product():
                    def context(evaluate):
                        def scope(acc_ref):
                            evaluate(acc_ref)
                            acc = acc_ref[...].astype(dtype)
                            write(lambda r, c: acc[r, c])

                        pl.run_scoped(scope, acc_ref=plgpu.ACC((tiles.m, half), jnp.float32))

                    def multiply(_, lhs_smem, rhs_smem, acc_ref):
                        matrix = (
                            rhs_smem.at[columns].transpose((1, 0))
                            if contract
                            else rhs_smem.at[:, columns]
                        )
                        plgpu.wgmma(acc_ref, lhs_smem, matrix)
                        plgpu.wgmma_wait(tiles.lag)
                        return acc_ref

                    matrix_gmem = rhs_gmem.at[group]
                    at = pl.ds(column_tile * tiles.n, tiles.n)
                    pipeline(multiply, context)(
                        lhs_gmem.at[pl.ds(block * tiles.m, tiles.m), :],
                        matrix_gmem.at[at, :] if contract else matrix_gmem.at[:, at],
                        allocations=allocations,
                    )

                @pl.when((end > first) & (group < 0) & (warpgroup < 2))
                def _nothing():
                    zeros = plgpu.layout_cast(
                        jnp.zeros((_EPILOGUE, _EPILOGUE), dtype), plgpu.Layout.WGMMA
                    )
                    write(lambda r, c: zeros)

        pl.run_scoped(
            run,
            allocations=pipeline(ignore, ignore).get_allocations(lhs_gmem, rhs_gmem.at[0]),
            out_smem=plgpu.SMEM(
                (2, slots, _EPILOGUE, _EPILOGUE),
                dtype,
                transforms=_transforms(_EPILOGUE, dtype),
            ),
            part_smem=plgpu.SMEM((2, _EPILOGUE, _EPILOGUE), dtype),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = jax.ShapeDtypeStruct((padded, outer), dtype)
    out = _launch(body, out_type, *table, lhs, rhs)
    return out[:rows]


def _rows_by_rows(
    lhs: jax.Array, d_out: jax.Array, *, group_sizes: jax.Array, dtype: Any, tiles: Tiles | None
) -> jax.Array:
    (rows, inner), outer, groups = lhs.shape, d_out.shape[1], group_sizes.shape[0]
    tiles = (tiles or _default_tiles(dtype, by_matrices=False)).for_columns(outer)
    padded = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    lhs = jnp.pad(lhs, ((0, padded - rows), (0, 0)))
    d_out = jnp.pad(d_out, ((0, padded - rows), (0, 0)))
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    starts = ends - group_sizes.astype(jnp.int32)
    half = tiles.n // 2

    def body(start_of, end_of, lhs_gmem, d_out_gmem, out_gmem):
        warpgroup = lax.axis_index("wg")
        columns = pl.ds(warpgroup * half, half)

        def pipeline(multiply, context, steps):
            return plgpu.emit_pipeline_warp_specialized(
                multiply,
                grid=(steps,),
                memory_registers=_MEMORY_REGISTERS,
                in_specs=[
                    plgpu.BlockSpec(
                        (tiles.k, width),
                        lambda k: (k, 0),
                        transforms=_transforms(width, lhs.dtype),
                        memory_space=plgpu.SMEM,
                        delay_release=tiles.lag,
                    )
                    for width in (tiles.m, tiles.n)
                ],
                wg_axis="wg",
                num_compute_wgs=2,
                max_concurrent_steps=tiles.steps,
                compute_context=context,
            )

        def ignore(*_, **__):
            return None

        def run(allocations, out_smem):
            row_tiles, column_tiles = inner // tiles.m, outer // tiles.n

            @plgpu.nd_loop((groups * row_tiles * column_tiles,), collective_axes="sm")
            def _tile(loop_info: plgpu.NDLoopInfo):
                index = loop_info.index[0]
                group = lax.div(index, row_tiles * column_tiles)
                row_tile, column_tile = plgpu.planar_snake(
                    lax.rem(index, row_tiles * column_tiles),
                    (row_tiles, column_tiles),
                    0,
                    tiles.width,
                )
                start, end = start_of[group], end_of[group]
                first_block = lax.div(start, tiles.k)
                steps = lax.div(end + tiles.k - 1, tiles.k) - first_block

                def write(value_of):
                    for slot, (i, j) in enumerate(
                        (i, j)
                        for i in range(0, tiles.m, _EPILOGUE)
                        for j in range(0, half, _EPILOGUE)
                    ):
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        out_smem[warpgroup, slot % 2] = value_of(
                            slice(i, i + _EPILOGUE), slice(j, j + _EPILOGUE)
                        )
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            out_smem.at[warpgroup, slot % 2],
                            out_gmem.at[
                                group,
                                pl.ds(row_tile * tiles.m + i, _EPILOGUE),
                                pl.ds(column_tile * tiles.n + warpgroup * half + j, _EPILOGUE),
                            ],
                        )

                @pl.when(end > start)
                def _product():
                    def context(evaluate):
                        def scope(acc_ref):
                            evaluate(acc_ref)
                            acc = acc_ref[...].astype(dtype)
                            write(lambda r, c: acc[r, c])

                        pl.run_scoped(scope, acc_ref=plgpu.ACC((tiles.m, half), jnp.float32))

                    def multiply(indices, lhs_smem, d_out_smem, acc_ref):
                        begin = (first_block + indices[0]) * tiles.k
                        mine = d_out_smem.at[:, columns]

                        # Blocks at the ends of a group have rows of others, whatever they hold. Both
                        # warpgroups write the same zeros.
                        @pl.when((begin < start) | (begin + tiles.k > end))
                        def _mask():
                            for smem in (lhs_smem, mine):
                                row = begin + plgpu.layout_cast(
                                    lax.broadcasted_iota(jnp.int32, smem.shape, 0),
                                    plgpu.Layout.WGMMA,
                                )
                                value = smem[...]
                                smem[...] = jnp.where(
                                    (row >= start) & (row < end), value, jnp.zeros_like(value)
                                )
                            plgpu.commit_smem()

                        plgpu.wgmma(acc_ref, lhs_smem.transpose((1, 0)), mine)
                        plgpu.wgmma_wait(tiles.lag)
                        return acc_ref

                    # It may reach past the last row; blocks there are never loaded.
                    at = pl.ds(pl.multiple_of(first_block * tiles.k, tiles.k), padded)
                    pipeline(multiply, context, steps)(
                        lhs_gmem.at[at, pl.ds(row_tile * tiles.m, tiles.m)],
                        d_out_gmem.at[at, pl.ds(column_tile * tiles.n, tiles.n)],
                        allocations=allocations,
                    )

                @pl.when((end == start) & (warpgroup < 2))
                def _nothing():
                    zeros = plgpu.layout_cast(
                        jnp.zeros((_EPILOGUE, _EPILOGUE), dtype), plgpu.Layout.WGMMA
                    )
                    write(lambda r, c: zeros)

        pl.run_scoped(
            run,
            allocations=pipeline(ignore, ignore, padded // tiles.k + 2).get_allocations(
                lhs_gmem, d_out_gmem
            ),
            out_smem=plgpu.SMEM(
                (2, 2, _EPILOGUE, _EPILOGUE), dtype, transforms=_transforms(_EPILOGUE, dtype)
            ),
            collective_axes="wg",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = jax.ShapeDtypeStruct((groups, inner, outer), dtype)
    return _launch(body, out_type, starts, ends, lhs, d_out)
