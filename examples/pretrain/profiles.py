"""Profiles of steps: those that the command line asks for, and one now and then for shares of time."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable

import jax

from examples.pretrain import shares


class Profiler:
    """Decides which steps have a profile, and takes it.

    A step before which ``begins`` is True has to wait for those before it, and one after which ``ends``
    is True has to be done before ``stop``.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        chosen: tuple[int, int] | None,
        every: int,
        here: bool,
        steps_before: int = 0,
    ) -> None:
        """Begin without a profile.

        Args:
            folder: Where the profile of the chosen steps is kept. Others are removed.
            chosen: First and last step of it; None for none.
            every: Steps between profiles of one step; 0 for none.
            here: Whether this process takes any.
            steps_before: Steps of earlier parts of the run. The first one after them compiles, so its
                profile would say nothing of other steps.
        """
        self._compiles = steps_before + 1
        self._folder, self._every = folder, every if here else 0
        self._first, self._last = chosen if chosen is not None and here else (0, 0)
        self._until: int | None = None  # the last step of the profile that is running
        self._removed: tempfile.TemporaryDirectory[str] | None = None

    def begins(self, step: int) -> bool:
        """Whether a profile begins before ``step``."""
        one = self._every > 0 and step % self._every == 0 and step != self._compiles
        return self._until is None and (one or step == self._first)

    def start(self, step: int) -> None:
        """Begin the profile."""
        options = jax.profiler.ProfileOptions()
        if step == self._first:
            folder, self._until = self._folder, self._last
        else:
            self._removed = tempfile.TemporaryDirectory()
            folder, self._until = pathlib.Path(self._removed.name), step
            options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)

    def ends(self, step: int) -> bool:
        """Whether the profile that is running ends after ``step``."""
        return self._until is not None and step >= self._until

    def stop(self, program: Callable[[], str] | None) -> dict[str, float]:
        """End the profile, and give its shares of time.

        Args:
            program: As ``shares.read`` takes it.
        """
        jax.profiler.stop_trace()
        self._until = None
        folder = self._folder if self._removed is None else pathlib.Path(self._removed.name)
        try:
            # A folder for each profile, named by its time.
            newest = max(path.parent for path in folder.rglob("*.xplane.pb"))
            return shares.read(newest, program)
        finally:
            self._remove()

    def close(self) -> None:
        """End a profile that is running, without a look at it."""
        if self._until is not None:
            jax.profiler.stop_trace()
            self._until = None
        self._remove()

    def _remove(self) -> None:
        if self._removed is not None:
            self._removed.cleanup()
            self._removed = None
