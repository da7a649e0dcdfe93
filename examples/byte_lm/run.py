"""One run: from the start or a checkpoint to its held-out loss, its picture and its sample."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import pathlib
import signal
from typing import NamedTuple, Self

import jax
import numpy as np
from rich.console import Console

from byte_lm.config import DEFAULT_MINUTES, RunConfig
from byte_lm.data import Corpus
from byte_lm.progress import figures_text, rate_text
from byte_lm.report import plot
from byte_lm.training import Figures, Trainer, TrainState
from common.checkpoints import Checkpoints, newest
from common.clock import Clock
from common.folders import differences, make_folder
from common.interrupt import Interrupt
from common.metrics import Metrics
from common.pace import Decision, Pace
from common.progress import make_bar

_PROVISIONAL_STEPS = 10_000  # of a run by time, until its first steps have been timed
_IN_FLIGHT = 2  # steps whose figures are not fetched yet, so that devices need not wait for us
_QUICK_BATCHES = 4  # of an evaluation on the way, one in each tenth of the run
_FINAL_BATCHES = 32
_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a run.

    Attributes:
        steps: Steps of the run in all its parts.
        held_out_loss: Nats per byte on held-out text.
        unigram_loss: The same for a model that only knows byte frequencies.
        bytes_per_second: Bytes trained on per second of training, in this part.
        sample: Text that the model wrote.
    """

    steps: int
    held_out_loss: float
    unigram_loss: float
    bytes_per_second: float
    sample: str


class _Start(NamedTuple):
    """Where a run begins (at zero or at a checkpoint), and what limits it: steps or minutes."""

    state: TrainState
    step: int
    steps: int | None
    minutes: float | None
    seconds: float  # of training that are over


