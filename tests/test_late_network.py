"""The network that stands in for InfiniBand under NVSHMEM (tests/cuda/late_network), without a GPU.

Two processes are PEs (check/scenarios.cc) and call the plug-in as NVSHMEM does. A stand-in for the
CUDA driver shows each write in the moment it happens.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.one_process("runs programs of its own"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

_ROOT = pathlib.Path(__file__).parent / "cuda" / "late_network"
_NAME = "nvshmem_transport_ibrc.so.3"
_ALL = 2**64 - 1  # of 64 blocks
_DELAY = {"JAX_EP_LATE_DELAY_US": "100"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the plug-in and the programs that test it."""
    out = tmp_path_factory.mktemp("late_network")
    built = subprocess.run(
        [_ROOT / "check" / "build.sh", out], capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0 and not built.stderr, built.stderr
    return out


def run(built: pathlib.Path, scenario: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A scenario with ``settings`` and no others of the network."""
    others = {name: value for name, value in os.environ.items() if "JAX_EP_LATE" not in name}
    return subprocess.run(
        [built / "scenarios", built / _NAME, scenario],
        env={**others, "JAX_EP_LATE_DRIVER": str(built / "fake_driver.so"), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def facts(built: pathlib.Path, scenario: str, **settings: str) -> dict[str, int]:
    """What a scenario that passes prints, by "PE.name"."""
    done = run(built, scenario, **settings)
    assert done.returncode == 0, done.stderr
    return {name: int(value) for name, value in (s.split("=") for s in done.stdout.split())}


def counts(folder: pathlib.Path, pe: int) -> list[dict[str, int]]:
    """What ``pe`` has handed to the network, by destination."""
    found = json.loads((folder / f"pe-{pe}.json").read_text())
    assert found["pe"] == pe
    return found["to"]


@pytest.mark.parametrize("delay_us", [0, 100])
def test_all_arrives(built, tmp_path, delay_us):
    """Puts, gets, values and atomics, whole and in parts. Each PE counts exactly what it sends."""
    more = {"JAX_EP_LATE_DELAY_US": str(delay_us), "JAX_EP_LATE_COUNTS": str(tmp_path)}
    total = facts(built, "bytes", **more)["0.bytes"]
    sent = {
        "puts": 7 + 1 + 2 + 1,  # as many sizes, of no bytes, values, one that blocks
        "put_bytes": total + 8 + 4 + 8,
        "gets": 7,
        "get_bytes": total,
        "signals": 3,
        "atomics": 16,
        "fences": 0,
        "lost": 0,
    }
    nothing = dict.fromkeys(sent, 0)
    assert counts(tmp_path, 0) == [nothing, sent]
    assert counts(tmp_path, 1) == [sent, nothing]


def test_fence_keeps_order(built):
    """Whatever the delays and the seed. In between two fences all comes in any order."""
    early = 0
    for seed in range(12):
        settings = {"JAX_EP_LATE_DELAY_US": str(40 * (seed % 4)), "JAX_EP_LATE_SEED": str(seed)}
        found = facts(built, "fenced", **settings)
        assert (found["1.signals"], found["1.blocks"]) == (_ALL, _ALL)
        assert found["1.overtakes"] == 0
        early += found["1.early_blocks"]
    assert early > 0


def test_without_fence_signals_overtake_data(built):
    found = facts(built, "unfenced", **_DELAY)
    assert (found["1.signals"], found["1.blocks"]) == (_ALL, _ALL)
    assert found["1.overtakes"] > 0


@pytest.mark.parametrize("delay_us", [0, 100_000])
def test_sources_are_read_late(built, delay_us):
    """A source that is written before quiet is seen as it is then, and never as it is after quiet.

    Quiet starts all at once, but waits for each delivery.
    """
    found = facts(built, "sources", JAX_EP_LATE_DELAY_US=str(delay_us))
    assert found["1.late"] > 0
    assert found["0.quiet_ms"] >= 0.8 * delay_us / 1000  # the longest of 64 delays


def test_operations_start_late(built):
    """If nobody waits for them, when they are due: here none before some seconds have passed."""
    assert facts(built, "starts")["0.started"] == 16
    assert facts(built, "starts", JAX_EP_LATE_DELAY_US="60000000")["0.started"] == 0


@pytest.mark.parametrize("faulty", [None, 0])
def test_lost_signal(built, faulty):
    """It never arrives, nothing waits for it, and nobody is told."""
    settings = {"JAX_EP_LATE_DROP_SIGNAL": "1:64", **_DELAY}
    if faulty is not None:
        settings["JAX_EP_LATE_FAULTY_PE"] = str(faulty)
    found = facts(built, "fenced", **settings)
    assert found["1.signals"] == _ALL >> 1
    assert (found["1.blocks"], found["0.quiet"]) == (_ALL, 0)


def test_network_that_stops(built):
    """Of 11 operations, six are puts and five signals. Quiet cannot say that all has arrived."""
    found = facts(built, "fenced", JAX_EP_LATE_STOP_AFTER="11", **_DELAY)
    assert (found["1.blocks"], found["1.signals"]) == (0b111111, 0b11111)
    assert found["0.quiet"] != 0


@pytest.mark.parametrize("fault", [{"DROP_SIGNAL": "0:1"}, {"STOP_AFTER": "0", "FAULTY_PE": "1"}])
def test_fault_elsewhere(built, fault):
    """A signal towards another PE is lost, or another PE has the fault."""
    settings = {f"JAX_EP_LATE_{name}": value for name, value in fault.items()}
    found = facts(built, "fenced", **settings)
    assert (found["1.signals"], found["1.blocks"], found["0.quiet"]) == (_ALL, _ALL, 0)


def test_faults_while_it_runs(built):
    """After four signals the second gets lost, and then all but one more."""
    found = facts(built, "calls", **_DELAY)
    assert found["1.signals"] == 0b00111011111
    assert (found["0.quiet"], found["0.quiet_stopped"]) == (0, 1)
    assert (found["0.counted_signals"], found["0.counted_lost"]) == (8, 3)


def test_counts_of_a_process_that_was_killed(built, tmp_path):
    done = run(built, "killed", JAX_EP_LATE_COUNTS=str(tmp_path))
    assert done.returncode == 128 + 9, done.stderr
    sent = counts(tmp_path, 0)[1]
    assert (sent["puts"], sent["put_bytes"]) == (3, 300)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("DELAY_US", "soon", "expected a number from 0 to 60000000, got 'soon'"),
        ("DELAY_US", "60000001", "expected a number from 0 to 60000000, got '60000001'"),
        ("TRACE", "2", "expected a number from 0 to 1, got '2'"),
        ("DROP_SIGNAL", "1", "expected PE:N, with N from 1 on, got '1'"),
        ("DROP_SIGNAL", "1:0", "expected PE:N, with N from 1 on, got '1:0'"),
        ("DROP_SIGNAL", "2:1", "expected one of 2 PEs, got 2"),
        ("COUNTS", "/nonexistent/counts", "cannot write /nonexistent/counts/pe-"),
        ("DRIVER", "/nonexistent/libcuda", "no CUDA driver: /nonexistent/libcuda"),
    ],
)
def test_wrong_setting(built, name, value, text):
    done = run(built, "sources", **{f"JAX_EP_LATE_{name}": value})
    assert done.returncode == 1
    assert text in done.stderr


def test_trace(built):
    done = run(built, "calls", JAX_EP_LATE_TRACE="1")
    lines = [line for line in done.stderr.splitlines() if "late network 0->1: atomic 9" in line]
    assert len(lines) == 11
    assert sum(line.endswith("8 bytes, value 0x1, lost") for line in lines) == 3


def test_other_version_of_nvshmem_is_refused(built, capfd):
    network = ctypes.CDLL(str(built / _NAME))
    made = ctypes.c_void_p()
    assert network.nvshmemt_init(ctypes.byref(made), None, 40000) != 0
    assert made.value is None
    assert "expected version 3 of the plug-in interface, got 40000" in capfd.readouterr().err


_HOST = """
import os, socket, subprocess
print(socket.gethostname(), os.environ.get("LD_PRELOAD"))
print(subprocess.check_output(["/bin/sh", "-c", "echo $LD_PRELOAD"], text=True))
"""


@pytest.mark.parametrize("host", ["host7", None])
@pytest.mark.parametrize("other", [None, "fake_driver.so"])
def test_name_of_the_host(built, host, other):
    """Preloaded, it gives NVSHMEM the name that it is told.

    Programs that the process starts lack it, and get what else was preloaded.
    """
    others = [] if other is None else [str(built / other)]
    settings = {} if host is None else {"JAX_EP_LATE_HOST": host}
    done = subprocess.run(
        [sys.executable, "-c", _HOST],
        env={**os.environ, "LD_PRELOAD": " ".join([str(built / _NAME), *others]), **settings},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    name = host or os.uname().nodename
    assert done.stdout.split() == [name, *(others or ["None"]), *others]


# It fails while another one runs.
_SLOW = """#!/bin/sh
mkdir {folder}/running || exit 3
read question
sleep 0.1
rmdir {folder}/running
echo "$1 $question"
"""


def test_questions_to_the_daemon_queue(tmp_path):
    """The wrapper runs the next program of its name, one at a time."""
    program = tmp_path / "real" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(_SLOW.format(folder=tmp_path))
    program.chmod(0o755)
    path = f"{_ROOT}/bin:{program.parent}:{os.environ['PATH']}"
    ask = functools.partial(
        subprocess.Popen,
        ["nvidia-cuda-mps-control", "-x"],
        env={**os.environ, "PATH": path, "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    asked = [ask() for _ in range(4)]
    for i, process in enumerate(asked):  # all at once: any of them may be the first
        assert process.stdin is not None
        process.stdin.write(f"question {i}\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in asked]
    assert [process.returncode for process in asked] == [0] * 4
    assert answers == [f"-x question {i}\n" for i in range(4)]


def test_wrapper_without_a_program(tmp_path):
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "")
    for name in ("dirname", "basename"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run(
        [_ROOT / "bin" / "nvidia-cuda-mps-control"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 127
    assert "there is no nvidia-cuda-mps-control behind this one on the path" in done.stderr
