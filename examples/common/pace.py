"""When a run ends and when it saves: decisions that all of its processes take at the same step.

A run by time does not know its number of steps beforehand, so it keeps estimating that number from
the speed of its last steps. Processes measure different times and receive different signals, so
they meet at certain steps, where they take the estimate of process 0 and the signal of any process.
The first meetings set the steps of the next ones: a single process decides after every step, and
several meet about once a second, because a meeting is a collective that waits for all devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from .clock import Clock

_SECONDS_BETWEEN_MEETINGS = 1.0
_MOST_STEPS_BETWEEN_MEETINGS = 100
_SECONDS_BETWEEN_SAVES = 60.0
_FIRST_TIMED_STEP = 4  # of a part of a run: the first compiles, and two are in flight


class Decision(NamedTuple):
    """What the processes agree on.

    Attributes:
        signal: The number of the signal that ends the run; 0 for none.
        total_steps: Steps of the whole run; 0 if it is not known yet.
        save: 1 where it is time for a checkpoint, else 0.
        tenths: Tenths of the run that are over.
        next_step: The step after which they meet again.
    """

    signal: int
    total_steps: int
    save: int
    tenths: int
    next_step: int


class Pace:
    """Decides for one part of a run, from its first step to its last.

    Attributes:
        steps: Steps of the whole run, if steps limit it.
        minutes: Minutes of training in the whole run, if time limits it.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        first_step: int,
        steps: int | None,
        minutes: float | None,
        seconds_before: float,
        checkpoint_every: int | None,
    ) -> None:
        """Begin.

        Args:
            clock: Counts the seconds and steps of this part.
            first_step: Steps that were done before.
            steps: Steps of the whole run; None if ``minutes`` limit it.
            minutes: Minutes of training in the whole run.
            seconds_before: Seconds of training in earlier parts.
            checkpoint_every: Steps between checkpoints; None for about one a minute.
        """
        self.steps = steps
        self.minutes = minutes
        self._clock = clock
        self._first_step = first_step
        self._seconds_before = seconds_before
        self._checkpoint_every = checkpoint_every
        self._last_save = 0.0
        self._next_step = first_step + 1

    def seconds(self) -> float:
        """Seconds of training in the whole run."""
        return self._seconds_before + self._clock.seconds()

    def tenths(self, step: int) -> int:
        """Tenths of the run that are over after ``step``, of its steps or of its time."""
        if self.steps is not None:
            return 10 * step // self.steps
        assert self.minutes is not None
        return int(10 * self.seconds() / (60 * self.minutes)) if self.minutes else 10

    def decide(self, step: int, *, signal: int) -> Decision | None:
        """What happens after ``step``, or None where no decision is due; call it in all processes.

        Args:
            step: Steps done or under way.
            signal: The number of the signal that this process received; 0 for none.
        """
        if step < self._next_step:
            return None
        mine = Decision(
            signal=signal,
            total_steps=self._total_steps(step),
            save=self._save_is_due(step),
            tenths=self.tenths(step),
            next_step=self._meet_after(step),
        )
        decision = mine
        if jax.process_count() > 1:
            everyone = multihost_utils.process_allgather(np.array(mine, np.int32))
            decision = Decision(*map(int, everyone[0]))
            decision = decision._replace(signal=int(everyone[:, 0].max()))
        if decision.save:
            self._last_save = self._clock.seconds()
        self._next_step = decision.next_step
        return decision

    def decide_at_the_end(self, signal: int) -> int:
        """The signal that any process received before the last step was done."""
        if jax.process_count() == 1:
            return signal
        return int(multihost_utils.process_allgather(np.array([signal], np.int32)).max())

    def _total_steps(self, step: int) -> int:
        if self.steps is not None:
            return self.steps
        assert self.minutes is not None
        left = 60 * self.minutes - self.seconds()
        each = self._clock.seconds_per_step()
        if left <= 0:
            return step
        if not each:
            return 0
        done = self._first_step + 1 + self._clock.steps  # steps in flight take their time too
        return max(step, done + math.floor(left / each))

    def _save_is_due(self, step: int) -> int:
        if self._checkpoint_every is not None:
            return int(step % self._checkpoint_every == 0)
        return int(self._clock.seconds() - self._last_save > _SECONDS_BETWEEN_SAVES)

    def _meet_after(self, step: int) -> int:
        if jax.process_count() == 1:
            return step + 1
        each = self._clock.seconds_per_step()
        if each:
            apart = max(1, int(_SECONDS_BETWEEN_MEETINGS / each))
            after = step + min(apart, _MOST_STEPS_BETWEEN_MEETINGS)
        else:
            after = max(step + 1, self._first_step + _FIRST_TIMED_STEP)
        if self._checkpoint_every is not None:  # not beyond the step of the next checkpoint
            after = min(after, step + self._checkpoint_every - step % self._checkpoint_every)
        return after
