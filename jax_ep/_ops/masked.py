"""Layout "masked": that of layout "expert", but every expert has its rows at a fixed place.

To plans and ops it is layout "expert" with groups of one size. Only what users give and get has another
shape, ``[L, S, ...]`` for L local experts of S rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_ep._core import arguments
from jax_ep._core.capacity import round_up
from jax_ep._core.types import DispatchConfig, Handle, is_latency
from jax_ep._groups.group import Group


def rows_of_expert(
    op: str, capacity: Any, factors: tuple[Any, Any], *, alignment: int, sources: int, experts: int
) -> int:
    """S, the rows that each of ``experts`` local experts has.

    Args:
        op: For errors.
        capacity: As in ``dispatch``.
        factors: ``capacity_factor`` and ``rank_capacity_factor``, which must be None.
        alignment: Divides S.
        sources: R·T, the most rows that an expert may get.
        experts: L.
    """
    for name, factor in zip(("capacity_factor", "rank_capacity_factor"), factors, strict=True):
        if factor is not None:
            raise arguments.value_error(
                op, name, "None with layout='masked'", factor, "bound the rows with capacity"
            )
    if capacity is None:
        return round_up(max(sources, 1), alignment)
    multiple = experts * alignment
    if not arguments.is_int(capacity) or capacity < multiple or capacity % multiple:
        raise arguments.value_error(
            op,
            "capacity",
            f"a Python int, a positive multiple of {multiple}: {experts} local experts, alignment "
            f"{alignment}",
            repr(capacity),
            "leave it out for room that always suffices, or round it up",
        )
    return capacity // experts


def check_mode(op: str, group: Group, config: DispatchConfig | None) -> None:
    """On GPUs only latency mode makes such plans."""
    if group.backend == "cuda" and not is_latency(config):
        raise arguments.value_error(
            op,
            "layout",
            "'expert' or 'token' on GPUs in mode 'throughput'",
            "'masked'",
            "use mode='latency', or create_group(latency_tokens=, latency_hidden=) with sizes that it "
            "suffices for",
        )


def split(handle: Handle, results: Any) -> Any:
    """``[C, ...]`` arrays as users get them."""
    experts = handle.group_sizes.shape[0]
    return jax.tree.map(lambda x: x.reshape(experts, -1, *x.shape[1:]), results)


def join(op: str, name: str, handle: Handle, given: jax.Array) -> jax.Array:
    """An array that users give, as ``[C, ...]``."""
    shape = (handle.group_sizes.shape[0], handle.alignment)
    if jnp.shape(given)[:2] != shape:
        raise arguments.value_error(
            op,
            name,
            f"{shape[1]} rows for each of {shape[0]} local experts",
            f"shape {jnp.shape(given)}",
            "keep the rows of a dispatch with layout='masked' where they are",
        )
    return given.reshape(-1, *given.shape[2:])
