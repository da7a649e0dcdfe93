"""Which choices are dropped before the plan: those of absent ranks, and those beyond experts' quotas.

Where experts have quotas, the choices of each source rank with the lowest scores are dropped. The rank
that has the tokens decides that: entries beyond the quota become −1, so no kernel knows about it. The
counts of the handle are then corrected, so that they tell what was asked for: the ranks add up, for
each expert, the entries that they have dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep._core import arguments
from jax_ep._core.quota import sanitise, within_quota
from jax_ep._core.types import Handle
from jax_ep._groups.group import Group
from jax_ep._ops import absent, bounds
from jax_ep._ops.bounds import Bounds
from jax_ep._ops.varying import vary_together


def before_plan(
    op: str,
    limits: Bounds,
    topk_idx: Int32[Array, "tokens top_k"],
    topk_weights: Float[Array, "tokens top_k"] | None,
    *,
    group: Group,
    num_experts: int,
) -> tuple[Int32[Array, "tokens top_k"], Callable[[Handle], Handle]]:
    """The choices that are kept before the plan, and what corrects the counts of its handle."""
    num_tokens, top_k = topk_idx.shape
    topk_idx = absent.before_plan(
        op, topk_idx, limits.drop_policy, group=group, num_experts=num_experts
    )
    quota = bounds.quota(limits, num_tokens=num_tokens, top_k=top_k, num_experts=num_experts)
    if quota is None or num_tokens == 0:
        return topk_idx, lambda handle: handle
    if topk_weights is None:
        raise arguments.value_error(
            op,
            "topk_weights",
            "weights with drop_policy='score', which drops the rows with the lowest",
            "None",
            "pass the scores of the choices, or drop_policy='position'",
        )
    topk_idx, scores = vary_together(group, topk_idx, topk_weights)
    return by_score(topk_idx, scores, group=group, num_experts=num_experts, quota=quota)


def by_score(
    topk_idx: Int32[Array, "tokens top_k"],
    scores: Float[Array, "tokens top_k"],
    *,
    group: Group,
    num_experts: int,
    quota: int,
) -> tuple[Int32[Array, "tokens top_k"], Callable[[Handle], Handle]]:
    """Drop what is beyond the quota of each (source rank, expert).

    Args:
        topk_idx: The choices of this rank's tokens.
        scores: Their scores, which decide what is dropped.
        group: The group.
        num_experts: E.
        quota: Entries of this rank that an expert takes.

    Returns:
        The choices that are kept, and what corrects the counts of the handle of their plan.
    """
    chosen, num_invalid = sanitise(topk_idx, num_experts)
    scores = lax.stop_gradient(scores)
    kept = within_quota(chosen, scores, num_experts=num_experts, quota=quota)

    def correct(handle: Handle) -> Handle:
        target = jnp.where(kept < 0, chosen, -1).reshape(-1)
        experts = jnp.arange(num_experts, dtype=jnp.int32)
        lost = (target[:, None] == experts).sum(axis=0, dtype=jnp.int32)
        num_local = num_experts // group.size
        first = lax.axis_index(group.axis_names) * num_local
        here = lax.dynamic_slice_in_dim(lax.psum(lost, group.axis_names), first, num_local)
        return dataclasses.replace(
            handle,
            demand=handle.demand + here,
            num_dropped=handle.num_dropped + here.sum(dtype=jnp.int32),
            num_invalid=handle.num_invalid + num_invalid,
        )

    return kept, correct
