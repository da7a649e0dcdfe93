"""Several real processes that make groups of GPUs together, without GPUs.

    python tests/support/handle_processes.py SCENE FOLDER PROCESSES

They are forks of one process, which only imports what they need and then waits for them, because
most of the time of such a process is its imports. The native library is replaced by one whose
device memory is files in memory, and JAX's key-value store by files in FOLDER. A process writes
what it saw as one line of JSON to FOLDER/output_RANK.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time
import types
from typing import Any

import jax

from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._errors import CommunicationError
from jax_ep._groups import gpu_side, meetings, network
from jax_ep._groups import hosts as real_hosts
from jax_ep._groups import memory as group_memory
from jax_ep._groups.gpu_side import Rank
from jax_ep._groups.room import Room
from jax_ep._groups.topology import Topology

SCENE, FOLDER, PROCESSES = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
EVERYBODY = list(range(PROCESSES))
ME = -1  # of the process that waits


def key_value_set(key: str, value: bytes) -> None:
    """Write a file that appears with all of its contents."""
    path = FOLDER / key.replace("/", "_")
    unfinished = path.with_suffix(f".{ME}")
    unfinished.write_bytes(value)
    unfinished.rename(path)


def key_value_get(key: str, timeout: float) -> bytes:
    """The contents of the file, once it is there."""
    deadline = time.monotonic() + timeout
    path = FOLDER / key.replace("/", "_")
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
        time.sleep(0.01)
    return path.read_bytes()


class Memory:
    """A native library with memory in files instead of GPUs."""

    def __init__(self) -> None:
        self.next_address = 0x1000 * (ME + 1)
        self.allocations: dict[int, int] = {}  # address: descriptor
        self.imported: list[str] = []  # contents
        self.specs: list[Any] = []
        self.sizes: list[int] = []  # of what was allocated
        self.rooms: list[tuple[int, ...]] = []
        self.max_blocks = self.ranks_per_gpu = 0
        self.fails = ""

    def device_uuid(self, ordinal: int) -> tuple[str, None]:
        return f"shared on {meetings.host_name()}", None

    def workspace_bytes(self, num_channels: int, num_ranks: int, *latency: int) -> int:
        return 1024 * num_channels + num_ranks * sum(latency)

    def allocate_exportable(self, ordinal: int, ordinals: list[int], size: int) -> Any:
        if self.fails == "allocate":
            raise MemoryError("no room")  # an error that the code does not expect
        self.sizes.append(size)
        address, self.next_address = self.next_address, self.next_address + size
        descriptor = os.memfd_create("memory")
        os.write(descriptor, f"process {ME} at {address:#x}".encode())
        self.allocations[address] = descriptor
        return address, None

    def export_allocation(self, ordinal: int, address: int) -> Any:
        return os.dup(self.allocations[address]), address, 4096, None

    def import_memory(self, descriptor: int, size: int, ordinals: list[int]) -> Any:
        if self.fails == "import":
            return 0, "cuMemMap failed: out of memory"
        self.imported.append(os.pread(descriptor, size, 0).decode())
        return 0x7000000 + len(self.imported), None

    def create_group(
        self, group_id, specs, arrival, op, max_blocks, ranks_per_gpu, staging, first_rank, *room
    ) -> str | None:
        self.specs.append(specs)
        self.max_blocks, self.ranks_per_gpu = max_blocks, ranks_per_gpu
        self.first_rank = first_rank
        self.rooms.append(room)
        return None

    def watch_process(self, process: int, descriptor: int) -> None:
        pass

    def say_goodbye(self) -> None:
        pass


memory: Memory


def open_descriptors() -> int:
    """How many descriptors this process has, except those of its memory."""
    return len(os.listdir("/proc/self/fd")) - len(memory.allocations)


places: list[Any] = []  # of the ranks of the groups that were made


def create(
    group_id: int,
    instances: list[list[int]],
    ranks_per_host: int | None = None,
    absent: tuple[int, ...] = (),
) -> str:
    """Make a group of one rank for each process; "made", or the error."""
    ranks = [[Rank(p, 10 + p, 0 if p == ME else None) for p in procs] for procs in instances]
    try:
        size = len(instances[0])
        per_host = ranks_per_host or size
        hosts = tuple(tuple(range(first, first + per_host)) for first in range(0, size, per_host))
        topology = Topology(hosts, tuple(map(tuple, instances)), absent=absent)
        places.append(gpu_side.create(group_id, ranks, topology, 60.0, Room(2, 8, 64)))
    except CommunicationError as error:
        return str(error)
    return "made"


# Scenes --------------------------------------------------------------------------------------------


def groups() -> Any:
    """A group of all processes, groups side by side, and one whose memory is mapped already."""
    results = [create(1, [EVERYBODY])]
    before = open_descriptors()
    results += [create(2, [EVERYBODY]), create(3, [EVERYBODY[:2], EVERYBODY[2:]])]
    return {
        "results": results,
        "imported": memory.imported,
        "specs": memory.specs,
        "sizes": memory.sizes,
        "rooms": memory.rooms,
        "max_blocks": memory.max_blocks,
        "ranks_per_gpu": memory.ranks_per_gpu,
        "more_descriptors": open_descriptors() - before,
        "listening": [str(path) for path in pathlib.Path(os.environ["TMPDIR"]).glob("jax_ep-*")],
    }


def failures() -> Any:
    """One process cannot do its part: all hear why, and the next attempt works."""
    results = []
    for fails in ("allocate", "import"):
        memory.fails = fails if ME == 1 else ""
        results.append(create(1, [EVERYBODY]))
    memory.fails = ""
    before = open_descriptors()
    results.append(create(1, [EVERYBODY]))
    return {"results": results, "more_descriptors": open_descriptors() - before}


def agreements() -> Any:
    """The largest value counts; differing groups are an error in all; outsiders are not asked."""
    results: list[Any] = [gpu_side.agree(EVERYBODY, "group", 3 + ME)]
    try:
        gpu_side.agree(EVERYBODY, "one" if ME == 0 else "other", 0)
    except CommunicationError as error:
        results.append(str(error))
    results.append(gpu_side.agree([0, 1], "two", 5 * (ME + 1)))
    return results


def obstacles() -> Any:
    """An obstacle for one process stops all."""
    topology = Topology(hosts=((0, 1),), processes=((0, 1),))
    return gpu_side.obstacle(topology, "there is no library" if ME == 1 else None)


def hosts() -> Any:
    """Two processes on each of two hosts, with groups within a host and across hosts."""
    meetings.host_name = lambda: f"host {ME // 2}"
    within, across, uneven = [[0, 1], [2, 3]], [[0, 1, 2, 3]], [[0, 2, 1, 3]]
    topologies = [
        Topology((tuple(range(len(rows[0]))),), tuple(map(tuple, rows)))
        for rows in (within, across, uneven)
    ]
    obstacles = [gpu_side.obstacle(topology, None) for topology in topologies]
    ranks_per_host = [real_hosts.ranks_per_host(topology) for topology in topologies]
    largest = gpu_side.agree(EVERYBODY, "group", ME)
    results = [create(1, within)]
    memory.fails = "allocate" if ME == 3 else ""
    results.append(create(2, within))
    memory.fails = ""
    results.append(create(3, within))
    specs, memory.specs = memory.specs, []
    results.append(create(4, across, ranks_per_host[1]))
    return {
        "obstacles": obstacles,
        "ranks_per_host": ranks_per_host,
        "across": memory.specs,
        "rooms": memory.rooms,
        "first_rank": memory.first_rank,
        "largest": largest,
        "results": results,
        "connections": sorted(meetings.endpoint()._connections),
        "specs": specs,
        "imported": memory.imported,
        "max_blocks": memory.max_blocks,
        "ranks_per_gpu": memory.ranks_per_gpu,
        "places": places[0],
    }


def networks() -> Any:
    """Two hosts of two processes. The last one differs in what the network needs, and then dies."""
    meetings.host_name = lambda: f"host {ME // 2}"
    jax.local_devices = lambda: [None]
    of_process_3 = {
        "nothing": {},
        "wheel": {"unavailable": "NVSHMEM did not load (no file); pip install nvidia-nvshmem-cu13"},
        "version": {"version": (3, 4, 6)},
        "settings": {"lanes": "5"},
    }
    found = {}
    for what, differs in of_process_3.items():
        mine = differs if ME == 3 else {}
        version = mine.get("version", (3, 4, 5))
        network.library = lambda version=version: types.SimpleNamespace(
            loaded_version=lambda: version
        )
        libraries.why_unavailable = lambda backend, mine=mine: mine.get("unavailable")
        os.environ["JAX_EP_NETWORK_LANES"] = mine.get("lanes", "3")
        network.obstacle.cache_clear()
        found[what] = network.obstacle(tuple(EVERYBODY), 2)
    if ME == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    network.obstacle.cache_clear()
    begin = time.monotonic()
    try:
        found["dead"] = network.obstacle(tuple(EVERYBODY), 2)
    except CommunicationError as error:
        found["dead"] = str(error)
    return {**found, "seconds": time.monotonic() - begin}


def half_a_host() -> Any:
    """A process of another host does not come: all give up after the time for one host."""
    meetings.host_name = lambda: f"host {ME // 2}"
    meetings.TIMEOUT_S = 2.0
    meetings.facts_of(EVERYBODY)  # all are there at first
    if ME == PROCESSES - 1:
        return "absent"
    begin = time.monotonic()
    return {"result": create(1, [[0, 1], [2, 3]]), "seconds": time.monotonic() - begin}


def killed() -> Any:
    """A process dies in the middle, and the others soon know."""
    gpu_side.agree(EVERYBODY, "group", 0)
    if ME == PROCESSES - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    results = [create(1, [EVERYBODY])]
    seconds = time.monotonic() - begin
    results.append(create(2, [EVERYBODY]))
    results.append(create(3, [EVERYBODY[:-1]]))  # those that are left go on
    return {"seconds": seconds, "results": results}


def absent_ranks() -> Any:
    """Groups without the process in the middle: it is elsewhere, comes back, and dies."""
    results = [create(1, [EVERYBODY])]
    if ME != 1:
        results.append(create(2, [EVERYBODY], absent=(1,)))
    results.append(create(3, [EVERYBODY]))
    if ME == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    before = open_descriptors()
    topology = Topology((tuple(EVERYBODY),), (tuple(EVERYBODY),), absent=(1,))
    obstacle = gpu_side.obstacle(topology, None)
    per_host = real_hosts.ranks_per_host(topology), real_hosts.splits_hosts(topology)
    results.append(create(4, [EVERYBODY], absent=(1,)))
    return {
        "results": results,
        "more_descriptors": open_descriptors() - before,
        "found": [obstacle, *per_host],
        "specs": memory.specs[-1][0],
        "room": memory.rooms[-1],
        "gpus": places[-1][0],
    }


def forked() -> Any:
    """A process dies while a fork of it lives on, until there is a file "end"."""
    gpu_side.agree(EVERYBODY, "group", 0)
    pid, end = FOLDER / "fork", FOLDER / "end"
    if ME == 1:
        fork = os.fork()
        if fork == 0:
            for descriptor in (0, 1, 2):
                os.close(descriptor)
            deadline = time.monotonic() + 60
            while not end.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)
        pid.write_text(str(fork))
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    result = create(1, [EVERYBODY])
    seconds = time.monotonic() - begin
    os.kill(int(pid.read_text()), 0)
    end.touch()
    return {"seconds": seconds, "result": result}


def absent() -> Any:
    """A process that does not come."""
    meetings.TIMEOUT_S = 2.0
    if ME == PROCESSES - 1:
        return "absent"
    return create(1, [EVERYBODY])


def fork() -> int | None:
    """The number of a new process, in that process; None in the one that has waited for all."""
    children = {}
    for me in EVERYBODY:
        if (child := os.fork()) == 0:
            output = os.open(FOLDER / f"output_{me}", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            return me
        children[child] = me
    codes = [0] * PROCESSES
    for _ in EVERYBODY:
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))
    return None


if __name__ == "__main__":
    if (rank := fork()) is None:
        sys.exit()
    ME, memory = rank, Memory()
    _compat.key_value_set, _compat.key_value_get = key_value_set, key_value_get
    jax.process_index, jax.process_count = lambda: ME, lambda: PROCESSES
    gpu_side.library = lambda: memory
    group_memory._address_of_an_array = lambda _: memory.allocate_exportable(0, [0], 4096)[0]
    group_memory.why_not_in_place = lambda native, ordinal: ""
    meetings.TIMEOUT_S = 60.0
    print("SAW " + json.dumps(globals()[SCENE]()), flush=True)
