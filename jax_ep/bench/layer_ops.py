"""Times the arms of a layer, forward and backward, and compares their results."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep._ops.flights import why_in_line
from jax_ep.bench import expected, layer, memory, records, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.clock import Clock
from jax_ep.bench.layer import Arm, Experts, Sizes
from jax_ep.bench.ops import config
from jax_ep.bench.problems import Problem, dtype_of
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Spread, Step

_PASSES = 4  # that rows make over the links: to the experts and home, forward and backward
_MOST_SAMPLES = 20  # a sample takes long
# The calls of a layer of jax_ep, forward and backward.
_CALLS = (
    *("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine"),
    *("jax_ep_dispatch", "jax_ep_combine"),
)
_CHUNKS_SLACK = 1.03  # what a layer in chunks may take, by the layer in line
JUDGE = "all_to_all"  # the arm whose result counts as right
# The norm of the difference over that of the result, at most. Arms round at different places.
_TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one arm, named by ``case.name``."""
    if case.name == layer.PRODUCTS:
        return _measure_products(session, case)
    if case.name == layer.OPS_IN_CHUNKS:
        return _measure_ops_in_chunks(session, case)
    arm = layer.BY_NAME[case.name or "jax_ep"]
    problem = session.problem(case)
    sizes = sizes_of(session, case, problem)
    inputs = inputs_of(session, case, problem)
    judged = _judgement(session, case, sizes, inputs)
    chain = session.chain_of(
        0, _calls(session, arm.name), repeat=min(session.repeat, _MOST_SAMPLES)
    )
    chain = dataclasses.replace(chain, options=case.options)
    measured = timing.measure(step_of(arm, sizes), [inputs], session.mesh, chain)
    wrong = _disagreement(case, measured.result, judged)
    spread = _kept_spread(session, case, measured)
    record = session.record(
        case,
        spread,
        _traffic(case, problem, sizes, arm),
        correct=not wrong,
        name=arm.name,
        scratch_bytes=memory.scratch_bytes(measured.text),
        temporary_bytes=measured.temporary_bytes,
        error=wrong or None,
    )
    if arm is layer.CHUNKS and record["median_us"] is not None:
        whole, in_line, of_ops = (_median(session, case, name) for name in layer.CHUNKED[:3])
        record["share_hidden"] = float((in_line - spread.median) / of_ops)
        records.bind(record, _CHUNKS_SLACK * whole)
    return record


def _calls(session: Session, name: str) -> tuple[str, ...]:
    """The calls of a layer of jax_ep, or of its ops in chunks, if they count."""
    if session.group.backend == "reference" or name not in layer.CHUNKED:
        return ()
    calls = _CALLS if name == "jax_ep" else layer.NUM_CHUNKS * _CALLS
    if name != layer.CHUNKS.name or not session.on_gpu or why_in_line(session.group):
        return calls
    return tuple(call if call == "jax_ep_plan" else f"{call}_async" for call in calls)


def _kept_spread(session: Session, case: Case, measured: timing.Measured) -> Spread:
    """The spread without the link; other cases of the workload find its median."""
    link = session.link(case.tokens, case.top_k)
    spread = session.slowest(measured.spread).less(link.median)
    session.kept[_key(case, case.name)] = spread.median
    return spread


def _key(case: Case, name: str | None) -> tuple[Any, ...]:
    return ("layer", case.workload, name or "jax_ep")


def _median(session: Session, case: Case, name: str) -> float:
    """Microseconds of another case of the workload, measured once."""
    if _key(case, name) not in session.kept:
        measure(session, dataclasses.replace(case, name=name))
    median: float = session.kept[_key(case, name)]
    return median


def _measure_ops_in_chunks(session: Session, case: Case) -> dict[str, Any]:
    """The ops of the layer in chunks alone, forward and backward, in line."""
    problem = session.problem(case)
    sizes = sizes_of(session, case, problem)

    def run(inputs: Any) -> Any:
        x, topk_idx, weights, cotangent = inputs

        def forward(x: jax.Array, weights: jax.Array) -> jax.Array:
            return layer.ops_in_chunks((x, topk_idx, weights), sizes)

        y, backward = jax.vjp(forward, x, weights)
        return lax.optimization_barrier((y, backward(cotangent)))

    inputs, calls = _tokens(session, problem), _calls(session, layer.OPS_IN_CHUNKS)
    chain = session.chain_of(0, calls, repeat=min(session.repeat, _MOST_SAMPLES))
    measured = timing.measure(Step(run, _link), [inputs], session.mesh, chain)
    return session.record(
        case,
        _kept_spread(session, case, measured),
        _traffic(case, problem, sizes, layer.CHUNKS),
        correct=True,  # the same ops are checked where a layer has them
        name=case.name,
        scratch_bytes=memory.scratch_bytes(measured.text),
        temporary_bytes=measured.temporary_bytes,
    )


