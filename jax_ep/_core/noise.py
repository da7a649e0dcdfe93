"""Noise on the logits of a router that does not depend on how the tokens are split over ranks."""

from __future__ import annotations

import math

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

from jax_ep import _compat


def seed_of(key: Array) -> UInt32[Array, "2"]:
    """What ``add_noise`` takes, from a key of ``jax.random`` of any kind."""
    return jax.random.bits(key, (2,), jnp.uint32)


def add_noise(
    logits: Float32[Array, "tokens experts"],
    seed: UInt32[Array, "2"],
    token_idx: Int32[Array, " tokens"],
    std: float,
    num_used_experts: int,
) -> Float32[Array, "tokens experts"]:
    """``logits`` with Gaussian noise of ``std``, for the experts that exist.

    Each number is a hash of the token's index in the whole batch and of the expert, under ``seed``. So
    every rank finds the noise of its own tokens. The hash is Threefry, whatever the kind of the user's
    key: the numbers of an "rbg" key depend on what else is drawn with them.
    """
    # Without vmap, which JAX (0.11.2) refuses inside vmap(..., spmd_axis_name=).
    shape = (token_idx.shape[0], num_used_experts)
    tokens = lax.broadcast_in_dim(token_idx.astype(jnp.uint32), shape, (0,))
    experts = lax.broadcasted_iota(jnp.uint32, shape, 1)
    axes = _compat.varying_axes(token_idx) | _compat.varying_axes(seed)
    seed, tokens, experts = (_compat.cast_varying(x, axes) for x in (seed, tokens, experts))
    counters = jnp.stack([tokens, experts])  # Threefry takes the two halves of an array as words
    bits = jax.extend.random.threefry_2x32(seed, counters)[0]
    # Odd multiples of 2⁻²³, which float32 has all of, between −1 and 1 without these.
    odd = ((bits >> 9) * 2 + 1).astype(jnp.float32)
    noise = math.sqrt(2) * lax.erf_inv(odd * 2.0**-23 - 1)
    missing = logits.shape[1] - num_used_experts
    return logits + std * jnp.pad(noise, ((0, 0), (0, missing)))
