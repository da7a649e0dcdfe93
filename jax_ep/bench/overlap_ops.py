"""Ops in flight: each alone, compute alone, and both, and what share of the op's time is hidden.

The compute is a matmul of XLA's, or ``grouped_dot`` of the same number of operations over a few wide
experts. The latter either takes all SMs, as XLA's does, or leaves the op those that it takes. In both
cases the share is that of ``grouped_dot`` alone on all SMs, so it counts what leaving SMs costs.

If the GPU has S SMs and the op takes s of them, then both together should take as long as the longer
one of the op and ``grouped_dot * S / (S - s)``, times ``_SLACK``: the bound of the arms that leave SMs.
``grouped_dot`` alone on S - s SMs is an arm too, which says what that costs without the op.

All of these programs hold a small all-reduce of XLA's own, since its scheduler looks for work to hide
ops behind only in programs that do. Where there is one rank, XLA would drop that, so it is a
permutation there. It is timed too and subtracted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_ep
from jax_ep import _compat
from jax_ep._backends import native
from jax_ep._ops.flights import why_in_line
from jax_ep.bench import memory, records, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.clock import Clock
from jax_ep.bench.ops import config
from jax_ep.bench.problems import Problem, dtype_of
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Spread, Step

MATMUL, NOTHING = "matmul", "all-reduce"
GROUPED = "grouped_dot"
LEAVING = f"{GROUPED} with SMs left free"
LEFT = f"{GROUPED} alone on the SMs left by "  # an op
IN_FLIGHT = ("dispatch", "combine")
BESIDE = " beside "
ARMS = (NOTHING, MATMUL, *IN_FLIGHT, *(op + BESIDE + MATMUL for op in IN_FLIGHT))
GROUPED_ARMS = (
    GROUPED,
    *(op + BESIDE + by for op in IN_FLIGHT for by in (GROUPED, LEAVING)),
    *(LEFT + op for op in IN_FLIGHT),
)
BOUND_ARMS = (
    GROUPED,
    *(arm for op in IN_FLIGHT for arm in (op, LEFT + op, op + BESIDE + LEAVING)),
)
_EXPERTS = 4  # of grouped_dot, on each rank
_SLACK = 1.05


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one arm, named by ``case.name``; that of both has the share that is hidden."""
    problem, arm = session.problem(case), case.name or NOTHING
    op, compute = _parts(arm)
    inputs = _inputs(session, case, problem)
    measured = _time(session, case, inputs, arm)
    overhead = _kept(session, case, inputs, NOTHING)
    spread = session.slowest(measured.spread)
    spread = spread.less(overhead.median if arm != NOTHING else 0.0)
    wrong = ""
    if op in IN_FLIGHT and not _same(session, case, inputs, op, measured.result[0]):
        wrong = f"{arm}: differs from {op} in line with the program"
    wrong = next((text for text in session.exchange(wrong) if text), "")
    moved = traffic.Traffic(0, 0)
    if op in IN_FLIGHT:
        moved = traffic.of_op(
            dataclasses.replace(case, op="combine" if op == "combine" else "dispatch"), problem
        )
    record = session.record(
        case,
        spread,
        moved,
        correct=not wrong,
        name=arm,
        num_sms=_taken(session, case, inputs, op),
        workspace_bytes=native.workspace_bytes(session.group),
        scratch_bytes=memory.scratch_bytes(measured.text),
        error=wrong or why_in_line(session.group),
    )
    if op in IN_FLIGHT and compute and record["median_us"] is not None:
        names = op, GROUPED if compute == LEAVING else compute
        alone = [_kept(session, case, inputs, name).median - overhead.median for name in names]
        record["share_hidden"] = float((sum(alone) - spread.median) / min(alone))
        if compute == LEAVING and record["num_sms"] is not None:
            sms = _compat.num_multiprocessors()
            slower = alone[1] * sms / (sms - record["num_sms"])
            records.bind(record, _SLACK * max(alone[0], slower))
    return record


def _parts(arm: str) -> tuple[str, str]:
    """What an arm has in flight, if it is one of ``IN_FLIGHT``, and what it computes, or ""."""
    if arm.startswith(LEFT):
        return "", arm
    op, _, compute = arm.partition(BESIDE)
    return op, op if op in (MATMUL, GROUPED) else compute


def _taken(session: Session, case: Case, inputs: Any, op: str) -> int | None:
    """The SMs that an op in flight takes from compute beside it; None where it takes none."""
    free = _free_sms(session, case, inputs, op) if op in IN_FLIGHT else None
    return None if free is None else _compat.num_multiprocessors() - free


def _free_sms(session: Session, case: Case, inputs: Any, op: str) -> int | None:
    """The SMs that an op in flight leaves, as its ticket says."""
    found = []

    def start(inputs: Any) -> Any:
        ticket = _start(session, case, op, inputs)
        found.append(ticket.free_sms)
        done = jax_ep.dispatch_done if op == "dispatch" else jax_ep.combine_done
        return done(ticket)

    jax.eval_shape(session.on_all_ranks(start), inputs)
    return found[0]


