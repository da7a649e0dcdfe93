"""XLA's own exchanges of rows: the same bytes, in rows that were packed beforehand.

Neither op plans, packs or places rows as a dispatch does, so these figures flatter them. In a chain
each exchange sends what the one before it received, so that XLA can merge, move or drop none. Rows
go to their ranks and back alternately, and after an even number of exchanges all are home again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep.bench import expected, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.clock import Clock, no_clock
from jax_ep.bench.problems import Problem
from jax_ep.bench.ranks import AXIS
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Step

ALL_TO_ALL = "jax.lax.all_to_all"
RAGGED = "jax.lax.ragged_all_to_all"
RAGGED_DECOMPOSED = "jax.lax.ragged_all_to_all, decomposer"
DECOMPOSER = "xla_gpu_unsupported_enable_ragged_all_to_all_decomposer=true"


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of an exchange, or of one there and one back (op "round_trip")."""
    problem = session.problem(case)
    dense = case.name == ALL_TO_ALL
    rows = np.full((session.ranks, session.ranks), case.tokens)
    if not dense:
        rows = expected.rank_rows(problem.topk_idx[0], experts=case.experts)
    moved = traffic.of_rows(rows, case.wire_row_bytes)
    moved = moved._replace(memory=2 * int(rows.sum()) * case.wire_row_bytes)
    if case.op == "round_trip":
        moved = traffic.Traffic(*(2 * part for part in moved))
    exchange = (_dense if dense else _ragged)(session, problem)
    step = exchange.step if case.op == "exchange" else _twice(exchange.step)
    chain = session.chain(moved.wire / 1e5 + 50) if dense else session.chain_of(4 * session.on_gpu)
    chain = dataclasses.replace(chain, options=case.options)
    measured = timing.measure(step, [exchange.inputs], session.mesh, chain)
    wrongs = [text for text in session.exchange(_check(session, exchange, measured)) if text]
    return session.record(
        case,
        session.slowest(measured.spread),
        moved,
        correct=not wrongs,
        name=case.name,
        error=wrongs[0] if wrongs else None,
    )


class Exchange(NamedTuple):
    """A chain of exchanges.

    Attributes:
        step: One of them.
        inputs: Inputs of the first exchange.
        rows: The rows among a step's inputs, or its result: an array ``[R * N, H]``.
        home: The rows that a rank has at first, and after an even number of exchanges.
    """

    step: Step
    inputs: Any
    rows: Callable[[Any], jax.Array]
    home: Callable[[int], np.ndarray]


def _dense(session: Session, problem: Problem) -> Exchange:
    """Every token to every rank."""

    def run(rows: jax.Array) -> jax.Array:
        return lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)

    def link(_: jax.Array, received: jax.Array, now: Clock) -> jax.Array:
        return now(lax.optimization_barrier(received))

    def home(rank: int) -> np.ndarray:
        parts = [np.roll(problem.rows(0, rank)[0], to, axis=0) for to in range(session.ranks)]
        return np.concatenate(parts)

    return Exchange(Step(run, link, first=lambda x: x), session.put(home), lambda x: x, home)


def _ragged(session: Session, problem: Problem) -> Exchange:
    """The rows of the routing, packed by destination; on their way back, by where they came from.

    Each exchange overwrites the buffer that the one before it has read.
    """
    ranks, case = session.ranks, problem.case
    counts = expected.rank_rows(problem.topk_idx[0], experts=case.experts).astype(np.int32)
    most = max(*map(int, counts.sum(axis=0)), *map(int, counts.sum(axis=1)))
    room = max(-(-most // 128), 1) * 128

    def run(state: Any) -> Any:
        rows, buffer, sizes = state  # sizes[source, destination]
        mine = lax.axis_index(AXIS)
        sent, received = sizes[mine], sizes[:, mine]
        lands_at = (jnp.cumsum(sizes, axis=0) - sizes)[mine]
        out = lax.ragged_all_to_all(
            rows, buffer, jnp.cumsum(sent) - sent, sent, lands_at, received, axis_name=AXIS
        )
        return out, rows, sizes.T

    def link(_: Any, state: Any, now: Clock) -> Any:
        received, buffer, sizes = lax.optimization_barrier(state)
        return now(received), buffer, sizes

    def home(rank: int) -> np.ndarray:
        rows = problem.rows(0, rank)[0]
        return np.concatenate(
            [np.roll(rows, to, axis=0)[: counts[rank, to]] for to in range(ranks)]
        )

    def in_buffer(rank: int) -> np.ndarray:
        rows = home(rank)
        return np.concatenate([rows, np.zeros((room - len(rows), case.hidden), rows.dtype)])

    nothing = np.zeros((room, case.hidden), problem.rows(0, 0)[0].dtype)
    inputs = (session.put(in_buffer), session.put(lambda _: nothing), session.put(lambda _: counts))
    return Exchange(Step(run, link, first=lambda x: x), inputs, lambda state: state[0], home)


def _twice(step: Step) -> Step:
    """A step there and back."""

    def run(inputs: Any) -> Any:
        return step.run(step.link(inputs, step.run(inputs), no_clock))

    return dataclasses.replace(step, run=run)


def _check(session: Session, exchange: Exchange, measured: timing.Measured) -> str:
    """Whether all rows are where they began; chains are of even length."""
    for rank, got in session.parts(exchange.rows(measured.result)).items():
        want = exchange.home(rank)
        if not expected.same_bits(got[: len(want)], want):
            return f"rank {rank}: rows did not come back"
    return ""
