"""The hosts that processes with GPUs run on, beside those that a topology counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax

from jax_ep._groups import meetings
from jax_ep._groups.topology import Topology


def ranks_per_host(topology: Topology) -> int | None:
    """Ranks of each group that share a host, neighbours in the group; None if hosts differ in that.

    Call it where ``gpu_side.obstacle`` has found none.
    """
    if not topology.spans_processes or jax.process_index() not in topology.all_processes:
        return topology.ranks_per_host
    return ranks_by_host(topology, _hosts_of(topology))


def ranks_by_host(topology: Topology, host_of: Callable[[int], Any]) -> int | None:
    """``ranks_per_host`` where ``host_of(process)`` tells hosts apart."""
    sizes = set()
    for row in topology.processes:
        hosts = [host_of(process) for process in row]
        runs = [len(list(ranks)) for _, ranks in itertools.groupby(hosts)]
        if len(runs) > len(set(hosts)):
            return None
        sizes.update(runs)
    return sizes.pop() if len(sizes) == 1 else None


def splits_hosts(topology: Topology) -> bool:
    """Whether ranks that count as those of one host run on several.

    Call it where ``gpu_side.obstacle`` has found none.
    """
    if not topology.spans_processes or jax.process_index() not in topology.all_processes:
        return False
    host_of = _hosts_of(topology)
    return any(
        len({host_of(row[rank]) for rank in host}) > 1
        for row in topology.processes
        for host in topology.hosts
    )


def _hosts_of(topology: Topology) -> Callable[[int], Any]:
    """The host of each process.

    One that takes no part is not asked. It counts as on the host of the first one that does, because
    groups with absent ranks lie within one host.
    """
    found = meetings.facts_of(topology.all_processes)
    first = found[topology.all_processes[0]]
    return lambda process: found.get(process, first)["host"]
