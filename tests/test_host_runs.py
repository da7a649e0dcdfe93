"""How tests start processes of logical hosts and judge them (``host_runs.py``), without GPUs."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

import gpu_processes
import host_runs
import machine
import run_hosts
from host_runs import Ended
from test_hosts_failures import check_noticed

pytestmark = pytest.mark.one_process("starts programs of its own")

PROGRAM = """
import os, sys, time
program, processes, rank, port = sys.argv[1:5]
of = os.environ
print(f"said at {time.time():.3f}: {program} {processes} {rank} on GPU {of['JAX_EP_TEST_GPU']}",
      of["JAX_EP_TEST_FOLDER"], of["MORE"], of["JAX_EP_NETWORK_LANES"], flush=True)
time.sleep(60 if program == "stuck" else 0)
sys.exit(3 + int(rank))
"""


@pytest.fixture
def program(monkeypatch, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.delenv("JAX_EP_TEST_PLATFORM", raising=False)
    monkeypatch.setattr(gpu_processes, "HOST_PROGRAMS", path)
    monkeypatch.setattr(machine, "count_gpus", lambda: 2)
    monkeypatch.setattr(run_hosts, "build", lambda: pathlib.Path("/late.so"))


def test_processes_and_how_they_end(program, tmp_path):
    found = host_runs.run("some", 2, 1, tmp_path, late=False, MORE="more")
    assert [process.status for process in found] == [3, 4]
    for rank, process in enumerate(found):
        at, text = process.line("said")
        assert abs(at - time.time()) < 60
        assert text == f"some 2 {rank} on GPU {rank} {tmp_path} more 3"


def test_stuck_processes_are_ended(program, tmp_path):
    begin = time.monotonic()
    with host_runs.started("stuck", 2, 1, tmp_path, late=False, MORE="") as running:
        host_runs.wait_for(running[0], "said")
        found = host_runs.ended(running, 1)
    assert all(process.was_stuck for process in found) and time.monotonic() - begin < 50
    with pytest.raises(AssertionError, match="no line 'other'"):
        found[1].line("other")
    with (
        host_runs.started("some", 2, 1, tmp_path, late=False, MORE="") as running,
        pytest.raises(AssertionError, match="ended before it printed 'never'"),
    ):
        host_runs.wait_for(running[0], "never")


def test_environment(monkeypatch):
    """What ``run_hosts`` sets, and nothing that was there before."""
    monkeypatch.setenv("JAX_EP_TEST_PLATFORM", "cuda")
    monkeypatch.setenv("SOMETHING", "else")
    found = host_runs.environment(3, 2, run_hosts.Late(pathlib.Path("/late.so"), 7))
    assert found["JAX_EP_LATE_HOST"] == "host1" and found["JAX_EP_LATE_DELAY_US"] == "7"
    assert found["JAX_EP_TEST_RANKS_PER_HOST"] == "2" and "/late.so" in found["LD_PRELOAD"]
    assert not {name for name in found if found[name] == os.environ.get(name)}


WAITED = (
    "rank 0, op dispatch, phase arrival: waited 8.000001 s for rank 3; expected the chunk of ..."
)
TOLD = (
    "rank 1, op plan, phase rows: another rank of the group failed while this one waited for rank 0"
)
GONE = "rank 2: the process of rank 3 is gone. The group takes no more ops; start the job again."


def reported(error: str, poisoned: str = "True", more: str = "") -> Ended:
    return Ended(7, f"CommunicationError at 105.0: {error}\npoisoned at 105.1: {poisoned}\n{more}")


@pytest.mark.parametrize(
    ("process", "is_right"),
    [
        (reported(WAITED), True),
        (reported(TOLD, "no result"), True),
        (reported(GONE, "False"), True),
        (reported(WAITED, "False"), False),
        (reported(WAITED.replace("rank 3", "rank 1")), False),
        (reported(WAITED.replace("dispatch", "other")), False),
        (reported(WAITED, more="check raised nothing at 105.2: \n"), False),
        (Ended(7, reported(WAITED).text.replace("105.0", "111.0")), False),
        (Ended(7, "fine"), False),
    ],
)
def test_reports_of_failures(process, is_right):
    def check() -> None:
        check_noticed(process, since=100.0, within=10.0, peers={3}, ops="plan|dispatch|combine")

    if is_right:
        check()
    else:
        with pytest.raises(AssertionError):
            check()
