"""Runs the suite in several processes with one device each.

Usage: python tests/run_processes.py [--timeout S] [--grace S] [--follow] N [pytest arguments]

On CPU each process has one device. On GPUs (``JAX_EP_TEST_PLATFORM=cuda``) process i has GPU i, or,
where there are more processes than GPUs, shares GPU i modulo their number with others.
``XLA_PYTHON_CLIENT_MEM_FRACTION`` is made to fit unless it is set.

The output is the end of the report of the first process that failed, or else a list of what was
skipped and why. Then comes the last line of every process. With ``--follow`` the output of process
0 comes first, line by line while it runs. SIGTERM ends the processes, which report first. The exit
status is the worst one.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).with_name("support")))

from machine import count_gpus, free_port

_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")
_VERDICT = re.compile(r"\b(passed|failed|skipped|error|errors|deselected)\b.* in \d")
_REPORT_S = 2.5  # seconds for the reports of processes that are interrupted
_TAIL = 150  # lines of the log of a process that failed


def main(arguments: list[str]) -> int:
    """Start the processes, wait for them, and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for the whole run")
    parser.add_argument("--grace", type=float, default=20, help="seconds for the others to end")
    parser.add_argument("--follow", action="store_true", help="show what process 0 writes, at once")
    parser.add_argument("count", type=int, metavar="N", help="number of processes")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments of pytest")
    options = parser.parse_args(arguments)
    if options.count < 2:
        parser.error(
            f"argument N: expected two processes or more, got {options.count}; use pytest."
        )
    return run(
        options.count,
        options.pytest,
        timeout=options.timeout,
        grace=options.grace,
        follow=options.follow,
        environment=dict(os.environ),
    )


def run(
    count: int,
    arguments: list[str],
    *,
    timeout: float,
    grace: float,
    follow: bool,
    environment: dict[str, str],
    variables: Callable[[int], dict[str, str]] = lambda index: {},
) -> int:
    """Run pytest in ``count`` processes and say how they ended; the worst exit status.

    Args:
        count: Number of processes.
        arguments: Those of pytest.
        timeout: Seconds for the whole run.
        grace: Seconds for the others to end when one has failed.
        follow: Whether to show what process 0 writes, at once.
        environment: Variables of all processes, to which those are added that make them a group.
        variables: More of them, for each process.
    """
    start = time.monotonic()
    told_to_end: list[int] = []

    def remember(number: int, _: Any) -> None:
        told_to_end.append(number)

    signal.signal(signal.SIGTERM, remember)
    with tempfile.TemporaryDirectory(prefix="jax_ep-") as folder:
        logs = [pathlib.Path(folder) / f"{index}.log" for index in range(count)]
        processes = _start(arguments, pathlib.Path(folder), logs, environment, variables)
        try:
            followed = logs[0] if follow else None
            why = _wait(processes, start + timeout, grace, followed, told_to_end)
        finally:
            _end(processes)
        status = [_exit_status(process) for process in processes]
        _report(logs, status, why, followed=follow)
    worst = max(status)
    verdict = "all passed" if worst == 0 else f"FAILED, exit status {worst}"
    if why is not None:
        verdict += f" ({why})"
    print(f"{count} processes: {verdict}, in {time.monotonic() - start:.0f} s")
    return worst


def _start(
    arguments: list[str],
    folder: pathlib.Path,
    logs: list[pathlib.Path],
    environment: dict[str, str],
    variables: Callable[[int], dict[str, str]],
) -> list[subprocess.Popen[bytes]]:
    count = len(logs)
    exchange = folder / "exchange"
    exchange.mkdir()
    environment = environment | {
        "JAX_EP_TEST_PROCESSES": str(count),
        "JAX_EP_TEST_COORDINATOR": f"127.0.0.1:{free_port()}",
        "JAX_EP_TEST_FOLDER": str(exchange),
        "XLA_FLAGS": _DEVICE_COUNT.sub("", environment.get("XLA_FLAGS", "")),
    }
    if environment.get("JAX_EP_TEST_PLATFORM", "cpu") == "cuda":
        gpus = count_gpus()
        environment["JAX_EP_TEST_GPUS"] = str(gpus)
        share = 0.8 * min(1.0, gpus / count)
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
    processes = []
    for index, log in enumerate(logs):
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
                    env=environment | {"JAX_EP_TEST_PROCESS": str(index)} | variables(index),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def _wait(
    processes: list[subprocess.Popen[bytes]],
    deadline: float,
    grace: float,
    followed: pathlib.Path | None,
    told_to_end: list[int],
) -> str | None:
    """Wait until all have ended; says why if some have to be ended."""
    shown = 0
    while any(process.poll() is None for process in processes):
        failed = [index for index, process in enumerate(processes) if process.poll()]
        if failed and time.monotonic() + grace < deadline:
            deadline = time.monotonic() + grace
        if told_to_end or time.monotonic() > deadline:
            left = [index for index, process in enumerate(processes) if process.poll() is None]
            reason = f"after process {failed[0]} had failed" if failed else "at the time limit"
            if told_to_end:
                reason = "when the launcher was told to end"
                _interrupt(processes)
            _show(followed, shown)
            return f"processes {left} were killed {reason}"
        shown = _show(followed, shown)
        time.sleep(0.05)
    _show(followed, shown)
    return None


def _interrupt(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let pytest report what has failed so far, if it does so at once."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _REPORT_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def _show(log: pathlib.Path | None, shown: int) -> int:
    """Print what a log has beyond its first ``shown`` bytes; gives its number of bytes."""
    if log is None:
        return 0
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
    return shown + len(text)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """As in a shell: 128 plus the number of the signal if a signal ended the process."""
    code = process.returncode
    return code if code >= 0 else 128 - code


def _report(
    logs: list[pathlib.Path], status: list[int], why: str | None, *, followed: bool
) -> None:
    texts = [log.read_text(errors="replace").splitlines() for log in logs]
    # The log of a process that was killed tells less than that of one that failed by itself.
    failed = [i for i, code in enumerate(status) if 0 < code < 128]
    failed += [i for i, code in enumerate(status) if code >= 128]
    shown = failed[0] if failed else 0
    if followed:
        print()  # its last line may not be complete
    if followed and failed and shown == 0:
        pass  # all of it is there
    elif failed:
        print(f"process {shown}:", *texts[shown][-_TAIL:], sep="\n")
    else:
        # Print what was skipped and why. It may differ in processes that have no part in a test.
        for line in dict.fromkeys(line for text in texts for line in _summary(text)):
            print(line)
    for index, (text, code) in enumerate(zip(texts, status, strict=True)):
        # Other libraries may write after pytest's last line.
        last = next(filter(_VERDICT.search, reversed(text)), text[-1] if text else "(no output)")
        print(f"process {index}, exit status {code}: {last}")


def _summary(lines: list[str]) -> list[str]:
    """The short summary of pytest without its last line."""
    starts = [number for number, line in enumerate(lines) if "short test summary" in line]
    lines = lines[starts[-1] + 1 :] if starts else []
    ends = [number for number, line in enumerate(lines) if _VERDICT.search(line)]
    return lines[: ends[-1]] if ends else lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
