"""Where the ranks of a group are: which share a host, which a process, which a GPU.

``Group.topology`` alone answers such questions, so all parts of the library agree.
``create_group(ranks_per_host=)`` makes logical hosts of one machine.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np

Gpus = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Topology:
    """The places of a group's ranks. Whatever decides by place asks this.

    Attributes:
        hosts: The ranks of each host, ascending; the same in all groups side by side.
        processes: For each of the groups side by side, JAX's index of each rank's process.
        gpus: Likewise, what tells each rank's GPU from others: within one process JAX's id of the
            device, else the UUID. None on other platforms, and in a process that has no rank.
        absent: The ranks that take no part, ascending (``create_group(absent_ranks=)``).
    """

    hosts: tuple[tuple[int, ...], ...]
    processes: tuple[tuple[int, ...], ...]
    gpus: Gpus | None = None
    absent: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        instances: np.ndarray,
        ranks_per_host: int | None = None,
        absent: tuple[int, ...] = (),
    ) -> Topology:
        """The topology of ``[groups side by side, R]`` devices.

        Args:
            instances: The devices, in rank order.
            ranks_per_host: How many ranks, one after the other, share a host; None is for all.
            absent: The ranks that take no part.
        """
        size = instances.shape[1]
        per_host = ranks_per_host or size
        hosts = tuple(tuple(range(i, i + per_host)) for i in range(0, size, per_host))
        processes = tuple(tuple(device.process_index for device in row) for row in instances)
        return cls(hosts, processes, absent=absent)

    @property
    def ranks_per_host(self) -> int:
        """Ranks that share a host."""
        return len(self.hosts[0])

    @property
    def all_processes(self) -> list[int]:
        """The processes of all groups side by side that have a rank which takes part, ascending."""
        rows = map(enumerate, self.processes)
        return sorted({process for row in rows for rank, process in row if rank not in self.absent})

    @property
    def spans_processes(self) -> bool:
        """Whether ranks of one group are in several processes."""
        return any(len(set(row)) > 1 for row in self.processes)

    @property
    def ranks_per_process(self) -> int:
        """The most ranks, of all groups side by side, that share a process."""
        return max(collections.Counter(itertools.chain.from_iterable(self.processes)).values())

    @property
    def ranks_per_gpu(self) -> int | None:
        """The most ranks that share a GPU; None where that is not known."""
        return None if self.gpus is None else most_on_a_gpu(self.gpus)


def most_on_a_gpu(gpus: Gpus) -> int:
    """The most ranks, of all groups side by side, that share a GPU."""
    return max(collections.Counter(itertools.chain.from_iterable(gpus)).values())
