"""The results of a run for people: its metrics, step by step, and a picture of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
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
            self.records = _read(path, first_step)
        self._file = None if path is None else path.open("w")
        for record in self.records:
            self._write(record)

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
            self._file.write(json.dumps(record) + "\n")


def plot(
    records: list[dict[str, Any]], path: pathlib.Path, *, unigram_loss: float, title: str
) -> None:
    """Draw loss curves above, and below each expert's share of the load over time.

    Args:
        records: As ``Metrics`` holds them.
        path: The PNG to write.
        unigram_loss: Drawn as a line, in nats per byte; a model that learns gets below it.
        title: Title of the picture.
    """
    training = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    steps = np.array([record["step"] for record in training])
    figure, (losses, loads) = plt.subplots(
        2, 1, figsize=(9, 8), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    loss = np.array([record["loss"] for record in training])
    losses.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    losses.plot(steps, _smooth(loss[:, None])[:, 0], color="tab:blue", label="training")
    losses.plot(
        [record["step"] for record in held_out],
        [record["held_out_loss"] for record in held_out],
        "o-",
        color="tab:orange",
        label="held out",
    )
    losses.axhline(unigram_loss, color="gray", linestyle="--", label="byte frequencies, held out")
    losses.set_ylabel("loss (nats/byte)")
    losses.legend()
    losses.set_title(title)
    load = np.array([record["load"] for record in training], float)  # [steps, E]
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1.0)
    for expert, curve in enumerate(_smooth(share).T):
        loads.plot(steps, 100 * curve, linewidth=1.0, label=f"{expert}")
    loads.axhline(100 / load.shape[1], color="gray", linestyle="--")
    loads.set_ylim(bottom=0)
    loads.set_ylabel("load of each expert (%)")
    loads.set_xlabel("step")
    if load.shape[1] <= 16:
        loads.legend(title="expert", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _read(path: pathlib.Path, last_step: int) -> list[dict[str, Any]]:
    """The records up to ``last_step``."""
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # half a line, from a process that was killed
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


def _smooth(curves: np.ndarray) -> np.ndarray:
    """Running means over the last ``_SMOOTHING_STEPS`` rows of ``[steps, curves]``."""
    sums = np.cumsum(curves, axis=0)
    sums[_SMOOTHING_STEPS:] -= sums[:-_SMOOTHING_STEPS].copy()
    counts = np.minimum(np.arange(1, len(curves) + 1), _SMOOTHING_STEPS)
    return sums / counts[:, None]
