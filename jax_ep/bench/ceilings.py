"""How fast the machine moves bytes between the ranks, in the same run as everything else.

With two or more devices: every rank sends to the next one at the same time, so each link is
used in both directions, by ``lax.ppermute`` (XLA's way between devices) and, within one process, by
``jax.device_put`` (the copy engines). With one, or with ranks that share GPUs: a copy in its own
memory, where each byte is read and written; the figure counts it once, as a payload.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

_GPU_BYTES, _CPU_BYTES = 1 << 28, 1 << 22
_REPEAT = 10


class Ceiling(NamedTuple):
    """GB/s of each rank in one direction, all ranks at once."""

    name: str
    gbs: float


def num_bytes(*, on_gpu: bool) -> int:
    """Bytes that one move takes from each rank."""
    return _GPU_BYTES if on_gpu else _CPU_BYTES


def measure(
    mesh: jax.sharding.Mesh, sharding: Any, *, on_gpu: bool, shares_gpus: bool = False
) -> list[Ceiling]:
    """All the ways that there are; ``shares_gpus`` if several ranks are on one GPU."""
    size = num_bytes(on_gpu=on_gpu)
    ranks = mesh.size
    shape = (ranks * size // 4,)
    full = np.zeros(size // 4, np.float32)
    x = jax.make_array_from_callback(shape, sharding, lambda _: full)
    if ranks == 1 or shares_gpus:  # no link to measure
        name = "local copy, GPU shared" if shares_gpus else "local copy"
        return [Ceiling(name, _slope(_repeated(_local_copy, mesh), x, size))]
    found = [Ceiling("ppermute", _slope(_repeated(_to_next, mesh), x, size))]
    if jax.process_count() == 1:
        found.append(Ceiling("device_put", _device_put(x, mesh, size)))
    return found


def _local_copy(x: jax.Array) -> jax.Array:
    # Changes every element, or the compiler would copy nothing.
    return lax.optimization_barrier(x + 1)


def _to_next(x: jax.Array) -> jax.Array:
    ranks = lax.axis_size("expert")
    return lax.ppermute(x, "expert", [(rank, (rank + 1) % ranks) for rank in range(ranks)])


def _repeated(move: Any, mesh: jax.sharding.Mesh) -> Any:
    """``move`` done ``n`` times, as a jitted function of ``x`` and the static ``n``."""

    def program(n: int) -> Any:
        def body(x: jax.Array) -> jax.Array:
            for _ in range(n):
                x = move(x)
            return x

        spec = P(mesh.axis_names)
        return jax.jit(
            jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )

    return program


def _slope(program: Any, x: jax.Array, size: int) -> float:
    """GB/s by the slope between 4 and 8 moves."""
    times = []
    for run in (program(4), program(8)):
        jax.block_until_ready(run(x))
        times.append(_median_time(lambda run=run: run(x)))
    return _rate(4 * size, times[1] - times[0])


def _device_put(x: jax.Array, mesh: jax.sharding.Mesh, size: int) -> float:
    devices = list(mesh.devices.flat)
    parts = {shard.device: shard.data for shard in x.addressable_shards}

    def exchange(times: int) -> Any:
        arrived = []
        for _ in range(times):
            # A new array each time: a device_put of what is there already would copy nothing.
            arrived = [
                jax.device_put(parts[device], devices[(rank + 1) % len(devices)])
                for rank, device in enumerate(devices)
            ]
        return arrived

    jax.block_until_ready(exchange(1))
    few, many = _median_time(lambda: exchange(4)), _median_time(lambda: exchange(8))
    return _rate(4 * size, many - few)


def _rate(size: int, seconds: float) -> float:
    """GB/s; 0 where the time is not positive."""
    return size / seconds / 1e9 if seconds > 0 else 0.0


def _median_time(call: Any) -> float:
    """The median time of a call, in seconds."""
    samples = []
    for _ in range(_REPEAT):
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(time.perf_counter() - start)
    return float(np.median(samples))
