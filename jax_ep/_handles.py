"""Sockets between the processes of one host that share groups of GPUs.

A file descriptor of device memory opens all of an allocation to whoever holds it. So descriptors
travel only over Unix sockets in a directory that nobody else may enter, to a peer of the same user
that knows a random token, which it got from JAX's key-value store.

There is one connection for each pair of processes, made once and kept, and beside it a *lifeline*: a
pair of sockets over which nothing is sent, and which closes when the process at its other end is gone.
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
from typing import Any

from jax_ep import _compat
from jax_ep._errors import CommunicationError

_KEY = "jax_ep/processes/"
_MAX_DESCRIPTORS = 250  # of one message, which the kernel bounds by 253

_connections: dict[int, socket.socket] = {}
_lifelines: dict[int, socket.socket] = {}  # that nobody has taken yet
_listener: Listener | None = None


class Listener:
    """The socket at which this process is to be found, and the token that opens it."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="jax_ep-")  # readable by this user alone
        self.path = os.path.join(self.directory, secrets.token_hex(8))
        self.token = secrets.token_hex(16)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(self.path)
        self.socket.listen(64)
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)

    def accept(self, timeout: float) -> int:
        """Take the next peer that is who it says it is; its process.

        Raises:
            TimeoutError: if none came.
        """
        self.socket.settimeout(timeout)
        while True:
            connection, _ = self.socket.accept()
            connection.settimeout(timeout)
            process = self._welcome(connection)
            if process is not None:
                return process
            connection.close()

    def _welcome(self, connection: socket.socket) -> int | None:
        """The process at the other end, whose connections are kept; None if it is not one of ours."""
        if not _same_user(connection):
            return None
        try:
            greeting, descriptors = receive(connection)
        except (OSError, ValueError):
            return None
        is_ours = (
            isinstance(greeting, dict)
            and secrets.compare_digest(str(greeting.get("token")), self.token)
            and len(descriptors) == 1
        )
        if not is_ours:
            for descriptor in descriptors:
                os.close(descriptor)
            return None
        process = int(greeting["process"])
        _connections[process] = connection
        _lifelines[process] = socket.socket(fileno=descriptors[0])
        return process


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.getuid()


def host_name() -> str:
    """What tells this boot of this host from all others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()} {boot}"


def introduce(me: int, processes: list[int], timeout: float) -> dict[int, dict[str, str]]:
    """Publish where this process is to be found; the same of all ``processes``.

    Raises:
        CommunicationError: if a process has not come within ``timeout`` seconds.
    """
    global _listener
    if _listener is None:
        _listener = Listener()
        what = {"host": host_name(), "path": _listener.path, "token": _listener.token}
        _compat.key_value_set(f"{_KEY}{me}", json.dumps(what).encode())
    found = {}
    for process in processes:
        try:
            text = _compat.key_value_get(f"{_KEY}{process}", timeout)
        except Exception as error:
            raise CommunicationError(
                f"process {process} did not come to make the group within {timeout:g} s; call "
                f"jax_ep.create_group in every process ({error})"
            ) from error
        found[process] = json.loads(text)
    return found


def connect(me: int, peers: dict[int, dict[str, str]], timeout: float) -> dict[int, socket.socket]:
    """The connections to ``peers``, by process; makes those that are not there yet.

    Raises:
        CommunicationError: if a peer cannot be reached.
    """
    assert _listener is not None
    missing = [process for process in peers if process not in _connections]
    for process in (p for p in missing if p < me):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(peers[process]["path"])
            ours, theirs = socket.socketpair()
            with theirs:
                greeting = {"process": me, "token": peers[process]["token"]}
                send(connection, greeting, [theirs.fileno()])
        except OSError as error:
            raise CommunicationError(f"process {process} cannot be reached: {error}") from error
        _connections[process] = connection
        _lifelines[process] = ours
    waiting = {p for p in missing if p > me}
    while waiting:
        try:
            waiting.discard(_listener.accept(timeout))
        except TimeoutError as error:
            raise CommunicationError(
                f"processes {sorted(waiting)} did not connect within {timeout:g} s"
            ) from error
    return {process: _connections[process] for process in peers}


def take_lifelines() -> dict[int, socket.socket]:
    """The lifelines that nobody has taken yet, by process; they are the caller's to close."""
    taken = dict(_lifelines)
    _lifelines.clear()
    return taken


def exchange(
    connections: dict[int, socket.socket],
    message: dict[str, Any],
    descriptors: list[int],
    timeout: float,
) -> dict[int, tuple[dict[str, Any], list[int]]]:
    """Send the same message and descriptors to all peers; what each of them sent.

    Raises:
        CommunicationError: if a peer's answer does not come.
    """
    received = {}
    for process, connection in connections.items():
        connection.settimeout(timeout)
        try:
            send(connection, message, descriptors)
        except OSError as error:
            raise CommunicationError(f"process {process} is gone: {error}") from error
    for process, connection in connections.items():
        try:
            received[process] = receive(connection)
        except (OSError, ValueError) as error:
            raise CommunicationError(
                f"process {process} sent nothing within {timeout:g} s, or is gone: {error}"
            ) from error
    return received


def send(connection: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    """Send a message of JSON values, with file descriptors."""
    descriptors = descriptors or []
    if len(descriptors) > _MAX_DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors in one message")
    body = json.dumps(message).encode()
    head = struct.pack("<II", len(body), len(descriptors))
    rights = array.array("i", descriptors)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    connection.sendmsg([head], ancillary)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message, and the descriptors that came with it; they are the caller's to close."""
    size = struct.calcsize("<II")
    descriptors = array.array("i")
    head, ancillary, _, _ = connection.recvmsg(
        size, socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize)
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    head += _receive_exactly(connection, size - len(head))
    length, count = struct.unpack("<II", head)
    if count != len(descriptors):
        raise ValueError(f"{len(descriptors)} of {count} descriptors came")
    return json.loads(_receive_exactly(connection, length)), list(descriptors)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size > 0:
        part = connection.recv(size)
        if not part:
            raise ConnectionError("the connection was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
