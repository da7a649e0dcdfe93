"""Tensor parallelism of the experts: F of each, and S of the shared expert, split over a mesh axis.

All positions along the tensor axis have the same tokens and routes. Each dispatches the tokens within
its own group, and computes with its part of the inner channels, so that what ``combine`` brings home is
its part of the outputs. The parts are added there, ``[T, H]``, because the rows before it are more.

Tokens and top-k weights are cast to vary over the axis before the dispatch, and the transpose of the
cast adds their cotangents, ``[T, H]`` and ``[T, K]``, for the same reason. The router runs before the
cast, so each position computes its whole gradient, and nothing is counted twice.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_ep import _compat

Tree = TypeVar("Tree")


def vary(tree: Tree, tensor_axis: str | None) -> Tree:
    """Arrays that are the same along the axis, cast so that their cotangents are added over it."""
    if tensor_axis is None:
        return tree
    axes = frozenset((tensor_axis,))
    return jax.tree.map(lambda x: _compat.cast_varying(x, axes), tree)


def once(
    bias: Float[Array, "experts hidden"] | None, tensor_axis: str | None
) -> Float[Array, "experts hidden"] | None:
    """A bias of outputs on the first position along the axis, and zeros on the others."""
    if bias is None or tensor_axis is None:
        return bias
    return jnp.where(lax.axis_index(tensor_axis) == 0, bias, jnp.zeros_like(bias))


def add_parts(
    y: Float[Array, "tokens hidden"], *same: Array, tensor_axis: str | None
) -> tuple[Array, ...]:
    """The sum of the outputs over the axis, then integers that are the same along it."""
    if tensor_axis is None:
        return y, *same
    # With this name, a rematerialised block that saves what combine gives does not add again.
    y = checkpoint_name(lax.psum(y, tensor_axis), "jax_ep.combine")
    # JAX does not know that the integers are equal. Their maximum tells it, and they are few.
    return y, *lax.pmax(same, tensor_axis)
