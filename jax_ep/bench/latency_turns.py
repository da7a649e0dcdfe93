"""Chains of ops of latency mode with readings of the clock among them, for ``latency_beside``.

A turn of a chain is an op and what is timed of it. Turns are behind each other by the ids of the op, so
that nothing of one runs beside another. All turns of a chain have their readings; the first ones, which
absorb how far apart the ranks started, are dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_ep
from jax_ep.bench import clock, half_ops, memory, ops, timing
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem
from jax_ep.bench.session import Session

_WARM_OPS = 2
_LENGTHS = {True: 16, False: 4}  # ops of a chain, on GPUs and on CPU

# Inputs of an op; rows, matrices and sizes of groups; a number that data gives; and what comes before.
# To the result, what the next turn comes behind, and stamps.
Turn = Callable[[Any, Any, Any, Any], tuple[Any, jax.Array, list[Any]]]


@dataclasses.dataclass(frozen=True)
class Timed:
    """An op whose turns are timed.

    Attributes:
        session: The session.
        whole: The op, as a case of its own.
        problem: Its inputs.
        dot: The compute.
    """

    session: Session
    whole: Case
    problem: Problem
    dot: Callable[..., jax.Array]

    def start(self, given: Any) -> jax_ep.Ticket:
        """The start half."""
        return half_ops.start(self.session, self.whole, self.problem, given)

    def link(self, given: Any, behind: Any, now: clock.Clock = clock.no_clock) -> Any:
        """The inputs, behind a result."""
        return ops.step_of(self.session, self.whole, self.problem).link(given, behind, now)

    def alone(self, given: Any, operands: Any, number: Any, behind: Any) -> Any:
        """The turn that has the compute and no op: readings before it and after it."""
        del given, number
        x, weight, sizes = operands
        behind, *stamps = self._compute(x, weight, sizes if behind is None else behind)
        return None, behind, stamps[::-1]

    def between(self, given: Any, operands: Any, number: Any, behind: Any) -> Any:
        """The turn that reads the clock before and after the compute between the calls."""
        del number
        given = given if behind is None else self.link(given, behind)
        ticket, (_, *stamps) = self.start(given).beside(self._compute, *operands)
        out = done(ticket)
        return out, _rows(out), stamps[::-1]

    def late(self, given: Any, operands: Any, number: Any, behind: Any) -> Any:
        """The turn in which the last rank waits for ``number`` turns of a loop, and computes nothing.

        Readings are where all ranks have met, before the start, and after op and compute.
        """
        x, weight, sizes = operands
        is_last = lax.axis_index(self.session.axis) == self.session.ranks - 1
        given = given if behind is None else self.link(given, behind)
        meet = ops.step_of(self.session, self.whole, self.problem).run
        met, begun, ended = (clock.Reader() for _ in range(3))
        given = self.link(given, meet(given), met)
        first = _ids(given)[0, 0].astype(jnp.float32)
        number = jnp.where(is_last, number, 0)  # each takes at least as long as a launch
        waited = lax.fori_loop(0, number, lambda _, value: jnp.cos(value), first)
        given = self.link(given, waited, begun)
        ticket = self.start(given)
        ticket, product = ticket.beside(self.dot, x, weight, jnp.where(is_last, 0, sizes))
        out = done(ticket)
        given = self.link(given, (_rows(out), product), ended)
        return out, _ids(given), [met.stamp, begun.stamp, ended.stamp]

    def _compute(self, x: jax.Array, weight: jax.Array, sizes: jax.Array) -> Any:
        """What the done call comes behind, the time after the compute, and that before it."""
        sizes, before = clock.read(sizes)
        product = self.dot(x, weight, sizes)
        sizes, after = clock.read(timing.after(sizes, product))
        return sizes, after, before


def done(ticket: jax_ep.Ticket) -> Any:
    """The result of an op in flight."""
    if ticket.op == "dispatch":
        return jax_ep.dispatch_done(ticket)
    return jax_ep.combine_done(ticket)


def _rows(out: Any) -> jax.Array:
    rows: jax.Array = out.tokens if isinstance(out, jax_ep.Dispatched) else out
    return rows


def _ids(given: Any) -> jax.Array:
    """The ids in the inputs of an op, which chain it to others."""
    ids: jax.Array = given[1].topk_idx if isinstance(given[1], jax_ep.Handle) else given[1]
    return ids


class Chain:
    """A compiled chain of turns.

    Attributes:
        scratch_bytes: Of the program.
    """

    def __init__(self, timed: Timed, turn: Turn, operands: Any, calls: Sequence[str]) -> None:
        session = timed.session
        self._timed, self._operands = timed, operands
        self._sets = ops.sets_of(session, timed.whole, timed.problem)
        self._plan = session.chain_of(_LENGTHS[session.on_gpu], calls)
        self._count = _WARM_OPS + self._plan.length
        self._compiled = timing.compile_chain(
            functools.partial(program, turn, self._count),
            session.mesh,
            (self._sets, operands, 0),
            self._plan,
            self._count,
        )
        self._result: Any = None
        self.scratch_bytes = memory.scratch_bytes(self._compiled.as_text())

    def intervals(self, number: int = 0, repeat: int | None = None) -> list[dict[int, np.ndarray]]:
        """Of each run, for each rank here, ``[ops, readings - 1]`` microseconds between readings."""
        found = []
        for run in range(2 + (repeat or self._plan.repeat)):
            self._result = None
            self._result, stamps = jax.block_until_ready(
                self._compiled(self._sets, self._operands, np.int32(number))
            )
            if run < 2:  # which load, capture and allocate
                continue
            of_ranks = {}
            for rank, part in self._timed.session.parts(stamps).items():
                of_ops = clock.microseconds(part).reshape(self._count, -1)
                of_ranks[rank] = np.diff(of_ops[_WARM_OPS:], axis=1)
            found.append(of_ranks)
        return found

    def wrong(self) -> str:
        """What is wrong with the last result."""
        timed, last_set = self._timed, (self._count - 1) % len(self._sets)
        return ops.wrong_of(timed.session, timed.whole, timed.problem, self._result, last_set)


def program(turn: Turn, count: int, sets: list[Any], operands: Any, number: Any) -> Any:
    """Turns behind each other: the last result, and ``[count * readings, 2]`` stamps."""
    result, behind, stamps = None, None, list[Any]()
    for op in range(count):
        result, behind, new = turn(sets[op % len(sets)], operands, number, behind)
        stamps += new
    return result, jnp.stack(stamps)
