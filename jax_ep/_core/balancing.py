"""Losses and a bias that keep a router balanced and its logits small. Public in ``jax_ep.routing``.

Symbols: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer, Shaped

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
    op = "routing.load_balancing_loss"
    scores, topk_idx = _of_used(op, scores, topk_idx, num_used_experts)
    present = (topk_idx >= 0).any(axis=1)
    score_sums = _shares(scores, present).sum(axis=0)
    counts = expert_load(topk_idx, scores.shape[1])
    num_tokens = present.sum(dtype=jnp.int32)
    if axis_names:
        names = tuple(axis_names)
        score_sums, counts, num_tokens = lax.psum((score_sums, counts, num_tokens), names)
    counts, num_tokens = counts.astype(jnp.float32), num_tokens.astype(jnp.float32)
    fraction = counts / jnp.maximum(counts.sum(), 1)
    mean_share = score_sums / jnp.maximum(num_tokens, 1)
    return counts.shape[0] * jnp.sum(fraction * mean_share)


def sequence_balancing_loss(
    topk_idx: Integer[Array, "tokens top_k"],
    scores: Float32[Array, "tokens experts"],
    sequence_idx: Integer[Array, " tokens"],
    num_sequences: int,
    *,
    axis_names: Sequence[str] = (),
    num_used_experts: int | None = None,
) -> Float32[Array, ""]:
    """The load-balancing loss of each sequence, averaged over the sequences; 1 is its least.

    DeepSeek-V3's complementary sequence-wise auxiliary loss (arXiv:2412.19437, section 2.1.2). It is
    ``load_balancing_loss`` with the sums of one sequence in place of those of all tokens. In
    pseudocode, with E the number of experts that exist::

        for s in sequences:
            f[e] = E * (routes of the tokens of s to e) / (routes of the tokens of s)
            P[e] = mean over the tokens of s of score[e] / sum(score)
            loss[s] = sum(f[e] * P[e])
        mean of loss over the sequences that have a token

    There the routes are the K experts of the largest scores without the selection bias,
    ``jax.lax.top_k(scores, K)[1]``, which need not be those that the token goes to.

    Args:
        topk_idx: ``[T, K]`` chosen experts, −1 for none; any integer dtype. Tokens without an expert
            (all entries −1) are left out.
        scores: ``[T, E]`` scores; the gradient flows through these.
        sequence_idx: ``[T]`` the sequence of each token, of any integer dtype. Tokens of one outside
            ``[0, num_sequences)`` are left out.
        num_sequences: Of all ranks together. Two arrays ``[num_sequences, E]`` hold the sums.
        axis_names: Mesh axes that the tokens are split over. A sequence may be cut there: counts and
            score sums of each sequence are summed over them before the product, so the loss is the
            same on every rank.
        num_used_experts: Only this many experts exist, those with the lowest ids. Even use of these
            gives 1. Scores and routes of the others are left out. None: all exist.

    Returns:
        The loss, a scalar; 0 where there is no token at all.

    Raises:
        TypeError: if ``num_used_experts`` or ``num_sequences`` is no int, or ``sequence_idx`` has no
            integers.
        ValueError: if ``num_used_experts`` is not from 1 to the number of scores, ``num_sequences`` is
            negative, or ``sequence_idx`` has not one entry for each token.
    """
    op = "routing.sequence_balancing_loss"
    _check_sequences(op, sequence_idx, num_sequences, scores.shape[0])
    scores, topk_idx = _of_used(op, scores, topk_idx, num_used_experts)
    experts = scores.shape[1]
    topk_idx, sequence_idx = expert_ids(topk_idx), expert_ids(sequence_idx)
    inside = (sequence_idx >= 0) & (sequence_idx < num_sequences)
    present = (topk_idx >= 0).any(axis=1) & inside
    sequence_idx = jnp.where(present, sequence_idx, num_sequences)  # one more, of those left out
    shares = _shares(scores, present)
    columns = jnp.where(topk_idx >= 0, topk_idx, experts)  # those outside are dropped
    zeros = functools.partial(jnp.zeros, (num_sequences, experts))
    counts = zeros(jnp.int32).at[sequence_idx[:, None], columns].add(1, mode="drop")
    sums = zeros(jnp.float32).at[sequence_idx].add(shares, mode="drop")
    num_tokens = jnp.zeros((num_sequences,), jnp.int32).at[sequence_idx].add(1, mode="drop")
    if axis_names:
        sums, counts, num_tokens = lax.psum((sums, counts, num_tokens), tuple(axis_names))
    counts, num_present = counts.astype(jnp.float32), (num_tokens > 0).sum(dtype=jnp.int32)
    fraction = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    mean_share = sums / jnp.maximum(num_tokens.astype(jnp.float32), 1)[:, None]
    losses = experts * jnp.sum(fraction * mean_share, axis=1)
    return losses.sum() / jnp.maximum(num_present.astype(jnp.float32), 1)


def router_z_loss(
    logits: Float[Array, "tokens experts"],
    *,
    mask: Bool[Array, " tokens"] | None = None,
    axis_names: Sequence[str] = (),
    num_used_experts: int | None = None,
) -> Float32[Array, ""]:
    """The mean over the tokens of ``logsumexp(logits) ** 2``: it keeps logits small.

    The router z-loss of ST-MoE (Zoph et al. 2022, arXiv:2202.08906, section 3; scaled by 1e-3 there).
    Small logits are rounded less, and scores do not saturate. Two numbers are summed over ranks.

    Args:
        logits: ``[T, E]`` of any float dtype.
        mask: ``[T]``, False for tokens to leave out; even NaN in these does no harm. None: all count.
        axis_names: Mesh axes that the tokens are split over: the mean is that over the tokens of all
            ranks, the same on every rank.
        num_used_experts: Only this many experts exist, those with the lowest ids. The logits of the
            others are left out. None: all exist.

    Returns:
        The loss, a scalar; 0 where there is no token at all.

    Raises:
        TypeError: if ``num_used_experts`` is no int.
        ValueError: if it is not from 1 to the number of logits, or if ``mask`` has not one entry for
            each token.
    """
    op = "routing.router_z_loss"
    if num_used_experts is not None:
        check_num_used(op, num_used_experts, logits.shape[1], "the number of logits")
        logits = logits[:, :num_used_experts]
    logits = logits.astype(jnp.float32)
    tokens = logits.shape[0]
    if mask is None:
        mask = jnp.ones((tokens,), bool)
    elif mask.shape != (tokens,):
        raise arguments.value_error(
            op, "mask", f"shape {(tokens,)}, one entry for each token", mask.shape, "reshape it"
        )
    # Masked logits are replaced before anything is computed: 0 times the gradient of NaN is NaN.
    squares = jax.nn.logsumexp(jnp.where(mask[:, None], logits, 0.0), axis=1) ** 2
    total, num_tokens = jnp.where(mask, squares, 0.0).sum(), mask.sum(dtype=jnp.int32)
    if axis_names:
        total, num_tokens = lax.psum((total, num_tokens), tuple(axis_names))
    return total / jnp.maximum(num_tokens.astype(jnp.float32), 1)


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


def _of_used(
    op: str, scores: Array, topk_idx: Array, num_used_experts: int | None
) -> tuple[Array, Array]:
    """Scores of the experts that exist, and the routes to them; −1 for the others."""
    if num_used_experts is None:
        return scores, topk_idx
    check_num_used(op, num_used_experts, scores.shape[1], "the number of scores")
    topk_idx = jnp.where(topk_idx < num_used_experts, expert_ids(topk_idx), -1)
    return scores[:, :num_used_experts], topk_idx


def _shares(
    scores: Float32[Array, "tokens experts"], present: Bool[Array, " tokens"]
) -> Float32[Array, "tokens experts"]:
    """The share of each expert in the scores of a token; zeros for tokens that are not present."""
    shares = scores / (scores.sum(axis=1, keepdims=True) + _EPSILON)
    return jnp.where(present[:, None], shares, 0.0)


def _check_sequences(op: str, sequence_idx: Any, num_sequences: Any, num_tokens: int) -> None:
    """There is a sequence for each token, and a number of them."""
    if not arguments.is_int(num_sequences):
        raise arguments.type_error(
            op,
            "num_sequences",
            "a Python int",
            type(num_sequences).__name__,
            "pass how many sequences all ranks have together",
        )
    if num_sequences < 0:
        raise arguments.value_error(
            op, "num_sequences", "0 or more", num_sequences, "pass how many sequences there are"
        )
    if not jnp.issubdtype(sequence_idx.dtype, jnp.integer):
        raise arguments.type_error(
            op,
            "sequence_idx",
            "an array of an integer dtype",
            sequence_idx.dtype,
            "cast it with astype(jnp.int32)",
        )
    if sequence_idx.shape != (num_tokens,):
        raise arguments.value_error(
            op,
            "sequence_idx",
            f"shape {(num_tokens,)}, one entry for each token",
            sequence_idx.shape,
            "give each token the index of its sequence",
        )


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
