"""How many rows a dispatch has room for, by the bounds that its caller gave."""

from __future__ import annotations

from typing import NamedTuple

from jax_ep._core import arguments
from jax_ep._core.capacity import (
    INT32_MAX,
    lossless_capacity,
    round_up,
    rows_per_expert,
    rows_per_rank,
)
from jax_ep._core.types import DropPolicy, Layout
from jax_ep._groups.group import Group
from jax_ep._ops import checks

_MOST_LOSSLESS_ROWS = 1 << 20  # that a default may have where the group spans hosts


class Bounds(NamedTuple):
    """The bounds on rows that ``dispatch`` takes, checked; and which rows are dropped."""

    capacity: int | None
    capacity_factor: float | None
    rank_capacity_factor: float | None
    drop_policy: DropPolicy = "position"


def quota(bounds: Bounds, *, num_tokens: int, top_k: int, num_experts: int) -> int | None:
    """The rows of one source rank that an expert takes, or None where it takes them by position."""
    if bounds.drop_policy == "position":
        return None
    assert bounds.capacity_factor is not None  # as check_drop_policy says
    wanted = rows_per_expert(
        capacity_factor=bounds.capacity_factor,
        num_ranks=1,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
    )
    return min(wanted, num_tokens)


def room(
    op: str,
    bounds: Bounds,
    *,
    group: Group,
    num_experts: int,
    layout: Layout,
    alignment: int,
    shape: tuple[int, ...],
) -> tuple[int, int]:
    """The rows of a rank, and those that one expert keeps at most.

    Args:
        op: For errors.
        bounds: What was asked for; nothing for room that suffices.
        group: As in ``dispatch``, as are the next three.
        num_experts: E.
        layout: The layout.
        alignment: Of the rows of an expert.
        shape: ``[T, K]`` of the tokens of a rank.
    """
    num_tokens, top_k = shape
    num_local = num_experts // group.size
    lossless = lossless_capacity(
        num_ranks=group.size,
        num_tokens=num_tokens,
        top_k=top_k,
        num_local_experts=num_local,
        layout=layout,
        alignment=alignment,
    )
    capacity, expert_capacity = lossless, INT32_MAX
    if bounds[:3] == (None, None, None):
        _check_lossless(op, lossless, group)
    if bounds.capacity_factor is not None:
        wanted = rows_per_expert(
            capacity_factor=bounds.capacity_factor,
            num_ranks=group.size,
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
        )
        of_source = quota(bounds, num_tokens=num_tokens, top_k=top_k, num_experts=num_experts)
        wanted = wanted if of_source is None else group.size * of_source
        expert_capacity = min(wanted, group.size * num_tokens)
        capacity = min(capacity, num_local * round_up(expert_capacity, alignment))
    if bounds.rank_capacity_factor is not None:
        wanted = rows_per_rank(
            rank_capacity_factor=bounds.rank_capacity_factor,
            num_tokens=num_tokens,
            top_k=top_k,
            alignment=alignment,
        )
        capacity = min(capacity, wanted)
    if bounds.capacity is not None:
        capacity = bounds.capacity
    rows = group.size * capacity
    checks.check_int32_indices(op, sources=group.size * num_tokens, top_k=top_k, rows=rows)
    return capacity, expert_capacity


def _check_lossless(op: str, rows: int, group: Group) -> None:
    """Where the group spans hosts, room for any routing is not taken without being asked for."""
    if len(group.topology.hosts) > 1 and rows > _MOST_LOSSLESS_ROWS:
        raise arguments.value_error(
            op,
            "capacity",
            f"a number of rows: where a group spans hosts, the default has {_MOST_LOSSLESS_ROWS} rows "
            "at most",
            f"None, and room for any routing takes {rows} rows on each rank",
            "pass rank_capacity_factor=1.25, say, or capacity=",
        )
