"""Roundings that XLA cannot remove, and casts that lose nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Integer

_INT32 = jnp.iinfo(jnp.int32)


def round_to(x: Float32[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """``x`` in ``dtype``, rounded to nearest even.

    XLA is free to drop a pair of conversions f32→bf16→f32 (it allows excess precision by default),
    which would make results depend on what is fused with what.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)
    return lax.optimization_barrier(x.astype(dtype))


def expert_ids(idx: Integer[Array, "..."]) -> Int32[Array, "..."]:
    """Expert ids of any integer dtype as int32; ids beyond int32 become ones out of range."""
    if idx.dtype == jnp.int32:
        return idx
    wide = jnp.iinfo(idx.dtype)
    if wide.min < _INT32.min:
        idx = jnp.maximum(idx, jnp.array(_INT32.min, idx.dtype))
    if wide.max > _INT32.max:
        idx = jnp.minimum(idx, jnp.array(_INT32.max, idx.dtype))
    return idx.astype(jnp.int32)


@jax.custom_jvp
def keep(x: Float32[Array, "..."], zero: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """``x``, rounded as it is: XLA cannot contract a product in it into a fused multiply-add.

    Before jaxlib 0.11, XLA's CPU compiler contracts across an ``optimization_barrier``. It cannot see
    through an exclusive or.

    Args:
        x: Any numbers.
        zero: Zeros that the compiler does not know to be zero.
    """
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) ^ zero, jnp.float32)


@keep.defjvp
def _keep_jvp(primals, tangents):
    return keep(*primals), tangents[0]
