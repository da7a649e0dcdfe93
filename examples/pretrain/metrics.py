"""The figures of a run: what the steps between two lines report, and where the lines go.

``metrics.jsonl`` has a JSON object a line, and TensorBoard the same numbers. A resumed run drops the
lines after its checkpoint, in both.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import tensorboardX

from examples.common.metrics import Metrics

StepMetrics = dict[str, np.ndarray]  # what step.py reports, on the host

_OF_THE_LAST_STEP = ("aux_loss", "mtp_loss", "grad_norm", "load_entropy")


class Window:
    """Adds up the steps between two lines.

    Attributes:
        num_skipped_in_a_row: Steps left out since the last one that was taken, over all windows.
    """

    def __init__(self, *, flops_per_token: float, peak_flops: float | None) -> None:
        """Begin.

        Args:
            flops_per_token: Floating-point operations of the model for a token.
            peak_flops: Operations a second of all devices; None if they are not known.
        """
        self.num_skipped_in_a_row = 0
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._num_skipped = 0  # in the whole part of the run
        self._last: StepMetrics | None = None
        self._begin(seconds=0.0)

    def add(self, metrics: StepMetrics) -> None:
        """Add a step."""
        self._tokens += int(metrics["tokens"])
        self._steps += 1
        if metrics["skipped"]:
            self._num_skipped += 1
            self.num_skipped_in_a_row += 1
            return
        self.num_skipped_in_a_row = 0
        self._last = metrics
        self._nats += float(metrics["loss"]) * int(metrics["tokens"])
        self._counted += int(metrics["tokens"])
        self._dropped += int(metrics["num_dropped"])
        self._choices += int(metrics["load"].sum())

    def start_clock(self) -> None:
        """Time counts from now on: steps so far have no part in the rate."""
        self._tokens = self._steps = 0

    def line(self, *, seconds: float) -> dict[str, Any]:
        """The figures of the steps since the last line, and begin anew.

        Args:
            seconds: Of training so far; the line covers those since the last one.

        Returns:
            ``loss`` (mean over targets; missing if all steps were skipped), ``tokens_per_second``,
            ``step_seconds`` (mean), ``mfu`` if the peak is known, ``dropped`` (share of the choices of
            experts), ``num_skipped`` in this part of the run, and of the last step the norm of the
            gradients, the balancing loss, that of multi-token prediction, the entropy of the load and
            ``load`` ``[layers, E]``.
        """
        took = seconds - self._since
        line: dict[str, Any] = {"num_skipped": self._num_skipped}
        if took > 0 and self._steps:  # the first step compiles and counts no time
            rate = self._tokens / took
            line |= {"tokens_per_second": rate, "step_seconds": took / self._steps}
            if self._peak_flops is not None:
                line["mfu"] = rate * self._flops_per_token / self._peak_flops
        if self._last is not None:
            line["loss"] = self._nats / max(self._counted, 1)
            line["dropped"] = self._dropped / max(self._choices, 1)
            line |= {
                name: float(self._last[name]) for name in _OF_THE_LAST_STEP if name in self._last
            }
            line["load"] = self._last["load"].tolist()
        self._begin(seconds)
        return line

    def _begin(self, seconds: float) -> None:
        self._since = seconds
        self._tokens = self._steps = self._counted = self._dropped = self._choices = 0
        self._nats = 0.0
        self._last = None


class Log:
    """Writes lines. In processes other than the first it only keeps them.

    Attributes:
        lines: All of the run.
        productive_seconds_before: Seconds of training that the steps before this part took.
        up_seconds_before: Seconds that the program ran in earlier parts, lost steps included.
    """

    def __init__(self, folder: pathlib.Path | None, *, first_step: int) -> None:
        """Open the files in ``folder`` (None: none), keeping lines up to ``first_step`` steps."""
        path = None if folder is None else folder / "metrics.jsonl"
        before = Metrics.read(path) if path is not None and path.exists() else []
        self._metrics = Metrics(path, first_step=first_step)
        self.lines = self._metrics.records
        self.up_seconds_before = max((line.get("up_seconds", 0.0) for line in before), default=0.0)
        last = self._metrics.last("productive_seconds")
        self.productive_seconds_before = 0.0 if last is None else last["productive_seconds"]
        self._board = None
        if folder is not None:
            self._board = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1
            )

    def add(self, step: int, **figures: Any) -> None:
        """Write a line after ``step`` steps."""
        self._metrics.add(step, **figures)
        self._metrics.flush()
        if self._board is None:
            return
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)
            elif name == "load":
                for layer, load in enumerate(np.asarray(value, float)):
                    fullest = load.max() / max(load.mean(), 1.0)
                    self._board.add_scalar(f"fullest_expert/layer_{layer}", fullest, step)
        self._board.flush()

    def last(self, name: str) -> dict[str, Any] | None:
        """The last line that has ``name``."""
        return self._metrics.last(name)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()


def figures_text(line: dict[str, Any]) -> str:
    """The figures of a line in one short text."""
    parts = [f"loss {line['loss']:.4f}"] if "loss" in line else ["all steps skipped"]
    if "tokens_per_second" in line:
        parts.append(rate_text(line["tokens_per_second"]))
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("dropped"):
        parts.append(f"{line['dropped']:.1%} dropped")
    if line["num_skipped"]:
        parts.append(f"{line['num_skipped']} skipped")
    return ", ".join(parts)


def rate_text(tokens_per_second: float) -> str:
    """A rate with a unit that keeps it short."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tokens_per_second >= size:
            return f"{tokens_per_second / size:.1f}{unit} tokens/s"
    return f"{tokens_per_second:.0f} tokens/s"
