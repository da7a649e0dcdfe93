"""Over which axes of the mesh the operands and results of ops vary, inside ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax

from jax_ep import _compat
from jax_ep._core.batching import batched_alike
from jax_ep._groups.group import Group


def vary_together(group: Group, *operands: Any) -> tuple[Any, ...]:
    """Cast all operands to vary over the axes of any of them and of the group.

    If all operands of an op vary over the same axes, so do its results. And the transpose of the
    cast sums the cotangents of an operand that was the same on several ranks. ``vmap`` over an axis
    of the mesh batches all of them or none.
    """
    if not _compat.tracks_varying_axes(group.axis_names):
        return operands
    operands = batched_alike(*operands)
    axes = frozenset(group.axis_names).union(*map(_compat.varying_axes, jax.tree.leaves(operands)))
    return jax.tree.map(lambda leaf: _compat.cast_varying(leaf, axes), operands)


def match(results: Any, like: Any) -> Any:
    """Cast results to vary over the axes that ``like`` varies over."""
    axes = _compat.varying_axes(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda leaf: _compat.cast_varying(leaf, axes), results)
