"""Compiles programs for H200s on machines without a GPU.

What compiles is XLA's compiler for GPUs, as far as schedules go: stream assignment, latency hiding,
asynchronous regions. Flags leave out what needs a GPU, the autotuning of matmuls. It takes the packages
jax-cuda13-plugin and jax-cuda13-pjrt in the version of JAX, but neither a driver nor CUDA's libraries.

The plugin starts with these flags and with a patch of JAX, so only a process of its own imports this
module (``gpu_schedules.py``).
"""

from __future__ import annotations

from typing import Any

from examples.pretrain import h200

h200.prepare()

import jax  # noqa: E402


def gpu_devices(count: int, hosts: int = 1) -> list[Any]:
    """Compile-only H200s, as many on each host, one after the other."""
    return h200.devices(hosts, count // hosts)


def lowered(function: Any, *arguments: Any) -> Any:
    """``function`` lowered for GPUs."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
