"""The loop of a run: steps, evaluations, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import signal
import time
from typing import Any, Self

import jax
from rich.console import Console

from examples.common.checkpoints import Checkpoints
from examples.common.clock import Clock
from examples.common.folders import make_folder
from examples.common.interrupt import Interrupt
from examples.common.pace import Pace
from examples.common.progress import make_bar
from examples.pretrain import convert, flops
from examples.pretrain.config import Config
from examples.pretrain.data import Batch, Feed, Rows, held_out_batches
from examples.pretrain.metrics import Log, Window, figures_text
from examples.pretrain.profiles import Profiler
from examples.pretrain.record import write_record
from examples.pretrain.report import write_report
from examples.pretrain.resume import find_checkpoint, position_in, settings_of
from examples.pretrain.step import Setup, TrainState

_IN_FLIGHT = 2  # steps whose metrics are not fetched yet, so that devices need not wait for us
_MOST_SKIPPED_IN_A_ROW = 10


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradients that are not finite."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration.

    Attributes:
        out: Folder of all results; processes share it.
        resume: Go on from the newest checkpoint in ``out``, if there is one.
        allow_changes: Go on with other settings than before.
        minutes: End after this time of training in this part of the run, with a checkpoint.
        profile: First and last step of a trace; None for none.
        weights: Folder of safetensors files that a new run begins with.
        command: The command line, for the record of the run.
        started: When the program began, by ``time.perf_counter``.
    """

    out: pathlib.Path
    resume: bool = False
    allow_changes: bool = False
    minutes: float | None = None
    profile: tuple[int, int] | None = None
    weights: pathlib.Path | None = None
    command: str = ""
    started: float = dataclasses.field(default_factory=time.perf_counter)


