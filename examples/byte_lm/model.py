"""The model: a decoder-only transformer over bytes whose feed-forward layers are experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

import jax_ep
from byte_lm.config import ModelConfig
from byte_lm.data import VOCAB

_ROPE_BASE = 10_000.0
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class Cache(NamedTuple):
    """What attention keeps of the positions so far.

    Attributes:
        keys: ``[B, S, heads, channels]``, rotated; those of positions to come are not read.
        values: The same shape.
    """

    keys: Float[Array, "batch length heads channels"]
    values: Float[Array, "batch length heads channels"]


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions (Su et al., 2021)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Make the projections."""
        dtype = DTYPES[config.dtype]
        self.num_heads = config.num_heads
        self.qkv = nnx.Linear(
            config.hidden, 3 * config.hidden, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Mix each position with those before it."""
        q, k, v = self._project(x)
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(mixed.reshape(x.shape))

    def extend(
        self, x: Float[Array, "batch seq hidden"], cache: Cache, first: Int32[Array, ""]
    ) -> tuple[Float[Array, "batch seq hidden"], Cache]:
        """Mix the positions from ``first`` on with those before them, which ``cache`` holds."""
        q, k, v = self._project(x)
        positions = first + jnp.arange(x.shape[1])
        keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, rotate(k, first), first, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(cache.values, v, first, axis=1)
        seen = jnp.arange(keys.shape[1]) <= positions[:, None]
        mask = seen[None, None]  # of all texts and heads
        mixed = jax.nn.dot_product_attention(rotate(q, first), keys, values, mask=mask)
        return self.out(mixed.reshape(x.shape)), Cache(keys, values)

    def _project(
        self, x: Float[Array, "batch seq hidden"]
    ) -> tuple[Float[Array, "batch seq heads channels"], ...]:
        batch, seq, _ = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, self.num_heads, -1)
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


class Block(nnx.Module):
    """Attention, then experts, each with a residual connection."""

    def __init__(self, config: ModelConfig, group: jax_ep.Group, *, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        dtype = DTYPES[config.dtype]
        by_bias = config.balance == "bias"
        self.norm_attention = nnx.RMSNorm(config.hidden, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_experts = nnx.RMSNorm(config.hidden, dtype=dtype, rngs=rngs)
        self.experts = jax_ep.nnx.MoE(
            config.hidden,
            config.expert_hidden,
            num_experts=config.num_experts,
            top_k=config.top_k,
            group=group,
            router="sigmoid" if by_bias else "softmax",
            router_bias=by_bias,
            capacity_factor=config.capacity_factor,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch seq hidden"], mask: Bool[Array, "batch seq"] | None
    ) -> tuple[Float[Array, "batch seq hidden"], jax_ep.MoEAux]:
        """Run the layers; ``mask`` is False at positions that need no expert."""
        x = x + self.attention(self.norm_attention(x))
        y, aux = self.experts(self.norm_experts(x), mask=mask)
        return x + y, aux

    def extend(
        self, x: Float[Array, "batch seq hidden"], cache: Cache, first: Int32[Array, ""]
    ) -> tuple[Float[Array, "batch seq hidden"], Cache]:
        """Run the layers for the positions from ``first`` on."""
        mixed, cache = self.attention.extend(self.norm_attention(x), cache, first)
        x = x + mixed
        return x + self.experts(self.norm_experts(x))[0], cache


class ByteLM(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig, group: jax_ep.Group, *, rngs: nnx.Rngs) -> None:
        """Make the model, the experts split over ``group``."""
        dtype = DTYPES[config.dtype]
        self.embed = nnx.Embed(VOCAB, config.hidden, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, group, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.hidden, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden, VOCAB, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "batch seq"], *, mask: Bool[Array, "batch seq"] | None = None
    ) -> tuple[Float32[Array, "batch seq vocab"], jax_ep.MoEAux]:
        """Predict each next byte.

        Args:
            tokens: Bytes; the batch is split over the mesh axes "data" and "expert".
            mask: False at positions that need no expert.

        Returns:
            Logits, and what the experts report with a leading axis of blocks.
        """
        x = self.embed(tokens)
        reports = []
        for block in self.blocks:
            x, report = block(x, mask)
            reports.append(report)
        logits = self._logits(x)
        return logits, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)

    def extend(
        self, tokens: Int32[Array, "batch seq"], caches: list[Cache], first: Int32[Array, ""]
    ) -> tuple[Float32[Array, "batch seq vocab"], list[Cache]]:
        """Predict the bytes after those at ``first`` and on, given the bytes before.

        Args:
            tokens: Bytes; the batch is split as in ``__call__``.
            caches: Of each block, with the positions before ``first``.
            first: The position of the first one of ``tokens``.

        Returns:
            Logits, and the caches with these positions too.
        """
        x = self.embed(tokens)
        extended = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.extend(x, cache, first)
            extended.append(cache)
        return self._logits(x), extended

    def _logits(self, x: Float[Array, "batch seq hidden"]) -> Float32[Array, "batch seq vocab"]:
        return self.head(self.norm(x)).astype(jnp.float32)

    def update_router_biases(self, load: Int32[Array, "blocks experts"]) -> None:
        """Move the biases of all blocks towards even load, where there are biases."""
        for block, block_load in zip(self.blocks, load, strict=True):
            if block.experts.router_bias is not None:
                block.experts.update_router_bias(block_load)


def empty_caches(config: ModelConfig, batch: int, length: int) -> list[Cache]:
    """Caches of all blocks with room for ``length`` positions of ``batch`` texts."""
    shape = (batch, length, config.num_heads, config.hidden // config.num_heads)
    zeros = jnp.zeros(shape, DTYPES[config.dtype])
    return [Cache(zeros, zeros) for _ in range(config.num_layers)]


def rotate(
    x: Float[Array, "batch seq heads channels"], first: int | Int32[Array, ""] = 0
) -> Float[Array, "batch seq heads channels"]:
    """Turn the channel pairs (i, i + half) of position p, first or later, by p · base^(−i / half)."""
    half = x.shape[-1] // 2
    frequencies = _ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[1], dtype=jnp.float32) + first
    angles = positions[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
