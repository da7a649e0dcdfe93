"""The static arguments of the ops."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_ep._core.capacity import INT32_MAX
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import DispatchConfig, Layout, ScaleFormat, UnusedRows
from jax_ep._groups.group import Group


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Static arguments of one plan, by the names that backends give them.

    Attributes:
        group: The group.
        num_experts: Over the whole group.
        layout: "expert" or "token".
        capacity: Rows of each rank.
        alignment: Group sizes are multiples of it.
        expert_capacity: Rows that an expert keeps at most.
        masked: Whether every expert has ``alignment`` rows; kept in the handle.
        config: How to use the machine.
        unused_rows: What rows past the last group hold; kept in the handle.
    """

    group: Group
    num_experts: int
    layout: Layout
    capacity: int
    alignment: int
    expert_capacity: int = INT32_MAX
    masked: bool = False
    config: DispatchConfig | None = None
    unused_rows: UnusedRows = "zero"

    def fields(self) -> dict[str, Any]:
        """The arguments by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class DispatchOptions:
    """Static arguments of one dispatch.

    Attributes:
        group: The group.
        scale_format: None, or how rows are quantized on their way.
        dense_output: With ``scale_format``: whether rows are given back in the dtype of ``x``.
        packs_scales: Whether the scales of rows received are packed.
        config: How to use the machine.
        flight: How to issue the op, and the ops that its derivatives are.
    """

    group: Group
    scale_format: ScaleFormat | None = None
    dense_output: bool = True
    packs_scales: bool = False
    config: DispatchConfig | None = None
    flight: Flight = IN_LINE


@dataclasses.dataclass(frozen=True)
class CombineOptions:
    """Static arguments of one combine.

    Attributes:
        group: The group.
        config: How to use the machine.
        flight: How to issue the op, and the ops that its derivatives are.
    """

    group: Group
    config: DispatchConfig | None = None
    flight: Flight = IN_LINE
