"""Which mesh axes the tokens of a layer are split over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._groups.group import Group

# Usual names of axes for tensor and pipeline parallelism, along which ranks share their tokens.
SHARED_TOKEN_AXES = frozenset(
    ("tensor", "model", "tp", "mp", "stage", "stages", "pipeline", "pipe", "pp")
)

logger = logging.getLogger("jax_ep")

_warned: set[tuple[Any, ...]] = set()


def resolve_token_axes(
    token_axes: Any, group: Group, tensor_axis: str | None = None
) -> tuple[str, ...]:
    """The axes that ``moe`` splits tokens over, those of the group last by default.

    Args:
        token_axes: Names that the caller gave. None stands for all axes of the mesh but those whose
            names are in ``SHARED_TOKEN_AXES``, those that an enclosing ``shard_map`` has entered
            and the tensor axis.
        group: The group of the layer.
        tensor_axis: The axis along which ranks divide the work for the same tokens, or None.

    Raises:
        TypeError: for anything but a sequence of names.
        ValueError: if an axis is missing in the mesh, repeated, already entered or the tensor axis,
            or if one of the group's axes is left out.
    """
    names, manual = group.mesh.axis_names, _compat.manual_axes()
    if token_axes is None:
        left_out = (*manual, tensor_axis)
        outside = [name for name in group.other_axes if name not in left_out]
        split = [name for name in outside if name.lower() not in SHARED_TOKEN_AXES]
        _warn_of_repeats(group, split, [name for name in outside if name not in split])
        return (*split, *group.axis_names)
    if not isinstance(token_axes, Sequence) or isinstance(token_axes, str):
        raise arguments.type_error(
            "moe", "token_axes", f"a tuple of axes of the mesh {names}", repr(token_axes), "wrap it"
        )
    token_axes = tuple(token_axes)
    absent = [name for name in token_axes if name not in names]
    if absent or len(set(token_axes)) != len(token_axes):
        raise arguments.value_error(
            "moe",
            "token_axes",
            f"axes of the mesh {names}, each once",
            token_axes,
            "name the axes that tokens are to be split over",
        )
    if tensor_axis in token_axes:
        raise arguments.value_error(
            "moe",
            "token_axes",
            f"axes without the tensor_axis, {tensor_axis!r}",
            token_axes,
            "leave it out of one of the two: ranks along the tensor axis have the same tokens",
        )
    if not set(group.axis_names) <= set(token_axes):
        raise arguments.value_error(
            "moe",
            "token_axes",
            f"the axes of the group, {group.axis_names}, among them",
            token_axes,
            "add them: else every rank of the group would send the same tokens",
        )
    entered = [name for name in token_axes if name in manual]
    if entered:
        raise arguments.value_error(
            "moe",
            "token_axes",
            f"no axis that the enclosing shard_map has entered, {manual}",
            token_axes,
            "leave these out: over them the tokens are split already",
        )
    return token_axes


def _warn_of_repeats(group: Group, split: list[str], axes: list[str]) -> None:
    """Say once for each kind of mesh that ranks along ``axes`` work on the same tokens."""
    axes = [name for name in axes if group.mesh.shape[name] > 1]
    key = (*group.mesh.shape.items(), group.axis_names, tuple(axes))
    if not axes or key in _warned:
        return
    _warned.add(key)
    sizes = ", ".join(f"{name}={group.mesh.shape[name]}" for name in axes)
    logger.warning(
        "jax_ep.moe: ranks along the mesh axes %s work on the same tokens, as the names of these axes "
        "stand for tensor or pipeline parallelism. Name token_axes to say that this is meant, or to "
        "split the tokens over them too, as in token_axes=%s.",
        sizes,
        (*split, *axes, *group.axis_names),
    )
