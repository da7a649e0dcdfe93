"""How processes find each other, hand over descriptors and agree, and what they refuse."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

import jax_ep
import machine
from jax_ep._errors import CommunicationError
from jax_ep._groups import gpu_side

SCRIPT = pathlib.Path(__file__).with_name("support") / "handle_processes.py"


def play(scene: str, processes: int, folder: pathlib.Path, **env: str) -> list[object]:
    """What each process of a scene saw; None for one that was killed."""
    temporary = folder / "tmp"
    temporary.mkdir()
    path = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
    base = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)}
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), scene, str(folder), str(processes)],
        env={**base, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        codes, _ = running.communicate(timeout=120)
        assert running.returncode == 0, codes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    saw: list[object] = []
    for me, code in enumerate(json.loads(codes.splitlines()[-1])):
        output = (folder / f"output_{me}").read_text()
        lines = [line for line in output.splitlines() if line.startswith("SAW ")]
        assert lines or code == -signal.SIGKILL, output
        saw.append(json.loads(lines[0][4:]) if lines else None)
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
        assert (saw["max_blocks"], saw["ranks_per_gpu"]) == (33, 3)  # three ranks on one GPU
        # Two ops in flight and those in line; an inbox for the ranks of the group.
        assert saw["rooms"] == [[3, 8, 64, []]] * 3
        workspaces = saw["sizes"][::2]  # each with an array after it
        assert workspaces == [3072 + 72 * n for n in (3, 3, 2 if me < 2 else 1)]
        assert saw["more_descriptors"] == 0
        assert saw["listening"] == []  # all have come


def test_errors_reach_all_processes(tmp_path):
    """A process cannot allocate or cannot map: all raise the same error, and then make a group."""
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


def test_hosts_with_unlike_networks(tmp_path):
    """No wheel, another version or other settings of one process are the same text in all of them.

    All know soon of one that dies meanwhile, on its own host and on the other one.
    """
    *saw, dead = play("networks", 4, tmp_path)
    assert dead is None
    for one in saw:
        assert one["nothing"] is None
        assert one["wheel"] == (
            "in process 3 NVSHMEM did not load (no file); pip install nvidia-nvshmem-cu13"
        )
        assert one["version"] == (
            "the processes differ in NVSHMEM's version: process 2 has [3, 4, 5], process 3 has "
            "[3, 4, 6]"
        )
        assert one["settings"] == (
            "the processes differ in the settings of the network: process 2 has [3, 262144, 262144, "
            "2147483648], process 3 has [5, 262144, 262144, 2147483648]"
        )
        assert "process 3" in one["dead"] and "gone" in one["dead"]
        assert one["seconds"] < 20  # of 60


def test_groups_within_each_of_several_hosts(tmp_path):
    """Sockets and mappings stay within a host; decisions and errors are those of all processes."""
    for me, saw in enumerate(play("hosts", 4, tmp_path)):
        assert saw["obstacles"] == [None] * 3
        assert saw["ranks_per_host"] == [2, 2, None]  # of the last, ranks of a host are apart
        assert saw["largest"] == 3
        made, failed, again, across = saw["results"]
        assert made == again == across == "made"
        assert failed == "the group was not made: process 3: MemoryError: no room"
        assert saw["connections"] == [me ^ 1]
        assert {text.split(" at ")[0] for text in saw["imported"]} == {f"process {me ^ 1}"}
        for specs in saw["specs"]:
            [(number, ranks)] = specs.items()
            assert number == str(me // 2)
            assert [rank[1] for rank in ranks] == [me // 2 * 2, me // 2 * 2 + 1]
        # Of a group across hosts, too, only the ranks of this host are told to each other.
        assert [[rank[1] for rank in specs["0"]] for specs in saw["across"]] == [
            [me // 2 * 2, me // 2 * 2 + 1]
        ]
        assert saw["first_rank"] == me // 2 * 2
        assert saw["places"] == [["shared on host 0"] * 2, ["shared on host 1"] * 2]
        assert (saw["max_blocks"], saw["ranks_per_gpu"]) == (50, 2)  # two ranks on each GPU
        assert saw["rooms"][-1] == [1, 8, 64, []]  # nothing is in flight across hosts


def test_process_of_another_host_that_does_not_come(tmp_path):
    first, second, third, _ = play("half_a_host", 4, tmp_path)
    for saw in (first, second, third):
        assert saw["seconds"] < 30
        assert re.search(r"process(es)? \[?3\]? (did not connect|took no part)", saw["result"])


def test_killed_process(tmp_path):
    """The others raise at once and at the next attempt, and can make a group of their own."""
    *left, gone = play("killed", 3, tmp_path)
    assert gone is None
    for saw in left:
        first, second, own = saw["results"]
        assert "process 2 took no part in making the group: it is gone" in first
        assert "process 2 took no part in making the group: it is gone" in second
        assert own == "made"
        assert saw["seconds"] < 5


def test_absent_ranks(tmp_path):
    """Those that are left make a group of the same ranks, without memory of the one that is gone."""
    first, gone, last = play("absent_ranks", 3, tmp_path)
    assert gone is None
    for me, saw in (0, first), (2, last):
        assert saw["results"] == ["made"] * 4
        assert saw["found"] == [None, 3, False]
        assert saw["more_descriptors"] == 0
        ordinals, processes, workspaces, regions = zip(*saw["specs"], strict=True)
        assert ordinals == tuple(0 if p == me else -1 for p in range(3))
        assert processes == (0, 1, 2)
        assert [bool(address) for address in workspaces] == [True, False, True]
        assert [len(memory) for memory in regions] == [1, 0, 1]
        assert saw["room"] == [3, 8, 64, [1]]
        assert saw["gpus"][0] == saw["gpus"][2] != saw["gpus"][1]


def test_forks_hold_no_connections(tmp_path):
    """A fork, such as a data loader's process, may outlive the process that made it."""
    saw, gone = play("forked", 2, tmp_path)
    assert gone is None
    assert "process 1 took no part in making the group: it is gone" in saw["result"]
    assert saw["seconds"] < 5


def test_process_that_does_not_come(tmp_path):
    first, second, _ = play("absent", 3, tmp_path)
    for text in (first, second):
        assert text.startswith("process 2 did not come to make the group within 2 s; call jax_ep")


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
    """Deaths and goodbyes are told apart and noticed within 50 ms; forks disturb neither."""
    path = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
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
    assert gpu_side.blocks_per_rank(ranks, num_sms) == blocks


@pytest.mark.parametrize(("num_sms", "ranks", "most"), [(132, 13, 12), (78, 6, 5)])
def test_too_many_ranks_share_a_gpu(num_sms, ranks, most):
    with pytest.raises(CommunicationError, match=f"at most {most} ranks on a GPU .* got {ranks}"):
        gpu_side.blocks_per_rank(ranks, num_sms)
