"""How long training takes, without evaluation and saving between steps."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

_RECENT = 20  # steps that tell how fast training is now


class Clock:
    """Counts seconds while it runs, and the steps that have ended meanwhile.

    Attributes:
        steps: Steps that have ended since the start.
    """

    def __init__(self) -> None:
        """Make a stopped clock at zero."""
        self.steps = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT + 1)

    def start(self) -> None:
        """Count from zero."""
        self.steps, self._seconds = 0, 0.0
        self._since = time.perf_counter()
        self._recent.clear()
        self._recent.append(0.0)

    def stop(self) -> None:
        """Stop counting."""
        self._seconds = self.seconds()
        self._since = None

    def count_step(self) -> None:
        """One more step has ended; without effect before ``start``."""
        if self._since is not None:
            self.steps += 1
            self._recent.append(self.seconds())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop counting inside the block."""
        running = self._since is not None
        self.stop()
        yield
        if running:
            self._since = time.perf_counter()

    def seconds(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    def seconds_per_step(self) -> float | None:
        """The mean over the last few steps; None before the first has ended."""
        if len(self._recent) < 2:
            return None
        return (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
