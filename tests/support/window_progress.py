"""How far a stage came, read from what it has written so far."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

_NOT_CASES = ("ceiling", "link")
_CASES = re.compile(r"^(\d+) cases:", re.MULTILINE)
_LEFT_OUT = re.compile(r"^left out: (\d+) case\(s\)", re.MULTILINE)
_COLLECTED = re.compile(
    r"^(?:collecting \.\.\. )?collected (\d+) items?(?: .*?/ (\d+) selected)?", re.MULTILINE
)
_BY_WORKERS = re.compile(r"^\d+ workers? \[(\d+) items?\]", re.MULTILINE)
_OUTCOMES = ("PASSED", "FAILED", "SKIPPED", "ERROR", "XFAIL", "XPASS")
_ANY = "|".join(_OUTCOMES)
# "tests/x.py::test PASSED [ 1%]", or from a worker "[gw0] [ 1%] PASSED tests/x.py::test". The
# output of a test (with -s, when there are no percents) stands between its name and its outcome.
_NAME = re.compile(r"^(\S+\.py::\S.*)")
_OUTCOME = re.compile(rf"(?:^|^(.*?) )({_ANY})(?: \(.*\)?)?( +\[ *\d+%\])?$")
_OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_ANY}) (\S.*)$")
# run_processes.py repeats the end of the log of a process that failed.
_REPEATED = re.compile(r"^process \d+:$.*?(?=^\$ |\Z)", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a stage has done.

    Attributes:
        text: The progress in words, such as "12 of 18 cases".
        failed: Names of failures, or their number if there are no names.
        complete: Whether everything is done; None if that is unknown.
    """

    text: str
    failed: tuple[str, ...] = ()
    complete: bool | None = None


def of(kind: str, log: str, records: pathlib.Path | None = None) -> Progress:
    """The progress of a stage.

    Args:
        kind: The kind of the stage.
        log: Its output so far.
        records: The file that a benchmark writes its records to.
    """
    if kind == "bench":
        return of_bench(log, _records(records))
    if kind == "tests":
        return of_tests(log)
    lines = [line for line in log.splitlines() if line.strip()]
    return Progress(lines[-1].strip()[:100] if lines else "")


def of_bench(log: str, records: list[dict[str, Any]]) -> Progress:
    """Cases done, of those that can run here."""
    done = [record for record in records if record["op"] not in _NOT_CASES]
    failed = [
        " ".join(str(record.get(field) or "") for field in ("op", "name", "layout", "dtype"))
        for record in done
        if not record["correct"] or record["median_us"] is None
    ]
    said = _CASES.search(log)
    total = int(said[1]) if said else None
    text = f"{len(done)}{'' if total is None else f' of {total}'} cases"
    if failed:
        text += f", {len(failed)} without a figure"
    if left_out := sum(map(int, _LEFT_OUT.findall(log))):
        text += f", {left_out} left out"
    return Progress(text, tuple(failed), None if total is None else len(done) >= total)


def of_tests(log: str) -> Progress:
    """Tests done, of those collected, over all runs of pytest in a log."""
    log = _REPEATED.sub("", log)
    outcomes, name = [], ""
    for line in log.splitlines():
        if match := _OF_WORKER.match(line):
            outcomes.append((match[1], match[2].strip()))
            continue
        ended = _OUTCOME.match(line)
        started = _NAME.match(ended[1] or "" if ended else line)
        if started:
            name = started[1].strip()
        if ended and (ended[3] or started or not ended[1]):
            outcomes.append((ended[2], name))
    total = sum(int(match[2] or match[1]) for match in _COLLECTED.finditer(log))
    total += sum(map(int, _BY_WORKERS.findall(log)))
    if not total and not outcomes:
        return Progress("no tests yet")
    counts = dict.fromkeys(_OUTCOMES, 0)
    for outcome, _ in outcomes:
        counts[outcome] += 1
    text = f"{len(outcomes)} of {total} tests"
    parts = [f"{number} {outcome.lower()}" for outcome, number in counts.items() if number]
    failed = tuple(name for outcome, name in outcomes if outcome in ("FAILED", "ERROR"))
    return Progress(
        ": ".join(filter(None, [text, ", ".join(parts)])), failed, len(outcomes) >= total
    )


def _records(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The records so far; none where the file is not there yet."""
    try:
        return [] if path is None else json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []
