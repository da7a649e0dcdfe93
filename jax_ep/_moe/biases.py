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

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_ep import _compat
from jax_ep._core.batching import batched_alike
from jax_ep._core.derivatives import Form, bilinear


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
    added = bilinear(_Biases(rows.dtype), bias, weights, expert_of_row)
    return rows.astype(jnp.float32) + added


@dataclasses.dataclass(frozen=True)
class _Biases(Form):
    """The bias of each row, times its weight if there are any.

    Attributes:
        dtype: The dtype of the rows, which cotangents are rounded to.
    """

    dtype: Any

    def value(self, bias: Any, weights: Any, expert_of_row: Any) -> Any:
        added = _bias_of_rows(bias, expert_of_row)
        return added if weights is None else added * weights[:, None]

    def pull(
        self, bias: Any, weights: Any, expert_of_row: Any, d_out: Any, wanted: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        used = (expert_of_row < len(bias))[:, None]
        experts = jnp.arange(len(bias), dtype=jnp.int32)
        is_of = (expert_of_row[:, None] == experts).astype(jnp.float32)
        if weights is not None:
            is_of = is_of * weights[:, None]
        d_bias = lax.dot_general(
            is_of.astype(self.dtype),
            jnp.where(used, d_out.astype(self.dtype), 0),
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,  # of float32, where GPUs would take TF32
            preferred_element_type=jnp.float32,
        )
        if weights is None:
            return d_bias, None
        d_added = jnp.where(used, d_out, 0)
        return d_bias, jnp.sum(d_added * _bias_of_rows(bias, expert_of_row), axis=1)


def _bias_of_rows(bias: Array, expert_of_row: Array) -> Array:
    return bias.at[expert_of_row].get(mode="fill", fill_value=0)
