"""The k best experts of each token, and what weights they get. Public in ``jax_ep.routing``.

Symbols: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_ep._core import arguments
from jax_ep._core.balancing import check_num_used

Scoring = Literal["sigmoid", "softmax"]

# Added to the sum of the chosen scores before dividing by it: sigmoids may all be zero.
_EPSILON = 1e-20


class Routing(NamedTuple):
    """The routes of T tokens; in ``jax_ep.moe``, ``[...]`` as the batch has them in place of ``[T]``.

    Attributes:
        topk_idx: ``[T, K]`` int32 experts, the best first.
        topk_weights: ``[T, K]`` float32 factors of their outputs.
        scores: ``[T, E]`` float32 scores of all experts, without the selection bias. All routers
            give them; routes that ``jax_ep.moe`` is given may have None.
    """

    topk_idx: Int32[Array, "*batch top_k"]
    topk_weights: Float32[Array, "*batch top_k"]
    scores: Float32[Array, "*batch experts"] | None = None


def softmax_top_k(
    logits: Float[Array, "tokens experts"],
    k: int,
    *,
    bias: Float32[Array, " experts"] | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    num_used_experts: int | None = None,
) -> Routing:
    """The k experts of the largest softmax probability.

    Example: logits ``log([0.5, 0.3, 0.2])`` and ``k=2`` give experts ``[0, 1]`` with weights
    ``[0.5, 0.3] / 0.8``.

    Args:
        logits: ``[T, E]`` of any float dtype.
        k: Experts per token.
        bias: ``[E]`` added to the scores for the choice only; it has no gradient.
        renormalize: Divide the weights by their sum over the k experts. With ``k=1`` all weights are
            then 1 and the router learns nothing from them.
        scale: Factor of the weights.
        num_used_experts: Only this many experts exist, those with the lowest ids. The others are
            never chosen and have score 0. None: all exist.

    Returns:
        The routes.

    Raises:
        TypeError: if ``logits`` is no array, or ``k`` or ``num_used_experts`` no int.
        ValueError: if ``logits`` is not ``[T, E]``, ``num_used_experts`` not from 1 to E, or ``k`` not
            from 1 to the number of experts that exist.
    """
    used, bias = _checked("routing.softmax_top_k", logits, k, bias, num_used_experts)
    scores = jax.nn.softmax(used, axis=-1)
    selection = _selection(scores, bias)
    return _choose(scores, selection, k, renormalize, scale, logits.shape[1])


def sigmoid_top_k(
    logits: Float[Array, "tokens experts"],
    k: int,
    *,
    bias: Float32[Array, " experts"] | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    num_used_experts: int | None = None,
) -> Routing:
    """The k experts of the largest sigmoid score.

    Args:
        logits: ``[T, E]`` of any float dtype.
        k: Experts per token.
        bias: ``[E]`` added to the scores for the choice only; it has no gradient.
        renormalize: Divide the weights by their sum over the k experts.
        scale: Factor of the weights.
        num_used_experts: Only this many experts exist, those with the lowest ids. The others are
            never chosen and have score 0. None: all exist.

    Returns:
        The routes.

    Raises:
        TypeError: if ``logits`` is no array, or ``k`` or ``num_used_experts`` no int.
        ValueError: if ``logits`` is not ``[T, E]``, ``num_used_experts`` not from 1 to E, or ``k`` not
            from 1 to the number of experts that exist.
    """
    used, bias = _checked("routing.sigmoid_top_k", logits, k, bias, num_used_experts)
    scores = jax.nn.sigmoid(used)
    selection = _selection(scores, bias)
    return _choose(scores, selection, k, renormalize, scale, logits.shape[1])


def group_limited_top_k(
    logits: Float[Array, "tokens experts"],
    k: int,
    *,
    num_groups: int,
    top_groups: int,
    bias: Float32[Array, " experts"] | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    scoring: Scoring = "sigmoid",
    num_used_experts: int | None = None,
) -> Routing:
    """The k best experts of the best groups: bounds the hosts that a token goes to.

    The router of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2). Experts form ``num_groups`` equal
    groups of consecutive ids; where a group is the experts of one host, no token goes to more than
    ``top_groups`` hosts. In pseudocode, for each token::

        score = sigmoid(logits)                        # the weights come from these
        selection = score + bias                       # the choice is made with these
        group_score[g] = sum of the two largest selection scores in group g
        experts = the k largest selection scores within the top_groups best groups
        weights = score[experts] / sum(score[experts]) * scale

    Args:
        logits: ``[T, E]`` of any float dtype.
        k: Experts per token.
        num_groups: Groups that the experts are split into; divides the number of experts that exist.
        top_groups: Groups that a token may use; they must have k experts.
        bias: ``[E]`` added to the scores for the choice only; it has no gradient.
        renormalize: Divide the weights by their sum over the k experts.
        scale: Factor of the weights (DeepSeek-V3: 2.5).
        scoring: "sigmoid", or "softmax" for the router of DeepSeek-V2 (arXiv:2405.04434, section
            2.2.2): softmax scores, and the score of a group is its largest selection score.
        num_used_experts: Only this many experts exist, those with the lowest ids, and form the
            groups. The others are never chosen and have score 0. None: all exist.

    Returns:
        The routes.

    Raises:
        TypeError: if ``logits`` is no array, or ``k`` or ``num_used_experts`` no int.
        ValueError: if the sizes do not fit each other; the text says what would.
    """
    op = "routing.group_limited_top_k"
    used, bias = _checked(op, logits, k, bias, num_used_experts)
    tokens, experts = used.shape
    arguments.check_one_of(op, "scoring", scoring, ("sigmoid", "softmax"))
    if num_groups < 1 or experts % num_groups:
        raise arguments.value_error(
            op,
            "num_groups",
            f"a divisor of the {experts} experts",
            num_groups,
            "give every group the same number of experts",
        )
    size = experts // num_groups
    if not 1 <= top_groups <= num_groups or k > top_groups * size:
        raise arguments.value_error(
            op,
            "top_groups",
            f"1 to {num_groups} groups, of {size} experts each, with {k} experts among them",
            top_groups,
            "raise top_groups or lower k",
        )
    scores = jax.nn.sigmoid(used) if scoring == "sigmoid" else jax.nn.softmax(used, axis=-1)
    selection = _selection(scores, bias)
    grouped = selection.reshape(tokens, num_groups, size)
    counted = min(2, size) if scoring == "sigmoid" else 1
    group_scores = lax.top_k(grouped, counted)[0].sum(axis=-1)  # [T, num_groups]
    best = lax.top_k(group_scores, top_groups)[1]
    allowed = (best[:, :, None] == jnp.arange(num_groups)[None, None]).any(
        axis=1
    )  # [T, num_groups]
    selection = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
    return _choose(scores, selection, k, renormalize, scale, logits.shape[1])


def _checked(
    op: str, logits: Array, k: int, bias: Array | None, num_used_experts: int | None
) -> tuple[Float32[Array, "tokens experts"], Array | None]:
    """Logits and bias of the experts that exist; an error if they or ``k`` do not fit."""
    check_logits(op, logits)
    if num_used_experts is not None:
        check_num_used(op, num_used_experts, logits.shape[1])
        logits = logits[:, :num_used_experts]
        bias = None if bias is None else bias[:num_used_experts]
    _check_k(op, k, logits.shape[1])
    return jnp.asarray(logits, jnp.float32), bias


def _selection(
    scores: Float32[Array, "tokens experts"], bias: Float32[Array, " experts"] | None
) -> Float32[Array, "tokens experts"]:
    """What the choice is made by; no gradient flows through a choice."""
    return lax.stop_gradient(scores if bias is None else scores + bias[None])


def check_logits(op: str, logits: Any) -> None:
    if not isinstance(logits, jax.Array | np.ndarray):
        raise arguments.type_error(
            op, "logits", "an array", type(logits).__name__, "convert it first"
        )
    if logits.ndim != 2:
        raise arguments.value_error(
            op,
            "logits",
            "two dimensions, [tokens, experts]",
            f"shape {logits.shape}",
            "flatten the leading dimensions into tokens",
        )


def _check_k(op: str, k: Any, num_experts: int) -> None:
    if not arguments.is_int(k):
        raise arguments.type_error(
            op, "k", "a Python int", type(k).__name__, "pass the number of experts of a token"
        )
    if not 1 <= k <= num_experts:
        raise arguments.value_error(
            op,
            "k",
            f"1 to {num_experts}, the number of experts",
            k,
            "a token can go to each expert once",
        )


def _choose(
    scores: Float32[Array, "tokens experts"],
    selection: Float32[Array, "tokens experts"],
    k: int,
    renormalize: bool,
    scale: float,
    num_experts: int,
) -> Routing:
    """The k experts with the largest selection score, weighted by their score.

    Those past the last of the ``num_experts`` that has a score do not exist; their score is 0.
    """
    topk_idx = lax.top_k(selection, k)[1]  # of equal scores the one at the lowest index
    weights = jnp.take_along_axis(scores, topk_idx, axis=1)
    if renormalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + _EPSILON)
    if scale != 1.0:
        weights = weights * scale
    missing = num_experts - scores.shape[1]
    return Routing(
        topk_idx, weights, jnp.pad(scores, ((0, 0), (0, missing))) if missing else scores
    )
