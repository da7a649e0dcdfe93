"""The model: a decoder-only transformer over bytes whose feed-forward layers are experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

import jax_ep
from byte_lm.config import ModelConfig
from byte_lm.data import VOCAB

_ROPE_BASE = 10_000.0
_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions (Su et al., 2021)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Make the projections."""
        dtype = _DTYPES[config.dtype]
        self.num_heads = config.num_heads
        self.qkv = nnx.Linear(
            config.hidden, 3 * config.hidden, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Mix each position with those before it."""
        batch, seq, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(mixed.reshape(batch, seq, hidden))


class Block(nnx.Module):
    """Attention, then experts, each with a residual connection."""

    def __init__(self, config: ModelConfig, group: jax_ep.Group, *, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        dtype = _DTYPES[config.dtype]
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


class ByteLM(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: ModelConfig, group: jax_ep.Group, *, rngs: nnx.Rngs) -> None:
        """Make the model, the experts split over ``group``."""
        dtype = _DTYPES[config.dtype]
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
        logits = self.head(self.norm(x)).astype(jnp.float32)
        return logits, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)

    def update_router_biases(self, load: Int32[Array, "blocks experts"]) -> None:
        """Move the biases of all blocks towards even load, where there are biases."""
        for block, block_load in zip(self.blocks, load, strict=True):
            if block.experts.router_bias is not None:
                block.experts.update_router_bias(block_load)


def rotate(x: Float[Array, "batch seq heads channels"]) -> Float[Array, "batch seq heads channels"]:
    """Turn the channel pairs (i, i + half) of position p by the angle p · base^(−i / half)."""
    half = x.shape[-1] // 2
    frequencies = _ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
