"""Choices of tokens: which are valid, and which lie within the quotas of the experts."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def sanitise(
    topk_idx: Int32[Array, "tokens top_k"], num_experts: int
) -> tuple[Int32[Array, "tokens top_k"], Int32[Array, "1"]]:
    """Replace entries out of range or repeated within a token by −1, and count them."""
    in_range = (topk_idx >= 0) & (topk_idx < num_experts)
    top_k = topk_idx.shape[1]
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)  # [k, j]: j < k
    same = topk_idx[:, :, None] == topk_idx[:, None, :]
    repeated = in_range & (same & earlier[None]).any(axis=2)
    invalid = repeated | ((topk_idx != -1) & ~in_range)
    clean = jnp.where(in_range & ~repeated, topk_idx, -1)
    return clean, invalid.sum(dtype=jnp.int32)[None]


def within_quota(
    topk_idx: Int32[Array, "tokens top_k"],
    scores: Float[Array, "tokens top_k"],
    *,
    num_experts: int,
    quota: int,
) -> Int32[Array, "tokens top_k"]:
    """Keep the ``quota`` entries of each expert with the highest scores; the others become −1.

    Among equal scores those that come first are kept. NaN is below all numbers.

    Args:
        topk_idx: Expert ids, sanitised; −1 for none.
        scores: Of each entry.
        num_experts: E.
        quota: Entries of one expert.
    """
    expert = jnp.where(topk_idx >= 0, topk_idx, num_experts).reshape(-1)
    entry = jnp.arange(expert.size, dtype=jnp.int32)
    keys = (expert, -scores.reshape(-1))  # NaN comes last; zeros of both signs are equal
    by_expert, _, entry = lax.sort((*keys, entry), num_keys=2, is_stable=True)
    # An entry is beyond the quota if the one so many places before it is of the same expert.
    before = jnp.roll(by_expert, quota)
    place = jnp.arange(expert.size, dtype=jnp.int32)
    kept = (place < quota) | (before != by_expert)
    found = jnp.where(kept & (by_expert < num_experts), by_expert, -1)
    return lax.sort((entry, found), num_keys=1)[1].reshape(topk_idx.shape)
