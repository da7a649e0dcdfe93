"""Limits of the GPU kernels, as their library states them. Tracing and the handlers check them."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def _room() -> dict[str, int]:
    return importlib.import_module("jax_ep._cuda").limits()


def max_experts() -> int:
    """The largest number of experts of a group."""
    return _room()["max_experts"]


def max_vjp_row_bytes() -> int:
    """The largest row, in bytes, in the gradient of ``combine`` with weights."""
    return _room()["max_vjp_row_bytes"]


def max_summed_row_bytes(num_ranks: int) -> int:
    """The largest row in bytes in layout "expert", as the ring of sums holds one of each peer."""
    return _room()["ring_bytes"] // max(num_ranks - 1, 1)
