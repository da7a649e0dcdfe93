"""Arrays of tokens that go with ``x`` through the layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped

from jax_ep.routing import Routing


class OfTokens(NamedTuple):
    """Arrays of tokens that go with ``x``, each of them or None."""

    mask: Bool[Array, "tokens 1"] | None
    router_inputs: Any
    routing: Routing | None


def zero_masked(
    mask: Bool[Array, "tokens 1"], x: Shaped[Array, "tokens ..."]
) -> Shaped[Array, "tokens ..."]:
    """``x`` with zeros in the place of masked tokens."""
    return jnp.where(lax.expand_dims(mask[:, 0], range(1, x.ndim)), x, jnp.zeros((), x.dtype))
