"""Starts the processes that measure, and collects their records.

Each run of a set of cases has processes of its own, one for all devices or one for each rank, that
find each other through ``jax.distributed``. A process that dies or hangs costs the case it was at,
which becomes a record of a failure; the remaining cases are given to new processes. New processes
are needed in any case: XLA reads its flags and divides a GPU's memory once in a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from jax_ep.bench import records
from jax_ep.bench.cases import Case

_POLL_S = 0.1
_STDERR_LINES = 3
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*", re.MULTILINE)
_OF_ANOTHER = re.compile(
    r"UNAVAILABLE|CANCELLED|DEADLINE_EXCEEDED|heartbeat|process of rank \d+ is gone"
)
_GPU_SHARE = 0.9  # of a GPU's memory, for XLA

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the processes of one run need to know.

    Attributes:
        cases: Cases.
        ranks: Devices that take part.
        processes: 1, or as many as there are ranks, or a divisor of them on CPU.
        gpus: GPUs of this machine that are used; 0 on CPU.
        repeat: Samples of each figure.
        command: The user's command line, for the records.
        hosts: Logical hosts that the ranks are split into.
        until: Time since the epoch, in seconds, after which no case is begun.
        output: File that process 0 appends JSON lines to.
        coordinator: "host:port" of process 0.
    """

    cases: list[Case]
    ranks: int
    processes: int
    gpus: int
    repeat: int
    command: str
    hosts: int = 1
    until: float = float("inf")
    output: str = ""
    coordinator: str = ""

    def save(self, path: pathlib.Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: pathlib.Path) -> Job:
        """Read a job."""
        fields = json.loads(path.read_text())
        cases = [Case(**case) for case in fields.pop("cases")]
        return cls(cases=cases, **fields)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise ``SystemExit`` in this block, so that it can end its own processes."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(job: Job, *, timeout: float, progress: Progress) -> Iterator[dict[str, Any]]:
    """Measure all cases; yields each record as it comes.

    Args:
        job: The run, ``output`` and ``coordinator`` left out.
        timeout: Seconds that one case may take, with the start of its processes.
        progress: Is told the name of the case that is measured now.
    """
    with tempfile.TemporaryDirectory(prefix="jax_ep_bench_") as folder:
        left = list(job.cases)
        for attempt in itertools.count():
            if not left or time.time() > job.until:
                return
            where = pathlib.Path(folder) / str(attempt)
            where.mkdir()
            part = dataclasses.replace(
                job, cases=left, output=str(where / "records"), coordinator=_free_address()
            )
            finished, statuses = yield from _attempt(part, where, timeout, progress)
            if all(status == 0 for status in statuses) or finished == len(left):
                return
            yield _failure(part, left[finished], where, statuses)
            left = left[finished + 1 :]


def _attempt(
    job: Job, where: pathlib.Path, timeout: float, progress: Progress
) -> Generator[dict[str, Any], None, tuple[int, list[int | None]]]:
    """Run processes until all end or one fails.

    Gives the number of finished cases, and the exit status of each process, None of those that were
    still running.
    """
    path = where / "job.json"
    job.save(path)
    output = pathlib.Path(job.output)
    output.touch()
    workers = []
    for index in range(job.processes):
        with (where / f"stderr-{index}").open("wb") as stderr:
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "jax_ep.bench.worker", str(path), str(index)],
                    env=_environment(job),
                    stdout=stderr,
                    stderr=stderr,
                )
            )
    finished, seen = 0, 0
    moved = time.monotonic()
    try:
        while True:
            running = [worker.poll() is None for worker in workers]
            lines = output.read_text().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            for line in complete[seen:]:
                record = json.loads(line)
                moved = time.monotonic()
                if record is None:
                    finished += 1
                else:
                    yield record
            seen = len(complete)
            if finished < len(job.cases):
                progress(name_of(job.cases[finished]))
            statuses = [worker.returncode for worker in workers]
            if any(statuses) or not any(running) or time.monotonic() - moved > timeout:
                return finished, statuses
            time.sleep(_POLL_S)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def name_of(case: Case) -> str:
    """A short name of a case."""
    fields = {**case.to_json(), "dtype": case.row_dtype, "routing": case.pattern}
    return records.label(fields)


def _environment(job: Job) -> dict[str, str]:
    environment = dict(os.environ)
    all_flags = [environment.get("XLA_FLAGS", "")]
    if job.gpus == 0:
        environment["JAX_PLATFORMS"] = "cpu"
        # XLA takes the last of several equal flags.
        count = job.ranks // job.processes
        all_flags.append(f"--xla_force_host_platform_device_count={count}")
    elif "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        sharing = -(-job.processes // job.gpus) if job.processes > 1 else 1
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_GPU_SHARE / sharing:.3f}"
    environment["XLA_FLAGS"] = " ".join(filter(None, all_flags))
    return environment


def reason(outputs: list[str], statuses: Sequence[int | None] = ()) -> str:
    """Why processes ended: the signals that ended some, and what they wrote.

    That is their exceptions, else their last lines. Exceptions that only tell that another process is
    gone come last.
    """
    found = [
        f"process {index} was ended by {signal.Signals(-status).name}"
        for index, status in enumerate(statuses)
        if status is not None and status < 0
    ]
    for text in outputs:
        found += [match.group() for match in _EXCEPTION.finditer(text)][-1:]
    if found:
        found = sorted(dict.fromkeys(found), key=lambda line: bool(_OF_ANOTHER.search(line)))
        return " | ".join(found)[:400]
    lines = []
    for text in outputs:
        lines += [line for line in text.splitlines() if line.strip()][-_STDERR_LINES:]
    return " | ".join(lines)[-400:] or "a process ended without a word, or took too long"


def _failure(
    job: Job, case: Case, where: pathlib.Path, statuses: Sequence[int | None]
) -> dict[str, Any]:
    """The record of a case at which a process died or was given up."""
    names = [where / f"stderr-{index}" for index in range(job.processes)]
    error = reason([name.read_text(errors="replace") for name in names], statuses)
    record: dict[str, Any] = dict.fromkeys(
        ("median_us", "p10_us", "p90_us", "wire_gbs", "logical_gbs", "ceiling_gbs", "num_sms")
    )
    record |= {
        "op": case.op,
        "layout": case.layout,
        "dtype": case.row_dtype,
        "quantization": case.quantization,
        "mode": case.mode,
        "routing": case.pattern,
        "capacity": case.capacity,
        "ranks": job.ranks,
        "gpus": min(job.gpus, job.ranks),
        "processes": job.processes,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "top_k": case.top_k,
        "experts": case.experts,
        "wire_bytes": 0,
        "workspace_bytes": 0,
        "scratch_bytes": 0,
        "staged": False,
        "correct": False,
        "device": "gpu" if job.gpus else "cpu",
        "versions": {},
        "command": job.command,
        "error": error,
    }
    if job.hosts > 1:
        record["hosts"] = job.hosts
    if case.name is not None:
        record["name"] = case.name
    if case.intermediate is not None:
        record["intermediate"] = case.intermediate
    return record


def _free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"
