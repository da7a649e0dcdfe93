"""``drop_policy="score"``: what exceeds an expert's quota of a source rank is dropped by score."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_ep
import logical_hosts
import oracle
from jax_ep import nnx, routing
from jax_ep._core import quota
from spmd import fields, make_group, ranks_at_most, stacked_jit

FACTOR, TOKENS, TOP_K, HIDDEN = 0.6, 13, 3, 8


def numpy_quota(topk_idx, scores, num_experts, number):
    """``topk_idx`` without what exceeds the quotas, expert by expert."""
    kept = topk_idx.copy()
    for expert in range(num_experts):
        entries = np.flatnonzero(topk_idx == expert)
        low = np.where(np.isnan(scores.flat[entries]), -np.inf, scores.flat[entries])
        order = sorted(range(len(entries)), key=lambda i: (-low[i], i))
        kept.flat[entries[order[number:]]] = -1
    return kept


@given(st.data())
def test_within_quota(data):
    """Ties, zeros of both signs, infinities and NaN; one program for each quota."""
    number = data.draw(st.sampled_from([0, 1, 2, 30]))
    shape, num_experts = (9, 3), 4
    choices = st.lists(st.permutations(range(-1, num_experts)), min_size=9, max_size=9)
    topk_idx = np.array(data.draw(choices), np.int32)[:, :3]
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.inf, math.nan])
    scores = np.array(data.draw(st.lists(values, min_size=27, max_size=27)), np.float32)
    scores = scores.reshape(shape)
    run = jax.jit(quota.within_quota, static_argnames=("num_experts", "quota"))
    found = run(topk_idx, scores, num_experts=num_experts, quota=number)
    np.testing.assert_array_equal(found, numpy_quota(topk_idx, scores, num_experts, number))


def problem(ranks: int):
    """Skewed routes with invalid and repeated entries, and scores with ties."""
    rng = np.random.default_rng(4)
    shape, experts = (ranks, TOKENS, TOP_K), 2 * ranks
    idx = (rng.random(shape) ** 2 * (experts + 1)).astype(np.int32) - rng.integers(0, 2, shape)
    weights = (rng.integers(1, 5, shape) / 4).astype(np.float32)
    x = rng.standard_normal((ranks, TOKENS, HIDDEN)).astype(np.float32)
    return x, idx.astype(np.int32), weights, experts


@pytest.mark.needs_collectives
@pytest.mark.parametrize("capacity", [{}, {"rank_capacity_factor": 0.4}], ids=["alone", "of ranks"])
def test_dispatch(capacity, backend):
    """To the bit, against the oracle with the routes that NumPy keeps; with exact counts."""
    ranks = ranks_at_most(4)
    group = make_group(ranks, backend)
    x, idx, weights, experts = problem(ranks)
    number = math.ceil(FACTOR * TOKENS * TOP_K / experts)
    clean, num_invalid = oracle.sanitise(idx, experts)
    kept = np.stack(
        [numpy_quota(i, w, experts, number) for i, w in zip(clean, weights, strict=True)]
    )
    assert (kept != clean).any()

    def run(x, idx, weights):
        bounds = {"capacity_factor": FACTOR, "drop_policy": "score", **capacity}
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=experts, **bounds)
        return fields(out.handle), out.tokens, out.weights

    handle, rows, row_weights = stacked_jit(run, group.mesh)(x, idx, weights)
    room = min(
        2 * ranks * number,
        *(math.ceil(f * TOKENS * TOP_K) for f in capacity.values()),
        ranks * TOKENS * 2,
    )
    limits = oracle.Limits(capacity=room, per_expert=oracle.INT32_MAX)
    options = {"num_experts": experts, "layout": "expert", "alignment": 1, "bounds": limits}
    plan = oracle.plan(kept, **options)
    wanted = plan.arrays(logical_hosts.of_first(ranks))
    of_experts = np.arange(experts).reshape(ranks, -1)
    wanted["demand"] = (clean.reshape(1, 1, -1) == of_experts[..., None]).sum(-1).astype(np.int32)
    dropped = wanted["demand"].sum(1) - wanted["counts"].sum(1)
    wanted["num_dropped"] = dropped[:, None].astype(np.int32)
    wanted["num_invalid"] = np.asarray(num_invalid, np.int32).reshape(ranks, 1)
    assert handle.keys() == wanted.keys()
    for name, want in wanted.items():
        oracle.assert_same(handle[name], want, name)
    oracle.assert_same(rows, oracle.move(x, plan), "rows")
    oracle.assert_same(row_weights, oracle.move_weights(weights, plan), "weights")


@pytest.mark.needs_collectives
@pytest.mark.usefixtures("in_float32")
@pytest.mark.one_process("calls the layer with arrays of one process")
@pytest.mark.parametrize("overlap", [None, "chunks"])
def test_moe(overlap, native_backend):
    """The layer is that of the routes that are left, but reports all that the router chose."""
    ranks = ranks_at_most(2)
    group = make_group(ranks, native_backend)
    sizes = {"hidden": HIDDEN, "intermediate": 8, "num_experts": 4}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes)
    x = jax.random.normal(jax.random.key(1), (ranks * 2 * 10, HIDDEN))
    options = {"group": group, "num_experts": 4, "top_k": 2}
    drops = {"capacity_factor": 0.5, "drop_policy": "score", "overlap": overlap}

    @jax.jit
    def run(x):
        y, aux = jax_ep.moe(x, params, **options, **drops, return_routing=True)
        return y, aux

    y, aux = run(x)
    # Each part is that of a rank, or of a chunk of its tokens, with a quota of its own.
    size = 10 if overlap else 20
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    idx, weights = (np.asarray(a) for a in aux.routing[:2])
    number = math.ceil(0.5 * size * 2 / 4)
    kept = np.concatenate([numpy_quota(idx[p], weights[p], 4, number) for p in parts])
    assert (idx >= 0).all()
    np.testing.assert_array_equal(aux.load, np.bincount(idx.reshape(-1), minlength=4))
    assert aux.num_dropped == (kept < 0).sum() > 0
    given_routes = routing.Routing(jnp.asarray(kept), jnp.asarray(weights), None)
    wanted, _ = jax.jit(lambda x, r: jax_ep.moe(x, params, **options, routing=r))(x, given_routes)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_errors():
    group = make_group(2, "reference")
    x, idx, weights, experts = problem(2)

    def dispatch(*arguments, **options):
        call = lambda *a: jax_ep.dispatch(*a, group=group, num_experts=experts, **options).tokens  # noqa: E731
        jax.eval_shape(stacked_eval(call, group), *arguments)

    def stacked_eval(call, group):
        specs = jax.sharding.PartitionSpec("expert")
        return jax.shard_map(call, mesh=group.mesh, in_specs=specs, out_specs=specs)

    arguments = [np.concatenate(a) for a in (x, idx, weights)]
    score = {"drop_policy": "score", "capacity_factor": 1.0}
    with pytest.raises(ValueError, match=r"drop_policy: .*capacity_factor.* pass capacity_factor"):
        dispatch(*arguments, drop_policy="score")
    with pytest.raises(ValueError, match=r"drop_policy: expected one of .*'probs'"):
        dispatch(*arguments, drop_policy="probs")
    with pytest.raises(ValueError, match=r"topk_weights: .*pass the scores"):
        dispatch(*arguments[:2], **score)

    def again(x, idx, weights):
        handle = jax_ep.dispatch(x, idx, group=group, num_experts=experts).handle
        return jax_ep.dispatch(
            x, None, weights, group=group, handle=handle, drop_policy="score"
        ).tokens

    with pytest.raises(ValueError, match=r"drop_policy: expected None together with handle="):
        jax.eval_shape(stacked_eval(again, group), *arguments)
    sizes = {"hidden": 8, "intermediate": 8, "num_experts": 4, "top_k": 2}
    moe = nnx.MoE(**sizes, group=group, drop_policy="score", rngs=nnx.nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"jax_ep.moe: argument drop_policy"):
        moe(jnp.ones((4, 8)))
