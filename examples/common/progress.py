"""The bar of a run while it trains."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_BAR_WIDTH = 10  # columns


def make_bar(console: Console) -> Progress:
    """A bar whose tasks have a field ``figures``, the text that stands beside it."""
    return Progress(
        BarColumn(_BAR_WIDTH),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )
