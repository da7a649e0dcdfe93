"""Language models of one block (embedding, attention, experts, head) in Flax's NNX and Linen.

Each takes the layer of experts as a parameter: the one of jax_ep, or a dense one with the same
weights on a single device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_ep
from jax_ep import routing
from test_moe import dense_moe

VOCABULARY, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, HEADS = 12, 8, 4, 8, 2, 2
_WEIGHTS = {
    "router_kernel": (HIDDEN, EXPERTS),
    "gate": (EXPERTS, HIDDEN, INTERMEDIATE),
    "up": (EXPERTS, HIDDEN, INTERMEDIATE),
    "down": (EXPERTS, INTERMEDIATE, HIDDEN),
}


def _dense(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, (aux_loss, _) = dense_moe(
        x, jax_ep.MoEParams(**weights), router=routing.Router(), top_k=TOP_K
    )
    return y, aux_loss


class DenseNNX(nnx.Module):
    """Every expert for every token."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        for name, shape in _WEIGHTS.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Any]:
        y, aux_loss = _dense(x, {name: getattr(self, name)[...] for name in _WEIGHTS})
        return y, jax_ep.MoEAux(aux_loss, None, None, None)


class ModelNNX(nnx.Module):
    """An ordinary model, except for its layer of experts.

    ``batch_spec`` says how a batch is split over Explicit axes, because a lookup must name it
    there.
    """

    def __init__(self, moe: Callable[..., nnx.Module], rngs: nnx.Rngs, batch_spec: Any = None):
        self.embed = nnx.Embed(VOCABULARY, HIDDEN, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, HIDDEN, decode=False, rngs=rngs)
        self.moe = moe(rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)
        self.batch_spec = batch_spec

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax_ep.MoEAux]:
        if self.batch_spec is None:
            x = self.embed(ids)
        else:
            x = self.embed(ids, out_sharding=self.batch_spec)
        x = x + self.attention(x)
        y, aux = self.moe(x)
        return self.head(x + y), aux


class DenseLinen(nn.Module):
    """Every expert for every token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Any]:
        zeros = nn.initializers.zeros_init()
        y, aux_loss = _dense(x, {name: self.param(name, zeros, s) for name, s in _WEIGHTS.items()})
        return y, jax_ep.MoEAux(aux_loss, None, None, None)


class ModelLinen(nn.Module):
    """As ``ModelNNX``."""

    moe: nn.Module

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax_ep.MoEAux]:
        x = nn.Embed(VOCABULARY, HIDDEN)(ids)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(x)
        y, aux = self.moe(x)
        return nn.Dense(VOCABULARY)(x + y), aux


def fill(tree: Any) -> Any:
    """Weights for these shapes, the same for equal shapes in equal places; nothing is compiled."""
    rng = np.random.default_rng(0)

    def one(leaf: Any) -> np.ndarray:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else HIDDEN
        return (rng.standard_normal(leaf.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree.map(one, tree)
