"""Layout "masked": the rows of layout "expert", each expert's at a fixed place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import oracle
import routings
from spmd import make_group, native_calls, ranks_at_most, stacked_jit

RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN = ranks_at_most(2), 12, 3, 8, 128
LOCAL = EXPERTS // RANKS
LATENCY = {"latency_tokens": TOKENS, "latency_hidden": 2 * HIDDEN}


def data(pattern: str = "zipf") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    sizes = {"ranks": RANKS, "tokens": TOKENS, "top_k": TOP_K, "experts": EXPERTS}
    idx = routings.make(pattern, **sizes)
    return x, rng.random(idx.shape).astype(np.float32), idx


def used(counts: np.ndarray, room: int) -> np.ndarray:
    """Which rows of each expert are used."""
    return np.arange(room) < counts[:, None]


@pytest.mark.parametrize("mode", ["throughput", "latency"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "fp8", "output": "quantized"},
        {"alignment": 16},
        {"capacity": 8 * LOCAL},
    ],
    ids=["plain", "fp8", "aligned", "few rows"],
)
def test_rows_are_those_of_layout_expert(backend, options, mode):
    if (backend, mode) == ("cuda", "throughput"):
        pytest.skip("on GPUs layout 'masked' has no throughput mode; the other mode has it")
    group = make_group(RANKS, backend, **LATENCY)
    bounded = options.get("capacity", 0) // LOCAL
    room = bounded or oracle.round_up(RANKS * TOKENS, options.get("alignment", 1))
    config = jax_ep.DispatchConfig(mode=mode)
    given = {"group": group, "num_experts": EXPERTS, "config": config}

    def run(x, weights, idx):
        masked = jax_ep.dispatch(x, idx, weights, layout="masked", **given, **options)
        again = jax_ep.dispatch(x, handle=masked.handle, group=group)
        plain = {n: v for n, v in options.items() if n not in ("capacity", "alignment")}
        return masked, again.tokens, jax_ep.dispatch(x, idx, weights, **given, **plain)

    found, again, wanted = stacked_jit(run, group.mesh)(*data())
    for rank in range(RANKS):
        counts = np.asarray(found.counts)[rank]
        demand = np.asarray(wanted.counts)[rank]
        np.testing.assert_array_equal(counts, np.minimum(demand, bounded) if bounded else demand)
        np.testing.assert_array_equal(np.asarray(found.group_sizes)[rank], room)
        starts = np.cumsum(demand) - demand
        mask = used(counts, room)
        source = np.concatenate([s + np.arange(c) for s, c in zip(starts, counts, strict=True)])
        leaves = zip(
            jax.tree.leaves((found.tokens, found.weights)),
            jax.tree.leaves((wanted.tokens, wanted.weights)),
            strict=True,
        )
        for got, want in leaves:
            got, want = np.asarray(got)[rank], np.asarray(want)[rank]
            assert got.shape == (LOCAL, room, *want.shape[1:])
            oracle.assert_same(got[mask], want[source], "a used row")
        if not options.get("quantization"):
            oracle.assert_same(np.asarray(again)[rank][mask], found.tokens[rank][mask], "again")


@pytest.mark.parametrize("fused", [False, True])
def test_combine_and_gradients_are_those_of_layout_expert(backend, fused):
    """Also of programs that never look at the unused rows, which are undefined."""
    group = make_group(RANKS, backend, **LATENCY)

    def run(layout, x, weights, idx):
        given = {"group": group, "num_experts": EXPERTS, "layout": layout}
        out = jax_ep.dispatch(x, idx, weights, **given)
        rows = jnp.sin(out.tokens)
        if not fused:
            rows *= out.weights[..., None]
        y = jax_ep.combine(rows, out.handle, group=group, weights=out.weights if fused else None)
        return jnp.sum(y**2), y

    def both(*inputs):
        # Without fused weights, theirs is a sum of XLA's, whose order may follow the shape.
        wrt = (0, 1) if fused else 0
        return [
            jax.grad(lambda *a, n=name: run(n, *a), wrt, has_aux=True)(*inputs)
            for name in ("masked", "expert")
        ]

    found, wanted = stacked_jit(both, group.mesh)(*data("masked"))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        oracle.assert_same(got, want, "masked")


def test_unused_rows(backend):
    """Undefined unless asked for zeros; on CPU they are NaN, which shows who reads them."""
    group = make_group(RANKS, backend, **LATENCY)

    def run(x, weights, idx):
        given = {"group": group, "num_experts": EXPERTS, "layout": "masked"}
        outs = [
            jax_ep.dispatch(x, idx, weights, unused_rows=unused, **given)
            for unused in (None, "undefined", "zero")
        ]
        return [(out.tokens, out.weights, out.counts) for out in outs]

    for which, (tokens, weights, counts) in enumerate(stacked_jit(run, group.mesh)(*data())):
        for rank in range(RANKS):
            unused = ~used(np.asarray(counts)[rank], tokens.shape[2])
            assert unused.any() and not np.asarray(weights)[rank][unused].any()
            if which == 2:
                assert not np.asarray(tokens)[rank][unused].any()
            elif backend == "cpu":
                assert np.isnan(np.asarray(tokens)[rank][unused]).all()


def test_no_tokens():
    group = make_group(RANKS, "reference")

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, layout="masked")
        return out.tokens, out.counts, jax_ep.combine(out.tokens, out.handle, group=group)

    x = jnp.zeros((RANKS, 0, HIDDEN))
    tokens, counts, y = stacked_jit(run, group.mesh)(x, jnp.zeros((RANKS, 0, TOP_K), jnp.int32))
    assert tokens.shape == (RANKS, LOCAL, 1, HIDDEN) and not counts.any() and y.shape == x.shape


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"capacity": LOCAL + 1},
            f"argument capacity: .*multiple of {LOCAL}: {LOCAL} local experts",
        ),
        ({"capacity": LOCAL, "alignment": 2}, "argument capacity: .*alignment 2"),
        ({"capacity_factor": 1.5}, "argument capacity_factor: expected None with layout='masked'"),
        ({"rank_capacity_factor": 1.5}, "argument rank_capacity_factor: expected None"),
        ({"rows": 1}, f"combine: argument rows: expected .* for each of {LOCAL} local experts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(options, text):
    group = make_group(RANKS, "reference")
    cut = options.pop("rows", 0) if "rows" in options else 0

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, layout="masked", **options)
        return jax_ep.combine(out.tokens[:, cut:], out.handle, group=group)

    with pytest.raises(ValueError, match=text):
        calls_of(run, group)


def test_calls_on_gpus():
    """One call in latency mode, also where another mode would be faster; else an error."""
    group = dataclasses.replace(make_group(RANKS, "reference", **LATENCY), backend="cuda")
    plain = dataclasses.replace(make_group(RANKS, "reference"), backend="cuda")

    def run(group, mode, x, idx):
        config = jax_ep.DispatchConfig(mode=mode)
        given = {"group": group, "num_experts": EXPERTS, "layout": "masked", "config": config}
        return jax_ep.dispatch(x, idx, **given).tokens

    (call,) = calls_of(lambda *a: run(group, "auto", *a), group)
    attributes = dict(call["attributes"])
    assert call["target"] == "jax_ep_latency_dispatch"
    assert (attributes["masked"], attributes["unused_rows"]) == (1, 1)
    assert attributes["alignment"] == attributes["expert_capacity"] == RANKS * TOKENS
    for where, mode in (plain, "auto"), (group, "throughput"):
        with pytest.raises(
            ValueError, match=r"argument layout: expected .* got 'masked'; use mode="
        ):
            calls_of(lambda *a, w=where, m=mode: run(w, m, *a), where)


def calls_of(run, group):
    """The native calls of a program, which is traced."""
    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((RANKS * TOKENS, HIDDEN), jnp.float32)
    idx = jax.ShapeDtypeStruct((RANKS * TOKENS, TOP_K), jnp.int32)
    return native_calls(jax.make_jaxpr(mapped)(x, idx).jaxpr)
