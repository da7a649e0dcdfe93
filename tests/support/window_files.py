"""The files that a window leaves. They are always up to date, because it may end at any moment.

* ``window.log``: the output of all stages, line by line as it comes. Each line begins with its stage.
* ``window.txt``, ``window.json``: the table of stages, how far each has come, and the machine.
* ``records_2_processes.json``, ``records_1_process.json``: the records of all benchmarks of a mode, in
  the form of ``benchmarks/results/``.
* ``loads.json``, ``tuning.json``: results of ``benchmarks/loads.cu`` and ``jax_ep.tune``.

Stages write to a working folder. This module writes all of these files, by a rename except the log.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading
import time
from typing import Any

import window_cache
import window_progress
from window_stages import RECORDS, Stage

LOG, TABLE, STATE = "window.log", "window.txt", "window.json"
PART = "window.part"  # of the file that is written at the moment
FILES = (LOG, TABLE, STATE, PART, *RECORDS.values(), "loads.json", "tuning.json")
STAGE_LOG_BYTES = 640 << 10  # of a stage in the log; all together stay below 16 MiB
_TAIL_BYTES = 16 << 10  # the end of a longer one
NOTHING = window_progress.Progress("")


@dataclasses.dataclass
class Row:
    """A stage in the table.

    Attributes:
        stage: The stage.
        state: "waiting", "running", "ok", "FAILED: …", "ended at its limit …", "left out: …".
        limit: Seconds that it was given.
        begun: When it began, in seconds since the window did.
        seconds: Seconds that it took.
        progress: How far it came.
        lookups: Programs found in the compilation cache, missed, and names of the missed.
    """

    stage: Stage
    state: str = "waiting"
    limit: float | None = None
    begun: float | None = None
    seconds: float | None = None
    progress: window_progress.Progress = NOTHING
    lookups: tuple[int, int, list[str]] = (0, 0, [])
    shown: int = 0  # bytes of its log that are in the window's
    dropped: int = 0  # bytes that are not
    settled: bool = False  # whether it has reached its last state


class Files:
    """All files of a window.

    Args:
        out: The folder of ``FILES``.
        work: The folder that stages write to.
        stages: All stages, also those left out.
        keeps_results: Whether records and the like are brought to ``out``.
    """

    def __init__(
        self,
        out: pathlib.Path,
        work: pathlib.Path,
        stages: list[Stage],
        *,
        keeps_results: bool = True,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # files of an earlier window would pass for this one's
            (out / name).unlink(missing_ok=True)
        self.out, self.work = out, work
        self.rows = {stage.name: Row(stage) for stage in stages}
        self.machine: dict[str, Any] = {}
        self._begin, self._keeps_results = time.monotonic(), keeps_results
        self._log = (out / LOG).open("w", errors="replace")
        self._lock = threading.Lock()
        self._merged: dict[str, list[tuple[str, int, int]]] = {}

    def seconds(self) -> float:
        """Seconds since the window began."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        """Write a line of the window itself to the log."""
        with self._lock:
            line = f"## {self.seconds():5.0f} s: {text}"
            print(line, flush=True)
            self._log.write(f"{line}\n")
            self._log.flush()

    def log_of(self, stage: Stage) -> pathlib.Path:
        """The file that a stage writes its output to."""
        return self.work / f"{stage.name}.log"

    def lookups_of(self, stage: Stage) -> pathlib.Path:
        """The folder where its processes note what they look for in the compilation cache."""
        return self.work / "lookups" / stage.name

    def update(self) -> None:
        """Bring all files up to date."""
        with self._lock:
            for row in self.rows.values():
                if row.begun is not None and not row.settled:
                    row.settled = row.state != "running"
                    self._follow(row)
                    if row.state == "ok" and row.progress.complete is False:
                        row.state = "ended before it was complete"
            if self._keeps_results:
                self._merge()
            self._tables()

    def close(self) -> None:
        """The last update, and the ends of logs that were too long."""
        self.update()
        with self._lock:
            for row in self.rows.values():
                if row.dropped:
                    with self.log_of(row.stage).open("rb") as file:
                        file.seek(max(row.shown, file.seek(0, 2) - _TAIL_BYTES))
                        self._write(row, f"({row.dropped} bytes are left out)\n".encode())
                        self._write(row, file.read() + b"\n")
            self._log.close()

    def _follow(self, row: Row) -> None:
        """Copy the complete lines that a stage has written meanwhile; read how far it came."""
        path = self.log_of(row.stage)
        if not path.exists():
            return
        text = path.read_bytes()
        new = text[row.shown + row.dropped :]
        if row.state == "running":
            new = new[: new.rfind(b"\n") + 1]
        elif new and not new.endswith(b"\n"):
            new += b"\n"
        if not row.dropped and row.shown + len(new) <= STAGE_LOG_BYTES:
            self._write(row, new)
            row.shown += len(new)
        else:
            row.dropped += len(new)
        results = [self.work / name for name in row.stage.results]
        try:
            row.progress = window_progress.of(
                row.stage.kind, text.decode(errors="replace"), results[0] if results else None
            )
        except (KeyError, TypeError, ValueError) as error:  # the window must go on
            row.progress = window_progress.Progress(f"not readable: {error!r}")
        row.lookups = window_cache.found_and_missed(self.lookups_of(row.stage))

    def _write(self, row: Row, text: bytes) -> None:
        for line in text.decode(errors="replace").splitlines():
            self._log.write(f"[{row.stage.name}] {line}\n")
        self._log.flush()

    def _merge(self) -> None:
        """Write the results that have changed: the records of all suites of a mode as one list."""
        sources: dict[str, list[pathlib.Path]] = {}
        for row in self.rows.values():
            for source, target in row.stage.results.items():
                if (self.work / source).exists():
                    sources.setdefault(target, []).append(self.work / source)
        for target, paths in sources.items():
            stamps = [(p.name, (s := p.stat()).st_mtime_ns, s.st_size) for p in paths]
            if self._merged.get(target) == stamps:
                continue
            try:
                contents = [json.loads(path.read_text()) for path in paths]
            except (json.JSONDecodeError, FileNotFoundError):
                continue  # a program is writing it; next time
            if target in RECORDS.values():
                lines = [json.dumps(record) for content in contents for record in content]
                text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"
            else:
                text = paths[-1].read_text()
            self._replace(target, text)
            self._merged[target] = stamps

    def _tables(self) -> None:
        rows = list(self.rows.values())
        state = {
            "seconds": round(self.seconds(), 1),
            "machine": self.machine,
            "stages": [self._json(row) for row in rows],
        }
        self._replace(STATE, json.dumps(state, indent=1) + "\n")
        self._replace(TABLE, "\n".join([*map(line, rows), *self._failures(rows)]) + "\n")

    def _failures(self, rows: list[Row]) -> list[str]:
        return [
            f"failed in {row.stage.name}: {name}" for row in rows for name in row.progress.failed
        ]

    def _json(self, row: Row) -> dict[str, Any]:
        found, missed, names = row.lookups
        return {
            "name": row.stage.name,
            "state": row.state,
            "progress": row.progress.text,
            "failed": list(row.progress.failed),
            "begun": row.begun,
            "seconds": row.seconds,
            "limit": row.limit,
            "programs found": found,
            "programs missed": missed,
            "missed": names[:40],
        }

    def _replace(self, name: str, text: str) -> None:
        part = self.out / PART
        part.write_text(text)
        part.replace(self.out / name)


def line(row: Row) -> str:
    """A stage in one line of the table."""
    found, missed, _ = row.lookups
    took = "" if row.seconds is None else f"{row.seconds:.0f} s"
    programs = f"{found} of {found + missed} programs cached" if found + missed else ""
    parts = [row.state, row.progress.text, programs]
    return f"{row.stage.name:28} {took:>6}  {'; '.join(filter(None, parts))}".rstrip()
