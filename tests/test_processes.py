"""The machinery that runs the suite in several processes: what they exchange, and how they fail."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
import time

import pytest

import lockstep
from spmd import run_python

pytestmark = pytest.mark.one_process("starts processes itself")
CONFIG = pathlib.Path(__file__).parents[1] / "pyproject.toml"
LAUNCHER = pathlib.Path(__file__).with_name("run_processes.py")


def test_exchange(tmp_path):
    """Two processes, here threads: each gets the values of both, also one that is no source."""
    heard = {}

    def work(index: int) -> None:
        exchange = lockstep.Exchange(tmp_path, index, 2, timeout=30)
        for test in ("a", "b"):
            exchange.begin(test)
            both = exchange.swap(f"{test}{index}", [0, 1])
            one = exchange.swap(f"only {index}", [1])
            heard[test, index] = (both, one, exchange.end("passed"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = {0: "passed", 1: "passed"}
    for test in ("a", "b"):
        wanted = ([f"{test}0", f"{test}1"], ["only 1"], ends)
        assert heard[test, 0] == heard[test, 1] == wanted


def test_exchange_with_a_process_that_has_left(tmp_path, monkeypatch):
    """A wait for a process that has left the test fails at once, and for a silent one in time."""
    here, there = (lockstep.Exchange(tmp_path, index, 2, timeout=0.5) for index in range(2))
    for exchange in (here, there):
        exchange.begin("a")
    with pytest.raises(TimeoutError, match=r"process 0 waited 0\.5 s for 00000\.1 in a"):
        here.swap(1, [0, 1])
    with pytest.raises(TimeoutError, match=r"process 1 waited 0\.5 s for end\.0"):
        there.end("failed")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
        with pytest.raises(RuntimeError, match=r"process 1 has left a without 00001\.1"):
            here.swap(2, [0, 1])
    assert here.end("failed") == {0: "failed", 1: "failed"}


def test_exchange_of_processes_in_other_tests(tmp_path):
    here, there = (lockstep.Exchange(tmp_path, index, 2, timeout=0.5) for index in range(2))
    here.begin("a")
    there.begin("b")
    with pytest.raises(TimeoutError):
        there.end("passed")
    with pytest.raises(RuntimeError, match=r"process 0 ran a, others \{1: 'b'\}"):
        here.end("passed")


MARKED = """
import pytest

@pytest.mark.one_process("because")
def test_one(): ...

@pytest.mark.needs_collectives
def test_collectives(): ...

def test_any(): ...
"""


@pytest.mark.parametrize(
    ("active", "shared", "skipped"),
    [(False, False, ""), (True, False, "one"), (True, True, "one collectives")],
)
def test_what_is_skipped(active, shared, skipped, request, tmp_path, monkeypatch):
    monkeypatch.setattr(lockstep, "ACTIVE", active)
    monkeypatch.setattr(lockstep, "SHARED_GPUS", shared)
    path = tmp_path / f"test_marked_{active}_{shared}.py"  # modules of one name would clash
    path.write_text(MARKED)
    module = pytest.Module.from_parent(request.session, path=path)
    reasons = {item.name: lockstep.why_not(item, "cuda") for item in module.collect()}
    found = {name.removeprefix("test_"): reason for name, reason in reasons.items() if reason}
    assert list(found) == skipped.split()
    assert found.get("one", "because").endswith("because")
    assert "NCCL" in found.get("collectives", "NCCL")


def launch(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher, on CPU wherever this suite runs."""
    env |= {"JAX_EP_TEST_PLATFORM": "cpu", "JAX_PLATFORMS": "cpu"}
    return run_python(str(LAUNCHER), "--timeout", "200", *arguments, timeout=250, **env)


FAILING = """
import os, time
import jax, numpy as np, pytest
import lockstep, spmd

ME = jax.process_index()

def test_together():
    assert jax.process_count() == jax.device_count() == 2
    mesh = spmd.make_mesh(2)
    x = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    np.testing.assert_array_equal(spmd.stacked_jit(lambda x: 2 * x, mesh)(x), 2 * x)

def test_alone():
    assert ME == 1, "this one fails"
    lockstep.exchange.swap(0, [0, 1])

def test_other_mesh():
    mesh = spmd.make_mesh(1)
    x = np.ones((1, 3, 1), np.float32)
    np.testing.assert_array_equal(spmd.stacked_jit(lambda x: 3 * x, mesh)(x), 3 * x)
    assert spmd.here(mesh) == (ME == 0)
    put = spmd.put(x, mesh)  # in a process without a part of it too
    assert (put.shape, put.dtype) == (x.shape, x.dtype)

def test_ends():
    if os.environ.get("TEST_OF_LAUNCHER") == "kill" and ME == 1:
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def failing(tmp_path) -> str:
    """A test file that fails, in a folder of its own; CONFIG puts the suite's modules on the path."""
    path = tmp_path / "test_failing.py"
    path.write_text(FAILING)
    conftest = pathlib.Path(__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    return str(path)


def launch_failing(failing: str, *arguments: str, **env: str):
    options = ("-c", str(CONFIG), f"--rootdir={pathlib.Path(failing).parent}", "-q")
    return launch(*arguments, "2", failing, *options, **env)


def test_failure_of_one_process(failing):
    """The other fails at once where it needs that one, and both go on with the next test."""
    done = launch_failing(failing)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "this one fails" in done.stdout
    lines = done.stdout.strip().splitlines()
    for index in range(2):
        assert lines[index - 3].startswith(f"process {index}, exit status 1: 1 failed, 3 passed")
    assert lines[-1].startswith("2 processes: FAILED, exit status 1, in ")


def test_death_of_one_process(failing):
    done = launch_failing(failing, "--grace", "2", TEST_OF_LAUNCHER="kill")
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 137, done.stdout
    assert "process 1, exit status 137" in done.stdout
    assert lines[-1].startswith("2 processes: FAILED, exit status 137")
    assert "at the time limit" not in lines[-1]  # that text would say that nobody noticed the death


@pytest.mark.slow
def test_suite_in_two_processes():
    """A part of the real suite, with groups that span both processes."""
    suite = str(pathlib.Path(__file__).with_name("test_suite_values.py"))
    chosen = "test_values and R2 and token or no_tokens_and_no_rows"
    done = launch("2", suite, "-c", str(CONFIG), "-q", "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert all(" passed" in line and "failed" not in line for line in lines[-3:-1])
    assert lines[-1].startswith("2 processes: all passed")


def test_launcher_wants_several_processes():
    done = subprocess.run([sys.executable, str(LAUNCHER), "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "argument N: expected two processes or more, got 1" in done.stderr
