"""Starts the programs of ``support/host_programs.py`` as logical hosts, and says how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator, Sequence

import gpu_processes
import machine
import mps
import run_hosts

LATE_US = 100  # the longest delay on the late network
START_S = 150.0  # for a whole program


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: Its exit status, negative for a signal.
        text: What it has printed.
    """

    status: int
    text: str

    def line(self, what: str) -> tuple[float, str]:
        """The time and the rest of the first line that begins with ``what``."""
        found = re.search(rf"^{re.escape(what)} at ([\d.]+): ?(.*)$", self.text, re.MULTILINE)
        assert found is not None, f"no line {what!r}:\n{self.text}"
        return float(found[1]), found[2]

    @property
    def was_stuck(self) -> bool:
        return "(killed: it did not end in time)" in self.text


def environment(index: int, ranks: int, network: run_hosts.Late | None) -> dict[str, str]:
    """The variables of a process that ``run_hosts`` would set or change."""
    common = run_hosts.common(dict(os.environ), ranks, network)
    changed = {name: value for name, value in common.items() if value != os.environ.get(name)}
    return changed | run_hosts.of_process(index, ranks, network)


def service(count: int) -> contextlib.AbstractContextManager[dict[str, str]]:
    """MPS where so many processes share GPUs; gives the variables of processes that use it."""
    if count > machine.count_gpus():
        return mps.multi_process_service()
    return contextlib.nullcontext({})


@contextlib.contextmanager
def started(
    program: str,
    hosts: int,
    ranks: int,
    tmp_path: pathlib.Path,
    *,
    late: bool,
    under: Sequence[str] = (),
    **env: str,
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a program, ``under`` a tool; those that are left at the end are killed."""
    network = run_hosts.Late(run_hosts.build(), LATE_US) if late else None
    more = {"JAX_EP_TEST_FOLDER": str(tmp_path), **env}
    gpus, count = machine.count_gpus(), hosts * ranks
    with service(count) as variables:
        running = gpu_processes.start(
            program,
            count,
            gpus,
            programs=gpu_processes.HOST_PROGRAMS,
            of_process=lambda index: environment(index, ranks, network) | variables | more,
            under=under,
        )
        try:
            yield running
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


def ended(running: list[subprocess.Popen[str]], timeout: float) -> list[Ended]:
    """How the processes end; those that do not in time are killed."""
    return [Ended(*result) for result in gpu_processes.finish(running, timeout)]


def run(
    program: str,
    hosts: int,
    ranks: int,
    tmp_path: pathlib.Path,
    *,
    late: bool,
    under: Sequence[str] = (),
    **env: str,
) -> list[Ended]:
    """Run a program to its end, which all processes must come to by themselves."""
    with started(program, hosts, ranks, tmp_path, late=late, under=under, **env) as running:
        found = ended(running, START_S)
    for rank, process in enumerate(found):
        print(f"rank {rank} ended with {process.status}:\n{process.text}")
    assert not any(process.was_stuck for process in found)
    return found


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Read on until a process prints ``line``."""
    assert process.stdout is not None
    text = ""
    for found in process.stdout:
        text += found
        if found.startswith(line):
            return
    raise AssertionError(f"a process ended before it printed {line!r}:\n{text}")
