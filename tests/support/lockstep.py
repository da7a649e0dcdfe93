"""The suite in several processes of one device each: who this one is, and how they exchange data.

``run_processes.py`` starts the processes. All run the same tests in the same order. In a test, each
computes on its own device and hands its part of every result to the others through files in a
shared folder. So each can compare whole results with whole expectations. XLA's collectives have no
part in that, because NCCL by default refuses two processes on one GPU.

A process that ends a test says so, also if the test failed. Processes that still wait for its data
fail at once, and all go on together with the next test.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import shutil
import time
from collections.abc import Iterable
from typing import Any

import pytest

import machine

COUNT = int(os.environ.get("JAX_EP_TEST_PROCESSES", "1"))
INDEX = int(os.environ.get("JAX_EP_TEST_PROCESS", "0"))
ACTIVE = COUNT > 1
# GPUs of this machine; several processes may share one.
_GPUS = int(os.environ.get("JAX_EP_TEST_GPUS", "0"))
SHARED_GPUS = ACTIVE and 0 < _GPUS < COUNT
_FOLDER = pathlib.Path(os.environ.get("JAX_EP_TEST_FOLDER", "/nonexistent"))
# For another process, which may be compiling on a busy machine.
TIMEOUT_S = float(os.environ.get("JAX_EP_TEST_EXCHANGE_TIMEOUT", "120"))


def start(platform: str) -> None:
    """Start ``jax.distributed``, which must come before JAX's first device."""
    if not ACTIVE:
        return
    import jax

    address = os.environ["JAX_EP_TEST_COORDINATOR"]
    jax.distributed.initialize(
        address,
        COUNT,
        INDEX,
        local_device_ids=[INDEX % _GPUS] if platform == "cuda" else None,
        # Without it the service binds [::], which fails where there is no IPv6.
        coordinator_bind_address=address if INDEX == 0 else None,
    )


def why_not(item: pytest.Item, platform: str) -> str | None:
    """Why a test cannot run in these processes, as its markers say, or None."""
    if not ACTIVE:
        return None
    if marker := item.get_closest_marker("one_process"):
        return f"for one process: {marker.args[0]}"
    refused = platform == "cuda" and SHARED_GPUS and not machine.NCCL_SHARES_GPUS
    if refused and item.get_closest_marker("needs_collectives"):
        return (
            f"needs XLA's collectives, which NCCL refuses to {COUNT} processes on {_GPUS} GPUs "
            "without NCCL_MULTI_RANK_GPU_ENABLE=1 (from 2.30 on)"
        )
    return None


class Exchange:
    """The messages between processes, test by test.

    ``folder/TEST/CALL.PROCESS`` holds the value of PROCESS at the CALL-th exchange of the TEST-th
    test, and ``folder/TEST/end.PROCESS`` says how that test ended there. All files appear by a
    rename.
    """

    def __init__(self, folder: pathlib.Path, index: int, count: int, timeout: float) -> None:
        self._root, self._index, self._count, self._timeout = folder, index, count, timeout
        self._test = self._call = -1
        self._name = "before the first test"
        self._folder = folder

    def begin(self, name: str) -> None:
        """Enter the next test."""
        self._test, self._call, self._name = self._test + 1, -1, name
        self._folder = self._root / f"{self._test:05d}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def swap(self, value: Any, sources: Iterable[int]) -> list[Any]:
        """Send ``value`` if this process is one of ``sources``; gives the values of all sources.

        Raises:
            TimeoutError: if a process sends nothing in time.
            RuntimeError: if a process has left this test.
        """
        self._call += 1
        sources = list(sources)
        if self._index in sources:
            self._write(f"{self._call:05d}.{self._index}", value)
        return [
            value if source == self._index else self._read(f"{self._call:05d}.{source}", source)
            for source in sources
        ]

    def end(self, outcome: str) -> dict[int, str]:
        """Leave the test together; says how it ended for each process.

        Raises:
            TimeoutError: if a process does not leave it in time.
            RuntimeError: if a process was in another test.
        """
        self._write(f"end.{self._index}", (self._name, outcome))
        ends = {index: self._read(f"end.{index}", None) for index in range(self._count)}
        others = {index: name for index, (name, _) in ends.items() if name != self._name}
        if others:
            raise RuntimeError(f"process {self._index} ran {self._name}, others {others}")
        # No process reads the folder of the previous test any more.
        if self._index == 0 and self._test > 0:
            shutil.rmtree(self._root / f"{self._test - 1:05d}", ignore_errors=True)
        return {index: outcome for index, (_, outcome) in ends.items()}

    def _write(self, name: str, value: Any) -> None:
        hidden = self._folder / f".{name}"
        hidden.write_bytes(pickle.dumps(value))
        hidden.rename(self._folder / name)

    def _read(self, name: str, source: int | None) -> Any:
        """The file ``name``; if ``source`` is given, no later than that process's end of the test."""
        path, deadline, pause = self._folder / name, time.monotonic() + self._timeout, 2e-4
        while True:
            ended = source is not None and (self._folder / f"end.{source}").exists()
            if path.exists():
                return pickle.loads(path.read_bytes())
            if ended:
                raise RuntimeError(f"process {source} has left {self._name} without {path.name}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {self._index} waited {self._timeout:g} s for {path.name} in {self._name}"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, 0.01)


exchange = Exchange(_FOLDER, INDEX, COUNT, TIMEOUT_S)


class Plugin:
    """Keeps the processes in the same test. Register it where there are several."""

    def __init__(self) -> None:
        self._outcome, self._failure = "passed", ""
        self.elsewhere: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._failure = "passed", ""
        exchange.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self._outcome != "failed":
            self._outcome = report.outcome
        if report.failed:
            self._failure += f"\n{report.longreprtext}\n"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        try:
            outcomes = exchange.end(self._outcome)
        except (TimeoutError, RuntimeError) as error:
            # pytest reports no failures after an exit.
            pytest.exit(f"{self._failure}the processes are out of step: {error}", returncode=3)
        failed = [index for index, outcome in outcomes.items() if outcome == "failed"]
        if failed and INDEX not in failed:
            self.elsewhere.append(f"{nodeid} failed in processes {failed}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.elsewhere:
            terminalreporter.write_line(line)
