"""Routing patterns: which experts the tokens of each rank go to, as data."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from jax_ep.bench.cases import Case

_NUM_GROUPS, _BEST_GROUPS = 8, 4  # of "group-limited", as in DeepSeek-V3


def topk_idx(
    case: Case, *, ranks: int, rng: np.random.Generator
) -> Int32[np.ndarray, "ranks tokens top_k"]:
    """Expert ids by the case's pattern; −1 where a token, or a place, has none.

    * "uniform": K different experts, all equally likely.
    * "group-limited": the best 4 of 8 groups of experts, then the best K experts in them.
    * "zipf": expert n is chosen like 1 / (n + 1), so rank 0 is the hottest.
    * "all-to-one": every token goes to the first K experts of rank 0.
    """
    case.check_ranks(ranks)
    shape = (ranks, case.tokens)
    if case.routing == "all-to-one":
        ids = np.arange(case.top_k)
        ids = np.where(ids < case.experts // ranks, ids, -1)
        chosen = np.broadcast_to(ids, (*shape, case.top_k)).copy()
    else:
        scores = _scores(case, shape, rng)
        chosen = np.argpartition(-scores, case.top_k - 1, axis=-1)[..., : case.top_k]
        taken = np.take_along_axis(scores, chosen, axis=-1)
        chosen = np.where(np.isneginf(taken), -1, chosen)
    if case.ragged:
        for rank in range(ranks):
            chosen[rank, num_real_tokens(case.tokens, rank, ranks) :] = -1
    return chosen.astype(np.int32)


def num_real_tokens(tokens: int, rank: int, ranks: int) -> int:
    """Tokens of a rank that are not masked where ranks are ragged: from almost all down to half."""
    return tokens - tokens * (rank + 1) // (2 * ranks)


def _scores(case: Case, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """``[R, T, E]``: the experts with the largest scores are chosen."""
    scores = rng.random((*shape, case.experts), np.float32)
    if case.routing == "zipf":  # Gumbel top-k: K draws without replacement
        return -np.log(-np.log(scores + 1e-20) + 1e-20) - np.log1p(np.arange(case.experts))
    if case.routing == "uniform":
        return scores
    if case.experts % _NUM_GROUPS:
        raise ValueError(
            f"experts: expected a multiple of {_NUM_GROUPS} for routing 'group-limited', got "
            f"{case.experts}."
        )
    grouped = scores.reshape(*shape, _NUM_GROUPS, -1)
    best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    groups = np.argsort(-best_two, axis=-1)[..., :_BEST_GROUPS]
    allowed = np.zeros(best_two.shape, bool)
    np.put_along_axis(allowed, groups, True, axis=-1)
    return np.where(allowed[..., None], grouped, -np.inf).reshape(scores.shape)
