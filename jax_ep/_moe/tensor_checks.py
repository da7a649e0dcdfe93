"""Errors of ``moe`` and its layers about the tensor axis, while tracing."""

from __future__ import annotations

from typing import Any

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._groups.group import Group


def check_axis(op: str, tensor_axis: Any, group: Group) -> None:
    """``tensor_axis`` is None or another axis of the mesh than those of the group."""
    if tensor_axis is None:
        return
    if not isinstance(tensor_axis, str):
        raise arguments.type_error(
            op,
            "tensor_axis",
            f"one axis of the mesh {group.mesh.axis_names}, or None",
            repr(tensor_axis),
            "pass its name, as in tensor_axis='tensor'",
        )
    if tensor_axis not in group.mesh.axis_names:
        raise arguments.value_error(
            op,
            "tensor_axis",
            f"an axis of the mesh {group.mesh.axis_names}",
            repr(tensor_axis),
            "make the mesh of the group with this axis",
        )
    if tensor_axis in group.axis_names:
        raise arguments.value_error(
            op,
            "tensor_axis",
            f"an axis that is not one of the group's, {group.axis_names}",
            repr(tensor_axis),
            "split each expert over another axis than the experts",
        )


def check_not_entered(tensor_axis: str | None) -> None:
    """No enclosing ``shard_map`` has entered the axis."""
    if tensor_axis is not None and tensor_axis in _compat.manual_axes():
        raise arguments.value_error(
            "moe",
            "tensor_axis",
            f"no axis that the enclosing shard_map has entered, {_compat.manual_axes()}",
            repr(tensor_axis),
            "leave the axis out of the axis_names of that shard_map, because moe enters it itself",
        )
