"""The product of tokens and router kernel, exact to float32.

Routes must not depend on the precision of a product, so logits are sums in float32 of products that
lose nothing. For tokens in float32 or float16 that is a product at ``Precision.HIGHEST``.

Tokens in bfloat16 have 8 significant bits. A kernel in float32 has 24, and is the sum of three
bfloat16 numbers of 8 bits each. So three bfloat16 products, which tensor cores add up in float32,
are all of the product, and they are one product with the parts side by side::

    x @ kernel = x @ [k0 | k1 | k2], of which the three results are added, the smallest first

The gradient of the kernel is such a product too: ``x.T @ d_logits`` with the parts of ``d_logits``. In
that of the tokens, ``d_logits @ kernel.T``, both factors have three parts. Six products of parts are
large enough to reach a float32, and they are again one, along a contraction of six times the experts.
By the rates of an H200, about 800 TFLOP/s in bfloat16 and 60 in float32, that takes half the time of a
product in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from jax_ep import _compat
from jax_ep._core.numerics import round_to

_PARTS = 3  # bfloat16 numbers in a float32: 24 significant bits, of which each takes 8


def router_logits(
    x: Float[Array, "tokens hidden"], kernel: Float[Array, "hidden experts"]
) -> Float32[Array, "tokens experts"]:
    """``x @ kernel`` in float32, with a gradient that is as exact."""
    wide = kernel.astype(jnp.float32)
    if x.dtype != jnp.bfloat16:
        return _highest(x.astype(jnp.float32), wide)
    axes = _compat.varying_axes(x) | _compat.varying_axes(wide)
    x, wide = (_compat.cast_varying(operand, axes) for operand in (x, wide))
    return _logits(1 if kernel.dtype == jnp.bfloat16 else _PARTS, x, wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(
    kernel_parts: int,
    x: BFloat16[Array, "tokens hidden"],
    kernel: Float32[Array, "hidden experts"],
) -> Float32[Array, "tokens experts"]:
    """The product of ``x`` and a kernel that is the sum of so many bfloat16 numbers."""
    return _by_parts(x, _split(kernel, kernel_parts))


def _logits_fwd(kernel_parts: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(kernel_parts, x, kernel), (x, kernel)


@_compat.backward
def _logits_bwd(
    kernel_parts: int, residuals: tuple[Array, Array], d_logits: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    d_x = _by_wide(kernel_parts, d_logits, kernel).astype(x.dtype)
    return d_x, _logits(_PARTS, x.T, d_logits)


_logits.defvjp(_logits_fwd, _logits_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_wide(
    kernel_parts: int,
    d_logits: Float32[Array, "tokens experts"],
    kernel: Float32[Array, "hidden experts"],
) -> Float32[Array, "tokens hidden"]:
    """``d_logits @ kernel.T``, exact to float32; its own gradients are those of second derivatives."""
    d_parts, parts = _split(d_logits, _PARTS), _split(kernel, kernel_parts)
    # Products of parts below 2⁻²⁴ of the whole are left out. The smallest come first.
    pairs = [(i, j) for i in range(_PARTS) for j in range(kernel_parts) if i + j < _PARTS]
    pairs.sort(key=sum, reverse=True)
    return lax.dot_general(
        jnp.concatenate([d_parts[i] for i, _ in pairs], axis=1),
        jnp.concatenate([parts[j] for _, j in pairs], axis=1),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _by_wide_fwd(
    kernel_parts: int, d_logits: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _by_wide(kernel_parts, d_logits, kernel), (d_logits, kernel)


@_compat.backward
def _by_wide_bwd(
    kernel_parts: int, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    d_logits, kernel = residuals
    return _highest(cotangent, kernel), _highest(cotangent.T, d_logits)


_by_wide.defvjp(_by_wide_fwd, _by_wide_bwd)


def _highest(lhs: Float32[Array, "a b"], rhs: Float32[Array, "b c"]) -> Float32[Array, "a c"]:
    return jnp.dot(lhs, rhs, precision=lax.Precision.HIGHEST)  # the default has fewer bits on GPUs


def _split(x: Float32[Array, "rows columns"], count: int) -> list[BFloat16[Array, "rows columns"]]:
    """``x`` as a sum of bfloat16 arrays, the largest first. Three lose nothing but subnormals."""
    parts = []
    for _ in range(count):
        part = round_to(x, jnp.bfloat16)  # XLA would drop a pair of casts, and all parts but one
        x = x - part.astype(jnp.float32)
        parts.append(part)
    return parts


def _by_parts(
    lhs: BFloat16[Array, "rows inner"], parts: list[BFloat16[Array, "inner columns"]]
) -> Float32[Array, "rows columns"]:
    """``lhs`` times the sum of ``parts``, as one product whose results are added."""
    product = lax.dot_general(
        lhs,
        jnp.concatenate(parts, axis=1),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    results = lax.split(product, [parts[0].shape[1]] * len(parts), axis=1)
    return functools.reduce(jnp.add, reversed(results))  # the smallest first