def _key(case: Case, arm: str) -> tuple[Any, ...]:
    return ("overlap", case.workload, case.num_sms, arm)


def _kept(session: Session, case: Case, inputs: Any, arm: str) -> Spread:
    """The spread of an arm, measured once for a workload."""
    key = _key(case, arm)
    if key not in session.kept:
        session.kept[key] = session.slowest(_time(session, case, inputs, arm).spread)
    return session.kept[key]


def _time(session: Session, case: Case, inputs: Any, arm: str) -> timing.Measured:
    op, native_ops = _parts(arm)[0], session.group.backend != "reference"
    calls: tuple[str, ...] = ()
    if op in IN_FLIGHT and native_ops:
        beside = session.on_gpu and why_in_line(session.group) is None
        calls = (f"jax_ep_{op}_async" if beside else f"jax_ep_{op}",)
    chain = session.chain(300.0, calls=calls)
    step = step_of(session, case, arm, inputs)
    measured = timing.measure(step, [inputs], session.mesh, chain)
    session.kept[_key(case, arm)] = session.slowest(measured.spread)
    return measured


def step_of(session: Session, case: Case, arm: str, inputs: Any) -> Step:
    """One turn of the chain of an arm."""
    axis = session.mesh.axis_names
    op, compute = _parts(arm)
    left = None
    if compute.startswith(LEFT):
        left = _free_sms(session, case, inputs, compute.removeprefix(LEFT))

    def run(inputs: Any) -> Any:
        x, handle, _, weight = inputs
        results, free_sms = [], None
        if op in IN_FLIGHT:  # XLA places its halves
            ticket = _start(session, case, op, inputs)
            free_sms = ticket.free_sms
            done = jax_ep.dispatch_done(ticket).tokens if op == "dispatch" else None
            results.append(jax_ep.combine_done(ticket) if done is None else done)
        if compute == MATMUL:
            results.append(x @ weight)
        elif compute:
            sizes = jnp.full((len(weight),), len(x) // len(weight), jnp.int32)
            num_sms = free_sms if compute == LEAVING else left
            results.append(jax_ep.grouped_dot(x, weight, sizes, num_sms=num_sms))
        element = handle.topk_idx[:1, :1].astype(jnp.float32)
        if session.ranks == 1:
            return *results, lax.ppermute(element, axis, [(0, 0)])
        return *results, lax.psum(element, axis)

    def link(inputs: Any, result: Any, now: Clock) -> Any:
        x, handle, rows, weight = inputs
        topk_idx = now(timing.after(handle.topk_idx, result))
        if session.group.backend == "reference":  # which may not read topk_idx
            handle = jax.tree.map(lambda leaf: timing.after(leaf, result), handle)
        # Without the barrier XLA would see that all matmuls of a chain are one.
        weight, topk_idx = lax.optimization_barrier((weight, topk_idx))
        return x, dataclasses.replace(handle, topk_idx=topk_idx), rows, weight

    return Step(run, link)


def _start(session: Session, case: Case, op: str, inputs: Any) -> jax_ep.Ticket:
    """The start half of an op."""
    x, handle, rows, _ = inputs
    how: dict[str, Any] = {"group": session.group, "config": config(case)}
    if op == "dispatch":
        return jax_ep.dispatch_start(x, handle=handle, **how)
    return jax_ep.combine_start(rows, handle, **how)


def _inputs(session: Session, case: Case, problem: Problem) -> Any:
    """Tokens, a handle, rows that come home, and what the compute multiplies with, on each rank."""
    assert case.intermediate is not None
    shape: tuple[int, ...] = (session.ranks * case.hidden, case.intermediate)
    if GROUPED in _parts(case.name or NOTHING)[1]:
        local = min(_EXPERTS, case.tokens)
        shape = (session.ranks * local, case.hidden, case.intermediate)

    @functools.partial(jax.jit, out_shardings=session.sharding)
    def make_weight(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype_of(case.dtype))

    def prepare(inputs: Any) -> Any:
        x, topk_idx = inputs
        out = jax_ep.dispatch(
            x,
            topk_idx,
            group=session.group,
            num_experts=case.experts,
            layout=case.layout,
            alignment=case.alignment,
            capacity=problem.capacity,
        )
        return x, out.handle, out.tokens

    x = session.put(functools.partial(problem.part, 0, 0))
    topk_idx = session.put(problem.topk_idx[0].__getitem__)
    return *session.on_all_ranks(prepare)((x, topk_idx)), make_weight(jax.random.key(0))


def _same(session: Session, case: Case, inputs: Any, op: str, result: jax.Array) -> bool:
    """Whether an op gave the bits that it gives in line with the program."""

    def in_line(inputs: Any) -> jax.Array:
        x, handle, rows, _ = inputs
        if op == "dispatch":
            return jax_ep.dispatch(x, handle=handle, group=session.group).tokens
        return jax_ep.combine(rows, handle, group=session.group)

    wanted = session.parts(session.on_all_ranks(in_line)(inputs))
    found = session.parts(result)
    return all((found[rank] == wanted[rank]).all() for rank in wanted)
