"""The late network of ``tests/cuda/late_network`` in this process: what it has sent, and its faults.

``run_hosts.py --late`` loads it into each process. It is connected once a group that spans hosts has
been made. Process i is processing element i.
"""

from __future__ import annotations

import ctypes
import os
import time

import pytest

# In the order of counts.h.
COUNTS = ("puts", "put_bytes", "gets", "get_bytes", "signals", "atomics", "fences", "lost")
IS_THERE = "JAX_EP_LATE_HOST" in os.environ

needs_late_network = pytest.mark.skipif(
    not IS_THERE, reason="needs the late network between hosts: tests/run_hosts.py --late"
)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None), f"jax_ep_late_{name}")(*arguments) != 0:
        raise RuntimeError(
            f"the late network refuses {name}: no such process, or not connected yet"
        )


def counts(process: int) -> dict[str, int]:
    """What this process has handed to the network for ``process``."""
    numbers = (ctypes.c_uint64 * len(COUNTS))()
    _call("counts", ctypes.c_int(process), numbers)
    return dict(zip(COUNTS, numbers, strict=True))


def drop_signal(process: int, number: int) -> None:
    """Lose the ``number``-th signal from now on towards ``process``, counted from 1."""
    _call("drop_signal", ctypes.c_int(process), ctypes.c_uint64(number))


def stop_after(operations: int) -> None:
    """Lose all that this process sends after so many operations from now on."""
    _call("stop_after", ctypes.c_uint64(operations))


def settled(
    processes: range, *, quiet_s: float = 0.3, timeout: float = 30.0
) -> list[dict[str, int]]:
    """``counts`` of ``processes`` once they have not changed for ``quiet_s`` seconds.

    Kernels end before NVSHMEM's thread has handed over the last of what they send.
    """
    deadline = time.monotonic() + timeout
    found = [counts(process) for process in processes]
    while time.monotonic() < deadline:
        time.sleep(quiet_s)
        now = [counts(process) for process in processes]
        if now == found:
            return found
        found = now
    raise TimeoutError(f"the network was not quiet within {timeout:g} s: {found}")
