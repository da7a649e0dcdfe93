"""How many rows a rank has room for."""

from __future__ import annotations

import math

from jax_ep._core.types import Layout

INT32_MAX = 2**31 - 1


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def lossless_capacity(
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_local_experts: int,
    layout: Layout,
    alignment: int,
) -> int:
    """The number of rows of a rank that suffices for any routing.

    In layout "token" each of the R·T tokens of the group has at most one row. In layout "expert"
    each has at most N = min(K, L) rows on this rank. At most min(L, R·T·N) groups are padded, each
    by at most ``alignment - 1`` rows.
    """
    if layout == "token":
        return num_ranks * num_tokens
    rows = num_ranks * num_tokens * min(top_k, num_local_experts)
    padding = min(num_local_experts, rows) * (alignment - 1)
    return round_up(rows + padding, alignment)


def rows_per_expert(
    *, capacity_factor: float, num_ranks: int, num_tokens: int, top_k: int, num_experts: int
) -> int:
    """Rows that one expert keeps: ``capacity_factor`` times its share under even routing."""
    return math.ceil(capacity_factor * num_ranks * num_tokens * top_k / num_experts)
