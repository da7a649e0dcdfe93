"""What an op of latency mode moves in memory, and what it may take where its ranks share a GPU.

The bound is a fixed time, for the launch and one exchange between the ranks, and the time that the
bytes take at a rate near what the memory of an H200 reaches: ``8.5 us + bytes / 3 TB/s``.

The bytes are those of ``csrc/cuda/decode/`` (its README has the protocol). A byte counts once for each
rank that reads it and once for each that writes it, however many of a rank's warps do so, because the
cache has it for the others. With R ranks, T tokens of K entries and C rows of results on each, a
*dispatch* moves

* what each rank is given: its rows as they are (with their scales), ids ``[T, K]`` and weights;
* ids, as words of 16 bytes with six ids each: every rank writes those of its tokens to all R ranks,
  itself included, and reads those of all R·T tokens;
* rows that cross: one for each token and *other* rank with an expert of it. The sender writes its
  words and the receiver reads them. A word has 12 bytes of the message in 16. A row is cut into
  parts of 1792 bytes, whose values and scales each begin a word, as do the weights behind the last
  part. Rows that stay on their rank are not written to an inbox;
* results: C rows, scales and weights, of which the unused ones are cleared;
* the handle: ``topk_idx`` and ``dest_row [T, K]``, ``recv_rows [R, T, M]``, ``recv_src [C]`` and, in
  layout "token", ``expert_idx [C, K]``, where M is 1 in layout "token" and the least of K and the local
  experts in layout "expert".

A *combine* reads the experts' rows, one for each (token, expert) in layout "expert" and for each
(token, rank) in layout "token", and the handle's ``topk_idx``, ``dest_row`` and ``recv_rows``. Sums
that cross are written and read as words, one for each token and other rank, and ``[T, H]`` is
written.

Hellos, epochs and the counts of experts are left out, which are less than 1 kB for each rank.
"""

from __future__ import annotations

from jax_ep.bench import expected
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem

FIXED_US = 8.5
BYTES_PER_US = 3e6

# Those of csrc/cuda/decode/inbox.h.
PART_BYTES = 1792
WORD_BYTES = 12  # of the message
STORED_BYTES = 16  # of a word
IDS_OF_WORD = 6
SCALES_OF_WORD = 3  # and weights

_SCALE_BLOCK = 128  # channels of a scale
_INT_BYTES = 4  # also of a scale and a weight


def bound_us(moved_bytes: int) -> float:
    """What an op may take that moves so many bytes in the memory of a GPU that all ranks share."""
    return FIXED_US + moved_bytes / BYTES_PER_US


def moved_bytes(case: Case, problem: Problem) -> int:
    """Bytes that a dispatch or combine in latency mode moves, over all ranks; 0 of other ops."""
    if case.op == "dispatch":
        return _of_dispatch(case, problem)
    return _of_combine(case, problem) if case.op == "combine" else 0


def row_words(num_bytes: int, *, scaled: bool, num_weights: int) -> int:
    """Words of a row of ``num_bytes`` bytes, without its scales, that travels with weights."""
    words = _ceil(num_weights, SCALES_OF_WORD)
    for begin in range(0, num_bytes, PART_BYTES):
        part = min(PART_BYTES, num_bytes - begin)
        words += _ceil(part, WORD_BYTES)
        words += _ceil(part // _SCALE_BLOCK, SCALES_OF_WORD) if scaled else 0
    return words


def _of_dispatch(case: Case, problem: Problem) -> int:
    ranks, tokens, top_k, capacity = problem.ranks, case.tokens, case.top_k, problem.capacity
    by_token = case.layout == "token"
    scaled = case.quantization != "none"
    weights = top_k if case.weights else 0
    given = tokens * (case.in_row_bytes + (weights + top_k) * _INT_BYTES)
    ids = ranks * tokens * _ceil(top_k, IDS_OF_WORD) * STORED_BYTES
    values = case.hidden if scaled else case.in_row_bytes
    row = row_words(values, scaled=scaled, num_weights=weights) * STORED_BYTES
    of_row = (weights if by_token else min(weights, 1)) * _INT_BYTES
    results = capacity * (case.out_row_bytes + of_row)
    handle = _routes(case, ranks) + capacity * (1 + (top_k if by_token else 0)) * _INT_BYTES
    return ranks * (given + 2 * ids + results + handle) + 2 * _crossing(case, problem) * row


def _of_combine(case: Case, problem: Problem) -> int:
    topk, row_bytes = problem.topk_idx[0], case.wire_row_bytes
    count = expected.rank_rows if case.layout == "token" else expected.rank_pairs
    rows = int(count(topk, experts=case.experts).sum())
    sums = row_words(row_bytes, scaled=False, num_weights=0) * STORED_BYTES
    of_rank = _routes(case, problem.ranks) + case.tokens * row_bytes
    return rows * row_bytes + problem.ranks * of_rank + 2 * _crossing(case, problem) * sums


def _routes(case: Case, ranks: int) -> int:
    """Bytes of what a rank's handle has by token."""
    width = 1 if case.layout == "token" else min(case.top_k, case.experts // ranks)
    return case.tokens * (2 * case.top_k + ranks * width) * _INT_BYTES


def _crossing(case: Case, problem: Problem) -> int:
    """Rows, or sums of rows, that go to another rank."""
    rows = expected.rank_rows(problem.topk_idx[0], experts=case.experts)
    return int(rows.sum() - rows.trace())


def _ceil(count: int, of: int) -> int:
    return -(-count // of)
