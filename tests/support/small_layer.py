"""A small MoE layer with a dense twin, and data for it, for tests of transformations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
import oracle
import routings
from spmd import ranks_at_most

RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 6, 2, 16
EXPERTS = oracle.round_up(8, RANKS)


def data(seed: int = 0, top_k: int = TOP_K, pattern: str = "uniform"):
    rng = np.random.default_rng([21, seed])
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.uniform(0.5, 1, (RANKS, TOKENS, top_k)).astype(np.float32)
    sizes = {"ranks": RANKS, "tokens": TOKENS, "top_k": top_k, "experts": EXPERTS}
    return x, weights, routings.make(pattern, **sizes, seed=seed)


def layer(group, x, weights, idx, *, fused=True, **arguments):
    """A small MoE layer with a residual connection."""
    arguments = {"num_experts": EXPERTS, "alignment": 1} | arguments
    out = jax_ep.dispatch(x, idx, weights, group=group, **arguments)
    rows = jnp.tanh(out.tokens)
    if fused:
        return x + jax_ep.combine(rows, out.handle, group=group, weights=out.weights)
    return x + jax_ep.combine(rows * out.weights[:, None], out.handle, group=group)


def dense_layer(x, weights):
    """What ``layer`` gives where no pair is invalid or dropped: all experts are the same function."""
    return x + jnp.tanh(x) * weights.sum(axis=-1, keepdims=True)


def assert_close(found, wanted, what="", tolerance=1e-5):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=what)
