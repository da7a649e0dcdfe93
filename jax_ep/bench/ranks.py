"""The ranks of a run, as one process sees them: mesh, group, arrays, messages of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep.bench.timing import Spread

AXIS = "expert"


@dataclasses.dataclass
class Ranks:
    """One process' part of the ranks.

    Attributes:
        ranks: Devices that take part.
        gpus: GPUs that they are on; 0 on CPU.
        hosts: Logical hosts that they are split into.
    """

    ranks: int
    gpus: int
    hosts: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        devices = jax.devices()
        if len(devices) < self.ranks:
            raise ValueError(f"ranks: expected at most {len(devices)} devices, got {self.ranks}.")
        self.axis = AXIS
        self.mesh = jax.sharding.Mesh(np.array(devices[: self.ranks]), (AXIS,))
        self.sharding = NamedSharding(self.mesh, P(AXIS))
        self.group = self.make_group("auto")
        self.on_gpu = devices[0].platform == "gpu"
        self.shares_gpus = self.on_gpu and self.gpus < self.ranks
        # Whether bytes between ranks cross a link; else they move in the memory that ranks share.
        self.has_links = self.on_gpu and self.ranks == self.gpus > 1
        if why := libraries.why_unavailable("cuda" if self.on_gpu else "cpu"):
            raise RuntimeError(f"benchmarks read the clock of jax_ep's own library: {why}")
        self._exchanges = 0

    def make_group(
        self,
        backend: Literal["auto", "reference"],
        latency_tokens: int = 0,
        latency_hidden: int = 0,
    ) -> jax_ep.Group:
        """The group of all ranks."""
        per_host = None if self.hosts == 1 else self.ranks // self.hosts
        return jax_ep.create_group(
            self.mesh,
            AXIS,
            timeout=120,
            backend=backend,
            ranks_per_host=per_host,
            latency_tokens=latency_tokens,
            latency_hidden=latency_hidden,
        )

    def put(self, make: Callable[[int], np.ndarray]) -> jax.Array:
        """A global array of which ``make(rank)`` is the part of each rank."""
        first, mine = self.my_ranks()[0], {}
        mine[first] = make(first)
        rows = mine[first].shape[0]
        shape = (self.ranks * rows, *mine[first].shape[1:])

        def part(index: Any) -> np.ndarray:
            rank = (index[0].start or 0) // rows
            return mine[rank] if rank in mine else make(rank)

        return jax.make_array_from_callback(shape, self.sharding, part)

    def my_ranks(self) -> list[int]:
        """Ranks whose devices are of this process."""
        mine = jax.process_index()
        return [r for r, d in enumerate(self.mesh.devices.flat) if d.process_index == mine]

    def on_all_ranks(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``function`` of what one rank sees, jitted, as a function of global arrays."""
        spec = P(AXIS)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=(spec,), out_specs=spec, check_vma=False
        )
        return jax.jit(mapped)

    def parts(self, array: jax.Array) -> dict[int, np.ndarray]:
        """The parts of a global array that belong to this process' ranks."""
        rank_of = {device: rank for rank, device in enumerate(self.mesh.devices.flat)}
        return {rank_of[s.device]: np.asarray(s.data) for s in array.addressable_shards}

    def slowest(self, spread: Spread) -> Spread:
        """The spread of the process with the largest median, told to all processes."""
        values = self.exchange(" ".join(map(repr, spread)))
        return max(Spread(*map(float, text.split())) for text in values)

    def largest(self, value: float) -> float:
        """The largest of the numbers that the processes have, told to all."""
        return max(map(float, self.exchange(repr(float(value)))))

    def exchange(self, text: str) -> list[str]:
        """The ``text`` of each process, by index; call it in all processes, in the same order."""
        self._exchanges += 1
        return _compat.all_gather_text(f"jax_ep/bench/{self._exchanges}", text)
