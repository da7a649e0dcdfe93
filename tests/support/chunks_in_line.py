"""Layers in chunks with no op in flight: the same chunks, one op after the other."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jax_ep._moe import exchange
from jax_ep._ops.combine import combine
from jax_ep._ops.dispatch import dispatch
from jax_ep._ops.flights import Opened
from jax_ep._ops.overlap import Ticket


def replace_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ``moe`` run whole ops where it would start them; gives the names of those that it traces."""
    order: list[str] = []

    def start(op: Any) -> Any:
        def run(*args: Any, after: Any, **kwargs: Any) -> Ticket:
            del after
            order.append(op.__name__)
            return Ticket(op(*args, **kwargs), op.__name__, Opened(0, 1, 0, None))

        return run

    monkeypatch.setattr(exchange, "dispatch_start", start(dispatch))
    monkeypatch.setattr(exchange, "combine_start", start(combine))
    jax.clear_caches()  # moe's programs are found by their settings
    return order
