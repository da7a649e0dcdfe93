"""Experts of the user's own: the function, and what is checked and weighted around it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ep._core import arguments
from jax_ep._core.types import Dispatched


@runtime_checkable
class ExpertFunction(Protocol):
    """A function for ``moe(experts=)``: the experts of one rank, on the rows that came to them.

    Example, experts whose matrices are stored in 8 bits with a scale for each output channel::

        def int8_experts(rows, group_sizes, expert_of_row, params):
            up, down = (w.astype(rows.dtype) for w in (params["up"], params["down"]))
            scale = params["scale"].at[expert_of_row].get(mode="fill", fill_value=0)
            inner = jax.nn.gelu(jax_ep.grouped_dot(rows, up, group_sizes) * scale)
            return jax_ep.grouped_dot(inner.astype(rows.dtype), down, group_sizes)

        weights = {"up": up, "down": down, "scale": scale}   # [E, H, F], [E, F, H], [E, F]
        params = jax_ep.MoEParams(router_kernel=router_kernel, experts=weights)
        y, aux = jax_ep.moe(x, params, experts=int8_experts, ...)

    Such a function makes the outputs of the experts, and ``moe`` multiplies them with the top-k
    weights. It runs inside ``jax.shard_map`` over the mesh of the group, so it may use collectives.
    With ``tensor_axis`` it returns its part of a sum over that axis, over which ``expert_specs`` splits
    at least one of the weights; it adds what all positions have, such as a bias, on one of them. With
    ``overlap="chunks"`` it runs once for each chunk. Rows that do not belong to a token are zeros; the
    function may return anything for them, even NaN, and their cotangents are zeros.

    JAX keeps a program for each function, which it finds by hash and equality. So define it once, and
    pass arrays in ``params.experts`` rather than closing over them.

    Args:
        rows: ``[C, H]`` in the dtype of ``x``, those of an expert side by side.
        group_sizes: ``[L]`` int32 rows of each local expert with their padding to ``alignment``, ready
            for ``grouped_dot``.
        expert_of_row: ``[C]`` int32 local expert of each row, L past the last group.
        params: ``params.experts`` of ``moe``, of which each leaf is the part of this rank.

    Returns:
        ``[C, H]`` in the dtype of ``rows``.
    """

    def __call__(
        self, rows: Array, group_sizes: Array, expert_of_row: Array, params: Any, /
    ) -> Array:
        """The outputs of the experts of this rank, not yet weighted."""
        ...


def apply_own(
    out: Dispatched, function: ExpertFunction, params: Any
) -> Float[Array, "rows hidden"]:
    """The outputs of the user's own experts for the rows that came, weighted."""
    assert out.weights is not None  # as was asked of dispatch
    rows = function(out.tokens, out.group_sizes, out.expert_of_row, params)
    _check_rows(rows, out.tokens)
    # Unused rows may be NaN, and then the cotangents of their weights are. Neither is read.
    return (rows.astype(jnp.float32) * out.weights[:, None]).astype(rows.dtype)


def _check_rows(rows: Any, tokens: Array) -> None:
    """The function gave an array like the rows that it got."""
    if not isinstance(rows, jax.Array):
        raise arguments.type_error(
            "moe",
            "experts",
            "a function that gives an array of rows",
            f"one that gives {type(rows).__name__}",
            "return the outputs alone, [rows, hidden]",
        )
    if rows.shape != tokens.shape:
        raise arguments.value_error(
            "moe",
            "experts",
            f"a function that gives rows of shape {tokens.shape}, as it got them",
            rows.shape,
            "keep padding and unused rows in place",
        )
    if rows.dtype != tokens.dtype:
        raise arguments.type_error(
            "moe",
            "experts",
            f"a function that gives rows of dtype {tokens.dtype}, that of x",
            rows.dtype,
            "cast them with astype(rows.dtype)",
        )
