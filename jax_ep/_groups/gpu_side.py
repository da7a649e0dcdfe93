"""The native side of groups of GPUs, made in one process or by several together.

Within a process, GPUs reach each other's memory as it is. Across the processes of a host, each
process exports its workspaces and the allocation that XLA's arrays lie in, and maps those of its
peers; from then on kernels read peers' arrays in place. Where XLA's memory cannot be exported, the
group is *staged*: operands are copied into memory that can be.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import logging
from typing import Any

import jax
import numpy as np

from jax_ep import _compat
from jax_ep._errors import CommunicationError
from jax_ep._groups import meetings
from jax_ep._groups import processes as other_processes
from jax_ep._groups.memory import Offer, checked, staging_of
from jax_ep._groups.room import Room
from jax_ep._groups.topology import Gpus, Topology, most_on_a_gpu

_OP_TIMEOUT_S = 30.0  # inside an op, once all ranks have arrived
_LONGEST_TIMEOUT_S = 1e9  # native code counts nanoseconds; stands for infinity too
_FREE_SMS = 32  # for other kernels that wait, such as NCCL's
_SMS = 132  # of an H100 or H200
_MIN_BLOCKS = 8  # a plan is one cluster of so many

# The channels of a workspace, the sizes of latency mode, and the absent ranks.
_NativeRoom = tuple[int, int, int, tuple[int, ...]]

logger = logging.getLogger("jax_ep")

# What was mapped so far; it stays until the process ends. Only the GPUs that it was mapped for can use
# it, so they are part of the keys.
_mapped: dict[tuple[Any, ...], int] = {}  # by process, device, base, size there: address
_staged_groups: dict[int, str] = {}  # by id: why
_blocks_of_groups: dict[int, int] = {}  # by id: how many an op has at most
_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Rank:
    """A device of a group.

    Attributes:
        process: JAX's index of the process that it belongs to.
        device: JAX's id of the device, which all processes know.
        ordinal: Its CUDA ordinal, if it belongs to this process.
        num_sms: Its streaming multiprocessors.
    """

    process: int
    device: int
    ordinal: int | None
    num_sms: int = _SMS


def library() -> Any:
    """The native GPU library."""
    return importlib.import_module("jax_ep._cuda")


def ranks_of(instances: np.ndarray) -> list[list[Rank]]:
    """The ranks of each of the groups side by side."""
    return [
        [
            Rank(
                device.process_index,
                device.id,
                _compat.local_ordinal(device),
                _compat.multiprocessor_count(device) or _SMS,
            )
            for device in instance
        ]
        for instance in instances
    ]


def why_staged(group_id: int) -> str | None:
    """Why operands of the group are copied, or None."""
    return _staged_groups.get(group_id)


def num_channels(topology: Topology, in_flight: int) -> int:
    """Channels of the workspaces of a group that may have ``in_flight`` ops in flight.

    One more is for the ops in line with programs. Across hosts no other op runs beside them.
    """
    return 1 if len(topology.hosts) > 1 else 1 + in_flight


def max_blocks(group_id: int) -> int:
    """Blocks that an op of the group has at most, whatever number of SMs is asked for."""
    return _blocks_of_groups[group_id]


def plan_scratch_size(
    layout: int, num_tokens: int, top_k: int, num_experts: int, ranks: int
) -> int:
    """How many int32 a plan takes on GPUs of one host.

    Raises:
        ValueError: if there is no kernel for it.
    """
    size = library().plan_scratch_size(layout, num_tokens, top_k, num_experts, ranks)
    if size < 0:
        raise ValueError(
            "jax_ep.dispatch: argument num_experts: expected a plan that shared memory of GPUs "
            f"has room for, got {num_experts} experts, {top_k} a token, on {ranks} ranks; "
            "use fewer of them, or make the group with backend='reference'."
        )
    return size


def obstacle(topology: Topology, unavailable: str | None) -> str | None:
    """Why the processes cannot make groups of GPUs together, the same in all of them, or None.

    Args:
        topology: Where the ranks of the groups side by side are.
        unavailable: Why this process has no kernels.
    """
    processes = topology.all_processes
    if jax.process_index() not in processes:
        return unavailable
    found = meetings.facts_of(processes, unavailable)
    for process, facts in found.items():
        if facts["unavailable"]:
            return f"in process {process} {facts['unavailable']}"
    versions = {facts["version"]: process for process, facts in found.items()}
    if len(versions) > 1:
        texts = [f"process {process} has {version}" for version, process in versions.items()]
        return f"the processes have different versions of jax_ep: {', '.join(texts)}"
    return None


def agree(processes: list[int], what: str, value: int) -> int:
    """The largest of the values that the processes have.

    Raises:
        CommunicationError: if a process does not come, or comes with another ``what``.
    """
    if jax.process_index() not in processes:
        return value
    received = meetings.meet(processes, {"what": what, "value": value})
    for process, (message, _) in received.items():
        if message.get("what") != what:
            raise CommunicationError(
                f"process {process} makes another group ({message.get('what')}) than this one "
                f"({what}); call jax_ep.create_group in the same order in every process"
            )
    return max([value, *(message["value"] for message, _ in received.values())])


def imagine(group_id: int, instances: list[list[Rank]]) -> Gpus:
    """``create`` for GPUs that programs are compiled for, in one process."""
    gpus = tuple(tuple(str(rank.device) for rank in ranks) for ranks in instances)
    _blocks_of_groups[group_id] = blocks_per_rank(most_on_a_gpu(gpus), _fewest_sms(instances))
    return gpus


def create(
    group_id: int,
    instances: list[list[Rank]],
    topology: Topology,
    timeout: float,
    room: Room,
) -> Gpus | None:
    """Make the native side of a group.

    Args:
        group_id: The id of the group, the same in all processes.
        instances: The ranks of each of the groups side by side.
        topology: Their places. Ranks of one host reach each other's memory. A process that has only
            absent ranks does not call this.
        timeout: Seconds that an op waits for a peer to arrive.
        room: What its workspaces have room for.

    Returns:
        What tells each rank's GPU from others (``Topology.gpus``), the same in all processes; None in a
        process that has no rank.

    Raises:
        CommunicationError: if the group cannot be made; then in all processes.
    """
    timeout = min(timeout, _LONGEST_TIMEOUT_S)
    me = jax.process_index()
    processes = topology.all_processes
    if me not in processes:
        return None
    mine, first_rank = _on_this_host(instances, topology)
    latency = room.latency_tokens, room.latency_hidden
    native_room = num_channels(topology, room.channels), *latency, topology.absent
    if processes == [me]:
        specs = {n: [_spec_of(rank, {}, {}) for rank in mine[n]] for n in mine}
        gpus = imagine(group_id, instances)
        shares = max_blocks(group_id), most_on_a_gpu(gpus)
        error = library().create_group(
            group_id, specs, timeout, _OP_TIMEOUT_S, *shares, [], 0, *native_room
        )
        if error is not None:
            raise CommunicationError(f"the group was not made: {error}")
        return gpus
    return _create_together(group_id, instances, mine, first_rank, timeout, native_room, processes)


def _on_this_host(
    instances: list[list[Rank]], topology: Topology
) -> tuple[dict[int, list[Rank]], int]:
    """The ranks that share a host with one of this process, by instance; and their first one.

    Where groups span hosts, a process has one rank, so there is one first rank.
    """
    me, size = jax.process_index(), topology.ranks_per_host
    mine = {}
    first_rank = 0
    for number, ranks in enumerate(instances):
        for first in range(0, len(ranks), size):
            of_host = ranks[first : first + size]
            if any(rank.process == me for rank in of_host):
                mine[number] = of_host
                first_rank = first
    return mine, first_rank


def _fewest_sms(instances: list[list[Rank]]) -> int:
    return min(rank.num_sms for ranks in instances for rank in ranks)


def _create_together(
    group_id: int,
    instances: list[list[Rank]],
    mine: dict[int, list[Rank]],
    first_rank: int,
    timeout: float,
    room: _NativeRoom,
    processes: list[int],
) -> Gpus:
    """``create`` with other ``processes``; ``mine`` and ``first_rank``: see ``_on_this_host``."""
    me = jax.process_index()
    num_sms = _fewest_sms(instances)
    ours = [rank for ranks in mine.values() for rank in ranks]
    own = {rank.device: rank.ordinal for rank in ours if rank.ordinal is not None}
    offer = Offer()
    # Whatever goes wrong here, the others wait for this process: it tells them.
    error = meetings.error_of(lambda: _prepare(offer, own, mine, room))
    message = {"what": f"group {group_id}", "devices": offer.devices, "error": error}
    try:
        received = meetings.meet(processes, message, offer.descriptors)
    finally:
        offer.close()
    try:
        meetings.raise_first({me: error, **{p: m["error"] for p, (m, _) in received.items()}})
        offered = [offer.devices, *(m["devices"] for m, _ in received.values())]
        uuids = {
            int(text): device["uuid"] for devices in offered for text, device in devices.items()
        }
        gpus = tuple(
            tuple(uuids.get(rank.device, f"absent {rank.device}") for rank in ranks)
            for ranks in instances
        )

        def make() -> None:
            sharing = most_on_a_gpu(gpus)
            shares = blocks_per_rank(sharing, num_sms), sharing
            _map_and_create(group_id, mine, first_rank, own, offer, received, timeout, shares, room)

        error = meetings.error_of(make)
    finally:
        for _, descriptors in received.values():
            other_processes.close_all(descriptors)
    answers = meetings.meet(processes, {"what": f"made {group_id}", "error": error})
    meetings.raise_first({me: error, **{p: m["error"] for p, (m, _) in answers.items()}})
    reasons = [
        device["staged"] for devices in offered for device in devices.values() if device["staged"]
    ]
    if reasons:
        _staged_groups[group_id] = reasons[0]
        if reasons[0] not in _warned:
            _warned.add(reasons[0])
            logger.warning(
                "operands are copied before peers read them, which costs time: %s. Let XLA "
                "preallocate its memory (the default) with its default allocator to avoid this.",
                reasons[0],
            )
    return gpus


def _prepare(
    offer: Offer, own: dict[int, int], mine: dict[int, list[Rank]], room: _NativeRoom
) -> None:
    """Offer the memory of this process's GPUs, which share the host with the ranks in ``mine``."""
    channels, *latency, _ = room
    size = library().workspace_bytes(channels, len(next(iter(mine.values()))), *latency)
    for device, ordinal in own.items():
        offer.add(library(), device, ordinal, sorted(own.values()), size)


