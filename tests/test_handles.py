"""How processes find each other, hand over descriptors and agree, and what they do not let in."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import jax_ep
from jax_ep import _compat
from jax_ep._errors import CommunicationError
from jax_ep._groups import gpu_side, processes

SCRIPT = pathlib.Path(__file__).with_name("support") / "handle_processes.py"


def play(scene: str, processes: int, folder: pathlib.Path, **env: str) -> list[object]:
    """What each process of a scene saw; None of one that was killed."""
    temporary = folder / "tmp"
    temporary.mkdir()
    root = pathlib.Path(jax_ep.__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    base = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scene, str(folder), str(me), str(processes)],
            env={**base, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for me in range(processes)
    ]
    saw: list[object] = []
    try:
        for process in running:
            output, _ = process.communicate(timeout=120)
            lines = [line for line in output.splitlines() if line.startswith("SAW ")]
            assert lines or process.returncode == -signal.SIGKILL, output
            saw.append(json.loads(lines[0][4:]) if lines else None)
    finally:
        for process in running:
            process.kill()
    assert not list(temporary.glob("jax_ep-*")) or None in saw, "a process left its socket behind"
    return saw


# Several processes --------------------------------------------------------------------------------


def test_groups_of_three_processes(tmp_path):
    """Each maps what the others gave, in rank order, once; nothing stays open."""
    for me, saw in enumerate(play("groups", 3, tmp_path)):
        assert saw["results"] == ["made"] * 3
        others = [p for p in range(3) if p != me]
        first = saw["imported"][:4]
        assert [text.split(" at ")[0] for text in first] == [
            f"process {p}" for p in others for _ in "wr"
        ]
        [ranks] = saw["specs"][0].values()
        assert [rank[0] for rank in ranks] == [0 if p == me else -1 for p in range(3)]
        assert [rank[1] for rank in ranks] == [0, 1, 2]
        addresses = [rank[2] for rank in ranks] + [rank[3][0][0] for rank in ranks]
        assert len(set(addresses)) == 6
        assert all(rank[3][0][1] == 4096 for rank in ranks)
        # Side by side: only one's own group, and only the memory of its ranks.
        [(number, ranks)] = saw["specs"][2].items()
        assert number == ("0" if me < 2 else "1")
        assert [rank[1] for rank in ranks] == ([0, 1] if me < 2 else [2])
        assert saw["max_blocks"] == 33  # three ranks on one GPU
        assert saw["more_descriptors"] == 0
        assert saw["listening"] == []  # all have come


def test_errors_reach_all_processes(tmp_path):
    """One that cannot allocate, one that cannot map: the same error in all, and then a group."""
    for saw in play("failures", 3, tmp_path):
        allocate, imported, made = saw["results"]
        assert allocate == "the group was not made: process 1: MemoryError: no room"
        assert imported == "the group was not made: process 1: cuMemMap failed: out of memory"
        assert made == "made"
        assert saw["more_descriptors"] == 0


def test_agreement(tmp_path):
    for me, saw in enumerate(play("agreements", 3, tmp_path)):
        largest, mismatch, pair = saw
        assert largest == 5
        who, here, there = ("1", "one", "other") if me == 0 else ("0", "other", "one")
        assert f"process {who} makes another group ({there}) than this one ({here})" in mismatch
        assert pair == (15 if me == 2 else 10)


def test_an_obstacle_of_one_is_that_of_all(tmp_path):
    assert play("obstacles", 2, tmp_path) == ["in process 1 there is no library"] * 2


def test_killed_process(tmp_path):
    """The others raise at once, again at the next try, and can make a group of their own."""
    *left, gone = play("killed", 3, tmp_path)
    assert gone is None
    for saw in left:
        first, second, own = saw["results"]
        assert "process 2 took no part in making the group: it is gone" in first
        assert "process 2 took no part in making the group: it is gone" in second
        assert own == "made"
        assert saw["seconds"] < 5


def test_forks_hold_no_connections(tmp_path):
    """A data loader's process, say, that outlives the one that made it."""
    saw, gone = play("forked", 2, tmp_path)
    assert gone is None
    assert "process 1 took no part in making the group: it is gone" in saw["result"]
    assert saw["seconds"] < 5


def test_process_that_does_not_come(tmp_path):
    first, second, _ = play("absent", 3, tmp_path)
    for text in (first, second):
        assert text.startswith("process 2 did not come to make the group within 2 s; call jax_ep")


