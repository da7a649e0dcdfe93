"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), as training needs it.

Keys and values of all heads are made from one small vector for each token, and queries too if there is
a rank for them. A rotary position is on extra channels of queries and of one key that all heads share.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from examples.pretrain import fused
from examples.pretrain.blockwise import attention, block_size
from examples.pretrain.config import ModelConfig
from examples.pretrain.parallel import BATCH_AXES
from examples.pretrain.rotary import frequencies, rotate, score_scale

NORM_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """Causal attention within segments."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, rngs: nnx.Rngs) -> None:
        """Make the projections."""
        self.config = config
        self.mesh = mesh
        dtype = jnp.dtype(config.dtype)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        heads, hidden = config.num_heads, config.hidden
        of_query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        self.q: Any = nnx.data(None)
        if config.q_lora_rank:
            self.q_a = linear(hidden, config.q_lora_rank)
            self.q_norm = norm(config.q_lora_rank)
            self.q_b = linear(config.q_lora_rank, of_query)
        else:
            self.q = linear(hidden, of_query)
        self.kv_a = linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = norm(config.kv_lora_rank)
        of_key_and_value = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b = linear(config.kv_lora_rank, heads * of_key_and_value)
        self.out = linear(heads * config.v_head_dim, hidden)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        segments: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
    ) -> Float[Array, "batch seq hidden"]:
        """Mix each position with those before it in its segment."""
        config = self.config
        batch, seq, _ = x.shape
        shape = (batch, seq, config.num_heads, -1)
        q = self.q(x) if self.q is not None else self.q_b(self.q_norm(self.q_a(x)))
        q, q_rope = jnp.split(q.reshape(shape), [config.qk_nope_head_dim], axis=-1)
        latent, k_rope = jnp.split(self.kv_a(x), [config.kv_lora_rank], axis=-1)
        kv = self.kv_b(self.kv_norm(latent)).reshape(shape)
        k, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
        turns = frequencies(config)
        q_rope = rotate(q_rope, positions, turns)
        k_rope = rotate(k_rope[:, :, None], positions, turns)
        q = jnp.concatenate([q, q_rope], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1)
        mixed = self._mix(q, k, v, segments)
        return self.out(mixed.reshape(batch, seq, -1))

    def _mix(self, q: Array, k: Array, v: Array, segments: Array) -> Array:
        """The attention of each device, for its sequences and its heads."""
        split = P(BATCH_AXES, None, "tensor", None)
        scale = score_scale(self.config)
        mix: Any = functools.partial(attention, scale=scale, block=block_size(q.shape[1]))
        if self.config.attention == "cudnn":
            most = self.config.most_segments
            mix = functools.partial(fused.attention, scale=scale, most_segments=most)
        specs = (split, split, split, P(BATCH_AXES, None))
        # Its scans start from zeros, and every input varies over all axes, or has no gradient.
        return jax.shard_map(
            lambda *given: mix(*given),
            mesh=self.mesh,
            in_specs=specs,
            out_specs=split,
            check_vma=False,
        )(q, k, v, segments)


def positions_of(segments: Int32[Array, "batch seq"]) -> Int32[Array, "batch seq"]:
    """The position of each token in its segment, from 0 on."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    before = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start = jnp.where(segments != before, index, 0)
    return index - jax.lax.cummax(start, axis=1)