def _map_and_create(
    group_id: int,
    instances: dict[int, list[Rank]],
    first_rank: int,
    own: dict[int, int],
    offer: Offer,
    received: other_processes.Received,
    timeout: float,
    shares: tuple[int, int],
    room: _NativeRoom,
) -> None:
    """Map what the peers of this host offer and make the group.

    ``own`` has the CUDA ordinals of this process's devices by their ids; ``shares`` are the blocks
    that an op has at most, and how many ranks share a GPU at most.
    """
    native = library()
    _watch_peers()
    ordinals = sorted(own.values())
    wanted = {rank.device for ranks in instances.values() for rank in ranks}
    regions = {
        int(text): [(base, size) for base, size in device["memories"][1:]]
        for text, device in offer.devices.items()
    }
    workspaces = dict(offer.workspaces)
    for process, (message, descriptors) in received.items():
        if not descriptors:  # of another host
            continue
        unused = iter(descriptors)
        for text, device in message["devices"].items():
            memories = [(*memory, next(unused)) for memory in device["memories"]]
            if int(text) not in wanted:  # of another of the groups side by side
                continue
            mapped = []
            for base, size, descriptor in memories:
                key = (process, int(text), base, size, *ordinals)
                if key not in _mapped:
                    _mapped[key] = checked(native.import_memory(descriptor, size, ordinals))[0]
                mapped.append((_mapped[key], size))
            (workspaces[int(text)], _), *regions[int(text)] = mapped
    specs = {n: [_spec_of(r, workspaces, regions) for r in ranks] for n, ranks in instances.items()}
    staging = [
        (ordinal, *staging_of(native, ordinal, ordinals))
        for device, ordinal in own.items()
        if offer.devices[str(device)]["staged"]
    ]
    _blocks_of_groups[group_id] = shares[0]
    error = native.create_group(
        group_id, specs, timeout, _OP_TIMEOUT_S, *shares, staging, first_rank, *room
    )
    if error is not None:
        raise CommunicationError(error)


