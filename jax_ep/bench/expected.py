"""The right results, in NumPy on the host, without the library's own code."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable
from typing import TypeVar

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int, Int32

from jax_ep._core.types import Layout

_MAX_E4M3 = np.float32(448)
_PART_ROWS = 512  # of a thread at a time: a few megabytes, which its caches hold
_MOST_THREADS = 16

Result = TypeVar("Result")


def by_parts(function: Callable[[slice], Result], rows: int) -> list[Result]:
    """The results of ``function`` for consecutive slices of rows, in order, by several threads."""
    parts = [slice(first, first + _PART_ROWS) for first in range(0, rows, _PART_ROWS)]
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))


def row_sources(
    topk_idx: Int32[np.ndarray, "ranks tokens top_k"],
    rank: int,
    *,
    experts: int,
    layout: Layout,
    alignment: int,
) -> Int[np.ndarray, " rows"]:
    """Where each row of ``rank`` comes from, −1 in the padding; only the rows that are in use.

    As ``Handle.recv_src``: ``(source · T + token) · K + k`` in layout "expert", where rows are ordered
    by (local expert, source, token), and ``source · T + token`` in layout "token".
    """
    ranks = topk_idx.shape[0]
    local = topk_idx - rank * (experts // ranks)
    mine = (topk_idx >= 0) & (local >= 0) & (local < experts // ranks)
    if layout == "token":
        return np.flatnonzero(mine.any(axis=-1))
    pairs = np.flatnonzero(mine)  # ordered by source, token, k
    expert = local.reshape(-1)[pairs]
    order = np.argsort(expert, kind="stable")
    counts = np.bincount(expert, minlength=experts // ranks)
    padded = -(-counts // alignment) * alignment
    first = np.cumsum(padded) - padded
    within = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
    sources = np.full(padded.sum(), -1, np.int64)
    sources[np.repeat(first, counts) + within] = pairs[order]
    return sources


def capacity(
    sets: list[Int32[np.ndarray, "ranks tokens top_k"]],
    *,
    experts: int,
    layout: Layout,
    alignment: int,
) -> int:
    """Rows that the fullest rank receives in any of the sets, rounded up to 128 (and alignment)."""
    most = max(
        len(row_sources(topk, rank, experts=experts, layout=layout, alignment=alignment))
        for topk in sets
        for rank in range(topk.shape[0])
    )
    multiple = alignment * 128 // np.gcd(alignment, 128) if layout == "expert" else 128
    return max(-(-most // int(multiple)), 1) * int(multiple)


def rank_rows(
    topk_idx: Int32[np.ndarray, "ranks tokens top_k"], *, experts: int
) -> Int[np.ndarray, "ranks ranks"]:
    """``[source, destination]``: tokens of ``source`` with an expert on ``destination``."""
    ranks = topk_idx.shape[0]
    owner = np.where(topk_idx >= 0, topk_idx // (experts // ranks), -1)
    return np.stack([(owner == rank).any(axis=-1).sum(axis=-1) for rank in range(ranks)], axis=1)


def rank_pairs(
    topk_idx: Int32[np.ndarray, "ranks tokens top_k"], *, experts: int
) -> Int[np.ndarray, "ranks ranks"]:
    """``[source, destination]``: (token, expert) pairs of ``source`` on ``destination``."""
    ranks = topk_idx.shape[0]
    owner = np.where(topk_idx >= 0, topk_idx // (experts // ranks), -1)
    return np.stack([(owner == rank).sum(axis=(-1, -2)) for rank in range(ranks)], axis=1)


def quantize(
    x: np.ndarray, *, powers_of_two: bool = False
) -> tuple[np.ndarray, Float32[np.ndarray, "rows blocks"]]:
    """Float8 values and scales of rows, by the definition of ``jax_ep.quantize``.

    Scales are of format "f32", or with ``powers_of_two`` of format "ue8m0".
    """
    blocks = x.astype(np.float32).reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(blocks).max(axis=-1), np.float32(1e-30))
    scales = amax * np.float32(1 / 448)
    if powers_of_two:
        fractions, exponents = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponents - (fractions == 0.5))
    inverse = (np.float32(1) / scales)[..., None]
    values = np.clip(blocks * inverse, -_MAX_E4M3, _MAX_E4M3).astype(ml_dtypes.float8_e4m3fn)
    return values.reshape(x.shape), scales


def unpacked(
    words: Int32[np.ndarray, "words lines"], rows: int, blocks: int
) -> Float32[np.ndarray, "rows blocks"]:
    """The scales that ``jax_ep.pack_scales`` makes such words of; zeros stay zeros."""
    exponents = np.ascontiguousarray(words.T).view(np.uint8)[:rows, :blocks]
    return (exponents.astype(np.uint32) << 23).view(np.float32)


def dequantize(
    values: np.ndarray, scales: Float32[np.ndarray, "rows blocks"], dtype: str
) -> np.ndarray:
    """Rows in ``dtype``, by the definition of ``jax_ep.dequantize``."""
    blocks = values.astype(np.float32).reshape(*scales.shape, 128)
    return (blocks * scales[..., None]).reshape(values.shape).astype(np.dtype(dtype))


def rounded_sums(x: np.ndarray, factors: list[Float32[np.ndarray, "tokens width"]]) -> np.ndarray:
    """The exact bits that combine gives for tokens whose rows are ``x`` times a factor.

    Args:
        x: ``[T, H]``, the tokens; rows have their dtype.
        factors: For each rank, the factors of each token's rows there, in the order of the sum; NaN
            where there is no row.

    Returns:
        ``[T, H]``: float32 sums, rounded once for each rank and once at the end.
    """
    exact, total = x.astype(np.float32), np.zeros(x.shape, np.float32)
    for of_rank in factors:
        partial = np.zeros(x.shape, np.float32)
        for factor in of_rank.T:
            there = ~np.isnan(factor)
            rows = (exact[there] * factor[there, None]).astype(x.dtype)
            partial[there] += rows.astype(np.float32)
        total += partial.astype(x.dtype).astype(np.float32)
    return total.astype(x.dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are of one shape and the same bytes (NaNs and signed zeros included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    return np.array_equal(np.ascontiguousarray(a).view(kind), np.ascontiguousarray(b).view(kind))
