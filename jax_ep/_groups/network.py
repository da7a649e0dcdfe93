"""The native side of groups that span hosts: NVSHMEM, started once, and a part of its memory for each.

Every process of the job takes part, with one GPU each. Process i is processing element i. NVSHMEM gives
all of them the same amount of memory, and groups take parts of it at the same offsets, so a group needs
no allocation, and no address has to travel. Parts are never given back: a kernel of a failed peer may
still use one.

Across hosts the processes agree on everything here through ``meetings``, so that a process with other
settings, another version of NVSHMEM or none ends in the same error in all of them.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._errors import CommunicationError
from jax_ep._groups import meetings

_KIB, _MIB = 1 << 10, 1 << 20
DEFAULTS = {
    "JAX_EP_NETWORK_BYTES": 2048 * _MIB,  # of memory in each process, for all groups
    "JAX_EP_NETWORK_CHUNK_BYTES": 256 * _KIB,  # of what travels at a time
    "JAX_EP_NETWORK_LANES": 0,  # between two ranks; 0 is for enough
    "JAX_EP_NETWORK_CHOICES": 128 * _KIB,  # tokens times top_k, at most
}
# Lanes of a rank to all other hosts, where JAX_EP_NETWORK_LANES does not say: one for each block of
# the largest op that pays. A block without a lane has little to do.
_LANES_OF_ALL_HOSTS = 64
_CHUNK_UNIT = 1024  # bytes
_ROW_ROOM = 1024  # bytes of a chunk that its header and what goes with a row take at most
_END_TIMEOUT_S = 20.0  # for all processes to end

logger = logging.getLogger("jax_ep")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a group uses the network; the same in all processes.

    Attributes:
        num_lanes: Ways between two ranks of different hosts, each with chunks of its own under way.
        chunk_bytes: Of a chunk of rows.
        message_bytes: Of the choices of experts that a plan sends to each host.
    """

    num_lanes: int
    chunk_bytes: int
    message_bytes: int

    @classmethod
    def of(cls, values: Mapping[str, int], num_hosts: int) -> Settings:
        """Those of a group of ``num_hosts`` hosts, from the values of the variables."""
        lanes = values["JAX_EP_NETWORK_LANES"] or max(
            1, _LANES_OF_ALL_HOSTS // max(num_hosts - 1, 1)
        )
        message_bytes = -(-2 * values["JAX_EP_NETWORK_CHOICES"] // 128) * 128
        return cls(lanes, values["JAX_EP_NETWORK_CHUNK_BYTES"], message_bytes)

    @property
    def max_row_bytes(self) -> int:
        """Bytes of a row that a chunk has room for, with all that may go with it."""
        return self.chunk_bytes - _ROW_ROOM

    @property
    def max_choices(self) -> int:
        """Tokens times top_k of a plan, at most."""
        return self.message_bytes // 2


_settings_of_groups: dict[int, Settings] = {}  # by id
_used_bytes = 0  # of the memory of each process


def library() -> Any:
    """The native library of groups that span hosts."""
    return importlib.import_module("jax_ep._nvshmem")


def settings_of(group_id: int) -> Settings:
    """The settings of a group that spans hosts."""
    return _settings_of_groups[group_id]


def setting(name: str) -> int:
    """The value of an environment variable of the network, or its default.

    Raises:
        CommunicationError: if it is not one that ``check_setting`` takes.
    """
    return check_setting(name, os.environ.get(name, ""))


def check_setting(name: str, text: str) -> int:
    """The number that ``text`` is for the variable ``name``; the default if it is empty.

    Raises:
        CommunicationError: if it is no number, or none that the variable may have.
    """
    if not text:
        return DEFAULTS[name]
    if not (text.isascii() and text.isdecimal()):
        raise CommunicationError(f"{name}: expected a number, got {text!r}")
    value = int(text)
    if name == "JAX_EP_NETWORK_CHUNK_BYTES":
        if value % _CHUNK_UNIT or value < 8 * _CHUNK_UNIT:
            raise CommunicationError(
                f"{name}: expected a multiple of {_CHUNK_UNIT} of at least {8 * _CHUNK_UNIT}, got "
                f"{value}"
            )
    elif name != "JAX_EP_NETWORK_LANES" and value == 0:
        raise CommunicationError(f"{name}: expected at least 1, got 0")
    return value


def settings_for(num_hosts: int) -> Settings:
    """What the environment says for a group of ``num_hosts`` hosts."""
    return Settings.of({name: setting(name) for name in DEFAULTS}, num_hosts)


@functools.cache
def obstacle(processes: tuple[int, ...], num_hosts: int) -> str | None:
    """Why ``processes`` cannot make groups that span hosts, the same in all of them, or None."""
    me = jax.process_index()
    said: dict[str, Any] = {"what": "network", "unavailable": "", "settings": ""}
    said["unavailable"] = libraries.why_unavailable("nvshmem") or ""
    said["devices"] = len(jax.local_devices())
    try:
        said["settings"] = _settings_list(num_hosts)
    except CommunicationError as error:
        said["unavailable"] = str(error)
    if not said["unavailable"]:
        said["version"] = list(library().loaded_version())
    received = meetings.meet(list(processes), said)
    answers = {me: said, **{process: message for process, (message, _) in received.items()}}
    for process, answer in sorted(answers.items()):
        if answer["unavailable"]:
            return f"in process {process} {answer['unavailable']}"
        if answer["devices"] != 1:
            return (
                f"process {process} has {answer['devices']} GPUs, and groups that span hosts need one "
                "process for each GPU (local_device_ids= of jax.distributed.initialize)"
            )
    if len(processes) < jax.process_count():
        return (
            f"the mesh has devices of {len(processes)} of {jax.process_count()} processes, and groups "
            "that span hosts need all of them"
        )
    for what in ("version", "settings"):
        values = {str(answer[what]): process for process, answer in sorted(answers.items())}
        if len(values) > 1:
            name = "NVSHMEM's version" if what == "version" else "the settings of the network"
            texts = [f"process {process} has {value}" for value, process in values.items()]
            return f"the processes differ in {name}: {', '.join(texts)}"
    return None


def _settings_list(num_hosts: int) -> list[int]:
    settings = settings_for(num_hosts)
    return [*dataclasses.astuple(settings), setting("JAX_EP_NETWORK_BYTES")]


def imagine(group_id: int, num_hosts: int) -> None:
    """``add`` for GPUs that programs are compiled for, with the settings of this process."""
    _settings_of_groups[group_id] = settings_for(num_hosts)


def add(group_id: int, device: int, hosts: list[list[int]]) -> None:
    """Add the network to a group whose ranks of this host have been made; in all processes at once.

    Args:
        group_id: The id of the group.
        device: CUDA ordinal of this process's GPU.
        hosts: The processes of the ranks of each host of this process's group.

    Raises:
        CommunicationError: if a process cannot do its part; then in all of them.
    """
    me = jax.process_index()
    everybody = list(range(jax.process_count()))
    native = library()
    job = b""
    error = None
    if me == 0 and not native.runs():
        job, error = native.unique_id()
    said = {"what": f"network {group_id}", "id": job.hex(), "used": _used_bytes, "error": error}
    answers = _agreed(everybody, said)
    used = {process: answer["used"] for process, answer in answers.items()}
    if len(set(used.values())) > 1:
        raise CommunicationError(
            f"the processes have made different groups before: they use {used} bytes of network "
            "memory; call jax_ep.create_group in the same order in every process"
        )
    if not native.runs():
        _end_at_exit()
    error = native.start(
        device,
        me,
        len(everybody),
        bytes.fromhex(answers[0]["id"]),
        setting("JAX_EP_NETWORK_BYTES"),
    )
    if error is None:
        error = _take_part(native, group_id, device, hosts)
    _agreed(everybody, {"what": f"network of {group_id}", "error": error})


def _agreed(processes: list[int], said: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What each process says, unless one has an error or does something else: then that is raised."""
    received = meetings.meet(processes, said)
    answers = {jax.process_index(): said}
    answers |= {process: message for process, (message, _) in received.items()}
    for process, answer in sorted(answers.items()):
        if answer.get("what") != said["what"]:
            raise CommunicationError(
                f"process {process} makes another group than this one; call jax_ep.create_group in the "
                "same order in every process"
            )
        if answer["error"] is not None:
            raise CommunicationError(
                f"the group was not made: process {process}: {answer['error']}"
            )
    return answers


def _take_part(native: Any, group_id: int, device: int, hosts: list[list[int]]) -> str | None:
    """Give the group its part of the memory; an error text or None."""
    global _used_bytes
    settings = settings_for(len(hosts))
    host = next(i for i, ranks in enumerate(hosts) if jax.process_index() in ranks)
    error = native.add_network(
        group_id,
        device,
        host,
        hosts,
        settings.num_lanes,
        settings.chunk_bytes,
        settings.message_bytes,
        _used_bytes,
    )
    if error is None:
        _used_bytes += memory_bytes(settings, len(hosts), len(hosts[0]))
        _settings_of_groups[group_id] = settings
    return error


def memory_bytes(settings: Settings, num_hosts: int, ranks_per_host: int) -> int:
    """Bytes of each GPU that a group takes for the network."""
    return library().network_bytes(
        num_hosts,
        ranks_per_host,
        settings.num_lanes,
        settings.chunk_bytes,
        settings.message_bytes,
    )


@functools.cache
def _end_at_exit() -> None:
    atexit.register(_end)


def _end() -> None:
    """End NVSHMEM, if all processes come to it: it waits for all of them, and hangs if one is gone."""
    if not library().runs():
        return
    groups = importlib.import_module("jax_ep._cuda")
    if any(groups.group_failure(group_id) for group_id in _settings_of_groups):
        return
    try:
        _compat.wait_for_all("jax_ep/network/end", _END_TIMEOUT_S)
    except Exception as error:  # of a type of XLA's
        logger.info("NVSHMEM is not ended, since not all processes came to it: %s", error)
        return
    failure = library().end()
    if failure is not None:
        logger.warning("ending NVSHMEM failed: %s", failure)
