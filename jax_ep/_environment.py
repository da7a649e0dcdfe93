"""Settings that XLA's CPU client must see before it starts.

With several devices in one process, the client runs everything on max(cores, devices) threads. If
many steps are in flight, their collectives (also XLA's own) can occupy all threads and deadlock.
More threads prevent that, and they cost nothing while idle.
"""

from __future__ import annotations

import logging
import os

_THREADS = "256"

logger = logging.getLogger("jax_ep")


def raise_cpu_thread_count(num_started: int | None) -> None:
    """Set ``PJRT_NPROC`` unless the user has set it; warn if it is too late.

    Args:
        num_started: CPU devices that JAX has started already; None if it has started nothing.
    """
    if "PJRT_NPROC" in os.environ:
        return
    if num_started is None:
        os.environ["PJRT_NPROC"] = _THREADS
    elif num_started > 1:
        logger.warning(
            "jax_ep was imported after JAX had started its %d CPU devices, so it cannot give them the "
            "threads that many steps in flight need: such steps can deadlock. Import jax_ep before "
            "anything that asks JAX for devices or makes an array, or set PJRT_NPROC=%s.",
            num_started,
            _THREADS,
        )