def _measure_products(session: Session, case: Case) -> dict[str, Any]:
    """The products of the layer alone, as dense ones, with as many rows over all."""
    local = case.experts // session.group.size
    rows, narrow = -(-case.tokens * case.top_k // local), case.intermediate
    assert narrow is not None
    widths = (case.hidden, narrow, narrow, narrow, case.hidden)

    @functools.partial(jax.jit, out_shardings=session.sharding)
    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            jax.random.normal(k, (case.experts, rows, width), dtype_of(case.dtype))
            for k, width in zip(jax.random.split(key, len(widths)), widths, strict=True)
        )

    def run(inputs: Any) -> Any:
        _, (x, gated, d_gate, d_up, d_x), experts = inputs
        y, backward = jax.vjp(layer.dense_products, x, gated, experts)
        return lax.optimization_barrier((y, backward((d_gate, d_up, d_x))))

    def link(inputs: Any, result: Any, now: Clock) -> Any:
        turn, *rest = inputs
        return lax.optimization_barrier((now(timing.after(turn, result)), *rest))

    chain = session.chain_of(0, (), repeat=min(session.repeat, _MOST_SAMPLES))
    turn = session.put(lambda rank: np.zeros(1, np.int32))
    inputs = (turn, make(jax.random.key(1)), make_experts(session, case))
    measured = timing.measure(Step(run, link), [inputs], session.mesh, chain)
    return session.record(
        case,
        session.slowest(measured.spread).less(session.link(case.tokens, case.top_k).median),
        traffic.Traffic(0, 0),
        correct=True,
        name=case.name,
        scratch_bytes=memory.scratch_bytes(measured.text),
        temporary_bytes=measured.temporary_bytes,
    )


def sizes_of(session: Session, case: Case, problem: Problem) -> Sizes:
    """The static sizes of a case: room for exactly the rows that there are."""
    pairs = max(expected.rank_pairs(t, experts=case.experts).max() for t in problem.topk_idx)
    return Sizes(
        group=session.group,
        experts=case.experts,
        capacity=problem.capacity,
        pair_capacity=-(-int(pairs) // 8) * 8,
        config=config(case),
    )


def step_of(arm: Arm, sizes: Sizes) -> Step:
    """One turn of the chain of an arm."""

    def run(inputs: Any) -> Any:
        x, topk_idx, weights, cotangent, experts = inputs

        def forward(x: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
            return arm.layer((x, topk_idx, weights), experts, sizes)

        y, backward = jax.vjp(forward, x, weights, experts)
        # The compiler must not see that the link reads only one element of each.
        return lax.optimization_barrier((y, backward(cotangent)))

    return Step(run, _link)


def _link(inputs: Any, result: Any, now: Clock) -> Any:
    x, topk_idx, *rest = inputs
    # All inputs change in each turn. Otherwise the compiler would move work on them out of the loop.
    return lax.optimization_barrier((x, now(timing.after(topk_idx, result)), *rest))


def inputs_of(session: Session, case: Case, problem: Problem) -> Any:
    """Tokens, ids, weights, cotangent and experts."""
    return *_tokens(session, problem), make_experts(session, case)


def _tokens(session: Session, problem: Problem) -> tuple[jax.Array, ...]:
    """Tokens, their ids and weights, and the cotangent."""
    return (
        session.put(functools.partial(problem.part, 0, 0)),
        session.put(problem.topk_idx[0].__getitem__),
        session.put(functools.partial(problem.weights, 0)),
        # The tokens of another set serve as cotangent.
        session.put(functools.partial(problem.part, 1, 0)),
    )


def make_experts(session: Session, case: Case) -> Experts:
    """Random weights, made on the devices of their experts."""
    assert case.intermediate is not None
    up = (case.experts, case.hidden, case.intermediate)
    down = (case.experts, case.intermediate, case.hidden)

    @functools.partial(jax.jit, out_shardings=session.sharding)
    def make(key: jax.Array) -> Experts:
        keys = jax.random.split(key, 3)
        return Experts(
            *(
                (jax.random.normal(k, shape, jnp.bfloat16) / np.sqrt(shape[1])).astype(
                    dtype_of(case.dtype)
                )
                for k, shape in zip(keys, (up, up, down), strict=True)
            )
        )

    return make(jax.random.key(0))


def _judgement(session: Session, case: Case, sizes: Sizes, inputs: Any) -> Any:
    """The right results of the layer: outputs and gradients of the arm ``JUDGE``."""
    key = ("judgement", dataclasses.replace(case.workload, capacity="exact"))
    if key not in session.kept:
        run = session.on_all_ranks(step_of(layer.BY_NAME[JUDGE], sizes).run)
        session.kept[key] = jax.block_until_ready(run(inputs))
    return session.kept[key]


def _disagreement(case: Case, result: Any, judged: Any) -> str:
    """Where a result differs from the judge's."""
    names = ("y", "d_x", "d_weights", "d_gate", "d_up", "d_down")
    found = jax.tree.leaves(_errors(result, judged))
    wrong = {
        name: float(error)
        for name, error in zip(names, found, strict=True)
        if not error <= _TOLERANCE[case.dtype]
    }
    if not wrong:
        return ""
    texts = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return f"differs from the arm {JUDGE!r}: {texts} of its norm"


@jax.jit
def _errors(result: Any, judged: Any) -> Any:
    """For each array, the norm of the difference over that of the right one."""

    def error(got: jax.Array, want: jax.Array) -> jax.Array:
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    return jax.tree.map(error, result, judged)


def _traffic(case: Case, problem: Problem, sizes: Sizes, arm: Arm) -> traffic.Traffic:
    """The bytes of all four passes."""
    topk = problem.topk_idx[0]
    if arm.name.startswith("jax_ep"):
        rows = expected.rank_rows(topk, experts=case.experts)
    elif arm.name == "all_to_all":
        rows = np.full((problem.ranks, problem.ranks), sizes.pair_capacity)
    else:
        rows = expected.rank_pairs(topk, experts=case.experts)
    return traffic.of_rows(rows, case.wire_row_bytes * _PASSES)
