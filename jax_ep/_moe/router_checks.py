"""Errors of ``moe`` about its router and the routes, while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import routing
from jax_ep._core import arguments
from jax_ep._moe.report import Parts


def check_call(
    router: Any,
    parts: Parts,
    batch: tuple[int, ...],
    top_k: int,
    num_experts: int,
    *,
    router_inputs: Any,
    router_key: Any,
    routing: Any,
) -> None:
    """What a call gives the router, or instead of it, and what it asks for, fit each other."""
    _check_flag("sequence_loss", parts.sequence_loss)
    _check_flag("return_routing", parts.routing)
    _check_replay(routing, parts, {"scores": (*batch, num_experts)}, (*batch, top_k))
    _check_router_inputs(router_inputs, router, routing, batch)
    _check_router_key(router_key, router, routing)


def _check_router_inputs(inputs: Any, router: Any, replayed: Any, shape: tuple[int, ...]) -> None:
    """``inputs`` are None, or arrays of tokens for a router that takes them."""
    if inputs is None:
        return
    if replayed is not None:
        raise arguments.value_error(
            "moe",
            "router_inputs",
            "None with routing=, because no router runs",
            type(inputs).__name__,
            "leave out one of them",
        )
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
    if routes.scores is None:
        raise arguments.type_error(
            "moe",
            "router",
            "a function that gives scores",
            "one that gives None",
            "give the score of every expert for every token",
        )
    if routes.scores.shape != logits_shape:
        raise arguments.value_error(
            "moe",
            "router",
            f"a function that gives scores of the shape of the logits, {logits_shape}",
            routes.scores.shape,
            "give the score of every expert for every token",
        )


def _check_router_key(key: Any, router: Any, replayed: Any) -> None:
    """``key`` is None, or one key for a router that adds noise."""
    if key is None:
        return
    if replayed is not None:
        raise arguments.value_error(
            "moe",
            "router_key",
            "None with routing=, because no router runs",
            "a key",
            "leave out one of them",
        )
    if not isinstance(router, routing.Router) or router.noise_std == 0:
        raise arguments.value_error(
            "moe",
            "router_key",
            "None with a router without noise",
            "a key",
            "pass a jax_ep.routing.Router with noise_std, or leave the key out",
        )
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32
    if not isinstance(key, jax.Array | np.ndarray) or not (typed or raw):
        raise arguments.type_error(
            "moe",
            "router_key",
            "a key of jax.random",
            type(key).__name__ if dtype is None else dtype,
            "make one with jax.random.key",
        )
    if key.ndim != (0 if typed else 1):
        raise arguments.value_error(
            "moe", "router_key", "one key", f"shape {key.shape}", "choose one with jax.random.split"
        )


def _check_replay(
    routes: Any, parts: Parts, shapes: dict[str, tuple[int, ...]], shape_of_others: tuple[int, ...]
) -> None:
    """``routes`` are None, or a ``Routing`` in the shape of the batch."""
    if routes is None:
        return
    if not isinstance(routes, routing.Routing):
        raise arguments.type_error(
            "moe",
            "routing",
            "a jax_ep.routing.Routing or None",
            type(routes).__name__,
            "pass jax_ep.routing.Routing(topk_idx, topk_weights, scores)",
        )
    floats = "float32, bfloat16 or float16"
    for name, array in routes._asdict().items():
        if name == "scores" and array is None:
            if parts.sequence_loss:
                raise arguments.value_error(
                    "moe",
                    "sequence_loss",
                    "False with a routing that has no scores",
                    True,
                    "give the routing its scores, or leave the loss out",
                )
            continue
        is_array, is_idx = isinstance(array, jax.Array | np.ndarray), name == "topk_idx"
        fits = is_array and (
            jnp.issubdtype(array.dtype, jnp.integer)
            if is_idx
            else array.dtype in arguments.ROW_DTYPES
        )
        if not fits:
            raise arguments.type_error(
                "moe",
                f"routing.{name}",
                f"an array of {'integers' if is_idx else floats}",
                array.dtype if is_array else type(array).__name__,
                f"cast it with astype(jnp.{'int32' if is_idx else 'float32'})",
            )
        shape = shapes.get(name, shape_of_others)
        if array.shape != shape:
            raise arguments.value_error(
                "moe",
                f"routing.{name}",
                f"shape {shape}, the batch of x and {shape[-1]} entries for each token",
                array.shape,
                "give each token its entries",
            )


def _check_flag(argument: str, value: Any) -> None:
    """``value`` is a bool, so that it decides what the program has."""
    if not isinstance(value, bool):
        raise arguments.type_error(
            "moe", argument, "True or False", type(value).__name__, "pass a Python bool"
        )
