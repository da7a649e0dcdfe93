"""The static arguments of the ops, and the backend that takes them."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax

from jax_ep import _compat, reference
from jax_ep._backends import native
from jax_ep._core.capacity import INT32_MAX
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._core.types import DispatchConfig, Layout, ScaleFormat, UnusedRows
from jax_ep._groups.group import Group

BACKENDS: dict[str, types.ModuleType] = {"reference": reference, "cpu": native, "cuda": native}


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
        config: How to use the machine.
        unused_rows: What rows past the last group hold; kept in the handle.
    """

    group: Group
    num_experts: int
    layout: Layout
    capacity: int
    alignment: int
    expert_capacity: int = INT32_MAX
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
        config: How to use the machine.
        flight: How to issue the op, and the ops that its derivatives are.
    """

    group: Group
    scale_format: ScaleFormat | None = None
    dense_output: bool = True
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


def backend_of(group: Group) -> Any:
    """The module of the group's backend."""
    return BACKENDS[group.backend]


def how(options: DispatchOptions | CombineOptions, config: DispatchConfig | None) -> dict[str, Any]:
    """The arguments of a backend's functions that change no results; XLA alone issues the reference."""
    arguments: dict[str, Any] = {"config": config}
    is_reference = backend_of(options.group) is reference
    return arguments if is_reference else arguments | {"flight": options.flight}


def match(results: Any, like: Any) -> Any:
    """Cast results to vary over the axes that ``like`` varies over."""
    axes = _compat.varying_axes(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda leaf: _compat.cast_varying(leaf, axes), results)
