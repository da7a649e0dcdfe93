"""Even use of experts: a loss and a bias that work towards it. Public in ``jax_ep.routing``.

Symbols: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Integer, Shaped

from jax_ep._core import arguments
from jax_ep._core.numerics import expert_ids

# Added to the sum of a token's scores before dividing by it: sigmoids may all be zero.
_EPSILON = 1e-20


def load_balancing_loss(
    topk_idx: Integer[Array, "tokens top_k"],
    scores: Float32[Array, "tokens experts"],
    *,
    axis_names: Sequence[str] = (),
    num_used_experts: int | None = None,
) -> Float32[Array, ""]:
    """The auxiliary load-balancing loss. It is least, 1, where all experts are used equally.

    ``E * sum(f[e] * P[e])``, with E the number of experts that exist, f the share of the routes that
    go to expert e and P the mean over the tokens of e's share of the token's scores (Switch
    Transformer, arXiv:2101.03961, section 2.2). Scores that do not sum to one, such as sigmoids, are
    divided by their sum first. Tokens without an expert (all entries −1) are left out of both.

    Args:
        topk_idx: ``[T, K]`` chosen experts, −1 for none; any integer dtype.
        scores: ``[T, E]`` scores; the gradient flows through these.
        axis_names: Mesh axes that the tokens are split over: counts and score sums are summed over
            them before the product, so the loss is that of all tokens, the same on every rank.
        num_used_experts: Only this many experts exist, those with the lowest ids. Even use of these
            gives 1. Scores and routes of the others are left out. None: all exist.

    Returns:
        The loss, a scalar; 0 where there is no token at all.

    Raises:
        TypeError: if ``num_used_experts`` is no int.
        ValueError: if it is not from 1 to the number of scores.
    """
    if num_used_experts is not None:
        check_num_used(
            "routing.load_balancing_loss", num_used_experts, scores.shape[1], "the number of scores"
        )
        scores = scores[:, :num_used_experts]
        topk_idx = jnp.where(topk_idx < num_used_experts, expert_ids(topk_idx), -1)
    experts = scores.shape[1]
    present = (topk_idx >= 0).any(axis=1)
    shares = scores / (scores.sum(axis=1, keepdims=True) + _EPSILON)
    score_sums = jnp.where(present[:, None], shares, 0.0).sum(axis=0)
    counts = expert_load(topk_idx, experts)
    num_tokens = present.sum(dtype=jnp.int32)
    if axis_names:
        names = tuple(axis_names)
        score_sums, counts, num_tokens = lax.psum((score_sums, counts, num_tokens), names)
    counts, num_tokens = counts.astype(jnp.float32), num_tokens.astype(jnp.float32)
    fraction = counts / jnp.maximum(counts.sum(), 1)
    mean_share = score_sums / jnp.maximum(num_tokens, 1)
    return experts * jnp.sum(fraction * mean_share)


def expert_load(
    topk_idx: Integer[Array, "tokens top_k"], num_experts: int
) -> Int32[Array, " experts"]:
    """How many routes go to each expert.

    Args:
        topk_idx: ``[T, K]`` chosen experts, any integer dtype; entries outside ``[0, E)`` are not
            counted.
        num_experts: E.

    Returns:
        ``[E]`` int32.
    """
    topk_idx = expert_ids(topk_idx)
    bins = jnp.where(topk_idx >= 0, topk_idx, num_experts).reshape(-1)
    return jnp.zeros((num_experts,), jnp.int32).at[bins].add(1, mode="drop")


def update_bias(
    bias: Float32[Array, " experts"],
    load: Shaped[Array, " experts"],
    rate: float = 1e-3,
    *,
    num_used_experts: int | None = None,
) -> Float32[Array, " experts"]:
    """Raise the bias of experts with less than the mean load, lower that of experts with more.

    Balancing without an auxiliary loss (arXiv:2408.15664): once a step, with the load of the whole
    batch, ``bias + rate * sign(mean(load) - load)``.

    Args:
        bias: ``[E]`` selection bias of the router.
        load: ``[E]`` routes to each expert, such as ``MoEAux.load``.
        rate: Size of the step (DeepSeek-V3: 1e-3).
        num_used_experts: Only this many experts exist, those with the lowest ids. The mean is
            theirs, and the bias of the others stays. None: all exist.

    Returns:
        ``[E]`` the new bias.

    Raises:
        TypeError: if ``num_used_experts`` is no int.
        ValueError: if it is not from 1 to E.
    """
    load = load.astype(jnp.float32)
    if num_used_experts is None:
        return bias + rate * jnp.sign(load.mean() - load)
    check_num_used("routing.update_bias", num_used_experts, load.shape[0])
    used = load[:num_used_experts]
    return bias.at[:num_used_experts].add(rate * jnp.sign(used.mean() - used))


def check_num_used(
    op: str, num_used_experts: Any, num_experts: int, what: str = "the number of experts"
) -> None:
    """``num_used_experts`` is an int from 1 to the number of experts."""
    if not arguments.is_int(num_used_experts):
        raise arguments.type_error(
            op,
            "num_used_experts",
            "a Python int or None",
            type(num_used_experts).__name__,
            "pass how many of the experts exist",
        )
    if not 1 <= num_used_experts <= num_experts:
        raise arguments.value_error(
            op,
            "num_used_experts",
            f"1 to {num_experts}, {what}",
            num_used_experts,
            "leave it out if all experts exist",
        )
