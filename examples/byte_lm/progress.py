"""The figures beside the bar of a run. Everything fits into 80 columns."""

from __future__ import annotations


def figures_text(*, loss: float, bytes_per_second: float, dropped: float) -> str:
    """The figures of a step in one line.

    Args:
        loss: Nats per byte.
        bytes_per_second: Bytes trained on per second.
        dropped: Share of the choices of experts that were dropped.
    """
    return f"loss {loss:.3f}, {rate_text(bytes_per_second)}, {dropped:.1%} dropped"


def rate_text(bytes_per_second: float) -> str:
    """A rate with a unit that keeps it short."""
    for unit, size in (("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_second >= size:
            return f"{bytes_per_second / size:.1f} {unit}"
    return f"{bytes_per_second:.0f} B/s"
