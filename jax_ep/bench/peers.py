"""What XLA itself has for the exchange of rows: the same bytes, rows packed beforehand.

Neither op plans, packs or places rows as a dispatch does, so these figures flatter them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep.bench import expected, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem
from jax_ep.bench.session import AXIS, Session
from jax_ep.bench.timing import Step

ALL_TO_ALL = "jax.lax.all_to_all"
RAGGED = "jax.lax.ragged_all_to_all"
RAGGED_DECOMPOSED = "jax.lax.ragged_all_to_all, decomposer"
DECOMPOSER_FLAG = "--xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true"


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of an exchange."""
    session.need_collectives()
    problem = session.problem(case)
    dense = case.name == ALL_TO_ALL
    make = _dense if dense else _ragged
    step, sets, check = make(session, case, problem)
    rows = np.full((session.ranks, session.ranks), case.tokens)
    if not dense:
        rows = expected.rank_rows(problem.topk_idx[0], experts=case.experts)
    moved = traffic.of_rows(rows, case.wire_row_bytes)
    measured = timing.measure(
        step,
        sets,
        session.mesh,
        length=session.length(moved.wire / 1e5 + 50) if dense else 4,
        repeat=session.repeat,
    )
    wrongs = [text for text in session.exchange(check(measured)) if text]
    return session.record(
        case,
        session.slowest(measured.spread),
        moved,
        correct=not wrongs,
        name=case.name,
        error=wrongs[0] if wrongs else None,
    )


def _dense(session: Session, case: Case, problem: Problem) -> Any:
    """Every token to every rank; the rows received are the next rows sent."""
    ranks = session.ranks

    def run(rows: jax.Array) -> jax.Array:
        return lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)

    def link(_: jax.Array, received: jax.Array) -> jax.Array:
        return lax.optimization_barrier(received)

    def sent(rank: int) -> np.ndarray:
        parts = [np.roll(problem.rows(0, rank)[0], to, axis=0) for to in range(ranks)]
        return np.concatenate(parts)

    def check(measured: timing.Measured) -> str:
        # An even number of exchanges brings every row back.
        for rank, got in session.parts(measured.result).items():
            if not expected.same_bits(got, sent(rank)):
                return f"rank {rank}: rows did not come back"
        return ""

    return Step(run, link), [session.put(sent)], check


def _ragged(session: Session, case: Case, problem: Problem) -> Any:
    """The rows of the routing, to a buffer that each exchange writes over."""
    ranks, tokens = session.ranks, case.tokens
    room = -(-ranks * tokens // 128) * 128

    def run(inputs: Any) -> jax.Array:
        rows, sizes, buffer = inputs
        mine = lax.axis_index(AXIS)
        send = sizes[mine]
        before = jnp.cumsum(sizes, axis=0) - sizes  # rows of lower ranks at each destination
        starts = jnp.arange(ranks, dtype=jnp.int32) * tokens
        return lax.ragged_all_to_all(
            rows, buffer, starts, send, before[mine], sizes[:, mine], axis_name=AXIS
        )

    def link(inputs: Any, received: jax.Array) -> Any:
        rows, sizes, _ = inputs
        return rows, sizes, lax.optimization_barrier(received)

    def sent(index: int, rank: int) -> np.ndarray:
        parts = [np.roll(problem.rows(index, rank)[0], to, axis=0) for to in range(ranks)]
        return np.concatenate(parts)

    counts = [expected.rank_rows(topk, experts=case.experts) for topk in problem.topk_idx]
    nothing = np.zeros((room, case.hidden), problem.rows(0, 0)[0].dtype)
    # Sizes are the same in all sets: else rows of one exchange would stay in the buffer of another.
    sizes = counts[0].astype(np.int32)
    sets = [
        (
            session.put(functools.partial(sent, index)),
            session.put(lambda _: sizes),
            session.put(lambda _: nothing),
        )
        for index in range(len(counts))
    ]

    def check(measured: timing.Measured) -> str:
        index = measured.last_set
        for rank, got in session.parts(measured.result).items():
            want = np.concatenate(
                [
                    sent(index, source)[rank * tokens : rank * tokens + sizes[source, rank]]
                    for source in range(ranks)
                ]
            )
            if not expected.same_bits(got[: len(want)], want):
                return f"rank {rank}: rows differ from those sent"
        return ""

    return Step(run, link), sets, check
