"""Settings that XLA's CPU client must see before it starts.

With several devices in one process, the client runs everything on max(cores, devices) threads, and
collectives of many steps in flight, XLA's own among them, can use them all up and deadlock. More
threads cure that; they cost nothing while idle.
"""

from __future__ import annotations

import os

_THREADS = "256"


def raise_cpu_thread_count() -> None:
    """Set ``PJRT_NPROC`` unless the user has. It has no effect once a client is up."""
    os.environ.setdefault("PJRT_NPROC", _THREADS)


raise_cpu_thread_count()
