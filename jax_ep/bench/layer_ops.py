"""Times the arms of a layer, forward and backward, and holds them to one another."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep.bench import expected, layer, memory, timing, traffic
from jax_ep.bench.cases import Case
from jax_ep.bench.layer import Arm, Experts, Sizes
from jax_ep.bench.ops import config
from jax_ep.bench.problems import Problem, dtype_of
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Step

_PASSES = 4  # that rows make over the links: to the experts and home, forward and backward
_LENGTH = 2  # of a chain, on GPUs
# Of the norm of the difference to that of the result; arms round at different places.
_TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}


def measure(session: Session, case: Case) -> dict[str, Any]:
    """The record of one arm, named by ``case.name``."""
    session.need_collectives()  # of the arms that it is compared with
    arm = layer.BY_NAME[case.name or "jax_ep"]
    problem = session.problem(case)
    sizes = sizes_of(session, case, problem)
    sets = _sets(session, case, problem)
    measured = timing.measure(
        _step(arm, sizes),
        sets,
        session.mesh,
        length=_LENGTH if session.on_gpu else 1,
        repeat=session.repeat,
    )
    wrong = _disagreement(session, case, arm, sizes, sets[measured.last_set], measured.result)
    link = session.link(case.tokens, case.top_k)
    return session.record(
        case,
        session.slowest(measured.spread).less(link.median),
        _traffic(case, problem, sizes, arm),
        correct=not wrong,
        name=arm.name,
        scratch_bytes=memory.scratch_bytes(measured.text),
        error=wrong or None,
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


def _step(arm: Arm, sizes: Sizes) -> Step:
    def run(inputs: Any) -> Any:
        x, topk_idx, weights, cotangent, experts = inputs

        def forward(x: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
            return arm.layer((x, topk_idx, weights), experts, sizes)

        y, backward = jax.vjp(forward, x, weights, experts)
        # The compiler is not to see that the link reads but one element of each.
        return lax.optimization_barrier((y, backward(cotangent)))

    def link(inputs: Any, result: Any) -> Any:
        x, topk_idx, *rest = inputs
        return x, timing.after(topk_idx, result), *rest

    return Step(run, link)


def _sets(session: Session, case: Case, problem: Problem) -> list[Any]:
    experts = make_experts(session, case)
    tokens = [
        session.put(functools.partial(problem.part, index, 0))
        for index in range(len(problem.topk_idx))
    ]
    return [
        (
            tokens[index],
            session.put(topk.__getitem__),
            session.put(functools.partial(problem.weights, index)),
            tokens[index - 1],  # another set's tokens are as good a cotangent as any
            experts,
        )
        for index, topk in enumerate(problem.topk_idx)
    ]


def make_experts(session: Session, case: Case) -> Experts:
    """Random weights, made where they belong."""
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


def _disagreement(
    session: Session, case: Case, arm: Arm, sizes: Sizes, inputs: Any, result: Any
) -> str:
    """Where an arm's result differs from jax_ep's, and jax_ep's from that over all_to_all."""
    other = layer.BY_NAME["all_to_all" if arm.name == "jax_ep" else "jax_ep"]
    key = ("errors", other.name, case.workload)
    if key not in session.programs:
        session.programs[key] = _errors(session.on_all_ranks(_step(other, sizes).run))
    errors = session.programs[key]
    names = ("y", "d_x", "d_weights", "d_gate", "d_up", "d_down")
    found = {
        n: float(e) for n, e in zip(names, jax.tree.leaves(errors(result, inputs)), strict=True)
    }
    wrong = {n: e for n, e in found.items() if not e <= _TOLERANCE[case.dtype]}
    if not wrong:
        return ""
    texts = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return f"differs from the arm {other.name!r}: {texts} of its norm"


def _errors(run: Any) -> Any:
    """The jitted function from a result and its inputs to how far it is from that of ``run``."""

    @jax.jit
    def errors(result: Any, inputs: Any) -> Any:
        def error(got: jax.Array, want: jax.Array) -> jax.Array:
            got, want = got.astype(jnp.float32), want.astype(jnp.float32)
            return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

        return jax.tree.map(error, result, run(inputs))

    return errors


def _traffic(case: Case, problem: Problem, sizes: Sizes, arm: Arm) -> traffic.Traffic:
    """Of all four passes."""
    topk = problem.topk_idx[0]
    if arm.name == "jax_ep":
        rows = expected.rank_rows(topk, experts=case.experts)
    elif arm.name == "all_to_all":
        rows = np.full((problem.ranks, problem.ranks), sizes.pair_capacity)
    else:
        rows = expected.rank_pairs(topk, experts=case.experts)
    return traffic.of_rows(rows, case.wire_row_bytes * _PASSES)
