"""The two calls of an op of latency mode, each by itself: what sending takes, and what receiving takes.

A chain of ops in two calls reads the clock before and behind each of the calls. Between the calls it
reads the clock some times more, which takes longer than rows take to come. So the time of the done call
is that behind other work, and contains no wait for the rows. A reading takes part of the time between
two readings; how much, the readings between the calls tell, and it is subtracted, as is the link to the
next op.

Both calls of an op are measured in one run. Only groups on GPUs have two calls: elsewhere the start
half does all the work, and the figure of the done half is noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from jax_ep._backends import native
from jax_ep._ops import halves
from jax_ep.bench import clock, memory, ops, timing, traffic
from jax_ep.bench.cases import Case, Op
from jax_ep.bench.problems import Problem
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Spread

_WARM_OPS = 2
READINGS = 16  # between the calls
_LENGTHS = {True: 16, False: 4}  # ops of a chain, on GPUs and on CPU


class Both(NamedTuple):
    """What a chain gave: the spread of each call, what is wrong with the result, and scratch bytes."""

    start: Spread
    done: Spread
    wrong: str
    scratch_bytes: int


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one of the two calls, ``case.op``."""
    name, _, half = case.op.partition("_")
    op: Op = "dispatch" if name == "dispatch" else "combine"
    whole = dataclasses.replace(case, op=op)
    both = both_of(session, whole)
    return session.record(
        case,
        both.start if half == "start" else both.done,
        traffic.Traffic(0, 0),  # no rate: the rows are on their way while neither of the calls runs
        correct=not both.wrong,
        num_sms=ops.num_sms_of(session, whole),
        workspace_bytes=native.workspace_bytes(session.group_of(whole)),
        scratch_bytes=both.scratch_bytes,
        error=both.wrong or None,
    )


def both_of(session: Session, whole: Case) -> Both:
    """What was measured of an op, once for each."""
    key = ("halves", whole)
    if key not in session.kept:
        session.kept[key] = _measure(session, whole)
    both: Both = session.kept[key]
    return both


def start(session: Session, case: Case, problem: Problem, inputs: Any) -> jax_ep.Ticket:
    """The start half of an op, from the inputs that ``ops`` makes for all of it."""
    given = ops.options(case, session)
    if case.op == "dispatch":
        x, topk_idx, weights = inputs
        routed = ops.routed_of(case, problem)
        return jax_ep.dispatch_start(x, topk_idx, weights, **routed, **given)
    rows, handle = inputs
    return jax_ep.combine_start(rows, handle, group=given["group"], config=given["config"])


def chain(session: Session, case: Case, problem: Problem, length: int) -> Any:
    """The program of a chain: from sets and ``[1]`` to the last result and ``[readings, 2]`` stamps."""
    link = ops.step_of(session, case, problem).link

    def program(sets: list[Any], value: jax.Array) -> Any:
        stamps: list[clock.Stamp] = []

        def now(value: jax.Array) -> jax.Array:
            value, stamp = clock.read(value)
            stamps.append(stamp)
            return value

        def readings(value: jax.Array) -> jax.Array:
            for _ in range(READINGS):
                value = now(value)
            return value

        result: Any = None
        for op in range(_WARM_OPS + length):
            inputs = sets[op % len(sets)]
            if result is not None:
                inputs = link(inputs, result, now if op >= _WARM_OPS else clock.no_clock)
            if op == _WARM_OPS:
                stamps = stamps[-1:]
            ticket = start(session, case, problem, inputs)
            if not isinstance(ticket.payload, halves.Sent):  # it is the result
                there = ticket.payload.tokens if case.op == "dispatch" else ticket.payload
                value = timing.after(value, there)
            ticket, value = ticket.beside(readings, value)
            done = jax_ep.dispatch_done if case.op == "dispatch" else jax_ep.combine_done
            result = done(ticket)
        unused = link(sets[0], result, now)
        del unused
        return result, jnp.stack(stamps)

    return program


def _measure(session: Session, case: Case) -> Both:
    problem, length = session.problem(case), _LENGTHS[session.on_gpu]
    sets = ops.sets_of(session, case, problem)
    value = session.put(lambda rank: np.zeros(1, np.int32))
    calls: tuple[str, ...] = ()
    if session.group_of(case).backend == "cuda":
        calls = tuple(f"jax_ep_latency_{case.op}_{half}" for half in ("start", "done"))
    plan = session.chain_of(length, calls)
    program = timing.compile_chain(
        chain(session, case, problem, length),
        session.mesh,
        (list(sets), value),
        plan,
        _WARM_OPS + length,
    )
    found, result = [], None
    for run in range(2 + plan.repeat):
        result = None
        result, stamps = jax.block_until_ready(program(list(sets), value))
        if run >= 2:
            found.append(times_of(timing.by_rank(stamps, length * (READINGS + 1) + 1)))
    starts, dones, readings = np.array(found).T
    reading = float(np.median(readings))
    link = session.link(case.tokens, case.top_k)
    last_set = (_WARM_OPS + length - 1) % len(sets)
    wrongs = session.exchange(ops.wrong_of(session, case, problem, result, last_set))
    return Both(
        session.slowest(Spread.of(starts).less(reading)),
        session.slowest(Spread.of(dones).less(reading)).less(link.median),
        next((text for text in wrongs if text), ""),
        memory.scratch_bytes(program.as_text()),
    )


def times_of(stamps: np.ndarray) -> tuple[float, float, float]:
    """Of a run: a start call and a done call with a reading of the clock, and a reading alone.

    Args:
        stamps: ``[ranks here, length * (readings + 1) + 1]`` microseconds: before each start call and
            after it as often as there are readings, and at the end.

    Returns:
        Microseconds: means over the ops of the slowest rank, and the mean of all readings.
    """
    by_op = stamps[:, :-1].reshape(len(stamps), -1, READINGS + 1)
    ends = stamps[:, READINGS + 1 :: READINGS + 1]
    starts = (by_op[..., 1] - by_op[..., 0]).mean(axis=1)
    dones = (ends - by_op[..., -1]).mean(axis=1)
    readings = (by_op[..., -1] - by_op[..., 1]) / (READINGS - 1)
    return float(starts.max()), float(dones.max()), float(readings.mean())
