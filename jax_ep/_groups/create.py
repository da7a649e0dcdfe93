"""Makes groups: the choice of backend, ids, and what processes agree on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._groups import absent as absent_ones
from jax_ep._groups import gpu_side, latency_mode, network, places, tuning
from jax_ep._groups.failures import failure
from jax_ep._groups.group import Group
from jax_ep._groups.imagined import devices_of
from jax_ep._groups.places import Transport
from jax_ep._groups.room import Room, check_channels
from jax_ep._groups.topology import Gpus, Topology

Backend = Literal["auto", "reference", "cpu", "cuda"]

_DEFAULT_TIMEOUT_S = 600.0
_SHORTEST_TIMEOUT_S = 1e-3  # native ops count milliseconds

logger = logging.getLogger("jax_ep")

_groups: dict[tuple[Any, ...], Group] = {}
_generations: dict[tuple[Any, ...], int] = {}
_warned: set[str] = set()


def create_group(
    mesh: Mesh | AbstractMesh,
    axis_name: str | Sequence[str] = "expert",
    *,
    backend: Backend = "auto",
    timeout: float = _DEFAULT_TIMEOUT_S,
    ranks_per_host: int | None = None,
    transport: Transport = "auto",
    channels: int = 1,
    latency_tokens: int = 0,
    latency_hidden: int = 0,
    absent_ranks: Sequence[int] = (),
) -> Group:
    """Make the group of ranks along ``axis_name`` of ``mesh``.

    Call it eagerly (outside ``jit``), in every process, with the same arguments and in the same
    order: where GPUs of several processes form groups, the processes meet in each call. Calls with
    equal arguments return the same object, unless a group has failed: then all processes get a new
    one.

    Example::

        mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        group = jax_ep.create_group(mesh, "expert")   # 4 ranks; two groups side by side

    Args:
        mesh: A mesh of devices of one platform. It may span hosts. Or an ``AbstractMesh``, see below.
        axis_name: The axis that experts are split over, or a tuple of axes (row-major).
        backend: "auto" follows the mesh's devices: the native backend of their platform where
            there is one, else "reference", which is logged once. "cuda" (Hopper GPUs), "cpu" (CPU
            devices of one process) and "reference" (pure JAX, any devices) insist: where that backend
            cannot serve the mesh, it is an error.
        timeout: Seconds that an op waits for a peer to arrive before it fails with
            ``CommunicationError``; at least 0.001, and ``float("inf")`` waits for ever. Peers may be
            late because they compile or write checkpoints.
        ranks_per_host: Ranks that count as those of one host, one after the other; a divisor of R.
            None takes the hosts that the processes of GPUs run on, and elsewhere one host for all.
            A number splits one machine into logical hosts, for tests. Where there are several hosts,
            ``combine`` sums a token's rows once on each rank, once for each host, over its ranks, and
            once at home, over the hosts.
        transport: How GPUs exchange rows. "peer" reads the memory of other GPUs of one host.
            "nvshmem" also crosses hosts, by NVSHMEM: each row once for each host, from where the
            ranks of that host read it. It takes one process for each GPU, all processes of the job in
            the mesh, and as many ranks on each host, neighbours in the group. "auto" takes what the
            hosts of the group ask for. The others insist.
        channels: Ops that may be in flight at once, between ``dispatch_start`` and ``dispatch_done``;
            1 to 3. On GPUs of one host each takes 45 MiB of every GPU, beside the 45 MiB that every
            group takes.
        latency_tokens: The most tokens T of a rank in latency mode (``DispatchConfig``), at most 512.
            With it, ops of few tokens take that mode by default; 0 is for groups without it. On GPUs
            each rank then has 1 + ``channels`` inboxes of 32·(6·R·T + (R − 1)·T·W) + 4224 bytes, with
            W = 152·⌈2H / 1792⌉ + 16: 20 MB for R = 2 and 142 MB for R = 8, with T = 512 and H = 7168.
        latency_hidden: The most channels H of a row in that mode; those of float32 rows count twice.
        absent_ranks: Ranks of each group that take no part, because they are dead or slow. Every
            (token, k) that goes to one of their experts, or comes from one of their tokens, counts as
            −1. On GPUs it takes latency mode, on one host, and forward passes only. There the processes
            whose ranks are all absent do not call this, and the others do not wait for them; they raise
            an error if their lists differ. The guide to decode has an example.

    The devices may be compile-only, as those of ``jax.experimental.topologies``: then the group is
    made for Hopper GPUs without their being there, programs lower to the same text as on real ones,
    and can be compiled but not run. So memory and schedule of a training step on a pod can be planned
    on a laptop. The processes of such devices count as hosts. A group that spans hosts needs NVSHMEM's
    library for that too, and the settings of the network (docs/network.md) are those of this process.

    A group of an ``AbstractMesh`` has no devices at all. ``jax.jit(step).trace(...)`` and ``lower``
    work with it: pass each ``jax.ShapeDtypeStruct`` a ``NamedSharding`` on that mesh. The mesh's
    ``abstract_device`` says what the devices are, else ``backend`` does, and all of them count as one
    host, unless ``ranks_per_host`` says otherwise. To compile, take compile-only devices.

    Returns:
        The group.

    Raises:
        TypeError: for a mesh, axis, timeout or number of another type.
        ValueError: for an unknown axis, backend, transport, timeout or number of channels, a
            ``ranks_per_host`` that does not divide R, a backend or transport that cannot serve the
            mesh, sizes of latency mode that are out of range or for a group on several hosts, or
            ``absent_ranks`` that are no ranks, or all of them, or that the group cannot be without.
        CommunicationError: if GPUs of several processes form the group and a process did not come,
            came with another group, or could not do its part; then in all of them.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"jax_ep.create_group: argument mesh: expected a jax.sharding.Mesh or AbstractMesh, got "
            f"{type(mesh).__name__}; make one with jax.make_mesh."
        )
    if not isinstance(axis_name, str | Sequence):
        raise TypeError(
            f"jax_ep.create_group: argument axis_name: expected an axis or a tuple of axes of "
            f"{mesh.axis_names}, got {type(axis_name).__name__}; name the axes of the experts."
        )
    axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    _check_axes(mesh, axis_names)
    if backend not in get_args(Backend):
        raise ValueError(
            f"jax_ep.create_group: argument backend: expected one of {get_args(Backend)}, got "
            f"{backend!r}."
        )
    if transport not in get_args(Transport):
        raise ValueError(
            f"jax_ep.create_group: argument transport: expected one of {get_args(Transport)}, got "
            f"{transport!r}."
        )
    if not isinstance(timeout, int | float):
        raise TypeError(
            f"jax_ep.create_group: argument timeout: expected seconds as a number, got "
            f"{type(timeout).__name__}; pass an int or a float."
        )
    if not timeout >= _SHORTEST_TIMEOUT_S:
        raise ValueError(
            f"jax_ep.create_group: argument timeout: expected at least {_SHORTEST_TIMEOUT_S:g} "
            f"seconds, got {timeout!r}; the default is {_DEFAULT_TIMEOUT_S:g}, and float('inf') "
            f"waits for ever."
        )
    latency = latency_mode.checked_sizes(latency_tokens, latency_hidden)
    devices = devices_of(mesh, backend)
    instances = _instances(mesh, devices, axis_names)
    absent = absent_ones.checked(absent_ranks, instances.shape[1])
    _check_ranks_per_host(ranks_per_host, instances.shape[1])
    check_channels(channels)
    compile_only = _compat.is_compile_only(devices.flat[0])
    resolved, topology = _resolve(instances, ranks_per_host, backend, transport, absent)
    latency_mode.check_hosts(latency, len(topology.hosts))
    if resolved == "cuda" and absent:
        absent_ones.check_gpus(topology, latency, compile_only=compile_only)
    room = Room(channels, *latency)
    key = (mesh, axis_names, resolved, float(timeout), topology, room)
    group = _groups.get(key)
    # A group that failed is not used again; programs that were made for it keep failing.
    alive = group is not None and not _has_failed(group)
    before = _generations.get(key, -1)
    generation = before if alive else before + 1
    processes = [] if compile_only else topology.all_processes
    if resolved == "cuda" and len(processes) > 1:
        # Some processes may know of a failure that others have not met yet.
        first_id = _group_id(mesh, devices, axis_names, resolved, float(timeout), topology, room, 0)
        what = f"{axis_names} of {dict(mesh.shape)}, timeout {timeout:g}, id {first_id:x}"
        if absent:
            what += f", absent ranks {absent}"
        generation = gpu_side.agree(processes, what, generation)
    if group is None or generation != before:
        _generations[key] = generation
        group_id = _group_id(
            mesh, devices, axis_names, resolved, float(timeout), topology, room, generation
        )
        table: tuning.Table = {}
        if resolved == "cuda":
            _groups.pop(key, None)
            ranks = gpu_side.ranks_of(instances)
            gpus: Gpus | None = None
            if compile_only:
                table, gpus = tuning.load(), gpu_side.imagine(group_id, ranks)
            else:
                assert isinstance(mesh, Mesh)  # the devices of others are compile-only
                table = tuning.agreed_table(mesh, str(group_id), processes)
                gpus = gpu_side.create(group_id, ranks, topology, float(timeout), room)
            topology = dataclasses.replace(topology, gpus=gpus)
            if len(topology.hosts) > 1 and compile_only:
                network.imagine(group_id, len(topology.hosts))
            elif len(topology.hosts) > 1:
                _add_network(group_id, instances, topology)
        group = Group(
            mesh=mesh,
            axis_names=axis_names,
            backend=resolved,
            timeout=float(timeout),
            id=group_id,
            topology=topology,
            tuning=table,
            channels=channels,
            latency_tokens=latency[0],
            latency_hidden=latency[1],
        )
        _groups[key] = group
    return group


