"""The model of ``examples/byte_lm`` written out densely, for one device and without jax_ep.

Every expert works on every byte, and a matrix of weights, zero where an expert was not chosen, picks
the outputs. Weights and mathematics are the same, but nothing is dispatched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_EPSILON = 1e-6  # of the norms


class Report(NamedTuple):
    """Loss in nats per byte, mean load-balancing loss, and routes to each expert of each block."""

    loss: Array
    aux_loss: Array
    load: Array


def loss(
    params: dict[str, Any],
    biases: list[Array | None],
    batch: Array,
    *,
    num_heads: int,
    top_k: int,
) -> Report:
    """Run the model on ``batch`` ``[B, S + 1]``.

    Args:
        params: Nested dicts of arrays, as ``nnx.to_pure_dict`` makes them of the example's.
        biases: The router bias ``[E]`` of each block; None for softmax routing without one.
        batch: Bytes.
        num_heads: Attention heads.
        top_k: Experts of each byte.

    Returns:
        The losses and loads.
    """
    x = params["embed"]["embedding"][batch[:, :-1]]
    aux_losses, loads = [], []
    for index, bias in enumerate(biases):
        block = params["blocks"][index]
        x = x + _attention(_norm(x, block["norm_attention"]), block["attention"], num_heads)
        y, aux_loss, load = _experts(_norm(x, block["norm_experts"]), block["experts"], bias, top_k)
        x = x + y
        aux_losses.append(aux_loss)
        loads.append(load)
    logits = _norm(x, params["norm"]) @ params["head"]["kernel"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], axis=-1)
    return Report(-chosen.mean(), jnp.stack(aux_losses).mean(), jnp.stack(loads))


def _norm(x: Array, params: dict[str, Array]) -> Array:
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(mean_square + _EPSILON) * params["scale"]


def _attention(x: Array, params: dict[str, Any], num_heads: int) -> Array:
    batch, seq, hidden = x.shape
    size = hidden // num_heads
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    q, k, v = (part.reshape(batch, seq, num_heads, size) for part in (q, k, v))
    scores = jnp.einsum("bqhc,bkhc->bhqk", _rotate(q), _rotate(k)) / jnp.sqrt(size)
    causal = jnp.tril(jnp.ones((seq, seq), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, seq, hidden)
    return mixed @ params["out"]["kernel"]


def _rotate(x: Array) -> Array:
    """Channels i and i + half as a complex number, turned by its position."""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 10_000.0 ** (-jnp.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)[:, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _experts(
    x: Array, params: dict[str, Array], bias: Array | None, top_k: int
) -> tuple[Array, Array, Array]:
    """Output, load-balancing loss and load of one layer."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ params["router_kernel"]
    num_experts = logits.shape[1]
    scores = jax.nn.softmax(logits) if bias is None else jax.nn.sigmoid(logits)
    selection = scores if bias is None else scores + bias
    _, chosen = jax.lax.top_k(selection, top_k)
    mask = jax.nn.one_hot(chosen, num_experts).sum(axis=1)  # [tokens, E]
    weights = scores * mask
    weights = weights / weights.sum(axis=1, keepdims=True)
    gated = jax.nn.silu(jnp.einsum("th,ehf->tef", tokens, params["gate"]))
    gated = gated * jnp.einsum("th,ehf->tef", tokens, params["up"])
    outputs = jnp.einsum("tef,efh->teh", gated, params["down"])
    y = jnp.einsum("te,teh->th", weights, outputs)
    shares = scores / scores.sum(axis=1, keepdims=True)
    aux_loss = num_experts * jnp.sum(mask.mean(axis=0) / top_k * shares.mean(axis=0))
    return y.reshape(x.shape), aux_loss, mask.sum(axis=0)
