"""Latency mode on GPUs: the bits of the oracle, and thousands of replayed steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_ep
import oracle
import problems
import routings
import shapes
from jax_ep.bench import clock, timing
from spmd import fields, make_group, ranks_at_most, stacked_jit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs GPUs"),
]

LATENCY = jax_ep.DispatchConfig(mode="latency")
CASES = [case.on(jax.device_count()) for case in shapes.COVERING + shapes.USUAL if case.ranks > 1]
STEPS = 10_000


def dispatch(*args: Any, in_flight: bool, **kwargs: Any) -> jax_ep.Dispatched:
    """A dispatch in latency mode, in one call or, with work beside it, in two."""
    if not in_flight:
        return jax_ep.dispatch(*args, config=LATENCY, **kwargs)
    ticket = jax_ep.dispatch_start(*args, config=LATENCY, **kwargs)
    ticket, _ = ticket.beside(jnp.sin, kwargs["group"].mesh.size * jnp.ones(128))
    return jax_ep.dispatch_done(ticket)


def combine(*args: Any, in_flight: bool, **kwargs: Any) -> jax.Array:
    """The same of a combine."""
    if not in_flight:
        return jax_ep.combine(*args, config=LATENCY, **kwargs)
    ticket = jax_ep.combine_start(*args, config=LATENCY, **kwargs)
    ticket, _ = ticket.beside(jnp.sin, kwargs["group"].mesh.size * jnp.ones(128))
    return jax_ep.combine_done(ticket)


def program(case: shapes.Case, group: jax_ep.Group, in_flight: bool):
    """Dispatch and combine in latency mode, as one function."""

    def run(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows: Any = x["x"]
        if "x_scales" in x:
            rows = jax_ep.Quantized(rows, x["x_scales"])
        weights = x["topk_weights"] if case.weighted else None
        how: dict[str, Any] = {"group": group, "in_flight": in_flight}
        out = dispatch(rows, x["topk_idx"], weights, **how, **case.dispatch_arguments)
        fused = x["row_weights"] if case.fused else None
        y = combine(x["rows"], out.handle, weights=fused, **how)
        found = fields(out.handle) | {"y": y}
        if isinstance(out.tokens, jax_ep.Quantized):
            found |= {f"x.{name}": leaf for name, leaf in out.tokens._asdict().items()}
        else:
            found["x.rows"] = out.tokens
        if out.weights is not None:
            found["weights"] = out.weights
        return found

    return run


@pytest.mark.parametrize("in_flight", [False, True], ids=["in line", "in flight"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, in_flight):
    group = make_group(case.ranks, "cuda", latency_tokens=16, latency_hidden=1024)
    run = stacked_jit(program(case, group, in_flight), group.mesh)
    for pattern in routings.PATTERNS:
        problem = problems.make(case, pattern)
        found = run(problem.inputs)
        expected = {n: a for n, a in problem.expected.items() if not n.startswith("x_again")}
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            oracle.assert_same(found[name], array, f"{name}, pattern {pattern}, {case}")
    group.check()


@pytest.mark.needs_collectives  # of the reference
@pytest.mark.parametrize("in_flight", [False, True], ids=["in line", "in flight"])
@pytest.mark.parametrize("options", [{}, {"capacity": 48}, {"unused_rows": "zero"}], ids=str)
def test_masked_layout(options, in_flight):
    """The used rows are those of the reference, and so is what combine gives."""
    ranks, tokens, hidden, top_k = ranks_at_most(8), 16, 256, 4
    experts = 8 * ranks
    sizes = {"latency_tokens": tokens, "latency_hidden": hidden}
    groups = [make_group(ranks, backend, **sizes) for backend in ("cuda", "reference")]

    def run(group, flies, x, weights, idx):
        given: dict[str, Any] = {"group": group, "in_flight": flies}
        out = dispatch(x, idx, weights, num_experts=experts, layout="masked", **given, **options)
        used = jnp.arange(out.tokens.shape[1]) < out.counts[:, None]
        y = combine(out.tokens, out.handle, weights=out.weights, **given)
        rows = out.tokens
        if not options.get("unused_rows"):
            rows = jnp.where(used[..., None], rows, 0)
        return rows, out.weights, y, out.handle

    def both(*inputs):
        return run(groups[0], in_flight, *inputs), run(groups[1], False, *inputs)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((ranks, tokens, hidden)).astype(jnp.bfloat16)
    idx = routings.make("zipf", ranks=ranks, tokens=tokens, top_k=top_k, experts=experts)
    weights = rng.random(idx.shape).astype(np.float32)
    found, wanted = stacked_jit(both, groups[0].mesh)(x, weights, idx)
    groups[0].check()
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype
        # Sums of the reference on GPUs may differ in rounding (ARCHITECTURE.md).
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(
    ("tokens", "hidden", "layout"),
    [(128, 7168, "token"), (128, 7168, "expert"), (8, 2048, "expert"), (1, 4096, "token")],
)
def test_many_steps_with_changing_routes(tokens, hidden, layout):
    """Each step has other rows, other routes and other masked tokens, and must be right."""
    ranks, top_k, local = ranks_at_most(8), 8, 16
    experts = ranks * local
    group = make_group(ranks, "cuda", latency_tokens=tokens, latency_hidden=2 * hidden)

    def run(x, idx):
        def step(wrong, i):
            now = jnp.mod(x + i, 1024.0)
            ids = (idx + 5 * i) % experts
            masked = (jnp.arange(tokens) + i) % 7 == 0
            ids = jnp.where(masked[:, None], -1, ids)
            out = jax_ep.dispatch(
                now, ids, group=group, num_experts=experts, layout=layout, config=LATENCY
            )
            y = jax_ep.combine(out.tokens, out.handle, group=group, config=LATENCY)
            there = jax.nn.one_hot(ids // local, ranks).max(axis=1).sum(axis=-1)
            times = there if layout == "token" else jnp.where(masked, 0, top_k)
            return wrong + jnp.sum(y != now * times[:, None]), None

        first = jnp.zeros((), jnp.int32) + jnp.sum(idx) * 0
        return lax.scan(step, first, jnp.arange(STEPS))[0][None]

    rng = np.random.default_rng(0)
    x = rng.integers(0, 1024, (ranks, tokens, hidden)).astype(np.float32)
    start = rng.integers(0, experts, (ranks, tokens, 1))
    idx = ((start + 3 * np.arange(top_k)) % experts).astype(np.int32)  # distinct: 3 * 8 < experts
    wrong = stacked_jit(run, group.mesh)(x, idx)
    group.check()
    assert not np.any(wrong), wrong


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_many_steps_with_two_ops_in_flight(layout):
    """Two micro-batches: each has an op in flight while the other one's is begun or finished."""
    ranks, tokens, hidden, top_k, local = ranks_at_most(8), 32, 2048, 4, 8
    experts = ranks * local
    group = make_group(ranks, "cuda", channels=2, latency_tokens=tokens, latency_hidden=2 * hidden)
    given: dict[str, Any] = {"group": group, "config": LATENCY}

    def run(x, idx):
        def step(wrong, i):
            now = [jnp.mod(x + i + 7 * batch, 1024.0) for batch in range(2)]
            ids = [(idx + (5 + batch) * i) % experts for batch in range(2)]
            options = {"num_experts": experts, "layout": layout, **given}
            tickets = [
                jax_ep.dispatch_start(*pair, **options) for pair in zip(now, ids, strict=True)
            ]
            first = jax_ep.dispatch_done(tickets[1])  # in another order than they were begun
            home = jax_ep.combine_start(first.tokens, first.handle, **given)
            home, turned = home.beside(lambda x: x[::-1], now[0])
            second = jax_ep.dispatch_done(tickets[0])
            y_second = jax_ep.combine(second.tokens, second.handle, **given)
            y_first = jax_ep.combine_done(home)
            for y, rows, there in zip((y_second, y_first), now, ids, strict=True):
                times = jax.nn.one_hot(there // local, ranks).max(axis=1).sum(axis=-1)
                times = times if layout == "token" else jnp.full(tokens, top_k)
                wrong += jnp.sum(y != rows * times[:, None])
            return wrong + jnp.sum(turned[::-1] != now[0]), None

        first = jnp.zeros((), jnp.int32) + jnp.sum(idx) * 0
        return lax.scan(step, first, jnp.arange(STEPS))[0][None]

    rng = np.random.default_rng(0)
    x = rng.integers(0, 1024, (ranks, tokens, hidden)).astype(np.float32)
    start = rng.integers(0, experts, (ranks, tokens, 1))
    idx = ((start + 3 * np.arange(top_k)) % experts).astype(np.int32)
    wrong = stacked_jit(run, group.mesh)(x, idx)
    group.check()
    assert not np.any(wrong), wrong


def test_a_late_rank_delays_only_the_op_that_waits_for_it():
    """A long wait looks across PCIe whether a peer is gone; later ops must not pay for that."""
    ranks, tokens, hidden, top_k, local = ranks_at_most(2), 128, 1024, 8, 16
    experts, before, timed = ranks * local, 5, 40
    group = make_group(ranks, "cuda", latency_tokens=tokens, latency_hidden=2 * hidden)

    def run(x, idx):
        is_last = lax.axis_index("expert") == ranks - 1
        turns = jnp.where(is_last, 2000, 0)  # milliseconds, each turn being at least a launch
        spent = lax.fori_loop(0, turns, lambda _, v: jnp.cos(v), x[0])
        ids, stamps = timing.after(idx, spent), []
        for op in range(before + timed):
            if op == before:
                ids, stamp = clock.read(ids)
                stamps.append(stamp)
            out = jax_ep.dispatch(
                x, ids, group=group, num_experts=experts, layout="token", config=LATENCY
            )
            ids = timing.after(ids, out.tokens)
        stamps.append(clock.read(ids)[1])
        return jnp.stack(stamps)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((ranks, tokens, hidden)).astype(np.float32)
    idx = rng.integers(0, local, (ranks, tokens, 1)) + 3 * np.arange(top_k)
    program = stacked_jit(run, group.mesh)
    for _ in range(3):  # the first run also loads kernels
        stamps = program(x, idx.astype(np.int32) % experts)
    group.check()
    for of_rank in np.asarray(stamps):
        start, end = clock.microseconds(of_rank)
        assert (end - start) / timed < 150, f"{(end - start) / timed:.0f} us an op"
