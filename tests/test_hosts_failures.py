"""Processes of logical hosts that fail or lack something: all others end with an error, and in time.

The processes run ``support/host_programs.py``, so pytest lives on and judges what they say and when.
"""

from __future__ import annotations

import re
import signal
import time

import pytest

import host_programs
import machine
from conftest import PLATFORM
from host_runs import Ended, ended, run, started, wait_for

END_S = 60.0  # for processes to end after a failure; JAX itself waits 10 s for one that is gone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.one_process("its programs have processes of their own"),
    pytest.mark.skipif(PLATFORM != "cuda", reason="needs a GPU"),
]


def check_noticed(
    process: Ended, *, since: float, within: float, peers: set[int], ops: str
) -> None:
    """It has reported in time what it waited for, with poison where there is a result."""
    at, error = process.line("CommunicationError")
    assert at - since < within, error
    _, poisoned = process.line("poisoned")
    # A process that was lost between two ops is an error, but has spoilt no result.
    assert poisoned in ("True", "no result") or ", op " not in error, process.text
    assert "check raised nothing" not in process.text
    told = "another rank of the group failed" in error
    named = {int(rank) for rank in re.findall(r"(?:for|of) rank (\d+)", error)}
    assert told or named & peers, f"{error}\nnames none of {sorted(peers)}"
    assert re.search(rf"^rank \d+(: |, op ({ops}), phase (arrival|rows|close): )", error), error


OPS = "plan|dispatch|combine"


@pytest.mark.parametrize("when", ["between", "in the middle"])
@pytest.mark.parametrize(
    ("hosts", "ranks", "late"),
    [(2, 1, True), (2, 2, True), (2, 2, False)],
    ids=["2x1 late", "2x2 late", "2x2"],
)
def test_a_process_that_is_killed(hosts, ranks, late, when, tmp_path):
    """The others raise within the deadline of the op, and end without waiting for it in NVSHMEM.

    "between": when it has ended an op and does not come to the next one, in which the others wait.
    """
    count = hosts * ranks
    if when == "in the middle" and machine.count_gpus() < count:
        pytest.skip(
            f"needs {count} GPUs: MPS does not keep clients apart from one that dies in a kernel"
        )
    with started(
        "killed", hosts, ranks, tmp_path, late=late, JAX_EP_TEST_KILL=when.partition(" ")[0]
    ) as running:
        victim = running[-1]
        for process in running:
            wait_for(process, "running")
        if when == "between":
            wait_for(victim, "stopped")
        victim.send_signal(signal.SIGKILL)
        killed_at = time.time()
        found = ended(running, END_S)
    assert found[-1].status == -signal.SIGKILL
    # A lost process of the same machine is known at once, if that is not of another logical host.
    knows_at_once = not late or ranks > 1
    within = 5.0 if knows_at_once else host_programs.TIMEOUT_S + 5.0
    for process in found[:-1]:
        assert not process.was_stuck, process.text
        assert process.status != 0, process.text
        check_noticed(process, since=killed_at, within=within, peers={count - 1}, ops=OPS)


@pytest.mark.parametrize(("hosts", "ranks"), [(2, 1), (2, 2)], ids=["2x1", "2x2"])
def test_a_network_that_stops(hosts, ranks, tmp_path):
    """All that one process sends gets lost: all raise within the deadline, and all end."""
    found = run("network_stops", hosts, ranks, tmp_path, late=True)
    stopped_at, _ = found[-1].line("stopped")
    last_host = set(range((hosts - 1) * ranks, hosts * ranks))
    for rank, process in enumerate(found):
        # NVSHMEM itself may end the process whose network fails, and the late network says why.
        ended_by_nvshmem = process is found[-1] and "cannot be reached" in process.text
        if ended_by_nvshmem and process.status not in (0, host_programs.NOTICED):
            continue
        assert process.status == host_programs.NOTICED, process.text
        peers = set(range(hosts * ranks)) if rank in last_host else last_host
        # Ranks of the same host, which are told later, may wait as long again.
        within = 2 * host_programs.TIMEOUT_S + 5.0
        check_noticed(process, since=stopped_at, within=within, peers=peers, ops=OPS)
    waited = [
        p
        for p in found
        if re.search(r"phase arrival: waited [89]", p.line("CommunicationError")[1])
    ]
    assert waited, "nobody names the chunk that did not come"


def test_a_process_that_ends_while_others_run(tmp_path):
    """Its end waits for the others in vain, for a while; their next op fails within its deadline."""
    *others, last = run("leaves", 2, 1, tmp_path, late=True)
    left_at, _ = last.line("ends")
    assert last.status == 0, last.text
    for process in others:
        assert process.status == host_programs.NOTICED, process.text
        check_noticed(
            process, since=left_at, within=host_programs.TIMEOUT_S + 5.0, peers={1}, ops=OPS
        )


@pytest.mark.parametrize("late", [True, False], ids=["late", "reached"])
def test_processes_that_end_one_after_the_other(late, tmp_path):
    """All wait for the last one, and NVSHMEM is ended in all."""
    found = run("ends_early", 2, 1, tmp_path, late=late)
    for process in found:
        assert process.status == 0, process.text
        assert process.line("at exit")[1] == "NVSHMEM runs: False"
    assert found[-1].line("ends")[0] < found[0].line("ends")[0]
    assert found[-1].line("at exit")[0] > found[0].line("ends")[0]


@pytest.mark.parametrize(
    ("hosts", "ranks", "late"), [(2, 1, True), (2, 2, True), (2, 2, False)], ids=str
)
def test_a_process_that_does_not_come(hosts, ranks, late, tmp_path):
    """Those that came to make the group say who did not, after the time for that."""
    *came, missing = run("missing", hosts, ranks, tmp_path, late=late)
    assert missing.status == 0, missing.text
    for process in came:
        assert process.status == host_programs.NOTICED, process.text
        _, error = process.line("CommunicationError")
        after = float(re.match(r"after ([\d.]+) s: ", error)[1])
        # Other hosts wait half as long again, and compiling may keep a process busy.
        assert host_programs.MEETING_S - 1 <= after <= 1.5 * host_programs.MEETING_S + 10, error
        assert (
            f"process {hosts * ranks - 1} " in error and "did not come to make the group" in error
        )


def test_processes_that_differ(tmp_path):
    """No wheel, another version or other settings in one process are one error in all of them.

    Where the backend may be chosen, all take the reference. In the end, when nothing differs, the same
    processes make the group.
    """
    for process in run("unlike", 2, 1, tmp_path, late=False):
        assert process.status == 0, process.text
        for what, text in {
            "wheel": "in process 1 NVSHMEM did not load (libnvshmem_of_no_wheel.so.3",
            "version": "in process 1 NVSHMEM 3.8.0 is installed, and jax_ep was built with 3.",
            "settings": "the processes differ in the settings of the network: process 0 has [3,",
        }.items():
            error = process.line(what)[1]
            assert error.startswith("jax_ep.create_group: argument backend: expected"), error
            assert text in error and error.endswith("use backend='reference'."), error
            assert process.line(f"{what}, auto")[1] == "reference"
            assert "using the pure-JAX reference backend" in process.text
