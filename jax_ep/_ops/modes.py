"""The mode that an op takes where ``DispatchConfig(mode="auto")`` leaves it open."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jax_ep._core.types import DispatchConfig, Layout
from jax_ep._groups.group import Group, crossover_of
from jax_ep._ops import gpu_room


def choose(
    op: Literal["dispatch", "combine"],
    rows: jax.Array,
    topk_idx: jax.Array,
    *,
    group: Group,
    layout: Layout,
    moved: str,
    config: DispatchConfig | None,
    in_flight: bool,
    masked: bool = False,
) -> DispatchConfig | None:
    """``config``, with mode "latency" where it says "auto" and latency mode fits and is faster.

    Where GPUs have no other mode, it need not be faster: with a masked plan, or with absent ranks.

    It depends on shapes, on the group and on the tuning table, in which all ranks agree; so all ranks
    choose alike, on all platforms.

    Args:
        op: "dispatch" with a new plan, or "combine".
        rows: ``[T, H]`` or ``[C, H]``, what moves.
        topk_idx: ``[T, K]``.
        group: The group.
        layout: "expert" or "token".
        moved: What moves, by ``tuning.rows_name``.
        config: As the user gave it, checked.
        in_flight: Whether a start half begins the op. Latency mode is not chosen for it, because the
            work between its calls has to be named.
        masked: Whether it is a dispatch in layout "masked", for which GPUs have no other mode.
    """
    if config is not None and config.mode != "auto":
        return config
    only_latency = masked or bool(group.absent_ranks)
    if in_flight and not only_latency:
        return config
    if not gpu_room.fits_latency(rows, topk_idx, group):
        return config
    most = crossover_of(group, op=op, layout=layout, rows=moved, hidden=rows.shape[1])
    if topk_idx.shape[0] > most and not only_latency:
        return config
    return dataclasses.replace(config or DispatchConfig(), mode="latency")
