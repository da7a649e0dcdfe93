"""Bytes that an op moves, computed from the routing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jax_ep.bench import expected


class Traffic(NamedTuple):
    """Bytes of the busiest rank in its busier direction.

    Attributes:
        wire: Crossing between ranks.
        logical: And those that stay on their rank too, as DeepEP's figures count them.
    """

    wire: int
    logical: int


def of_rows(rows: Int[np.ndarray, "ranks ranks"], row_bytes: int) -> Traffic:
    """Of ``rows[source, destination]`` rows that cross once each, of ``row_bytes`` bytes."""
    crossing = rows - np.diag(np.diag(rows))

    def busiest(counts: np.ndarray) -> int:
        return int(max(counts.sum(axis=0).max(), counts.sum(axis=1).max()))

    return Traffic(busiest(crossing) * row_bytes, busiest(rows) * row_bytes)


def of_dispatch(
    topk_idx: Int32[np.ndarray, "ranks tokens top_k"], *, experts: int, row_bytes: int
) -> Traffic:
    """Of dispatch, and of combine backwards: one row for each (token, rank), whatever the layout.

    Ids, weights and counts are not counted: they are well under one percent.
    """
    return of_rows(expected.rank_rows(topk_idx, experts=experts), row_bytes)
