"""Text of the rendered pages: tables, paragraphs and numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A "|" in a cell, which would end it, becomes "/"."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def wrapped(text: str) -> str:
    """A paragraph in lines no longer than those around it."""
    return textwrap.fill(text, width=104, break_on_hyphens=False, break_long_words=False)


def number(value: float | None, digits: int = 1) -> str:
    """A number with ``digits`` digits behind the point; nothing for None and 0."""
    return "" if not value else f"{value:.{digits}f}"


def microseconds(value: float | None) -> str:
    """A time in microseconds; None says that the run failed."""
    return "failed" if value is None else f"{value:.1f}"


def nothing(maker: str) -> str:
    """The text in place of a table whose records ``maker``, a command, has not made yet."""
    return f"No results are committed yet. `{maker}` makes them."


def where(record: dict[str, Any]) -> str:
    """The ranks of a record, and what they are on."""
    gpus = f"{record['gpus']} × {record['device']}" if record["gpus"] else record["device"]
    hosts = f" as {record['hosts']} hosts" if "hosts" in record else ""
    return f"{record['ranks']} rank(s){hosts}, {record['processes']} process(es), {gpus}"


def spread(record: dict[str, Any]) -> str:
    """From the 10th to the 90th percentile, or nothing."""
    if record["median_us"] is None:
        return ""
    return f"{record['p10_us']:.1f} to {record['p90_us']:.1f}"