# One process, with ends of its own ----------------------------------------------------------------


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
    """Connects to an end with a greeting; the connection and the lifeline."""
    with contextlib.ExitStack() as stack:

        def connect(*arguments):
            return [stack.enter_context(opened) for opened in greet(*arguments)]

        yield connect


def greet(end, process, token, lifeline=True):
    """``knock``; the sockets are the caller's to close."""
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
    """Whoever comes with one is sent away, and those who are awaited still come in."""
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
    """On both sides: who connects, and whom one connects to."""
    first, second = ends
    monkeypatch.setattr(processes.os, "getuid", lambda: os.geteuid() + 1)
    connection, _ = knock(first, 1, None)
    text = error_of(lambda: first.exchange([1], {}, [], 1.0))
    assert text == "processes [1] did not connect within 1 s"
    assert is_closed(connection)
    text = error_of(lambda: second.exchange([0], {}, [], 1.0))
    assert text == "process 0 cannot be reached: it belongs to another user"


def test_silence_breaks_the_connection_for_good(ends):
    """What comes too late is not taken for the answer to something else."""
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


# The native watch ---------------------------------------------------------------------------------

WATCH = """
import os, signal, socket, sys, time, warnings
from jax_ep import _cuda
warnings.simplefilter("ignore")

def wait(expected):
    begin = time.monotonic()
    while _cuda.gone_processes() != expected:
        assert time.monotonic() - begin < 10, _cuda.gone_processes()
        time.sleep(0.001)
    return time.monotonic() - begin

pairs = [socket.socketpair() for _ in range(5)]
for process, (ours, _) in enumerate(pairs):
    assert _cuda.watch_process(process, ours.fileno()) is None
    ours.close()
time.sleep(0.1)
assert _cuda.gone_processes() == {}
pairs[1][1].close()
seconds = wait({1: False})
assert seconds < 0.05, seconds
pairs[2][1].send(b"g")
wait({1: False, 2: True})
pairs[2][1].close()  # the end after a goodbye changes nothing
time.sleep(0.1)
assert _cuda.gone_processes() == {1: False, 2: True}

# A fork says nothing in the name of this process, and holds nothing open.
child = os.fork()
if child == 0:
    _cuda.say_goodbye()
    os._exit(0)
os.waitpid(child, 0)
pairs[0][1].setblocking(False)
try:
    print("fork said", pairs[0][1].recv(1))
except BlockingIOError:
    print("fork said nothing")
assert _cuda.watch_process(5, int(sys.argv[1])) is None
os.close(int(sys.argv[1]))
sleeper = os.fork()
if sleeper == 0:
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    time.sleep(60)
    os._exit(0)
print("sleeper", sleeper)
_cuda.say_goodbye()
pairs[0][1].settimeout(5)
print("goodbye", pairs[0][1].recv(9), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_ep._cuda") is None, reason="the GPU backend was not built"
)
def test_watch():
    """Ends and goodbyes are told apart and noticed within 50 ms; forks neither speak nor linger."""
    root = pathlib.Path(jax_ep.__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours, theirs = socket.socketpair()
    with theirs:
        done = subprocess.run(
            [sys.executable, "-c", WATCH, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
        )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    try:
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert said["fork"] == "said nothing"
        assert said["goodbye"] == "b'g'"
        with ours:
            ours.settimeout(5)
            assert ours.recv(9) == b"g"
            assert ours.recv(9) == b""  # though the fork is there still
        os.kill(int(said["sleeper"]), 0)
    finally:
        if "sleeper" in said:
            os.kill(int(said["sleeper"]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("num_sms", "ranks", "blocks"),
    [
        (132, 1, 100),
        (132, 2, 50),
        (132, 3, 33),
        (132, 8, 12),
        (132, 12, 8),
        (78, 1, 46),
        (78, 5, 9),
    ],
)
def test_blocks_of_ranks_that_share_a_gpu(num_sms, ranks, blocks):
    """All of them fit the GPU at once."""
    assert gpu_side.blocks_per_rank(["a"] * ranks + ["b"], num_sms) == blocks


@pytest.mark.parametrize(("num_sms", "ranks", "most"), [(132, 13, 12), (78, 6, 5)])
def test_too_many_ranks_share_a_gpu(num_sms, ranks, most):
    with pytest.raises(CommunicationError, match=f"at most {most} ranks on a GPU .* got {ranks}"):
        gpu_side.blocks_per_rank(["a"] * ranks, num_sms)
