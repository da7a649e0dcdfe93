"""Sockets between the processes of one host that share groups of GPUs.

A file descriptor of device memory opens all of an allocation to whoever holds it. So descriptors
travel only over Unix sockets in a directory that nobody else may enter, between processes of the same
user, and the one that connects shows a random token, which it got from JAX's key-value store.

There is one connection for each pair of processes, made once and kept, and beside it a *lifeline*: a
pair of sockets over which nothing is sent, and which closes when the process at its other end is gone.
A connection over which an exchange has failed is closed: what may still come is of no known exchange.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from typing import Any

from jax_ep import _compat
from jax_ep._errors import CommunicationError

_KEY = "jax_ep/processes/"
_MAX_DESCRIPTORS = 250  # of one message, which the kernel bounds by 253
_LONGEST_PATH = 107  # of a Unix socket
_GREETING_TIMEOUT_S = 10.0  # for what a peer sends as soon as it has connected
_HEAD = struct.Struct("<II")  # bytes of the text, number of descriptors

Received = dict[int, tuple[dict[str, Any], list[int]]]


class Listener:
    """The socket at which this process is to be found, and the token that opens it."""

    def __init__(self) -> None:
        name = secrets.token_hex(8)
        self.token = secrets.token_hex(16)
        self.directory = tempfile.mkdtemp(prefix="jax_ep-")  # this user's alone
        if len(os.path.join(self.directory, name)) > _LONGEST_PATH:
            os.rmdir(self.directory)
            self.directory = tempfile.mkdtemp(prefix="jax_ep-", dir="/tmp")
        self.path = os.path.join(self.directory, name)
        self._owner = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        atexit.register(self.close)
        self._socket.bind(self.path)
        self._socket.listen(64)

    def accept(self, deadline: float) -> tuple[int, socket.socket, socket.socket]:
        """The next peer that may come in: its process, the connection and its lifeline.

        Raises:
            TimeoutError: if none came until ``deadline``, a time of ``time.monotonic``.
        """
        while True:
            self._socket.settimeout(_remaining(deadline))
            connection, _ = self._socket.accept()
            welcome = self._welcome(connection)
            if welcome is not None:
                process, lifeline = welcome
                return process, connection, lifeline
            connection.close()

    def _welcome(self, connection: socket.socket) -> tuple[int, socket.socket] | None:
        """Who is at the other end, and its lifeline; None if it may not come in."""
        if not _same_user(connection):
            return None
        connection.settimeout(_GREETING_TIMEOUT_S)
        try:
            greeting, descriptors = receive(connection)
        except (OSError, ValueError):
            return None
        if isinstance(greeting, dict) and len(descriptors) == 1:
            token, process = greeting.get("token"), greeting.get("process")
            known = isinstance(token, str) and secrets.compare_digest(
                token.encode(), self.token.encode()
            )
            if known and isinstance(process, int):
                return process, socket.socket(fileno=descriptors[0])
        close_all(descriptors)
        return None

    def close(self) -> None:
        """Nobody finds this process any more."""
        self._socket.close()
        if os.getpid() == self._owner:  # not a fork
            shutil.rmtree(self.directory, ignore_errors=True)


class Endpoint:
    """This process's end of the connections to other processes of its host.

    Args:
        me: JAX's index of this process.
        num_processes: How many the program has.
        facts: What the others should know of this process before they connect.
    """

    def __init__(self, me: int, num_processes: int, facts: dict[str, str]) -> None:
        self.me = me
        self._num_processes = num_processes
        self._facts: dict[int, dict[str, str]] = {}
        self._connections: dict[int, socket.socket] = {}
        self._broken: dict[int, str] = {}  # connections that were closed: why
        self._lifelines: dict[int, socket.socket] = {}  # that nobody has taken yet
        self._listener = Listener()
        # A fork's copies would keep everything open after this process has gone.
        os.register_at_fork(after_in_child=self.close)
        found_at = {"path": self._listener.path, "token": self._listener.token}
        _compat.key_value_set(f"{_KEY}{me}", json.dumps({**facts, **found_at}).encode())

    def introduce(self, processes: list[int], timeout: float) -> dict[int, dict[str, str]]:
        """The facts of ``processes``.

        Raises:
            CommunicationError: if a process has not come within ``timeout`` seconds.
        """
        for process in processes:
            if process in self._facts:
                continue
            try:
                text = _compat.key_value_get(f"{_KEY}{process}", timeout)
            except Exception as error:  # of a type of XLA's
                raise CommunicationError(
                    f"process {process} did not come to make the group within {timeout:g} s; call "
                    f"jax_ep.create_group in every process ({error})"
                ) from error
            self._facts[process] = json.loads(text)
        return {process: self._facts[process] for process in processes}

    def exchange(
        self,
        processes: list[int],
        message: dict[str, Any],
        descriptors: list[int],
        timeout: float,
    ) -> Received:
        """Send the same message and descriptors to all ``processes``; what each of them sent.

        The descriptors received are the caller's to close.

        Raises:
            CommunicationError: if a process cannot be reached, or sends nothing.
        """
        self._connect(processes, timeout)
        deadline = time.monotonic() + timeout
        received: Received = {}
        failures: dict[int, str] = dict(self._broken)
        # Whoever fails, the others are heard: what they sent is of this exchange, not of the next.
        for process in processes:
            if process in self._broken:
                continue
            try:
                self._connections[process].settimeout(_remaining(deadline))
                send(self._connections[process], message, descriptors)
            except OSError as error:
                failures[process] = self._break(process, f"it is gone: {error}")
        for process in processes:
            if process in self._broken:
                continue
            try:
                self._connections[process].settimeout(_remaining(deadline))
                received[process] = receive(self._connections[process])
            except TimeoutError:
                reason = f"it sent nothing within {timeout:g} s"
                failures[process] = self._break(process, reason)
            except (OSError, ValueError) as error:
                failures[process] = self._break(process, f"it is gone: {error}")
        for process in processes:
            if process in failures:
                for _, unused in received.values():
                    close_all(unused)
                raise CommunicationError(
                    f"process {process} took no part in making the group: {failures[process]}"
                )
        return received

    def take_lifelines(self) -> dict[int, socket.socket]:
        """The lifelines that nobody has taken yet, by process; they are the caller's to close."""
        taken = self._lifelines
        self._lifelines = {}
        return taken

    def close(self) -> None:
        """Close everything."""
        for connection in [*self._connections.values(), *self._lifelines.values()]:
            connection.close()
        for process in self._connections:
            self._broken.setdefault(process, "the connections were closed")
        self._connections.clear()
        self._lifelines.clear()
        self._listener.close()

    def _break(self, process: int, reason: str) -> str:
        self._connections.pop(process).close()
        self._broken[process] = reason
        return reason

    def _connect(self, processes: list[int], timeout: float) -> None:
        """Make the connections that are not there yet: to lower processes, from higher ones."""
        deadline = time.monotonic() + timeout
        missing = {p for p in processes if p not in self._connections and p not in self._broken}
        facts = self.introduce(sorted(missing), timeout)
        for process in sorted(p for p in missing if p < self.me):
            self._connect_to(process, facts[process], deadline)
        waiting = {p for p in missing if p > self.me}
        while waiting:
            try:
                process, connection, lifeline = self._listener.accept(deadline)
            except TimeoutError as error:
                raise CommunicationError(
                    f"processes {sorted(waiting)} did not connect within {timeout:g} s"
                ) from error
            if process in self._connections or process in self._broken:  # came before
                connection.close()
                lifeline.close()
                continue
            self._connections[process] = connection
            self._lifelines[process] = lifeline
            waiting.discard(process)
        if len(self._connections) + len(self._broken) == self._num_processes - 1:
            self._listener.close()  # all have come

    def _connect_to(self, process: int, facts: dict[str, str], deadline: float) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_remaining(deadline))
            connection.connect(facts["path"])
            if not _same_user(connection):
                raise OSError("it belongs to another user")
            ours, theirs = socket.socketpair()
            self._lifelines[process] = ours
            with theirs:
                greeting = {"process": self.me, "token": facts["token"]}
                send(connection, greeting, [theirs.fileno()])
        except OSError as error:
            connection.close()
            if process in self._lifelines:
                self._lifelines.pop(process).close()
            raise CommunicationError(f"process {process} cannot be reached: {error}") from error
        self._connections[process] = connection