def _spec_of(
    rank: Rank, workspaces: dict[int, int], regions: dict[int, list[tuple[int, int]]]
) -> tuple[int, int, int, list[tuple[int, int]]]:
    """A rank as the native library takes it. Other processes' absent ranks have no workspace here."""
    ordinal = -1 if rank.ordinal is None else rank.ordinal
    return ordinal, rank.process, workspaces.get(rank.device, 0), regions.get(rank.device, [])


def blocks_per_rank(sharing: int, num_sms: int = _SMS) -> int:
    """Blocks that an op may have where ``sharing`` ranks at most share a GPU of ``num_sms`` SMs.

    These ranks wait for each other, so all their blocks must fit the GPU at once.

    Raises:
        CommunicationError: if too many ranks share a GPU.
    """
    blocks = (num_sms - _FREE_SMS) // sharing
    if blocks < _MIN_BLOCKS:
        most = (num_sms - _FREE_SMS) // _MIN_BLOCKS
        raise CommunicationError(
            f"expected at most {most} ranks on a GPU of {num_sms} SMs, got {sharing}: their kernels "
            "wait for each other, so all must run at once; use fewer processes for each GPU"
        )
    return blocks


def _watch_peers() -> None:
    """Have the native library notice when processes that were met for the first time end."""
    _say_goodbye_at_exit()
    errors = []
    for process, lifeline in meetings.endpoint().take_lifelines().items():
        with lifeline:
            errors.append(library().watch_process(process, lifeline.fileno()))
    for error in errors:
        if error is not None:
            raise CommunicationError(error)


@functools.cache
def _say_goodbye_at_exit() -> None:
    atexit.register(library().say_goodbye)
