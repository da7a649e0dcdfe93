"""Roundings that XLA cannot take out again."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


def round_to(x: Float32[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """``x`` in ``dtype``, rounded to nearest even.

    XLA is free to drop a pair of conversions f32→bf16→f32 (it allows excess precision by default),
    which would make results depend on what is fused with what.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)
    return lax.optimization_barrier(x.astype(dtype))
