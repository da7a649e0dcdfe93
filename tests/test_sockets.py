"""The sockets between processes: what they hand over, and whom they refuse.

Here one process plays all of them, with an end for each.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import threading
import time

import pytest

from jax_ep import _compat
from jax_ep._errors import CommunicationError
from jax_ep._groups import processes


@pytest.fixture
def store(monkeypatch):
    """A key-value store."""
    values: dict[str, bytes] = {}

    def get(key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while key not in values:
            if time.monotonic() > deadline:
                raise RuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.005)
        return values[key]

    monkeypatch.setattr(_compat, "key_value_set", values.__setitem__)
    monkeypatch.setattr(_compat, "key_value_get", get)
    return values


@pytest.fixture
def ends(store):
    """The ends of two processes of three."""
    both = [processes.Endpoint(me, 3, {"host": "here"}) for me in (0, 1)]
    yield both
    for end in both:
        end.close()


def in_background(do):
    """Runs ``do`` in a thread; calling the result waits for it, and gives what it returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(do()))
    thread.start()

    def join():
        thread.join(timeout=30)
        assert results, "it did not end"
        return results[0]

    return join


def error_of(do):
    """The text of the CommunicationError of ``do``."""
    with pytest.raises(CommunicationError) as caught:
        do()
    return str(caught.value)


@pytest.fixture
def knock():
    """A function that connects to an end with a greeting; gives the connection and the lifeline."""
    with contextlib.ExitStack() as stack:

        def connect(*arguments):
            return [stack.enter_context(opened) for opened in greet(*arguments)]

        yield connect


def greet(end, process, token, lifeline=True):
    """As ``knock``, but the caller closes the sockets."""
    facts = end.introduce([end.me], 1.0)[end.me]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(facts["path"])
    ours, theirs = socket.socketpair()
    token = facts["token"] if token is None else token
    with theirs:
        greeting = {"process": process, "token": token}
        processes.send(connection, greeting, [theirs.fileno()] if lifeline else [])
    return connection, ours


def is_closed(connection) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_the_socket_is_this_users_alone(ends):
    path = pathlib.Path(ends[0].introduce([0], 1.0)[0]["path"])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.is_socket()
    ends[0].close()
    assert not path.parent.exists()


def test_long_temporary_directories(store, tmp_path, monkeypatch):
    """A socket's path has 107 characters at most."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(processes.tempfile, "tempdir", str(long))
    end = processes.Endpoint(0, 2, {})
    path = end.introduce([0], 1.0)[0]["path"]
    assert len(path) <= 107 and pathlib.Path(path).is_socket()
    end.close()
    assert not list(long.iterdir())


def test_descriptors_arrive_and_are_not_inherited(ends):
    first, second = ends
    with open(os.memfd_create("memory"), "wb+", buffering=0) as file:
        file.write(b"rows")
        join = in_background(lambda: first.exchange([1], {"n": 1}, [file.fileno()] * 3, 20.0))
        message, descriptors = second.exchange([0], {"n": 2}, [], 20.0)[0]
        assert join() == {1: ({"n": 2}, [])}
    assert message == {"n": 1} and len(descriptors) == 3
    assert all(os.pread(descriptor, 9, 0) == b"rows" for descriptor in descriptors)
    assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    processes.close_all(descriptors)


@pytest.mark.parametrize("token", ["", "0" * 32, "é", 7, ["a"]])
def test_wrong_tokens_are_refused(ends, knock, token):
    """A process with a wrong token is refused, and awaited processes can still connect."""
    first, second = ends
    connection, lifeline = knock(first, 1, token)
    join = in_background(lambda: first.exchange([1], {}, [], 20.0))
    second.exchange([0], {}, [], 20.0)
    join()
    assert is_closed(connection) and is_closed(lifeline)


@pytest.mark.parametrize(
    ("process", "lifeline"),
    [("1", True), (None, True), (1, False)],
    ids=["text", "none", "lifeline"],
)
def test_greetings_with_the_token_but_wrong_are_refused(ends, knock, process, lifeline):
    first, second = ends
    connection, _ = knock(first, process, None, lifeline)
    join = in_background(lambda: first.exchange([1], {}, [], 20.0))
    second.exchange([0], {}, [], 20.0)
    join()
    assert is_closed(connection)


def test_other_users_are_refused(ends, knock, monkeypatch):
    """Both sides check: the one that connects and the one that accepts."""
    first, second = ends
    monkeypatch.setattr(processes.os, "getuid", lambda: os.geteuid() + 1)
    connection, _ = knock(first, 1, None)
    text = error_of(lambda: first.exchange([1], {}, [], 1.0))
    assert text == "processes [1] did not connect within 1 s"
    assert is_closed(connection)
    text = error_of(lambda: second.exchange([0], {}, [], 1.0))
    assert text == "process 0 cannot be reached: it belongs to another user"


def test_silence_breaks_the_connection_for_good(ends):
    """A late message is not taken for the answer to another one."""
    first, second = ends
    join = in_background(lambda: first.exchange([1], {"n": 1}, [], 20.0))
    second.exchange([0], {"n": 1}, [], 20.0)
    join()
    text = "process 1 took no part in making the group: it sent nothing within 0.2 s"
    assert error_of(lambda: first.exchange([1], {"n": 2}, [], 0.2)) == text
    for _ in range(2):
        text = error_of(lambda: second.exchange([0], {"n": 3}, [], 20.0))
        assert text.startswith("process 0 took no part in making the group: it is gone")
    text = "process 1 took no part in making the group: it sent nothing within 0.2 s"
    assert error_of(lambda: first.exchange([1], {"n": 4}, [], 20.0)) == text


def test_messages_that_are_cut_leak_no_descriptors():
    ours, theirs = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    with ours:
        rights = processes.array.array("i", [0, 1, 2])
        ours.sendmsg(
            [processes._HEAD.pack(100, 3), b"{"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
    with pytest.raises(ConnectionError):
        processes.receive(theirs)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    theirs.close()
