"""Inputs of a case, made on the host from a seed, so that every process can make every rank's."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from jax_ep._core.capacity import lossless_capacity
from jax_ep.bench import expected, patterns
from jax_ep.bench.cases import Case

NUM_SETS = 3  # of inputs, used in turn


class Problem:
    """Several sets of inputs for the ranks of one case.

    Attributes:
        case: The case.
        ranks: R.
        topk_idx: For each set ``[R, T, K]`` int32.
        capacity: Rows C: those that suffice for all sets, or the default, which suffices for any.
    """

    def __init__(self, case: Case, ranks: int, num_sets: int = NUM_SETS) -> None:
        self.case = case
        self.ranks = ranks
        self.topk_idx = [
            patterns.topk_idx(case, ranks=ranks, rng=np.random.default_rng([0, index]))
            for index in range(num_sets)
        ]
        if case.capacity == "default":
            self.capacity = lossless_capacity(
                num_ranks=ranks,
                num_tokens=case.tokens,
                top_k=case.top_k,
                num_local_experts=case.experts // ranks,
                layout=case.layout,
                alignment=case.alignment,
            )
        else:
            self.capacity = expected.capacity(
                self.topk_idx, experts=case.experts, layout=case.layout, alignment=case.alignment
            )
        self._rows = functools.cache(self._make_rows)

    def rows(self, index: int, rank: int) -> tuple[np.ndarray, ...]:
        """Tokens of a rank in set ``index``: ``(x [T, H],)``, or values and scales if quantized."""
        return self._rows(index, rank)

    def part(self, index: int, part: int, rank: int) -> np.ndarray:
        """One of the arrays of ``rows``."""
        return self.rows(index, rank)[part]

    def weights(self, index: int, rank: int) -> Float32[np.ndarray, "tokens top_k"]:
        """Top-k weights of a rank in set ``index``."""
        rng = np.random.default_rng([1, index, rank])
        return rng.random((self.case.tokens, self.case.top_k), np.float32)

    def sources(self, index: int, rank: int) -> np.ndarray:
        """What ``Handle.recv_src`` of ``rank`` must be in set ``index``: ``[C]``."""
        case = self.case
        sources = expected.row_sources(
            self.topk_idx[index],
            rank,
            experts=case.experts,
            layout=case.layout,
            alignment=case.alignment,
        )
        unused = np.full(self.capacity - len(sources), -1, sources.dtype)
        return np.concatenate([sources, unused])

    def _make_rows(self, index: int, rank: int) -> tuple[np.ndarray, ...]:
        case = self.case
        shape = (case.tokens, case.hidden)
        rng = np.random.default_rng([2, index, rank])
        if case.quantization == "quantized":
            bits = rng.integers(256, size=shape, dtype=np.uint8)
            bits ^= (bits & 0x7F) == 0x7F  # those are NaN
            scales = rng.random((case.tokens, case.hidden // 128), np.float32) + np.float32(0.5)
            return bits.view(ml_dtypes.float8_e4m3fn), scales
        steps = rng.integers(-(2**15), 2**15, size=shape, dtype=np.int16)
        return ((steps.astype(np.float32) / np.float32(2**14)).astype(dtype_of(case.dtype)),)


def dtype_of(name: str) -> Any:
    """The NumPy dtype of a name of ``cases``."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def row_factors(capacity: int) -> Float32[np.ndarray, " capacity"]:
    """Numbers, different for neighbouring rows, that stand for what experts make of their rows."""
    return ((np.arange(capacity) * 7) % 13 + 1).astype(np.float32) / np.float32(8)
