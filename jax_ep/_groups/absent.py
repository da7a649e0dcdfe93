"""Checks of ``create_group(absent_ranks=)``: the ranks of a group that take no part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_ep._groups.topology import Topology

_ARGUMENT = "jax_ep.create_group: argument absent_ranks:"


def checked(ranks: Any, size: int) -> tuple[int, ...]:
    """The ranks that are absent, ascending, of a group of ``size`` ranks."""
    if not isinstance(ranks, Sequence) or not all(
        isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks
    ):
        raise TypeError(
            f"{_ARGUMENT} expected a sequence of Python ints, got {ranks!r}; pass the ranks that take "
            "no part, as in (2,)."
        )
    absent = tuple(sorted(ranks))
    if len(set(absent)) < len(absent) or any(not 0 <= rank < size for rank in absent):
        raise ValueError(
            f"{_ARGUMENT} expected different ranks of the group's 0 to {size - 1}, got {ranks!r}; pass "
            "each rank that takes no part once."
        )
    if len(absent) == size:
        raise ValueError(
            f"{_ARGUMENT} expected at least one rank to take part, got all {size}; leave one out."
        )
    return absent


def check_gpus(topology: Topology, latency: tuple[int, int], *, compile_only: bool) -> None:
    """GPUs can do without the absent ranks of ``topology``, and this process has others."""
    if len(topology.hosts) > 1:
        raise ValueError(
            f"{_ARGUMENT} expected none where a group of GPUs spans hosts, got {topology.absent} with "
            f"{len(topology.hosts)} hosts; make the group again on a mesh without their devices."
        )
    if not any(latency):
        raise ValueError(
            f"{_ARGUMENT} expected none in a group of GPUs without latency mode, got "
            f"{topology.absent}; pass latency_tokens and latency_hidden too."
        )
    me = jax.process_index()
    of_me = {
        rank for row in topology.processes for rank, process in enumerate(row) if process == me
    }
    if of_me and me not in topology.all_processes and not compile_only:
        raise ValueError(
            f"{_ARGUMENT} expected ranks of other processes, got {topology.absent}, which are all that "
            f"process {me} has; call this only in the processes whose ranks go on."
        )
