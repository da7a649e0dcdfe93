"""Meetings of all processes of a mesh, which may be those of several hosts.

Processes of one host send each other messages and file descriptors through sockets. Between hosts
there are no descriptors to send, for ranks of other hosts map no memory: there the lowest process of
each host publishes what the processes of its host said, in JAX's key-value store.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_ep import _compat
from jax_ep._errors import CommunicationError
from jax_ep._groups.processes import Endpoint, Received, close_all, host_name
from jax_ep._version import __version__

TIMEOUT_S = 300.0  # for all processes to come
_LONGER = 1.5  # what other hosts have to wait for a host that waits in vain
_KEY = "jax_ep/meetings/"

logger = logging.getLogger("jax_ep")

# How often some processes have met, the same in all of them: a key of the store is used once.
_counts: collections.Counter[tuple[int, ...]] = collections.Counter()


@functools.cache
def _the_endpoint(me: int, unavailable: str | None) -> Endpoint:
    facts = {"host": host_name(), "unavailable": unavailable or "", "version": __version__}
    return Endpoint(me, jax.process_count(), facts)


def endpoint(unavailable: str | None = None) -> Endpoint:
    """This process's end of the connections; ``unavailable`` says why it has no kernels."""
    return _the_endpoint(jax.process_index(), unavailable)


def facts_of(processes: Sequence[int], unavailable: str | None = None) -> dict[int, dict[str, str]]:
    """What each of ``processes`` says of itself: "host", "unavailable" and "version"."""
    return endpoint(unavailable).introduce(list(processes), TIMEOUT_S)


def meet(
    processes: Sequence[int], message: dict[str, Any], descriptors: Sequence[int] = ()
) -> Received:
    """Exchange a message with the other ``processes``, all of which call this.

    Args:
        processes: JAX's indices, this process's among them.
        message: A dict of JSON values.
        descriptors: File descriptors for the processes of this host.

    Returns:
        For each other process its message and, from those of this host, the descriptors, which are
        the caller's to close.

    Raises:
        CommunicationError: if a process takes no part.
    """
    me = jax.process_index()
    hosts: dict[str, list[int]] = {}
    for process, facts in sorted(facts_of(processes).items()):
        hosts.setdefault(facts["host"], []).append(process)
    own = next(members for members in hosts.values() if me in members)
    if len(hosts) == 1:
        return _meet_on_host(own, message, descriptors)
    everybody = tuple(sorted(processes))
    number = _counts[everybody]
    _counts[everybody] += 1
    name = hashlib.sha256(repr(everybody).encode()).hexdigest()[:16]
    key = f"{_KEY}{name}/{number}/"
    try:
        received = _meet_on_host(own, message, descriptors)
    except CommunicationError as error:
        if me == own[0]:
            _publish(key, me, {"error": str(error)})
        raise
    if me == own[0]:
        said = {process: other for process, (other, _) in received.items()}
        _publish(key, me, {"messages": {str(p): m for p, m in {me: message, **said}.items()}})
    try:
        for members in hosts.values():
            if members is not own:
                messages = _read(key, members[0])
                received |= {int(process): (text, []) for process, text in messages.items()}
    except CommunicationError:
        for _, unused in received.values():
            close_all(unused)
        raise
    return received


def error_of(do: Callable[[], None]) -> str | None:
    """The text of the error that ``do`` raises, for the processes that wait for this one; or None."""
    try:
        do()
    except CommunicationError as error:
        return str(error)
    except Exception as error:
        logger.exception("making a group failed")
        return f"{type(error).__name__}: {error}"
    return None


def raise_first(errors: dict[int, str | None]) -> None:
    """Raise the first error that a process has told of."""
    for process, error in sorted(errors.items()):
        if error is not None:
            raise CommunicationError(f"the group was not made: process {process}: {error}")


def _meet_on_host(
    processes: list[int], message: dict[str, Any], descriptors: Sequence[int]
) -> Received:
    others = [process for process in processes if process != jax.process_index()]
    return endpoint().exchange(others, message, list(descriptors), TIMEOUT_S)


def _publish(key: str, process: int, said: dict[str, Any]) -> None:
    _compat.key_value_set(f"{key}{process}", json.dumps(said).encode())


def _read(key: str, process: int) -> dict[str, Any]:
    """What the processes of another host said, whose lowest is ``process``."""
    seconds = _LONGER * TIMEOUT_S
    try:
        said = json.loads(_compat.key_value_get(f"{key}{process}", seconds))
    except Exception as error:  # of a type of XLA's
        raise CommunicationError(
            f"process {process} of another host did not come to make the group within {seconds:g} s; "
            f"call jax_ep.create_group in every process ({error})"
        ) from error
    if "error" in said:
        raise CommunicationError(said["error"])
    return said["messages"]
