"""Routing patterns by name, as data: ``topk_idx`` ``[R, T, K]`` int32, stacked over ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def uniform(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """K different experts, all equally likely."""
    scores = rng.random((ranks, tokens, experts))
    return np.argsort(scores, axis=-1)[..., :top_k].astype(np.int32)


def zipf(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """K different experts, expert n likely as 1 / (n + 1): Gumbel top-k."""
    scores = rng.gumbel(size=(ranks, tokens, experts)) - np.log1p(np.arange(experts))
    return np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int32)


def one_expert(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """Every token to the same expert and to no other; its place among the K varies."""
    idx = np.full((ranks, tokens, top_k), -1, np.int32)
    place = rng.integers(top_k, size=(ranks, tokens, 1))
    np.put_along_axis(idx, place, experts // 2, axis=-1)
    return idx


def one_rank(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """Every token to experts of the last rank only."""
    local = experts // ranks
    idx = np.full((ranks, tokens, top_k), -1, np.int32)
    width = min(top_k, local)
    idx[..., :width] = uniform(rng, ranks, tokens, width, local) + (ranks - 1) * local
    return rng.permuted(idx, axis=-1)


def empty_ranks(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """Nothing is sent to the last rank, and rank 0 sends nothing (one rank: nothing at all)."""
    idx = uniform(rng, ranks, tokens, top_k, experts)
    idx[idx >= experts - experts // ranks] = -1
    idx[0] = -1
    return idx


def masked(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """A third of the entries and a quarter of the whole tokens have no expert."""
    idx = uniform(rng, ranks, tokens, top_k, experts)
    idx[rng.random(idx.shape) < 1 / 3] = -1
    idx[rng.random(idx.shape[:2]) < 1 / 4] = -1
    return idx


def invalid(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """Valid entries, repeated ones, and ones out of range on both sides, to the ends of int32."""
    idx = rng.integers(experts, size=(ranks, tokens, top_k))  # repeats by chance
    strange = np.array([-2, -experts, INT_MIN, INT_MIN + 1, experts, experts + 1, INT_MAX, -1])
    where = rng.random(idx.shape) < 1 / 3
    idx[where] = rng.choice(strange, size=where.sum())
    if top_k > 1:
        idx[:, ::3, -1] = idx[:, ::3, 0]  # and repeats for certain
    else:
        idx[:, ::3, 0] = INT_MIN
    return idx.astype(np.int32)


def group_limited(rng: np.random.Generator, ranks: int, tokens: int, top_k: int, experts: int):
    """The experts of a token live on at most two ranks (missing ones are −1)."""
    local = experts // ranks
    groups = uniform(rng, ranks, tokens, min(2, ranks), ranks)
    candidates = (groups[..., None] * local + np.arange(local)).reshape(
        ranks, tokens, groups.shape[-1] * local
    )
    chosen = rng.permuted(candidates, axis=-1)[..., :top_k]
    missing = np.full((ranks, tokens, top_k - chosen.shape[-1]), -1, np.int32)
    return np.concatenate([chosen.astype(np.int32), missing], axis=-1)


Pattern = Callable[[np.random.Generator, int, int, int, int], np.ndarray]
PATTERNS: dict[str, Pattern] = {
    f.__name__: f
    for f in (
        uniform,
        zipf,
        one_expert,
        one_rank,
        empty_ranks,
        masked,
        invalid,
        group_limited,
    )
}


def make(name: str, *, ranks: int, tokens: int, top_k: int, experts: int, seed: int = 0):
    """The pattern ``name`` for these sizes."""
    rng = np.random.default_rng([seed, *name.encode()])
    return PATTERNS[name](rng, ranks, tokens, top_k, experts)
