"""The inside of both kernels: sums over the steps of a pipeline, and parts of the result.

A block of the GPU has three warpgroups: one loads, and the first two multiply, each for half of the
columns of a tile.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jax_ep._grouped_dot.hopper.tiles import Tiles

plgpu: Any = mosaic_gpu  # experimental, and its annotations are not reliable

PART = 64  # rows and columns of the result that a warpgroup writes at a time
_MEMORY_REGISTERS = 40  # of the warpgroup that loads, as in JAX's matmul

# Writes what it gets for the rows and columns of each part of a tile.
Write = Callable[[Callable[[slice, slice], Any]], None]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A sum over steps, in each of which one warpgroup loads blocks that the others multiply.

    Attributes:
        steps: Number of steps, which may be known to the GPU only.
        loads: For each operand a result of ``load``, which says what is loaded.
        dtype: The dtype of the result.
        tiles: How the work is cut.
    """

    steps: Any
    loads: list[Any]
    dtype: Any
    tiles: Tiles

    def allocations(self, *operands: Any) -> Any:
        """The shared memory that it takes; one allocation serves a block for all its sums."""

        def ignore(*_, **__):
            return None

        return self._emit(ignore, ignore).get_allocations(*operands)

    def sum(self, multiply: Any, *operands: Any, allocations: Any, write: Write) -> None:
        """Sum in float32, and write the sum in the dtype of the result.

        Args:
            multiply: Adds to the sum: ``(indices of the step, *blocks, sum) -> sum``.
            operands: Arrays in global memory.
            allocations: A result of ``allocations``.
            write: A function that the warpgroups that multiply call.
        """

        def context(evaluate):
            def scope(acc_ref):
                evaluate(acc_ref)
                acc = acc_ref[...].astype(self.dtype)
                write(lambda rows, columns: acc[rows, columns])

            pl.run_scoped(scope, acc_ref=plgpu.ACC((self.tiles.m, self.tiles.half), jnp.float32))

        self._emit(multiply, context)(*operands, allocations=allocations)

    def _emit(self, multiply: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(self.steps,),
            memory_registers=_MEMORY_REGISTERS,
            in_specs=self.loads,
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=self.tiles.steps,
            compute_context=context,
        )


def load(shape: tuple[int, int], index: Callable[..., Any], dtype: Any, tiles: Tiles) -> Any:
    """Blocks of an operand that a pipeline loads: their shape and, from the step, their index."""
    return plgpu.BlockSpec(
        shape,
        index,
        transforms=_transforms(shape[1], dtype),
        memory_space=plgpu.SMEM,
        delay_release=tiles.lag,
    )


def write_zeros(write: Write, dtype: Any) -> None:
    """Write zeros, where there is nothing to sum."""
    zeros = plgpu.layout_cast(jnp.zeros((PART, PART), dtype), plgpu.Layout.WGMMA)
    write(lambda rows, columns: zeros)


def parts(tiles: Tiles) -> Iterator[tuple[int, int]]:
    """First row and column of each part that a warpgroup writes of a tile."""
    return itertools.product(range(0, tiles.m, PART), range(0, tiles.half, PART))


def memory_of_parts(slots: int, dtype: Any) -> Any:
    """Shared memory for parts on their way out, ``slots`` of them for each warpgroup that writes."""
    return plgpu.SMEM((2, slots, PART, PART), dtype, transforms=_transforms(PART, dtype))


def _transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory of a block with that many columns."""
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * width * 8)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)