def _add_network(group_id: int, instances: np.ndarray, topology: Topology) -> None:
    """Let the hosts of the group of this process reach each other; it has one rank."""
    me = jax.process_index()
    (row,) = (row for row in topology.processes if me in row)
    (device,) = (device for device in instances.flat if device.process_index == me)
    ordinal = _compat.local_ordinal(device)
    assert ordinal is not None
    network.add(group_id, ordinal, [[row[rank] for rank in host] for host in topology.hosts])


def _has_failed(group: Group) -> bool:
    return group.backend == "cuda" and failure(group.id) is not None


def _check_axes(mesh: Mesh | AbstractMesh, axis_names: tuple[str, ...]) -> None:
    unknown = [name for name in axis_names if name not in mesh.axis_names]
    if unknown or not axis_names:
        raise ValueError(
            f"jax_ep.create_group: argument axis_name: expected one or more of the mesh's axes "
            f"{mesh.axis_names}, got {axis_names}."
        )
    if len(set(axis_names)) != len(axis_names):
        raise ValueError(
            f"jax_ep.create_group: argument axis_name: expected each axis once, got {axis_names}."
        )


def _group_id(
    mesh: Mesh | AbstractMesh,
    devices: np.ndarray,
    axis_names: tuple[str, ...],
    backend: str,
    timeout: float,
    topology: Topology,
    room: Room,
    generation: int,
) -> int:
    """A positive 63-bit id made of what the group is, never of where it lives in memory."""
    names = [(device.platform, device.id) for device in devices.flat]
    what = (axis_names, mesh.axis_names, devices.shape, names, backend, timeout)
    text = repr((*what, topology.ranks_per_host, *dataclasses.astuple(room), generation))
    text += f" without {topology.absent}" if topology.absent else ""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _check_ranks_per_host(ranks_per_host: Any, size: int) -> None:
    if ranks_per_host is None:
        return
    if not isinstance(ranks_per_host, int) or isinstance(ranks_per_host, bool):
        raise TypeError(
            f"jax_ep.create_group: argument ranks_per_host: expected a Python int or None, got "
            f"{type(ranks_per_host).__name__}; pass the number of ranks that share a host."
        )
    if ranks_per_host < 1 or size % ranks_per_host:
        raise ValueError(
            f"jax_ep.create_group: argument ranks_per_host: expected a positive divisor of the group's "
            f"{size} ranks, got {ranks_per_host}; give every host the same number of ranks."
        )


