"""Turns Ctrl-C and SIGTERM into a request that training checks between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Notes the first SIGINT or SIGTERM inside its block; a second one acts as usual.

    A context manager. Python delivers signals to the main thread alone, so in another thread it notes
    nothing.

    Attributes:
        number: The signal that came; 0 for none.
    """

    def __init__(self) -> None:
        """Make one that does not listen yet."""
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()  # so a second signal ends the process at once

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # The handler is None if code outside Python has set it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
