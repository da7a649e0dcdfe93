"""The edges of groups, where a tile has rows of other groups too.

Copies by the memory engine (TMA) move whole tiles. Here the threads of a warpgroup do it, row by row:
write only the rows of a tile that are a group's, and replace those that are not by zeros.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu
from jax.extend.mlir.dialects import arith as arith_dialect
from jax.extend.mlir.dialects import scf as scf_dialect
from jax.extend.mlir.dialects import vector as vector_dialect
from jax.interpreters import mlir

from jax_ep._grouped_dot.hopper.pipeline import plgpu, transforms

mgpu: Any = gpu  # experimental, and its annotations are not reliable
ir: Any = mlir.ir
arith: Any = arith_dialect  # their annotations describe other signatures
scf: Any = scf_dialect
vector: Any = vector_dialect

_THREADS = 128  # of a warpgroup
_BYTES = 16  # that a thread writes at once


def write_rows(gmem: Any, value: Any, first: Any, end: Any) -> None:
    """Write rows ``first`` to ``end`` of ``value`` to those of ``gmem``; both have the same shape.

    Every thread writes what it holds, so nobody waits for anything.
    """
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, scalar, scalar))
    def write(_, gmem, value, first, end):
        first, end = map(_index, (first, end))
        places = value.layout.thread_idxs(value.shape)
        for at, (row, column) in zip(np.ndindex(value.registers.shape), places, strict=True):
            with mgpu.when(_is_within(row, first, end)):
                vector.store(value.registers[at], gmem, [row, column])

    write(gmem, value, first, end)


def clear_other_rows(smem: Any, first: Any, end: Any) -> None:
    """Write zeros to all rows of a block in shared memory but ``first`` to ``end``.

    The block has the layout of ``pipeline.load``: tiles of 8 rows of 128 bytes. Swizzling moves bytes
    within a row, so whole rows can be cleared without knowing how.
    """
    scalar = plgpu.Layout.WG_SPLAT
    rows, columns = smem.shape
    dtype = jnp.dtype(smem.dtype)
    layout = plgpu.RefType(transforms=transforms(columns, dtype))

    @plgpu.inline_mgpu(arg_types=(layout, scalar, scalar))
    def clear(_, smem, first, end):
        first, end = map(_index, (first, end))
        index, (row_tiles, column_tiles, tile_rows, tile_columns) = (
            ir.IndexType.get(),
            smem.type.shape,
        )
        assert (row_tiles * tile_rows, column_tiles * tile_columns) == (rows, columns)
        width = _BYTES // dtype.itemsize
        of_a_row = columns // width
        of_a_tile = tile_columns // width
        kind = ir.VectorType.get((width,), smem.type.element_type)
        zero = ir.FloatAttr.get(smem.type.element_type, 0)
        zeros = arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero))
        thread = arith.remui(arith.index_cast(index, mgpu.thread_idx()), _constant(_THREADS))

        def clear_rows(begin: Any, stop: Any) -> None:
            bounds = (arith.muli(x, _constant(of_a_row)) for x in (begin, stop))
            low, high = bounds
            loop = scf.ForOp(arith.addi(low, thread), high, _constant(_THREADS))
            with ir.InsertionPoint(loop.body):
                row, place = _divided(loop.induction_variable, of_a_row)
                row_tile, row = _divided(row, tile_rows)
                column_tile, chunk = _divided(place, of_a_tile)
                column = arith.muli(chunk, _constant(width))
                vector.store(zeros, smem, [row_tile, column_tile, row, column])
                scf.yield_([])

        clear_rows(_constant(0), first)
        clear_rows(end, _constant(rows))

    clear(smem, first, end)


def _is_within(row: Any, first: Any, end: Any) -> Any:
    less, not_less = arith.CmpIPredicate.slt, arith.CmpIPredicate.sge
    return arith.andi(arith.cmpi(not_less, row, first), arith.cmpi(less, row, end))


def _index(scalar: Any) -> Any:
    """The value of a scalar as an MLIR index."""
    return arith.index_cast(ir.IndexType.get(), scalar.registers.item())


def _constant(value: int) -> Any:
    return mgpu.c(value, ir.IndexType.get())


def _divided(value: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder."""
    return arith.divui(value, _constant(by)), arith.remui(value, _constant(by))