class Run:
    """A run in one process. With several processes, each has one, and all do the same.

    A context manager, which closes the files it writes.

    Attributes:
        state: The state of training.
        step: Steps done.
        total_steps: Steps of the whole run. A run by time keeps estimating them; None until its
            first steps have been timed.
    """

    def __init__(self, trainer: Trainer, corpus: Corpus, config: RunConfig) -> None:
        """Begin a run, or continue from the newest checkpoint.

        Args:
            trainer: The model on its mesh.
            corpus: The text.
            config: How long to train and where results go.

        Raises:
            FileExistsError: if there are checkpoints and ``config.resume`` is False.
            FileNotFoundError: if there are none and it is True.
            ValueError: if the prompt does not fit, the folder cannot be written to, or the checkpoint
                is of a run with other settings or other text. Nothing is written then.
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
        folder = config.out / "checkpoints"
        found = self._newest(folder)
        make_folder(folder)
        with contextlib.ExitStack() as on_failure:
            self._checkpoints = Checkpoints(folder)
            on_failure.callback(self._checkpoints.close)
            start = self._fresh() if found is None else self._resumed(found)
            on_failure.pop_all()
        self.state, self.step, self.total_steps, minutes, seconds = start
        if minutes is not None and seconds >= 60 * minutes and self.step > 0:
            self.total_steps = self.step  # all of the time has been used
        self._pace = Pace(
            self._clock,
            first_step=self.step,
            steps=start.steps,
            minutes=minutes,
            seconds_before=seconds,
            checkpoint_every=config.checkpoint_every,
        )
        self._evaluated = self._pace.tenths(self.step)  # tenths of the run at the last evaluation
        path = config.out / "metrics.jsonl" if self._is_first else None
        self._metrics = Metrics(path, first_step=self.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._checkpoints.close()

    def train(self) -> int:
        """Train to the last step, with checkpoints on the way and at the end.

        SIGINT (Ctrl-C) and SIGTERM, of any process of the run, end it after the step under way, with a
        checkpoint and a message. A second signal ends the process at once.

        Returns:
            0, or the number of the signal that ended training.
        """
        first_step = self.step
        self._console.print(
            f"text: {(len(self._corpus.train) + len(self._corpus.held_out)) / 1e6:.1f} MB from "
            f"{self._corpus.source}\nmesh: {self._mesh_text()}; losses are in nats per byte",
            markup=False,
            soft_wrap=True,
        )
        ended_by = 0
        with Interrupt() as interrupt, make_bar(self._console) as bar:
            task = bar.add_task(
                "", completed=self.step, total=self.total_steps, figures="compiling"
            )
            while self.total_steps is None or self.step < self.total_steps:
                self._train_step()
                if self.step == first_step + 1:
                    self._fetch_figures()
                    self._clock.start()
                decision = self._pace.decide(self.step, signal=interrupt.number)
                if decision is not None:
                    self.total_steps = decision.total_steps or None
                    if decision.signal:
                        ended_by = decision.signal
                        break
                    self._pause_if_due(decision)
                line = self._figures_line()
                bar.update(task, completed=self.step, total=self.total_steps, figures=line)
            self._fetch_figures()
            self._clock.stop()
            ended_by = ended_by or self._pace.decide_at_the_end(interrupt.number)
            if self._checkpoints.latest() != self.step:
                self._save()
        if ended_by:
            self._console.print(
                f"{signal.Signals(ended_by).name}: stopped after step {self.step} and saved it in "
                f"{self._config.out}\nthe same command with --resume goes on from there",
                markup=False,
                soft_wrap=True,
            )
        return ended_by

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

    def _newest(self, folder: pathlib.Path) -> int | None:
        """The checkpoint to begin from; raises if the user did not ask to resume from it."""
        config, found = self._config, newest(folder)
        if found is None and config.resume:
            raise FileNotFoundError(
                f"--resume: expected a checkpoint in {config.out}, got none; begin without it."
            )
        if found is not None and not config.resume:
            raise FileExistsError(
                f"--out: expected a folder without checkpoints, got {config.out}, which has one of "
                f"step {found}; pass --resume to go on from it, or another folder."
            )
        return found

    def _fresh(self) -> _Start:
        config = self._config
        minutes = config.minutes
        if config.steps is None and minutes is None:
            minutes = DEFAULT_MINUTES
        return _Start(self._trainer.initial_state(), 0, config.steps, minutes, 0.0)

    def _resumed(self, found: int) -> _Start:
        config = self._config
        saved = self._checkpoints.settings(found)
        progress = saved.pop("progress", None)
        if progress is None or saved != self._settings:
            found_others = differences(saved, self._settings) or ["it is of an older program"]
            raise ValueError(
                f"--resume: expected the settings and the text of the run in {config.out}, got "
                f"others: {', '.join(found_others)}."
            )
        steps, minutes = config.steps, config.minutes
        if steps is None and minutes is None:
            steps, minutes = progress["steps"], progress["minutes"]
        state = self._checkpoints.restore(found, self._trainer.abstract_state)
        return _Start(state, found, steps, minutes, progress["seconds"])

    def _train_step(self) -> None:
        self.step += 1
        self.state, figures = self._trainer.step_on(
            self.state,
            self._corpus,
            step=self.step,
            total_steps=max(self.total_steps or _PROVISIONAL_STEPS, self.step),
        )
        self._pending.append((self.step, figures))
        self._fetch_figures(but=_IN_FLIGHT)

    def _fetch_figures(self, *, but: int = 0) -> None:
        """Wait for the figures of all steps except the last ``but`` ones, and record them."""
        while len(self._pending) > but:
            step, figures = self._pending.popleft()
            loss, load, dropped = jax.device_get(figures)
            self._trainer.check()
            self._clock.count_step()
            self._metrics.add(step, loss=float(loss), dropped=float(dropped), load=load.tolist())

    def _pause_if_due(self, decision: Decision) -> None:
        """Evaluate and save if it is time for that; neither counts as training."""
        evaluate = decision.tenths > self._evaluated and self.step != self.total_steps
        save = bool(decision.save)
        if not evaluate and not save:
            return
        self._fetch_figures()
        with self._clock.paused():
            if evaluate:
                batches = self._held_out(_QUICK_BATCHES)
                loss = self._trainer.held_out_loss(self.state, batches)
                self._metrics.add(self.step, held_out_loss=loss)
                self._evaluated = decision.tenths
                self._console.print(
                    f"step {self.step}/{self.total_steps}: held out {loss:.3f}, "
                    f"{self._figures_line()}"
                )
            if save:
                self._save()

    def _save(self) -> None:
        self._metrics.flush()
        progress = {
            "steps": self._pace.steps,
            "minutes": self._pace.minutes,
            "seconds": self._pace.seconds(),
        }
        self._checkpoints.save(self.step, self.state, self._settings | {"progress": progress})

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
        return figures_text(
            loss=last["loss"], bytes_per_second=self._bytes_per_second(), dropped=last["dropped"]
        )

    def _mesh_text(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self._trainer.mesh.shape.items())

    def _sample(self) -> str:
        """One window of text that begins with the prompt."""
        prompt = np.frombuffer(self._config.prompt.encode(), np.uint8)
        # One row for each device, because batches are split over all of them. The first is shown.
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
        plot(
            self._metrics.records,
            out / "curves.png",
            unigram_loss=summary.unigram_loss,
            title=f"byte-level MoE model on a mesh of {self._mesh_text()}",
        )
        (out / "sample.txt").write_text(summary.sample)
        (out / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2))
        self._console.rule("sample")
        self._console.print(summary.sample, markup=False)
        self._console.rule()
        rate = ""
        if summary.bytes_per_second:  # a resumed run may have nothing left to train
            rate = f"{rate_text(summary.bytes_per_second)} while training; "
        self._console.print(
            f"held-out loss {summary.held_out_loss:.3f} nats/byte after {summary.steps} steps "
            f"(byte frequencies: {summary.unigram_loss:.3f})\n"
            f"{rate}written to {out}:\n"
            "curves.png, metrics.jsonl, sample.txt, summary.json, checkpoints",
            markup=False,
            soft_wrap=True,
        )
