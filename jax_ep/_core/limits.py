"""What the GPU kernels have room for, as their library says: refused while tracing, and by handlers."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def _room() -> dict[str, int]:
    return importlib.import_module("jax_ep._cuda").limits()


def max_experts() -> int:
    """Experts of a group."""
    return _room()["max_experts"]


def max_vjp_row_bytes() -> int:
    """Bytes of a row in the gradient of ``combine`` with weights."""
    return _room()["max_vjp_row_bytes"]


def max_summed_row_bytes(num_ranks: int) -> int:
    """Bytes of a row in layout "expert" of which the ring of sums holds one of each other rank."""
    return _room()["ring_bytes"] // max(num_ranks - 1, 1)