def why_reference(
    mesh: jax.sharding.Mesh,
    axis_names: tuple[str, ...],
    ranks_per_host: int | None = None,
    transport: Transport = "auto",
) -> str | None:
    """Why ``create_group`` with backend "auto" would take the reference, or None if it would not.

    Like ``create_group``, for all processes of the mesh to call.
    """
    instances = _instances(mesh, mesh.devices, axis_names)
    return _choose(instances, ranks_per_host, "auto", transport)[2]


def _resolve(
    instances: np.ndarray,
    ranks_per_host: int | None,
    backend: Backend,
    transport: Transport,
    absent: tuple[int, ...] = (),
) -> tuple[str, Topology]:
    """The backend, and where the ranks are."""
    resolved, topology, reason = _choose(instances, ranks_per_host, backend, transport, absent)
    if reason is None:
        return resolved, topology
    for argument, wanted in ("backend", backend), ("transport", transport):
        if wanted not in ("auto", "reference"):
            raise ValueError(
                f"jax_ep.create_group: argument {argument}: expected a {argument} that serves this "
                f"mesh, got {wanted!r}, but {reason}; use backend='reference'."
            )
    if backend == "auto" and reason not in _warned:
        _warned.add(reason)
        logger.warning("using the pure-JAX reference backend: %s", reason)
    return resolved, topology


