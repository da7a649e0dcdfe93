"""Bounds on rows: how much room they give, and how experts share it if not all rows fit."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import oracle
import spmd
from jax_ep._core.capacity import MAX_CAPACITY, share_room

RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN = 2, 12, 4, 16, 8


share = jax.jit(share_room, static_argnums=(1, 2))


@pytest.mark.parametrize("alignment", [1, 3, 8])
def test_room_is_shared_as_if_it_were_dealt(alignment: int) -> None:
    rng = np.random.default_rng(alignment)
    for num_experts, most_rows in itertools.product([1, 5, 39], [5, 60]):
        capacity = alignment * int(rng.integers(1, most_rows))
        most = rng.choice([3, 30, 3000], (12, 1))
        wanted = rng.integers(0, most, (12, num_experts), np.int32)
        kept = share(wanted, capacity, alignment)
        dealt = [oracle.deal_room(row.tolist(), alignment, capacity) for row in wanted]
        np.testing.assert_array_equal(kept, dealt)


def test_sums_of_sizes_do_not_overflow() -> None:
    """4096 experts that want 2^30 rows each, in the largest room there is."""
    kept = np.asarray(share(jnp.full((1, 4096), 2**30), MAX_CAPACITY, 1), np.int64)
    assert kept.sum() == MAX_CAPACITY and kept.max() - kept.min() == 1


def group_of(backend: str | None = None) -> jax_ep.Group:
    mesh = spmd.make_mesh((RANKS,), ("expert",))
    return jax_ep.create_group(mesh, "expert", backend=backend)


def routes() -> np.ndarray:
    """Experts with low ids are chosen more often."""
    rng = np.random.default_rng(0)
    skewed = -np.log(rng.random((RANKS * TOKENS, EXPERTS))) * (1 + np.arange(EXPERTS))
    return np.argsort(skewed, axis=1)[:, :TOP_K].astype(np.int32)


def run(backend: str, **bound: Any) -> dict[str, np.ndarray]:
    group = spmd.make_group(RANKS, backend)

    def on_rank(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, **bound)
        return {
            "counts": out.counts[None],
            "demand": out.demand[None],
            "num_dropped": out.num_dropped,
            "rows": jnp.full((1,), len(out.tokens)),
        }

    step = jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
    x = jnp.ones((RANKS * TOKENS, HIDDEN))
    return jax.tree.map(np.asarray, spmd.whole_jit(step, group.mesh)(x, jnp.asarray(routes())))


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("factor", [0.5, 1.1, 100.0])
def test_a_factor_bounds_the_rows_of_each_rank(
    factor: float, alignment: int, native_backend: str
) -> None:
    out = run(native_backend, rank_capacity_factor=factor, alignment=alignment)
    asked = oracle.round_up(math.ceil(factor * TOKENS * TOP_K), alignment)
    lossless = run(native_backend, alignment=alignment)["rows"]
    np.testing.assert_array_equal(out["rows"], np.minimum(asked, lossless))
    for demand, counts in zip(out["demand"], out["counts"], strict=True):
        kept = oracle.deal_room(demand.tolist(), alignment, int(out["rows"][0]))
        np.testing.assert_array_equal(counts, kept)
    assert (out["num_dropped"].sum() > 0) == (factor < 100)


def test_no_expert_starves(native_backend: str) -> None:
    """At the same memory, fewer rows are lost than with a bound for each expert."""
    by_rank, by_expert = (
        run(native_backend, rank_capacity_factor=4 / 3),
        run(native_backend, capacity_factor=4 / 3),
    )
    assert by_rank["rows"][0] == by_expert["rows"][0]
    assert by_rank["num_dropped"].sum() < by_expert["num_dropped"].sum()
    hungry = by_rank["counts"] < by_rank["demand"]
    assert hungry.any()
    level = by_rank["counts"][hungry].min()
    assert (by_rank["counts"] >= np.minimum(by_rank["demand"], level)).all()


def test_layers_with_room_for_each_rank(native_backend: str) -> None:
    """With enough room, values and gradients are those without a bound; with less, some rows drop."""
    group = spmd.make_group(RANKS, native_backend)
    params = jax_ep.init_moe_params(
        jax.random.key(0), hidden=HIDDEN, intermediate=16, num_experts=EXPERTS
    )
    x = jax.random.normal(jax.random.key(1), (RANKS * TOKENS, HIDDEN))

    def loss(x, params, **bound):
        y, aux = jax_ep.moe(x, params, group=group, num_experts=EXPERTS, top_k=TOP_K, **bound)
        return jnp.sin(y).sum(), aux.num_dropped

    def step(**bound):
        graded = jax.grad(functools.partial(loss, **bound), argnums=(0, 1), has_aux=True)
        return spmd.whole_jit(graded, group.mesh)(x, params)

    free, none = step()
    roomy, still_none = step(rank_capacity_factor=2.0)
    _, some = step(rank_capacity_factor=0.5)
    assert none == still_none == 0 < some
    # Compiled anew, so that XLA may choose other matmuls.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, roomy, free)