class Loop:
    """A part of a run, from its start or a checkpoint. In several processes all do the same.

    A context manager, which closes what it opened.

    Attributes:
        state: The state of training.
        step: Steps done, skipped ones included.
        log: The lines of metrics.
    """

    def __init__(self, config: Config, setup: Setup, rows: Rows, options: Options) -> None:
        """Begin, or go on from the newest checkpoint.

        Args:
            config: The configuration.
            setup: The model and its steps on a mesh.
            rows: The data.
            options: What the command line says beside the configuration.

        Raises:
            FileExistsError: if there is a checkpoint and ``options.resume`` is False.
            ValueError: if the folder cannot be written to, the checkpoint is of a run with other
                settings, or the weights do not fit.
        """
        self._config, self._setup, self._rows, self._options = config, setup, rows, options
        self._is_first = jax.process_index() == 0
        self._console = Console(quiet=not self._is_first, highlight=False, soft_wrap=True)
        self._settings = settings_of(config, data_digest=rows.summary.digest)
        found = find_checkpoint(options.out, resume=options.resume)
        folder = options.out / "checkpoints"
        make_folder(folder)
        self._clock = Clock()
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        with contextlib.ExitStack() as resources:
            self._checkpoints = Checkpoints(
                folder, kept=config.run.keep_checkpoints, in_background=True
            )
            resources.callback(self._checkpoints.close)
            position, self.step = 0, 0
            if found is None:
                self.state = self._initial_state()
            else:
                self.step = found
                position, changes = position_in(
                    self._checkpoints, found, self._settings, allow_changes=options.allow_changes
                )
                for change in changes:
                    self._console.print(f"changed: {change}", markup=False)
                self.state = self._checkpoints.restore(found, setup.abstract_state())
            self._feed = Feed(
                rows,
                setup.batch_sharding,
                batch_size=config.data.batch_size,
                seed=config.run.seed,
                position=position,
            )
            resources.callback(self._feed.close)
            self.log = Log(options.out if self._is_first else None, first_step=self.step)
            resources.callback(self.log.close)
            self._profiler = Profiler(
                options.out / "profile",
                chosen=options.profile,
                every=config.run.profile_every,
                here=self._is_first,
                steps_before=self.step,
            )
            resources.callback(self._profiler.close)
            self._resources = resources.pop_all()
        devices = setup.mesh.devices
        peak = flops.peak_flops(devices.flat[0].device_kind)
        self._window = Window(
            flops_per_token=flops.flops_per_token(config.model, seq_len=config.data.seq_len),
            peak_flops=None if peak is None else peak * devices.size,
        )
        self._total_steps = config.optimizer.total_steps
        self._pace = Pace(
            self._clock,
            first_step=self.step,
            steps=None if options.minutes is not None else self._total_steps,
            minutes=options.minutes,
            seconds_before=0.0,
            checkpoint_every=config.run.save_every,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def train(self) -> int:
        """Train to the last step, or to a signal.

        SIGTERM and SIGINT (Ctrl-C), of any process, end it after a step on which all agree, with a
        checkpoint and a message.

        Returns:
            0, or the number of the signal.

        Raises:
            jax_ep.CommunicationError: if an op of the group has failed; nothing is saved then.
            DivergedError: if too many steps in a row are not finite.
        """
        self._introduce()
        first_step, last_step, ended_by = self.step, self._total_steps, 0
        shown = self._console if self._console.is_terminal else Console(quiet=True)
        with Interrupt() as interrupt, make_bar(shown) as bar:
            task = bar.add_task("", completed=self.step, total=last_step, figures="compiling")
            while self.step < last_step:
                self._train_step()
                if self.step == first_step + 1:
                    self._fetch()
                    self._clock.start()
                    self._window.start_clock()
                decision = self._pace.decide(self.step, signal=interrupt.number)
                if decision is not None:
                    if decision.total_steps:
                        last_step = min(decision.total_steps, self._total_steps)
                    if ended_by := decision.signal:
                        break
                if self.step % self._config.run.eval_every == 0 and self.step < last_step:
                    self._evaluate()
                if decision is not None and decision.save:
                    self._save()
                last = self.log.last("num_skipped")
                text = "compiling" if last is None else figures_text(last)
                bar.update(task, completed=self.step, total=last_step, figures=text)
            self._fetch()
            self._write_line()
            self._clock.stop()
            ended_by = ended_by or self._pace.decide_at_the_end(interrupt.number)
            if self._checkpoints.latest() != self.step:
                self._save()
            self._checkpoints.wait()
            self.log.add(self.step, **self._times())  # with the last save
        if ended_by:
            self._console.print(
                f"{signal.Signals(ended_by).name}: stopped after step {self.step} and saved it in "
                f"{self._options.out}\nthe same command with --resume goes on from there",
                markup=False,
            )
        return ended_by

    def finish(self) -> float:
        """Evaluate on the held-out rows and write ``report.html`` and ``report.json``.

        Returns:
            The held-out loss, in nats per token.
        """
        loss = self._evaluate()
        if self._is_first:
            out, lines = self._options.out, self.log.lines
            write_record(out, self._setup, self._rows.summary, lines, command=self._options.command)
            path = write_report(out, self._config, lines)
            self._console.print(f"held-out loss {loss:.4f}; report: {path}", markup=False)
        return loss

    def _initial_state(self) -> TrainState:
        state = self._setup.init(self._config.run.seed)
        if self._options.weights is None:
            return state
        return convert.load(self._options.weights, self._config.model, state)

    def _introduce(self) -> None:
        mesh = " × ".join(f"{name} {size}" for name, size in self._setup.mesh.shape.items())
        summary = self._rows.summary
        self._console.print(
            f"{self._config.name}: {flops.active_weights(self._config.model) / 1e6:.1f}M active "
            f"weights on a mesh {mesh} of {jax.process_count()} process(es)\n"
            f"{summary.num_rows['train']} rows, {summary.num_targets['train'] / 1e6:.1f}M targets; "
            f"from step {self.step} to {self._total_steps}; losses are in nats per token",
            markup=False,
        )

    def _train_step(self) -> None:
        if self._profiler.begins(self.step + 1):
            self._fetch()
            with self._clock.paused():
                self._profiler.start(self.step + 1)
        batch = next(self._feed)
        self.step += 1
        self.state, metrics = self._setup.train_step(self.state, batch)
        self._pending.append((self.step, metrics))
        self._fetch(but=_IN_FLIGHT)
        if self._profiler.ends(self.step):
            self._fetch()
            with self._clock.paused():
                self._end_profile(batch)

    def _end_profile(self, batch: Batch) -> None:
        """Write down the shares of time of the steps that were profiled."""

        def program() -> str:
            # JAX has it already: nothing is compiled.
            return self._setup.train_step.lower(self.state, batch).compile().as_text() or ""

        on_cpu = self._setup.mesh.devices.flat[0].platform == "cpu"
        shares = self._profiler.stop(program if on_cpu else None)
        if shares:
            self.log.add(self.step, **shares)
            text = f"dispatch and combine take {shares['exchange_share']:.1%} of the time"
        else:
            text = "the profile has no op of jax_ep, so there are no shares of time"
        self._console.print(f"step {self.step}/{self._total_steps}: {text}", markup=False)

    def _fetch(self, *, but: int = 0) -> None:
        """Wait for the metrics of all steps except the last ``but`` ones."""
        while len(self._pending) > but:
            step, metrics = self._pending.popleft()
            values = jax.device_get(metrics)
            # A failed op gives NaN, which must not pass as a step to skip.
            self._setup.group.check()
            self._clock.count_step()
            self._window.add(values)
            if self._window.num_skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"the last {_MOST_SKIPPED_IN_A_ROW} steps, up to step {step}, had a loss or "
                    "gradients that are not finite. Go on from an earlier checkpoint with a lower "
                    "optimizer.peak_lr, or look at the data at this position."
                )
            if step % self._config.run.log_every == 0:
                self._write_line(step)

    def _write_line(self, step: int | None = None) -> None:
        """The figures since the last line; none if that is the line of this step."""
        step = self.step if step is None else step
        last = self.log.last("num_skipped")
        if step == 0 or (last is not None and last["step"] >= step):
            return
        line = self._window.line(seconds=self._clock.seconds())
        self.log.add(step, **line, **self._times())
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._total_steps}: {figures_text(line)}")

    def _times(self) -> dict[str, float]:
        """What goodput is made of, over all parts of the run."""
        productive = self.log.productive_seconds_before + self._clock.seconds()
        up = self.log.up_seconds_before + time.perf_counter() - self._options.started
        return {"productive_seconds": productive, "up_seconds": up, "goodput": productive / up}

    def _evaluate(self) -> float:
        """The loss on the held-out rows, which it writes down. It does not count as training."""
        self._fetch()
        config = self._config
        nats, targets = 0.0, 0
        with self._clock.paused():
            for batch in held_out_batches(
                self._rows,
                self._setup.batch_sharding,
                batch_size=config.data.batch_size,
                num_batches=config.run.eval_batches,
            ):
                metrics = jax.device_get(self._setup.eval_step(self.state, batch))
                self._setup.group.check()
                nats += float(metrics["loss"]) * int(metrics["tokens"])
                targets += int(metrics["tokens"])
            loss = nats / targets
            self.log.add(self.step, held_out_loss=loss)
            self._console.print(f"step {self.step}/{self._total_steps}: held out {loss:.4f}")
        return loss

    def _save(self) -> None:
        """Copy the state to the host; threads write it to the folder meanwhile."""
        self._fetch()
        self._setup.group.check()
        with self._clock.paused():
            settings = self._settings | {"position": self._feed.position}
            self._checkpoints.save(self.step, self.state, settings)
