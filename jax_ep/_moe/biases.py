"""Biases of experts, added to the rows of each.

The gradient of a bias is the sum of the cotangents of its expert's rows. It is computed as a product
with the one-hot ids of the experts, ``[L, C] @ [C, F]``, for two reasons. A scatter-add, which the
transpose of a gather and ``jax.ops.segment_sum`` are, adds with atomics on GPUs, so its bits change
from run to run; and all rows of an expert meet at one address. The product has a fixed order, and with
L local experts it costs about L / H of one of the experts' grouped products.

Rows past the last group may hold NaN, and so may their cotangents. They get no bias, and the backward
pass replaces their cotangents by zero before it sums.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_ep import _compat
from jax_ep._core.batching import batched_alike


def add_bias(
    rows: Float[Array, "rows channels"],
    bias: Float[Array, "experts channels"],
    expert_of_row: Int32[Array, " rows"],
    weights: Float32[Array, " rows"] | None = None,
) -> Float32[Array, "rows channels"]:
    """Each row plus the bias of its expert, in float32.

    Cotangents are rounded to the dtype of ``rows`` and summed in float32, as for the experts' matrices.

    Args:
        rows: ``[C, F]``, those of an expert side by side.
        bias: ``[L, F]`` in any dtype.
        expert_of_row: ``[C]``; rows with L get no bias.
        weights: ``[C]`` factors of the biases; None for 1.
    """
    operands = batched_alike(rows, bias.astype(jnp.float32), expert_of_row, weights)
    leaves = jax.tree.leaves(operands)
    axes = frozenset[str]().union(*map(_compat.varying_axes, leaves))
    rows, bias, expert_of_row, weights = jax.tree.map(
        lambda x: _compat.cast_varying(x, axes), operands
    )
    return _add(rows.dtype, rows, bias, expert_of_row, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(dtype: Any, rows: Array, bias: Array, expert_of_row: Array, weights: Any) -> Array:
    added = _bias_of_rows(bias, expert_of_row)
    if weights is not None:
        added = added * weights[:, None]
    return rows.astype(jnp.float32) + added


def _add_fwd(
    dtype: Any, rows: Array, bias: Array, expert_of_row: Array, weights: Any
) -> tuple[Array, Any]:
    return _add(dtype, rows, bias, expert_of_row, weights), (bias, expert_of_row, weights)


@_compat.backward
def _add_bwd(dtype: Any, residuals: Any, d_out: Array) -> tuple[Array, Array, None, Any]:
    bias, expert_of_row, weights = residuals
    used = (expert_of_row < len(bias))[:, None]
    d_rows = d_out.astype(dtype)
    is_of = (expert_of_row[:, None] == jnp.arange(len(bias), dtype=jnp.int32)).astype(jnp.float32)
    if weights is not None:
        is_of = is_of * weights[:, None]
    d_bias = lax.dot_general(
        is_of.astype(dtype),
        jnp.where(used, d_rows, 0),
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # of float32, where GPUs would take TF32
        preferred_element_type=jnp.float32,
    )
    if weights is None:
        return d_rows, d_bias, None, None
    d_added = jnp.where(used, d_out, 0)
    d_weights = jnp.sum(d_added * _bias_of_rows(bias, expert_of_row), axis=1)
    return d_rows, d_bias, None, d_weights


_add.defvjp(_add_fwd, _add_bwd)


def _bias_of_rows(bias: Array, expert_of_row: Array) -> Array:
    return bias.at[expert_of_row].get(mode="fill", fill_value=0)
