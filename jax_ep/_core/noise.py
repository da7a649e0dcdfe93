"""Noise on the logits of a router that does not depend on how the tokens are split over ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jax_ep import _compat

# The hash of every token, whatever the implementation of the user's key: with "rbg", the numbers of one
# key would depend on the others beside it.
_IMPLEMENTATION = "threefry2x32"


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

    The noise of a token is a function of ``seed`` and of its index in the whole batch, so every rank
    finds that of its own tokens.
    """
    axes = _compat.varying_axes(token_idx) | _compat.varying_axes(seed)
    seed, token_idx = (_compat.cast_varying(x, axes) for x in (seed, token_idx))
    key = jax.random.wrap_key_data(seed, impl=_IMPLEMENTATION)

    def of_token(index: Int32[Array, ""]) -> Float32[Array, " experts"]:
        return jax.random.normal(jax.random.fold_in(key, index), (num_used_experts,))

    noise = jax.vmap(of_token)(token_idx)
    missing = logits.shape[1] - num_used_experts
    return logits + std * jnp.pad(noise, ((0, 0), (0, missing)))
