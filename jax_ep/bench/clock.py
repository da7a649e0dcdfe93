"""Time as the devices see it: a kernel in the program that reads a clock.

Only ops lie between two readings. So figures do not contain what the host does meanwhile (starting
programs, waiting for them, other work on a busy machine), and a rank that starts late is waited for
before the first reading. On GPUs the clock is the GPU's, on CPU the host's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

TARGET = "jax_ep_clock"

Stamp = UInt32[jax.Array, "2"]


def read(value: jax.Array) -> tuple[jax.Array, Stamp]:
    """``value``, in place, and the time in nanoseconds (low word, high word) at that point.

    Whatever is computed from the returned value runs after the clock is read.
    """
    call = jax.ffi.ffi_call(
        TARGET,
        (
            jax.ShapeDtypeStruct(value.shape, value.dtype),
            jax.ShapeDtypeStruct((2,), jnp.uint32),
        ),
        input_output_aliases={0: 0},
    )
    same, stamp = call(value, ordinal=np.int32(0))
    return same, stamp


def microseconds(stamps: UInt32[np.ndarray, "*shape 2"]) -> np.ndarray:
    """Stamps as float64 microseconds since the first of them."""
    words = stamps.astype(np.uint64)
    nanoseconds = words[..., 0] | words[..., 1] << np.uint64(32)
    return (nanoseconds - nanoseconds.min()).astype(np.float64) / 1e3


class Reader:
    """Reads the clock once: a function for ``Step.link`` that keeps the stamp."""

    def __init__(self) -> None:
        self.stamp: Stamp | None = None

    def __call__(self, value: jax.Array) -> jax.Array:
        """``value``, after the clock is read."""
        value, self.stamp = read(value)
        return value


Clock = Callable[[jax.Array], jax.Array]


def no_clock(value: jax.Array) -> jax.Array:
    """Used where no time is read."""
    return value
