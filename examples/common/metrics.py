"""Records of a run, one JSON object a line, and running means of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

_SMOOTHING_STEPS = 25


class Metrics:
    """Records of a run, one JSON object a line.

    A record has "step", the number of steps done, and either the figures of the last one ("loss",
    "dropped", "load") or "held_out_loss". A resumed run drops the records after its checkpoint.

    Attributes:
        records: All of them.
    """

    def __init__(self, path: pathlib.Path | None, *, first_step: int) -> None:
        """Open ``path`` (None: write nothing), keeping records up to ``first_step`` steps."""
        self.records: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.records = [record for record in self.read(path) if record["step"] <= first_step]
        self._file = None
        if path is not None:
            # In a file beside it first: a process that is killed here loses nothing.
            part = path.with_name(f"{path.name}.part")
            part.write_text("".join(map(_line, self.records)))
            part.replace(path)
            self._file = path.open("a")

    @staticmethod
    def read(path: pathlib.Path) -> list[dict[str, Any]]:
        """The records in ``path``, up to one that a killed process left half written."""
        records = []
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def add(self, step: int, **figures: Any) -> None:
        """Record ``figures`` after ``step`` steps."""
        record = {"step": step, **figures}
        self.records.append(record)
        self._write(record)

    def last(self, name: str) -> dict[str, Any] | None:
        """The last record that has ``name``."""
        return next((record for record in reversed(self.records) if name in record), None)

    def flush(self) -> None:
        """Make sure that a process that is killed loses nothing recorded so far."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write out everything."""
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_line(record))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def smooth(curves: np.ndarray) -> np.ndarray:
    """Running means over the last ``_SMOOTHING_STEPS`` rows of ``[steps, curves]``."""
    sums = np.cumsum(curves, axis=0)
    sums[_SMOOTHING_STEPS:] -= sums[:-_SMOOTHING_STEPS].copy()
    counts = np.minimum(np.arange(1, len(curves) + 1), _SMOOTHING_STEPS)
    return sums / counts[:, None]
