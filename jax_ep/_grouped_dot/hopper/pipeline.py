"""The inside of the kernels: sums over the steps of a pipeline, and parts of the results.

A block of the GPU has three warpgroups: one loads, and the first two multiply, each for half of the
rows or columns of a tile (``Tiles.split``). The slots of shared memory go round through all steps of
all tiles of the block, so the next tile's operands arrive while this one's result is written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jax_ep._grouped_dot.hopper.tiles import Tiles

plgpu: Any = mosaic_gpu  # experimental, and its annotations are not reliable

PART = 64  # rows and columns of the result that a warpgroup writes at a time
# Registers of a thread, of the 512 that the threads of three warpgroups with one number have together.
_REGISTERS_TO_LOAD, _REGISTERS_TO_MULTIPLY = 40, 232

# Gives the value of a part of what a warpgroup has: of which result, which rows and columns.
ValueOf = Callable[[int, slice, slice], Any]
Write = Callable[[ValueOf], None]


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sums of one tile. Scalars of the GPU, and functions that run there.

    Attributes:
        exists: Whether there is anything to sum.
        steps: Number of steps.
        operands: The parts of the operands that a step loads: ``step -> arrays in global memory``.
        multiply: Adds to the sums: ``(step, *blocks in shared memory, sums)``.
        write: Writes the sums, in the dtype of the results.
    """

    exists: Any
    steps: Any
    operands: Callable[[Any], Sequence[Any]]
    multiply: Callable[..., None]
    write: Write


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Sums over steps, in each of which one warpgroup loads blocks that the others multiply.

    Attributes:
        blocks: The shape of each operand's block.
        operand_dtype: The dtype of the operands.
        dtype: The dtype of the results.
        tiles: How the work is cut.
        results: Number of sums, all of one shape.
    """

    blocks: Sequence[tuple[int, int]]
    operand_dtype: Any
    dtype: Any
    tiles: Tiles
    results: int = 1

    def allocations(self) -> dict[str, Any]:
        """The shared memory that it takes."""
        steps = self.tiles.steps
        slots = [
            plgpu.SMEM(
                (steps, *shape),
                self.operand_dtype,
                transforms=transforms(shape[1], self.operand_dtype),
            )
            for shape in self.blocks
        ]
        return {
            "slots": slots,
            "filled": plgpu.Barrier(num_arrivals=len(slots), num_barriers=steps),
            "free": plgpu.Barrier(num_arrivals=2, num_barriers=steps),
        }

    def run(self, tiles: int, sum_of: Callable[[Any], Sum], *, slots: Any, filled: Any, free: Any):
        """Work on all tiles that are this block's, of so many; ``sum_of`` says what a tile is."""

        def for_each_tile(work: Callable[[Sum, Any], None]) -> None:
            @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
            def _loop(loop_info: Any, carry: Any) -> Any:
                """The carry counts the steps of the tiles before."""
                tile = sum_of(loop_info.index[0])

                @pl.when(tile.exists)
                def _work():
                    work(tile, carry)

                return carry + jnp.where(tile.exists, tile.steps, 0)

        def load(tile: Sum, before: Any) -> None:
            @pl.loop(0, tile.steps)
            def _step(step):
                slot = lax.rem(before + step, self.tiles.steps)
                plgpu.barrier_wait(free.at[slot])
                for array, smem in zip(tile.operands(step), slots, strict=True):
                    plgpu.copy_gmem_to_smem(array, smem.at[slot], filled.at[slot])

        def multiply(tile: Sum, before: Any) -> None:
            def scope(*sums):
                def step_of(step, sums):
                    slot = lax.rem(before + step, self.tiles.steps)
                    plgpu.barrier_wait(filled.at[slot])
                    tile.multiply(step, *(smem.at[slot] for smem in slots), sums)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])
                    return sums

                lax.fori_loop(0, tile.steps, step_of, sums)
                values = [total[...].astype(self.dtype) for total in sums]
                tile.write(lambda result, rows, columns: values[result][rows, columns])

            share = plgpu.ACC((self.tiles.rows, self.tiles.columns), jnp.float32)
            pl.run_scoped(scope, *[share] * self.results)

        def loads() -> None:
            plgpu.set_max_registers(_REGISTERS_TO_LOAD, action="decrease")
            for_each_tile(load)

        def multiplies() -> None:
            plgpu.set_max_registers(_REGISTERS_TO_MULTIPLY, action="increase")
            for slot in range(self.tiles.steps):
                plgpu.barrier_arrive(free.at[slot])
            for_each_tile(multiply)

        lax.cond(lax.axis_index("wg") == 2, loads, multiplies)


def write_zeros(write: Write, dtype: Any) -> None:
    """Write zeros, where there is nothing to sum."""
    zeros = plgpu.layout_cast(jnp.zeros((PART, PART), dtype), plgpu.Layout.WGMMA)
    write(lambda result, rows, columns: zeros)


def parts(tiles: Tiles, results: int) -> Iterator[tuple[int, int, int]]:
    """First row, result and first column of each part that a warpgroup writes of its share."""
    return itertools.product(
        range(0, tiles.rows, PART), range(results), range(0, tiles.columns, PART)
    )


def share(tiles: Tiles, warpgroup: Any) -> tuple[Any, Any]:
    """First row and column of a tile that are this warpgroup's."""
    if tiles.split == "rows":
        return warpgroup * tiles.rows, 0
    return 0, warpgroup * tiles.columns


def memory_of_parts(slots: int, dtype: Any) -> Any:
    """Shared memory for parts on their way out, ``slots`` of them for each warpgroup that writes."""
    return plgpu.SMEM((2, slots, PART, PART), dtype, transforms=transforms(PART, dtype))


def transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory of a block with that many columns."""
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * width * 8)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)