def host_name() -> str:
    """What tells this boot of this host from all others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()} {boot}"


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.getuid()


def _remaining(deadline: float) -> float:
    """Seconds until ``deadline``; a moment after it, for what has come already."""
    return max(0.1, deadline - time.monotonic())


def send(connection: socket.socket, message: Any, descriptors: list[int]) -> None:
    """Send a message of JSON values, with file descriptors."""
    if len(descriptors) > _MAX_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in one message")
    body = json.dumps(message).encode()
    rights = array.array("i", descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    connection.sendmsg([_HEAD.pack(len(body), len(descriptors))], ancillary)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message, and the descriptors that came with it; they are the caller's to close.

    Raises:
        OSError: if the connection was closed, or nothing came in time.
        ValueError: if what came is not a message.
    """
    rights = array.array("i")
    head, ancillary, _, _ = connection.recvmsg(
        _HEAD.size,
        socket.CMSG_SPACE(_MAX_DESCRIPTORS * rights.itemsize),
        socket.MSG_CMSG_CLOEXEC,  # programs that this one starts must not inherit them
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
    descriptors = list(rights)
    try:
        head += _receive_exactly(connection, _HEAD.size - len(head))
        length, count = _HEAD.unpack(head)
        if count != len(descriptors):
            raise ValueError(f"{len(descriptors)} of {count} descriptors came")
        return json.loads(_receive_exactly(connection, length)), descriptors
    except BaseException:
        close_all(descriptors)
        raise


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that came with a message."""
    for descriptor in descriptors:
        os.close(descriptor)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size > 0:
        part = connection.recv(size)
        if not part:
            raise ConnectionError("the connection was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
