"""How long training takes, without what happens in between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Counts seconds while it runs, and the steps done meanwhile.

    Attributes:
        steps: Since the start.
    """

    def __init__(self) -> None:
        """Make a clock that stands still at zero."""
        self.steps = 0
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count from zero."""
        self.steps, self._seconds = 0, 0.0
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self._seconds = self.seconds()
        self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still for a while."""
        running = self._since is not None
        self.stop()
        yield
        if running:
            self._since = time.perf_counter()

    def seconds(self) -> float:
        """What has been counted."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running
