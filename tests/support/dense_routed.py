"""A layer of experts with any router, written out densely: every expert for every token.

It knows nothing of jax_ep. Losses are written as their papers state them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Routes(NamedTuple):
    """``[B, S, E]`` each: logits, scores, weights (zero where not chosen), and 1 where chosen."""

    logits: Array
    scores: Array
    weights: Array
    chosen: Array


class Report(NamedTuple):
    """What the layer of jax_ep reports too."""

    aux_loss: Array
    z_loss: Array
    sequence_loss: Array
    load: Array


def route(
    logits: Array,
    *,
    top_k: int,
    score: Callable[[Array], Array] = jax.nn.softmax,
    bias: Array | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    groups: tuple[int, int] | None = None,
) -> Routes:
    """The ``top_k`` best experts, of ``groups = (number, best)`` those in the best groups."""
    scores = score(logits)
    selection = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    if groups is not None:
        split = selection.reshape(*selection.shape[:-1], groups[0], -1)
        of_group = jnp.sort(split, axis=-1)[..., -2:].sum(-1)
        least = jnp.sort(of_group, axis=-1)[..., -groups[1], None]
        allowed = (of_group >= least)[..., None]
        selection = jnp.where(allowed, split, -jnp.inf).reshape(selection.shape)
    chosen = best(selection, top_k)
    weights = scores * chosen
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routes(logits, scores, weights * scale, chosen)


def best(values: Array, top_k: int) -> Array:
    """1 at the ``top_k`` largest of each token, else 0."""
    return jax.nn.one_hot(jax.lax.top_k(values, top_k)[1], values.shape[-1]).sum(-2)


def experts(
    x: Array,
    weights: Array,
    params: dict[str, Any],
    activation: Callable[[Array, Array], Array] = lambda gate, up: jax.nn.silu(gate) * up,
) -> Array:
    """The outputs of all experts of ``params`` (``gate``, ``up``, ``down``, biases), weighted."""
    zero = jnp.zeros(1)
    inner = [
        jnp.einsum("bsh,ehf->bsef", x, params[name]) + params.get(f"{name}_bias", zero)
        for name in ("gate", "up")
    ]
    outputs = jnp.einsum("bsef,efh->bseh", activation(*inner), params["down"])
    return jnp.einsum("bse,bseh->bsh", weights, outputs + params.get("down_bias", zero))


def report(routes: Routes, top_k: int, mask: Array | None = None) -> Report:
    """The losses and loads of the tokens in ``mask``."""
    num_experts = routes.logits.shape[-1]
    mask = jnp.ones(routes.logits.shape[:-1], bool) if mask is None else mask
    real = mask[..., None]
    shares = routes.scores / routes.scores.sum(-1, keepdims=True)

    def balance(chosen: Array, axis: Any) -> Array:
        number = jnp.sum(real, axis)
        fraction = jnp.sum(chosen * real, axis) / (number * top_k)
        return num_experts * jnp.sum(fraction * jnp.sum(shares * real, axis) / number, -1)

    squares = jax.nn.logsumexp(routes.logits, axis=-1) ** 2
    return Report(
        aux_loss=balance(routes.chosen, (0, 1)),
        z_loss=jnp.mean(squares, where=mask),
        sequence_loss=balance(best(routes.scores, top_k), 1).mean(),
        load=jnp.sum(routes.chosen * real, (0, 1)).astype(jnp.int32),
    )