def _choose(
    instances: np.ndarray,
    ranks_per_host: int | None,
    backend: Backend,
    transport: Transport,
    absent: tuple[int, ...] = (),
) -> tuple[str, Topology, str | None]:
    """The backend, where the ranks are, and why the backend is the reference if it is."""
    topology = Topology.of(instances, ranks_per_host, absent)
    platforms = sorted({device.platform for device in instances.flat})
    native = {"cpu": "cpu", "gpu": "cuda"}.get(platforms[0]) if len(platforms) == 1 else None
    reason: str | None
    if backend == "reference":
        reason = "backend='reference' moves rows by XLA's collectives"
    elif native is None:
        reason = f"there are no kernels for devices of {', '.join(platforms)}"
    elif backend not in ("auto", native):
        reason = f"its devices are of platform {platforms[0]!r}"
    elif native == "cpu":
        reason = _why_not_cpu(topology, transport)
    else:
        topology, reason = places.place_gpus(instances, ranks_per_host, transport, absent)
    if reason is None:
        assert native is not None
        return native, topology, None
    return "reference", Topology.of(instances, ranks_per_host, absent), reason


def _why_not_cpu(topology: Topology, transport: Transport) -> str | None:
    """Why the backend "cpu" cannot serve a group, or None."""
    if transport != "auto":
        return "its devices are CPUs, which need no transport"
    if len(topology.hosts) > 1:
        return f"the group spans {len(topology.hosts)} hosts, which the cpu backend cannot do"
    if topology.spans_processes:
        return "the group spans several processes, which the cpu backend cannot do yet"
    return libraries.why_unavailable("cpu")


def _instances(
    mesh: Mesh | AbstractMesh, devices: np.ndarray, axis_names: tuple[str, ...]
) -> np.ndarray:
    """``[groups side by side, R]`` devices in rank order."""
    axes = [mesh.axis_names.index(name) for name in axis_names]
    size = math.prod(devices.shape[axis] for axis in axes)
    return np.moveaxis(devices, axes, range(-len(axes), 0)).reshape(-1, size)
