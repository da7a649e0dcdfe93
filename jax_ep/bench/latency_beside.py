"""Ops of latency mode with compute between their two calls: what the op adds to the compute.

Where the peers are there, an op should add no more than its two calls take alone. Three kinds of arms,
whose records say in ``bound_us`` what they may take:

* "dispatch beside matmul": start, compute, done, in a chain without readings of the clock in between.
  The bound is the sum of the compute alone (an arm of its own), and of the two calls alone
  (``half_ops``).
* "grouped_dot between the calls of dispatch": only the compute is timed, by readings right before and
  after it. Its kernel has a block on every SM that the rank may count on, so it takes longer if a
  kernel of the op holds an SM. The bound is its time by the same readings without the op.
* "dispatch beside grouped_dot, a peer late": all ranks meet in an op in line. Then the last rank waits
  for about ``LATE_US`` before it starts, computes nothing, and the others compute meanwhile. Their time
  from start to done is the figure. The bound is the time of the same program if the last rank does not
  wait. ``late_us`` says how much later the last rank has started, compared with the others.

Each bound allows for ``_SLACK``. Ranks that share a GPU divide its SMs, and compute on their share.
Other groups than those on GPUs run the whole op in its start half, so bounds say nothing there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_ep
from jax_ep import _compat
from jax_ep._backends import native
from jax_ep.bench import clock, half_ops, memory, ops, records, timing, traffic
from jax_ep.bench.cases import Case, Op
from jax_ep.bench.latency_arms import BETWEEN, GROUPED, LATE, LATE_US, MATMUL, Arm, parse
from jax_ep.bench.latency_turns import Chain, Timed, done
from jax_ep.bench.problems import Problem, dtype_of
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Spread, Step

_SLACK = 1.05
_ROWS, _GROUPS = 4096, 4  # of the compute on GPUs, on all ranks of a GPU; groups of its rows
_MOST_TURNS = 1 << 20  # of the loop that a late rank waits in


class _Figure(NamedTuple):
    """What was measured: its spread, what is wrong with the result, scratch bytes, and the bound."""

    spread: Spread
    wrong: str
    scratch_bytes: int
    bound: float | None
    late: float | None = None


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one arm, named by ``case.name``."""
    arm = parse(case.name or GROUPED)
    whole = _whole(case, arm.op)
    figure = {"": _beside, BETWEEN: _between, LATE: _late}[arm.kind](session, case, whole, arm)
    wrong = next((text for text in session.exchange(figure.wrong) if text), "")
    record = session.record(
        case,
        figure.spread,
        traffic.Traffic(0, 0),  # no rate: rows travel while the rank computes
        correct=not wrong,
        name=case.name,
        num_sms=ops.num_sms_of(session, whole) if arm.op else None,
        workspace_bytes=native.workspace_bytes(session.group_of(whole)),
        scratch_bytes=figure.scratch_bytes,
        error=wrong or None,
    )
    if figure.bound is not None:
        records.bind(record, _SLACK * figure.bound)
    if figure.late is not None:
        record["late_us"] = figure.late
    return record


def _whole(case: Case, op: str) -> Case:
    """The op as a case of its own; a dispatch, whose ids chain it, for compute alone."""
    kind: Op = "combine" if op == "combine" else "dispatch"
    return dataclasses.replace(case, op=kind, name=None)


def _calls(session: Session, whole: Case, op: str) -> tuple[str, ...]:
    if not op or session.group_of(whole).backend != "cuda":
        return ()
    return tuple(f"jax_ep_latency_{op}_{half}" for half in ("start", "done"))


def _beside(session: Session, case: Case, whole: Case, arm: Arm) -> _Figure:
    """The compute alone, or start, compute and done, in a chain."""
    problem, operands = session.problem(case), _operands(session, case, arm.compute)
    sets: list[Any] = [operands]
    if arm.op:
        sets = [(given, operands) for given in ops.sets_of(session, whole, problem)]
    chain = session.chain(200.0, calls=_calls(session, whole, arm.op))
    chain = dataclasses.replace(chain, completed=None)  # an op is two calls
    step = step_of(session, case, problem)
    measured = timing.measure(step, sets, session.mesh, chain)
    link = session.link(case.tokens, case.top_k)
    spread = session.slowest(measured.spread).less(link.median)
    wrong, bound = "", None
    if arm.op:
        out, _ = measured.result
        wrong = ops.wrong_of(session, whole, problem, out, measured.last_set)
        calls = half_ops.both_of(session, whole)
        bound = _alone(session, case, arm.compute) + calls.start.median + calls.done.median
    else:
        session.kept[_key(case, arm.compute)] = spread.median
    return _Figure(spread, wrong, memory.scratch_bytes(measured.text), bound)


def _key(case: Case, compute: str) -> tuple[Any, ...]:
    return ("latency_beside", case.workload, compute)


def _alone(session: Session, case: Case, compute: str) -> float:
    """Microseconds of the compute alone, measured once for a workload."""
    key = _key(case, compute)
    if key not in session.kept:
        alone = dataclasses.replace(case, name=compute)
        _beside(session, alone, _whole(alone, ""), parse(compute))
    median: float = session.kept[key]
    return median


