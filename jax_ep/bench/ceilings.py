"""How fast the machine moves bytes, measured in the same run: the ceiling of the figures.

*Links*, where every rank has a GPU of its own: all ranks read from the next one at once, so that each
link is used in both directions. The library's own movers (bulk copies, as dispatch moves rows;
loads, as combine reads them) and the copy engines read over the group's mapping of the peers'
memory, in one process or in several. They need no plan and wait for nobody. XLA's ``lax.ppermute``
is measured beside them. The figure is GB/s of a rank in one direction.

*Memory*, where ranks share GPUs, or there is one: the same movers copy within each rank's memory, all
ranks at once. The figure is GB/s read and written on a GPU, by all of its ranks together. On CPU it is
what a core copies within its cache, times the cores, which no op can beat.

A plain kernel, one vector in each thread, is measured in both cases.
"""

from __future__ import annotations

import ast
import os
import time
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax import lax

from jax_ep import _compat
from jax_ep._groups import gpu_side
from jax_ep.bench import timing
from jax_ep.bench.ranks import Ranks
from jax_ep.bench.timing import Chain, Step

NUM_BYTES = 1 << 28  # of a copy on GPUs
_COPIES = 24  # timed ones of each mover, which take milliseconds; as many before and after
_TRIES = 3
_CPU_BYTES = 1 << 16  # of a core's copy
_CPU_COPIES = 20  # between readings of the clock, which may take microseconds
_CPU_SECONDS = 0.2

Kind = Literal["link", "memory"]

# Name, number in csrc/cuda/measure/copy.h, and numbers of blocks, of which the best counts (those of
# plain copies follow from the bytes).
_MOVERS = (
    ("bulk copies", 0, (8, 24, 64, 132)),
    ("loads", 1, (16, 64, 132, 264)),
    ("copy engines", 2, (1,)),
    ("plain copies", 3, (1,)),
)


class Ceiling(NamedTuple):
    """GB/s: of a rank in one direction ("link"), or read and written on a GPU ("memory")."""

    name: str
    gbs: float
    kind: Kind


def measure(session: Ranks) -> list[Ceiling]:
    """The rates of all movers that can run here, the fastest first; call it in all processes."""
    found = _on_gpus(session) if session.on_gpu else _on_cpu(session)
    # A time that is not positive only shows that the machine was busy.
    return sorted((c for c in found if c.gbs > 0), key=lambda c: -c.gbs)


def _on_gpus(session: Ranks) -> list[Ceiling]:
    kind: Kind = "link" if session.has_links else "memory"
    x = _array(session)
    found: list[Ceiling | None] = []
    if session.group.backend == "cuda":  # else only XLA reads other ranks' memory
        found = [_mover(session, x, kind, *mover) for mover in _MOVERS]
    if kind == "link":
        found.append(Ceiling("lax.ppermute", _ppermute(session, x), kind))
    return [ceiling for ceiling in found if ceiling is not None]


def _array(session: Ranks) -> jax.Array:
    part = np.zeros(NUM_BYTES // 4, np.float32)
    return session.put(lambda _: part)


def _mover(
    session: Ranks, x: jax.Array, kind: Kind, name: str, mover: int, blocks: tuple[int, ...]
) -> Ceiling | None:
    """The best rate of a mover; None where peers cannot read the array in place."""
    library, group = gpu_side.library(), session.group
    if kind == "link" and session.ranks == session.hosts:
        return None  # only the network goes to another rank
    to = jax.block_until_ready(x + 1)  # an array of the same size
    places: dict[int, tuple[int, int]] = {}
    failures = []
    devices = list(session.mesh.devices.flat)
    for rank, pointer in _pointers(session, x).items():
        ordinal = _compat.local_ordinal(devices[rank])
        region, offset, error = library.name_place(group.id, ordinal, pointer, NUM_BYTES)
        places[rank] = (region, offset)
        failures += [error] if error else []
    told = session.exchange(repr((places, failures)))
    everyone: dict[int, tuple[int, int]] = {}
    for text in told:
        theirs, failed = ast.literal_eval(text)
        everyone |= theirs
        failures += failed
    if failures:
        return None
    per_host = session.ranks // session.hosts
    step = 1 if kind == "link" else 0
    targets = _pointers(session, to)
    best = 0.0
    for count in blocks:
        copies = []
        for rank, target in targets.items():
            index = (rank % per_host + step) % per_host  # of the source on this rank's host
            ordinal = _compat.local_ordinal(devices[rank])
            source = rank - rank % per_host + index
            copies.append((ordinal, index, *everyone[source], target))
        for _ in range(_TRIES):
            session.exchange("")  # all begin together
            seconds, error = library.time_copies(group.id, copies, NUM_BYTES, mover, count, _COPIES)
            slowest = session.largest(max(seconds) if error is None else float("inf"))
            if slowest == float("inf"):
                raise RuntimeError(f"copies by {name} failed: {error or 'in another process'}")
            best = max(best, NUM_BYTES * _COPIES / slowest / 1e9)
    if kind == "memory":
        best *= 2 * session.ranks / session.gpus
    return Ceiling(name, best, kind)


def _pointers(session: Ranks, array: jax.Array) -> dict[int, int]:
    """Addresses of the parts of this process's ranks, by rank."""
    rank_of = {device: rank for rank, device in enumerate(session.mesh.devices.flat)}
    return {rank_of[s.device]: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}


def _ppermute(session: Ranks, x: jax.Array) -> float:
    """XLA's way between devices."""

    def to_next(x: jax.Array) -> jax.Array:
        ranks = session.ranks
        return lax.ppermute(x, session.axis, [(rank, (rank + 1) % ranks) for rank in range(ranks)])

    step = Step(
        run=to_next,
        link=lambda _, received, now: now(lax.optimization_barrier(received)),
        first=lambda x: x,
    )
    measured = timing.measure(step, [x], session.mesh, Chain(length=4, repeat=5))
    return NUM_BYTES / session.slowest(measured.spread).median / 1e3


def _on_cpu(session: Ranks) -> list[Ceiling]:
    """The rate of one core's copies within its cache, times the cores, which all cannot reach."""
    source, target = np.zeros(_CPU_BYTES // 4, np.int32), np.ones(_CPU_BYTES // 4, np.int32)
    one = np.int32(1)
    best, begin = 0.0, time.perf_counter()
    while (start := time.perf_counter()) - begin < _CPU_SECONDS:
        for _ in range(_CPU_COPIES):
            # A loop of vectors: memcpy may be ten times slower where the arrays lie badly.
            np.add(source, one, out=target)
        # The fastest counts, because other programs slow the rest on a busy machine.
        seconds = time.perf_counter() - start
        best = max(best, 2 * _CPU_COPIES * _CPU_BYTES / seconds / 1e9)
    cores = len(os.sched_getaffinity(0))
    name = f"copies in cache, {cores} cores"
    return [Ceiling(name, session.largest(best) * cores, "memory")]
