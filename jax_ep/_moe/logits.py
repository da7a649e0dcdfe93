"""The product of tokens and router kernel, in float32.

Routes must not depend on the precision of a product, so logits are sums in float32 of products that
lose nothing. For tokens in float32 or float16 that is a product at ``Precision.HIGHEST``, because the
default has fewer bits except on CPU.

Tokens in bfloat16 have 8 significant bits. A kernel in float32 has 24, and is the sum of three
bfloat16 numbers of 8 bits each. So three bfloat16 products, which tensor cores add up in float32,
are all of the product, and they are one product with the parts side by side::

    x @ kernel = x @ [k0 | k1 | k2], of which the three results are added, the smallest first

The gradient of the kernel is such a product too: ``x.T @ d_logits`` with the parts of ``d_logits``. In
that of the tokens, ``d_logits @ kernel.T``, both factors have three parts. Six products of parts are
large enough to reach a float32, and they are again one, along a contraction of six times the experts.
By the rates of an H200, about 800 TFLOP/s in bfloat16 and 60 in float32, that takes half the time of a
product in float32. What is lost is what tensor cores round when they add: there, the relative error of
logits of 7168 channels is 8e-6 (root mean square), that of a float32 product 1e-6.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from jax_ep import _compat
from jax_ep._core.batching import batched_alike
from jax_ep._core.derivatives import Form, bilinear
from jax_ep._core.numerics import round_to

_PARTS = 3  # bfloat16 numbers in a float32: 24 significant bits, of which each takes 8


def router_logits(
    x: Float[Array, "tokens hidden"], kernel: Float[Array, "hidden experts"]
) -> Float32[Array, "tokens experts"]:
    """``x @ kernel`` in float32, and gradients that are made in the same way."""
    wide = kernel.astype(jnp.float32)
    if x.dtype != jnp.bfloat16:
        return _highest(x.astype(jnp.float32), wide)
    x, wide = batched_alike(x, wide)
    axes = _compat.varying_axes(x) | _compat.varying_axes(wide)
    x, wide = (_compat.cast_varying(operand, axes) for operand in (x, wide))
    parts = 1 if kernel.dtype == jnp.bfloat16 else _PARTS
    return bilinear(_Product(parts, 1), x, wide, None)


@dataclasses.dataclass(frozen=True)
class _Product(Form):
    """``x``, whose axis ``contract`` is summed, times a sum of so many bfloat16 arrays."""

    parts: int
    contract: int

    def value(self, x: BFloat16[Array, "a b"], wide: Float32[Array, "inner c"], fixed: Any) -> Any:
        columns = jnp.concatenate(_split(wide, self.parts), axis=1)
        dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if self.contract == 1:
            product = dot(x, columns, (((1,), (0,)), ((), ())))
        else:
            # With a batch of one product. XLA's CPU compiler (jaxlib 0.11.2) cannot run what vmap makes
            # of a plain one whose second factor alone is mapped.
            product = dot(x[None], columns[None], (((1,), (1,)), ((0,), (0,))))[0]
        results = lax.split(product, [wide.shape[1]] * self.parts, axis=1)
        return functools.reduce(jnp.add, reversed(results))  # the smallest first

    def pull(
        self, x: Any, wide: Any, fixed: Any, d_out: Any, wanted: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        pair = ((_PARTS, d_out), (self.parts, wide))
        (lhs_parts, lhs), (rhs_parts, rhs) = pair if self.contract == 1 else reversed(pair)
        d_x = bilinear(_ByTransposed((lhs_parts, rhs_parts)), lhs, rhs, None).astype(x.dtype)
        return d_x, bilinear(_Product(_PARTS, 1 - self.contract), x, d_out, None)


@dataclasses.dataclass(frozen=True)
class _ByTransposed(Form):
    """``lhs @ rhs.T``, of sums of so many bfloat16 arrays; its gradient is for second derivatives."""

    parts: tuple[int, int]

    def value(
        self, lhs: Float32[Array, "a inner"], rhs: Float32[Array, "b inner"], fixed: Any
    ) -> Float32[Array, "a b"]:
        lhs_parts, rhs_parts = _split(lhs, self.parts[0]), _split(rhs, self.parts[1])
        # Products of parts below 2⁻²⁴ of the whole are left out. The smallest come first.
        pairs = [
            (i, j) for i in range(self.parts[0]) for j in range(self.parts[1]) if i + j < _PARTS
        ]
        pairs.sort(key=sum, reverse=True)
        return lax.dot_general(
            jnp.concatenate([lhs_parts[i] for i, _ in pairs], axis=1),
            jnp.concatenate([rhs_parts[j] for _, j in pairs], axis=1),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def pull(
        self, lhs: Any, rhs: Any, fixed: Any, d_out: Any, wanted: tuple[bool, bool]
    ) -> tuple[Any, Any]:
        return _highest(d_out, rhs), _highest(d_out.T, lhs)


def _highest(lhs: Float32[Array, "a b"], rhs: Float32[Array, "b c"]) -> Float32[Array, "a c"]:
    return jnp.dot(lhs, rhs, precision=lax.Precision.HIGHEST)


def _split(x: Float32[Array, "rows columns"], count: int) -> list[BFloat16[Array, "rows columns"]]:
    """``x`` as a sum of bfloat16 arrays, the largest first. Three lose nothing but subnormals."""
    parts = []
    for _ in range(count):
        part = round_to(x, jnp.bfloat16)  # XLA would drop a pair of casts, and all parts but one
        x = x - part.astype(jnp.float32)
        parts.append(part)
    return parts
