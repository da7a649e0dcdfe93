"""Which operands the kernels take, and how they divide the work."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        m: Rows of the result that a block computes at a time.
        n: Columns of the result, of both warpgroups together.
        k: Channels or rows that are summed at a time.
        steps: Loads in flight.
        lag: Multiplications that are still in flight when the next one begins.
        slots: Parts of the result that a warpgroup has on their way out (product with matrices).
        width: Tiles of columns (for the gradient of the matrices: of rows) that blocks walk over
            before they go on to the next rows. It keeps operands in the L2 cache.
    """

    m: int = 128
    n: int = 256
    k: int = 128
    steps: int = 2
    lag: int = 0
    slots: int = 1
    width: int = 8

    @property
    def half(self) -> int:
        """Columns of the result of one warpgroup."""
        return self.n // 2

    def for_columns(self, columns: int) -> Tiles:
        """These tiles if they divide the columns, else with the fewest columns of any tiles."""
        return self if columns % self.n == 0 else dataclasses.replace(self, n=128)


def default_tiles(dtype: Any, *, by_matrices: bool) -> Tiles:
    """The fastest tiles, as measured, that fit shared memory with the results on their way out."""
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
