"""Bytes that an op moves, computed from the routing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jax_ep.bench import expected, latency
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem


class Traffic(NamedTuple):
    """Bytes of the busiest rank in its busier direction.

    Attributes:
        wire: Crossing between ranks.
        logical: The same with those that stay on their rank, as DeepEP's figures count them.
        memory: At least so much is read and written in the memory of all ranks together: each row
            that is sent is read once, and each result is written once.
        moved: All that an op of latency mode moves there (``latency.py``); 0 of other ops.
    """

    wire: int
    logical: int
    memory: int = 0
    moved: int = 0


def of_rows(rows: Int[np.ndarray, "ranks ranks"], row_bytes: int) -> Traffic:
    """The bytes of ``rows[source, destination]`` rows of ``row_bytes`` that cross once each."""
    crossing = rows - np.diag(np.diag(rows))

    def busiest(counts: np.ndarray) -> int:
        return int(max(counts.sum(axis=0).max(), counts.sum(axis=1).max()))

    return Traffic(busiest(crossing) * row_bytes, busiest(rows) * row_bytes)


def of_dispatch(
    topk_idx: Int32[np.ndarray, "ranks tokens top_k"], *, experts: int, row_bytes: int
) -> Traffic:
    """The bytes of dispatch, or of combine in the other direction: one row for each (token, rank).

    That holds in both layouts. Ids, weights and counts are not counted: they are well under one
    percent.
    """
    return of_rows(expected.rank_rows(topk_idx, experts=experts), row_bytes)


def of_op(case: Case, problem: Problem) -> Traffic:
    """The bytes of one of our ops."""
    if case.op == "plan":
        return Traffic(0, 0)
    topk, ranks = problem.topk_idx[0], problem.ranks
    there = of_dispatch(topk, experts=case.experts, row_bytes=case.wire_row_bytes)
    rows = int(expected.rank_rows(topk, experts=case.experts).sum())
    pairs = int(expected.rank_pairs(topk, experts=case.experts).sum())
    dispatched = rows * case.wire_row_bytes + ranks * problem.capacity * case.out_row_bytes
    summed = pairs if case.layout == "expert" else rows
    combined = (summed + ranks * case.tokens) * case.wire_row_bytes
    if case.mode == "latency":
        there = there._replace(moved=latency.moved_bytes(case, problem))
    if case.op == "combine":
        return there._replace(memory=combined)
    if case.op == "round_trip":
        return Traffic(2 * there.wire, 2 * there.logical, dispatched + combined)
    return there._replace(memory=dispatched)
