"""Causal attention within segments by cuDNN's fused kernels, on Hopper GPUs.

cuDNN takes each segment of a row as a sequence of its own (Krell et al., "Efficient sequence packing
without cross-contamination", arXiv:2107.02027), so it computes no scores between segments. It wants to
know beforehand how many segments a row has at most, and the memory of its backward pass grows with that
number, so rows go through it some at a time. ``jax.nn.dot_product_attention`` has no argument for
segments; the function behind it, which is used here, has, but is not public.

Its backward pass adds in no fixed order: gradients differ in their last bits from run to run.
``blockwise.py`` computes the same on any device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# What the backward pass may take for the gradients of queries, which it sums in float32.
_SCRATCH_BYTES = 4 << 30


def attention(
    q: Float[Array, "batch seq heads keys"],
    k: Float[Array, "batch seq heads keys"],
    v: Float[Array, "batch seq heads values"],
    segments: Int32[Array, "batch seq"],
    *,
    scale: float,
    most_segments: int,
) -> Float[Array, "batch seq heads values"]:
    """What ``blockwise.attention`` gives, up to rounding.

    Args:
        q: Queries, in bfloat16 or float16.
        k: Keys.
        v: Values, with at most as many channels.
        segments: Numbers 1, 2, ... in order, then zeros where a row is not full.
        scale: Factor of the scores.
        most_segments: Of a row. Results of a row with more are wrong.

    Raises:
        RuntimeError: if there is no GPU with cuDNN.
    """
    batch, seq, heads, keys = q.shape
    of_row = 4 * (most_segments + 1) * seq * heads * keys
    rows = max(
        n
        for n in range(1, batch + 1)
        if batch % n == 0 and (n == 1 or n * of_row <= _SCRATCH_BYTES)
    )
    mix = functools.partial(_mix, scale=scale, most_segments=most_segments)
    if rows == batch:
        return mix(q, k, v, segments)
    parts = (x.reshape(batch // rows, rows, *x.shape[1:]) for x in (q, k, v, segments))
    mixed = jax.lax.map(lambda part: mix(*part), tuple(parts))
    return mixed.reshape(v.shape)


def _mix(
    q: Array, k: Array, v: Array, segments: Array, *, scale: float, most_segments: int
) -> Array:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    starts, lengths = bounds(segments, most_segments)
    # Values are found by the places of keys, so they need as many channels.
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))
    mixed = dot_product_attention(
        q,
        k,
        wide,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return mixed[..., : v.shape[-1]]


def bounds(
    segments: Int32[Array, "batch seq"], most_segments: int
) -> tuple[Int32[Array, "batch most_plus_two"], Int32[Array, "batch most_plus_one"]]:
    """Where the segments of each row begin, and their lengths; −1 for those that it does not have.

    The rest of a row that is not full counts as a segment, because cuDNN leaves alone what is in none.
    """
    seq = segments.shape[1]
    numbers = jnp.arange(1, most_segments + 3, dtype=jnp.int32)
    in_order = jnp.where(segments > 0, segments, segments.max(axis=1, keepdims=True) + 1)
    starts = jax.vmap(functools.partial(jnp.searchsorted, v=numbers))(in_order).astype(jnp.int32)
    lengths = jnp.diff(starts, axis=1)
    return jnp.where(starts < seq, starts, -1), jnp.where(lengths > 0, lengths, -1)
