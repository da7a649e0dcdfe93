"""Which operands the kernels take, and how they divide the work."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        m: Rows of each result that a block computes at a time.
        n: Columns of each result.
        k: Channels or rows that are summed at a time.
        steps: Loads in flight.
        slots: Parts of the result that a warpgroup has on their way out (product with matrices).
        width: Tiles of columns (for the gradient of the matrices: of rows) that blocks walk over
            before they go on to the next rows. It keeps operands in the L2 cache.
        split: What the two warpgroups that multiply divide between them.
    """

    m: int = 128
    n: int = 256
    k: int = 128
    steps: int = 2
    slots: int = 1
    width: int = 8
    split: Literal["rows", "columns"] = "columns"

    @property
    def rows(self) -> int:
        """Rows of each result of one warpgroup."""
        return self.m // 2 if self.split == "rows" else self.m

    @property
    def columns(self) -> int:
        """Columns of each result of one warpgroup."""
        return self.n // 2 if self.split == "columns" else self.n


# Channels up to which a product with matrices is so short that few loads of many channels are best.
_SHORT = 512


def tiles_by_matrices(
    dtype: Any, inner: int, outer: int, *, terms: int = 1, results: int = 1
) -> Tiles:
    """The fastest tiles, as measured on an H200, for rows by matrices.

    With the results on their way out they fit shared memory.

    Args:
        dtype: Of the results.
        inner: Channels that are summed.
        outer: Columns of the results.
        terms: Products that are added up.
        results: Results that have the rows in common.
    """
    slots = 1 if dtype == jnp.float32 else 2
    if results == 2:
        return Tiles(n=128, k=64, steps=3, slots=slots, split="rows")
    if terms == 2:
        return Tiles(n=256 if outer % 256 == 0 else 128, k=64, steps=2, slots=2)
    if outer % 256:
        return Tiles(m=256, n=128, k=64, steps=3, slots=slots, split="rows")
    if inner <= _SHORT and dtype != jnp.float32:
        return Tiles(slots=2)
    return Tiles(k=64, steps=3, slots=slots)


def tiles_by_rows(dtype: Any, outer: int, *, results: int = 1) -> Tiles:
    """Likewise for rows by rows."""
    steps = 3 if dtype == jnp.float32 else 4
    if results == 2:
        return Tiles(n=128, k=64, steps=steps, split="rows")
    return Tiles(n=256 if outer % 256 == 0 else 128, k=64, steps=steps)


def why_not(dtype: Any, rows: int, inner: int, outer: int) -> str | None:
    """Why the kernels cannot multiply ``[rows, inner]`` with ``[groups, inner, outer]``, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"there are none for {dtype}"
    if inner % 128 or outer % 128:
        return f"they need multiples of 128 channels, not {inner} and {outer}"
    if rows == 0:
        return "there are no rows"
    return None