def step_of(session: Session, case: Case, problem: Problem) -> Step:
    """One turn of a chain: the op with the compute between its calls, or the compute alone."""
    arm = parse(case.name or GROUPED)
    work = _work(session, arm.compute)
    if not arm.op:
        return _step_alone(session, work)
    whole = _whole(case, arm.op)
    link_op = ops.step_of(session, whole, problem).link

    def run(inputs: Any) -> Any:
        given, operands = inputs
        ticket = half_ops.start(session, whole, problem, given)
        ticket, product = ticket.beside(work, *operands)
        return done(ticket), product

    def link(inputs: Any, result: Any, now: clock.Clock) -> Any:
        (given, operands), (out, product) = inputs, result
        return link_op(given, out, lambda ids: now(timing.after(ids, product))), operands

    return Step(run, link)


def _step_alone(session: Session, work: Any) -> Step:
    def run(operands: Any) -> Any:
        return operands[-1], work(*operands)

    def link(operands: Any, result: Any, now: clock.Clock) -> Any:
        x, weight, sizes = operands
        sizes = now(timing.after(sizes, result))
        if not session.on_gpu:  # where chains are loops, which XLA would take equal products out of
            x = timing.after(x, sizes)
        # Without the barrier XLA would see that all matmuls of a chain are one.
        weight, sizes = lax.optimization_barrier((weight, sizes))
        return x, weight, sizes

    return Step(run, link)


def _work(session: Session, compute: str) -> Any:
    """The compute, on this rank's share of the SMs of its GPU."""
    if compute == MATMUL:
        return lambda x, weight, sizes: x @ weight
    num_sms = None
    if session.on_gpu:
        num_sms = _compat.num_multiprocessors() // _sharing(session)
    return functools.partial(jax_ep.grouped_dot, num_sms=num_sms, unused_rows="undefined")


def _sharing(session: Session) -> int:
    """Ranks of a GPU."""
    return session.group.topology.ranks_per_gpu or 1


def _operands(session: Session, case: Case, compute: str) -> tuple[jax.Array, ...]:
    """Rows, matrices and sizes of groups for the compute, on each rank."""
    assert case.intermediate is not None
    rows = _ROWS // _sharing(session) if session.on_gpu else case.tokens
    groups = min(_GROUPS, rows)
    matrices: tuple[int, ...] = (session.ranks * case.hidden, case.intermediate)
    if compute == GROUPED:
        matrices = (session.ranks * groups, case.hidden, case.intermediate)

    @functools.partial(jax.jit, static_argnums=1, out_shardings=session.sharding)
    def make(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype_of(case.dtype))

    first, second = jax.random.split(jax.random.key(0))
    sizes = np.full(groups, rows // groups, np.int32)
    return (
        make(first, (session.ranks * rows, case.hidden)),
        make(second, matrices),
        session.put(lambda rank: sizes),
    )


def _between(session: Session, case: Case, whole: Case, arm: Arm) -> _Figure:
    """The compute between the calls, by readings of the clock, and the same without the calls."""
    everyone, alone = range(session.ranks), ("latency_beside between", case.workload)
    operands = _operands(session, case, GROUPED)
    if alone not in session.kept:
        timed = _timed(session, case, _whole(case, ""))
        chain = Chain(timed, timed.alone, operands, ())
        session.kept[alone] = _spread_of(session, chain.intervals(), everyone, 0).median
    timed = _timed(session, case, whole)
    chain = Chain(timed, timed.between, operands, _calls(session, whole, arm.op))
    spread = _spread_of(session, chain.intervals(), everyone, 0)
    return _Figure(spread, chain.wrong(), chain.scratch_bytes, session.kept[alone])


def _late(session: Session, case: Case, whole: Case, arm: Arm) -> _Figure:
    """From start to done beside compute, on the ranks that are not late; also with none late."""
    last, others = session.ranks - 1, range(session.ranks - 1)
    timed = _timed(session, case, whole)
    operands = _operands(session, case, GROUPED)
    chain = Chain(timed, timed.late, operands, _calls(session, whole, arm.op))

    def lateness(runs: list[dict[int, np.ndarray]]) -> float:
        """How much longer than the others the last rank waits before it starts."""
        waits = {rank: float(np.mean([of[rank][:, 0] for of in runs])) for rank in runs[0]}
        others_wait = session.largest(max((waits.get(r, 0.0) for r in others), default=0.0))
        return session.largest(waits.get(last, 0.0)) - others_wait

    number = 1  # turns of the loop that the last rank waits in
    while (late := lateness(chain.intervals(number, 2))) < LATE_US:
        if number >= _MOST_TURNS:
            raise RuntimeError(f"{number} turns of a loop made the last rank {late:.0f} us late")
        number *= 2
    number = max(round(number * LATE_US / late), 1)
    punctual, found = chain.intervals(0), chain.intervals(number)
    return _Figure(
        _spread_of(session, found, others, 1),
        chain.wrong(),
        chain.scratch_bytes,
        _spread_of(session, punctual, others, 1).median,
        lateness(found) - lateness(punctual),
    )


def _timed(session: Session, case: Case, whole: Case) -> Timed:
    return Timed(session, whole, session.problem(case), _work(session, GROUPED))


def _spread_of(
    session: Session, runs: list[dict[int, np.ndarray]], ranks: range, interval: int
) -> Spread:
    """Of means over the ops of a run, on the slowest of ``ranks``."""
    samples = [
        max((float(of[r][:, interval].mean()) for r in ranks if r in of), default=0.0)
        for of in runs
    ]
    return session.slowest(Spread.of(samples))
