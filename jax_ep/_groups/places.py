"""Where the GPUs of a mesh are, and whether there are kernels and a transport for groups of them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._groups import gpu_side, hosts, network
from jax_ep._groups.topology import Topology

Transport = Literal["auto", "peer", "nvshmem"]

_UNEVEN_HOSTS = (
    "the hosts of its groups have different numbers of ranks, or ranks of a host are not neighbours; "
    "order the mesh so that each host has as many ranks of a group, one after the other"
)


def place_gpus(
    instances: np.ndarray,
    ranks_per_host: int | None,
    transport: Transport,
    absent: tuple[int, ...] = (),
) -> tuple[Topology, str | None]:
    """Where the ranks of GPUs are, and why the backend "cuda" cannot serve them, or None."""
    topology = Topology.of(instances, ranks_per_host, absent)
    kinds = {_compat.compute_capability(device) for device in instances.flat}
    if kinds != {"9.0"}:
        return topology, (
            f"its kernels need GPUs of compute capability 9.0, not {', '.join(kinds)}"
        )
    if _compat.is_compile_only(instances.flat[0]):
        return _imagine_gpus(instances, ranks_per_host, transport, absent)
    unavailable = libraries.why_unavailable("cuda")
    if len(topology.all_processes) > 1:
        unavailable = gpu_side.obstacle(topology, unavailable)
    if unavailable is None and ranks_per_host is None:
        found = hosts.ranks_per_host(topology)
        if found is None:
            return topology, _UNEVEN_HOSTS
        topology = Topology.of(instances, found, absent)
    if unavailable is None and hosts.splits_hosts(topology):
        return topology, (
            f"its {topology.ranks_per_host} ranks_per_host are on several hosts; leave it out, or give "
            "at most as many as each host has"
        )
    return topology, unavailable or _why_no_transport(topology, transport)


def _imagine_gpus(
    instances: np.ndarray,
    ranks_per_host: int | None,
    transport: Transport,
    absent: tuple[int, ...],
) -> tuple[Topology, str | None]:
    """``place_gpus`` of compile-only GPUs, whose processes are their hosts."""
    topology = Topology.of(instances, ranks_per_host, absent)
    if ranks_per_host is None:
        found = hosts.ranks_by_host(topology, lambda process: process)
        if found is None:
            return topology, _UNEVEN_HOSTS
        topology = Topology.of(instances, found, absent)
    spans_hosts = len(topology.hosts) > 1
    wrong = _why_wrong_transport(topology, transport)
    if wrong is not None:
        return topology, wrong
    library = "nvshmem" if spans_hosts else "cuda"
    reason = libraries.why_unavailable(library, compile_only=True)
    if reason is not None and spans_hosts:
        reason = f"the group spans {len(topology.hosts)} hosts, and {reason}"
    return topology, reason


def _why_wrong_transport(topology: Topology, transport: Transport) -> str | None:
    """Why ``transport`` is none for groups on these hosts, or None."""
    num_hosts = len(topology.hosts)
    if transport == "nvshmem" and num_hosts == 1:
        return (
            "each of its groups lies within one host, whose ranks reach each other's memory; give "
            "ranks_per_host to split it into logical hosts"
        )
    if transport == "peer" and num_hosts > 1:
        return f"the group spans {num_hosts} hosts"
    return None


def _why_no_transport(topology: Topology, transport: Transport) -> str | None:
    """Why ranks of these hosts cannot reach each other as they should, or None."""
    num_hosts = len(topology.hosts)
    wrong = _why_wrong_transport(topology, transport)
    if wrong is not None or num_hosts == 1:
        return wrong
    if topology.ranks_per_process > 1:
        return (
            f"the group spans {num_hosts} hosts, which takes one process for each GPU, and a process "
            "has several"
        )
    obstacle = network.obstacle(tuple(topology.all_processes), num_hosts)
    return obstacle and f"the group spans {num_hosts} hosts, and {obstacle}"
