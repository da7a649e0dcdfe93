"""Errors of ``moe`` about its router and the routes, while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import routing
from jax_ep._core import arguments


def check_router_inputs(inputs: Any, router: Any, shape: tuple[int, ...]) -> None:
    """``inputs`` are None, or arrays of tokens for a router that takes them."""
    if inputs is None:
        return
    if isinstance(router, routing.Router):
        raise arguments.value_error(
            "moe",
            "router_inputs",
            "None with a router of jax_ep.routing",
            type(inputs).__name__,
            "pass a function of (logits, bias, router_inputs) as router",
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        name = "router_inputs" + jax.tree_util.keystr(path)
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        if not is_array or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise arguments.type_error(
                "moe",
                name,
                "an array of numbers",
                leaf.dtype if is_array else type(leaf).__name__,
                "let the router close over what is the same for all tokens",
            )
        if leaf.shape[: len(shape)] != shape:
            raise arguments.value_error(
                "moe",
                name,
                f"a shape that begins with that of the tokens, {shape}",
                leaf.shape,
                "give each token its entry",
            )


def check_routing(routes: Any, top_k: int, logits_shape: tuple[int, ...]) -> None:
    """A custom router gave a ``Routing`` of ``top_k`` experts for each token."""
    if not isinstance(routes, routing.Routing):
        raise arguments.type_error(
            "moe",
            "router",
            "a function that gives a jax_ep.routing.Routing",
            f"one that gives {type(routes).__name__}",
            "return jax_ep.routing.Routing(topk_idx, topk_weights, scores)",
        )
    shape = (logits_shape[0], top_k)
    if routes.topk_idx.shape != shape or routes.topk_weights.shape != shape:
        raise arguments.value_error(
            "moe",
            "router",
            f"a function that gives topk_idx and topk_weights of shape [tokens, top_k] {shape}",
            f"{routes.topk_idx.shape} and {routes.topk_weights.shape}",
            "let it choose top_k experts, -1 where a token has fewer",
        )
    if not jnp.issubdtype(routes.topk_idx.dtype, jnp.integer):
        raise arguments.type_error(
            "moe",
            "router",
            "a function that gives topk_idx of an integer dtype",
            routes.topk_idx.dtype,
            "cast them with astype(jnp.int32)",
        )
    if routes.scores.shape != logits_shape:
        raise arguments.value_error(
            "moe",
            "router",
            f"a function that gives scores of the shape of the logits, {logits_shape}",
            routes.scores.shape,
            "give the score of every expert for every token",
        )
