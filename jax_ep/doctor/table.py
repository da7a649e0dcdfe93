"""The tables that the self-test prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Times = Mapping[tuple[int, int], float]

_MOST_COLUMNS = 64  # ranks of the reach matrix


def of_reach(matrix: np.ndarray, hosts: Sequence[Sequence[int]]) -> str:
    """Who reaches whom: "." by loads and stores, "n" by the network only."""
    size = len(matrix)
    if size > _MOST_COLUMNS:
        return f"Reach: {int(matrix.sum())} of {size * size} pairs by loads and stores."
    lines = ["Reach (row to column): . by loads and stores, n by the network only"]
    for ranks in hosts:
        for rank in ranks:
            words = ["".join("." if matrix[rank, b] else "n" for b in others) for others in hosts]
            lines.append(f"{rank:>6}  {' '.join(words)}")
    return "\n".join(lines) + "\n"


def of_pairs(latency: Times, bandwidth: Times, num_bytes: int, hosts: Mapping[int, int]) -> str:
    """A line for each pair of hosts.

    Args:
        latency: Seconds of a round trip of one token, by (sender, receiver).
        bandwidth: Seconds of a round trip of many.
        num_bytes: Bytes of those, in one direction.
        hosts: The host of each rank.
    """
    head = (
        "hosts",
        "pairs",
        "us median",
        "us worst",
        "between",
        "GB/s median",
        "GB/s worst",
        "between",
    )
    rows: list[tuple[str, ...]] = [head]
    for pair in sorted({(hosts[a], hosts[b]) for a, b in [*latency, *bandwidth]}):
        times = {p: t for p, t in latency.items() if (hosts[p[0]], hosts[p[1]]) == pair}
        rates = {
            p: 2 * num_bytes / t / 1e9
            for p, t in bandwidth.items()
            if (hosts[p[0]], hosts[p[1]]) == pair
        }
        row = [f"{pair[0]} to {pair[1]}", str(max(len(times), len(rates)))]
        row += _cells({p: t * 1e6 for p, t in times.items()}, max)
        row += _cells(rates, min)
        rows.append(tuple(row))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return (
        "Round trips (plan, dispatch, combine) of one rank's rows to one other; others are silent.\n"
        f"us: one token. GB/s: {num_bytes} bytes there and back.\n" + "\n".join(lines) + "\n"
    )


def _cells(values: Times, worst: Callable[..., tuple[int, int]]) -> list[str]:
    """Median, worst value and whose that is."""
    if not values:
        return ["-", "-", "-"]
    pair = worst(values, key=lambda p: values[p])
    return [
        f"{statistics.median(values.values()):.4g}",
        f"{values[pair]:.4g}",
        f"{pair[0]} to {pair[1]}",
    ]
