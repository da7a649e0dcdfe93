"""One run: from the start or a checkpoint to its held-out loss, its picture and its sample."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from byte_lm.checkpoint import Checkpoints
from byte_lm.clock import Clock
from byte_lm.config import RunConfig
from byte_lm.data import Corpus
from byte_lm.report import Metrics, plot
from byte_lm.training import Figures, Trainer, TrainState, learning_rates

# Steps that are timed, after the one that compiles, to learn how many fit in the time given.
_TIMED_STEPS = 20
_PROVISIONAL_STEPS = 10_000  # until then
_IN_FLIGHT = 2  # steps whose figures are not fetched yet, so that devices need not wait for us
_EVALUATIONS = 10  # on the way, on a few windows
_QUICK_BATCHES = 4
_FINAL_BATCHES = 32
_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a run.

    Attributes:
        steps: From the first on, over all its parts.
        held_out_loss: Nats per byte on held-out text.
        unigram_loss: The same of the model that knows byte frequencies and no more.
        bytes_per_second: Bytes trained on per second of training, in this part.
        sample: Text that the model made up.
    """

    steps: int
    held_out_loss: float
    unigram_loss: float
    bytes_per_second: float
    sample: str


class Run:
    """A run in one process; where there are several, each has one and all do the same.

    A context manager, which closes the files it writes.

    Attributes:
        state: The state of training.
        step: Steps done.
        total_steps: Steps of the whole run; None until the first few have been timed.
    """

    def __init__(self, trainer: Trainer, corpus: Corpus, config: RunConfig) -> None:
        """Begin, or take up the newest checkpoint.

        Args:
            trainer: The model on its mesh.
            corpus: The text.
            config: How long to train and where results go.

        Raises:
            FileExistsError: if there are checkpoints and ``config.resume`` is False.
            FileNotFoundError: if there are none and it is True.
            ValueError: if the prompt does not fit, or the checkpoint is of a run with other settings
                or other text.
        """
        if not 0 < len(config.prompt.encode()) < trainer.config.seq_len:
            raise ValueError(
                f"--prompt: expected 1 to {trainer.config.seq_len - 1} bytes (less than --seq-len), "
                f"got {len(config.prompt.encode())}."
            )
        self._trainer = trainer
        self._corpus = corpus
        self._config = config
        self._is_first = jax.process_index() == 0
        self._console = Console(quiet=not self._is_first, highlight=False)
        self._settings = {
            "model": dataclasses.asdict(trainer.model_config),
            "train": dataclasses.asdict(trainer.config),
            "text": corpus.fingerprint(),
        }
        self._clock = Clock()
        self._pending: collections.deque[tuple[int, Figures]] = collections.deque()
        config.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as on_failure:
            self._checkpoints = Checkpoints(config.out / "checkpoints")
            on_failure.callback(self._checkpoints.close)
            self.state, self.step, self.total_steps = self._start()
            on_failure.pop_all()
        path = config.out / "metrics.jsonl" if self._is_first else None
        self._metrics = Metrics(path, first_step=self.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._checkpoints.close()

    def train(self) -> None:
        """Train to the last step, with a checkpoint there and every so often before."""
        bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._is_first,
        )
        first_step = self.step
        self._plan_schedule()
        with bar:
            task = bar.add_task(
                "", completed=self.step, total=self.total_steps, figures="compiling"
            )
            while self.total_steps is None or self.step < self.total_steps:
                self._train_step()
                if self.step == first_step + 1:
                    self._fetch_figures()
                    self._clock.start()
                if self.total_steps is None and self.step == first_step + 1 + _TIMED_STEPS:
                    self._fetch_figures()
                    self.total_steps = self._estimate_total_steps()
                    self._plan_schedule()
                self._pause_if_due()
                line = self._figures_line()
                bar.update(task, completed=self.step, total=self.total_steps, figures=line)
            self._fetch_figures()
            self._clock.stop()
            if self._checkpoints.latest() != self.step:
                self._save()

    def finish(self) -> Summary:
        """Evaluate, draw, sample, and write it all down."""
        batches = self._held_out(_FINAL_BATCHES)
        summary = Summary(
            steps=self.step,
            held_out_loss=self._trainer.held_out_loss(self.state, batches),
            unigram_loss=self._corpus.unigram_loss(batches),
            bytes_per_second=self._bytes_per_second(),
            sample=self._sample(),
        )
        self._metrics.add(self.step, held_out_loss=summary.held_out_loss)
        if self._is_first:
            self._write(summary)
        return summary

    def _start(self) -> tuple[TrainState, int, int | None]:
        """State, steps done and steps wanted, afresh or from the newest checkpoint."""
        config, found = self._config, self._checkpoints.latest()
        if found is None and config.resume:
            raise FileNotFoundError(
                f"--resume: expected a checkpoint in {config.out}, got none; begin without it."
            )
        if found is not None and not config.resume:
            raise FileExistsError(
                f"--out: expected a folder without checkpoints, got {config.out}, which has one of "
                f"step {found}; pass --resume to go on from it, or another folder."
            )
        if found is None:
            return self._trainer.initial_state(), 0, config.steps
        saved = self._checkpoints.settings(found)
        total_steps = saved.pop("total_steps")
        if saved != self._settings:
            raise ValueError(
                f"--resume: expected the settings and the text of the run in {config.out}, got "
                f"others: {', '.join(_differences(saved, self._settings))}."
            )
        state = self._checkpoints.restore(found, self._trainer.abstract_state)
        return state, found, config.steps or total_steps

    def _train_step(self) -> None:
        config = self._trainer.config
        batch = self._corpus.batch(
            seed=config.seed, step=self.step, batch_size=config.batch_size, seq_len=config.seq_len
        )
        self.state, figures = self._trainer.step(
            self.state, self._trainer.put(batch), self._learning_rates[self.step]
        )
        self.step += 1
        self._clock.steps += 1
        self._pending.append((self.step, figures))
        self._fetch_figures(but=_IN_FLIGHT)

    def _fetch_figures(self, *, but: int = 0) -> None:
        """Wait for the figures of all steps ``but`` the last few, and record them."""
        while len(self._pending) > but:
            step, figures = self._pending.popleft()
            loss, load, dropped = jax.device_get(figures)
            self._trainer.check()
            self._metrics.add(step, loss=float(loss), dropped=float(dropped), load=load.tolist())

    def _pause_if_due(self) -> None:
        """Evaluate and save where it is time for that; neither counts as training."""
        every = max((self.total_steps or _PROVISIONAL_STEPS) // _EVALUATIONS, 1)
        evaluate = self.step % every == 0 and self.step != self.total_steps
        save = self.step % self._config.checkpoint_every == 0
        if not evaluate and not save:
            return
        self._fetch_figures()
        with self._clock.paused():
            if evaluate:
                batches = self._held_out(_QUICK_BATCHES)
                loss = self._trainer.held_out_loss(self.state, batches)
                self._metrics.add(self.step, held_out_loss=loss)
                self._console.print(
                    f"step {self.step}/{self.total_steps}: {self._figures_line()}, "
                    f"held out {loss:.3f}"
                )
            if save:
                self._save()

    def _save(self) -> None:
        self._metrics.flush()
        settings = self._settings | {"total_steps": self.total_steps}
        self._checkpoints.save(self.step, self.state, settings)

    def _plan_schedule(self) -> None:
        total_steps = max(self.total_steps or _PROVISIONAL_STEPS, self.step)
        self._learning_rates = learning_rates(self._trainer.config, total_steps=total_steps)

    def _estimate_total_steps(self) -> int:
        """How many steps the time given allows, by the clock of the first process."""
        seconds = self._clock.seconds()
        left = (60 * self._config.minutes - seconds) / (seconds / self._clock.steps)
        total = np.int32(self.step + max(left, 0))
        return int(multihost_utils.broadcast_one_to_all(total))

    def _held_out(self, num_batches: int) -> list[np.ndarray]:
        config = self._trainer.config
        return list(
            self._corpus.held_out_batches(
                num_batches=num_batches, batch_size=config.batch_size, seq_len=config.seq_len
            )
        )

    def _bytes_per_second(self) -> float:
        config = self._trainer.config
        seconds = self._clock.seconds()
        return self._clock.steps * config.batch_size * config.seq_len / seconds if seconds else 0.0

    def _figures_line(self) -> str:
        last = self._metrics.last("loss")
        if last is None:
            return "compiling"
        return (
            f"loss {last['loss']:.3f} nats/byte, {self._bytes_per_second():,.0f} bytes/s, "
            f"{last['dropped']:.1%} dropped"
        )

    def _sample(self) -> str:
        """One window, from the prompt on."""
        prompt = np.frombuffer(self._config.prompt.encode(), np.uint8)
        # One row for each device, since batches are split over all of them; the first is shown.
        tokens = np.zeros((self._trainer.mesh.size, self._trainer.config.seq_len), np.int32)
        tokens[:, : len(prompt)] = prompt
        made = self._trainer.sample(
            self.state,
            self._trainer.put(tokens),
            np.int32(len(prompt)),
            np.int32(self._trainer.config.seed),
            np.float32(_TEMPERATURE),
        )
        text = np.asarray(made)[0]
        self._trainer.check()
        return text.astype(np.uint8).tobytes().decode(errors="replace")

    def _write(self, summary: Summary) -> None:
        out = self._config.out
        mesh = " x ".join(f"{name} {size}" for name, size in self._trainer.mesh.shape.items())
        plot(
            self._metrics.records,
            out / "curves.png",
            unigram_loss=summary.unigram_loss,
            title=f"byte-level MoE model on a mesh of {mesh}",
        )
        (out / "sample.txt").write_text(summary.sample)
        (out / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2))
        self._console.rule("sample")
        self._console.print(summary.sample, markup=False)
        self._console.rule()
        self._console.print(
            f"held-out loss {summary.held_out_loss:.3f} nats/byte after {summary.steps} steps "
            f"(byte frequencies: {summary.unigram_loss:.3f}), {summary.bytes_per_second:,.0f} "
            f"bytes/s\nwritten to {out}: curves.png, metrics.jsonl, sample.txt, summary.json, "
            "checkpoints",
            markup=False,
            soft_wrap=True,
        )


def _differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What differs between two settings, for people."""
    found = []
    for part, value in given.items():
        before = saved.get(part)
        if isinstance(value, dict) and isinstance(before, dict):
            names = [name for name in value if value[name] != before.get(name)]
            found += [f"{name} was {before.get(name)}, is {value[name]}" for name in names]
        elif value != before:
            found.append(f"{part} is another")
    return found
