"""Activation functions of experts: of the gate alone, or of gate and up projection together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ep._core import arguments


@dataclasses.dataclass(frozen=True)
class GatedActivation:
    """An activation function of two arguments, the gate and the up projection.

    ``jax_ep.moe`` multiplies ``activation(gate)`` with ``up`` by default. With a ``GatedActivation`` it
    takes what the function makes of both, for example in a bilinear layer::

        activation = jax_ep.GatedActivation(lambda gate, up: gate * up)

    The function works channel by channel: it gets two arrays ``[..., F]`` float32, of the experts or
    of the shared expert, and returns one. JAX finds a compiled program by the hash and equality of the
    function, so make it once and not in every call.

    Attributes:
        function: The function ``(gate, up)``.

    Raises:
        TypeError: if ``function`` cannot be called.
    """

    function: Callable[[Array, Array], Array]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise arguments.type_error(
                "GatedActivation",
                "function",
                "a function of gate and up",
                type(self.function).__name__,
                "pass a function of two arrays",
            )

    def __call__(self, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
        """``function(gate, up)``."""
        return self.function(gate, up)


Activation = Callable[[Array], Array] | GatedActivation


@dataclasses.dataclass(frozen=True)
class _ClampedSwiglu:
    """The function of ``clamped_swiglu``; two with the same numbers are equal."""

    limit: float
    alpha: float

    def __call__(self, gate: Array, up: Array) -> Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


def clamped_swiglu(limit: float = 7.0, alpha: float = 1.702) -> GatedActivation:
    """The gated activation of gpt-oss, for ``moe(activation=)``.

    In pseudocode::

        gate = min(gate, limit)
        up = clip(up, -limit, limit)
        return gate * sigmoid(alpha * gate) * (up + 1)

    The defaults are those of gpt-oss-20b and gpt-oss-120b (OpenAI, 2025). Their checkpoints have gate
    and up projection in one matrix, in every other column: take ``[..., ::2]`` and ``[..., 1::2]``.

    Args:
        limit: Bound of the gate from above and of the up projection from both sides; positive.
        alpha: Factor inside the sigmoid; 1.702 makes it close to GELU.

    Returns:
        The activation. Two with the same numbers are equal.

    Raises:
        TypeError: if one of them is no number.
        ValueError: if ``limit`` is not positive.
    """
    for name, value in (("limit", limit), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise arguments.type_error(
                "clamped_swiglu",
                name,
                "a Python float",
                type(value).__name__,
                "pass a number that does not depend on arrays",
            )
    if not limit > 0:
        raise arguments.value_error(
            "clamped_swiglu", "limit", "a positive number", limit, "pass the bound, 7.0 in gpt-oss"
        )
    return GatedActivation(_ClampedSwiglu(float(limit), float(alpha)))


def activate(gate: Array | None, up: Array, activation: Activation) -> Float32[Array, "..."]:
    """The inner channels of experts in float32; those without a gate activate ``up``."""
    if gate is None:
        return activation(up.astype(jnp.float32))  # type: ignore[call-arg]  # checked by moe
    if isinstance(activation, GatedActivation):
        return activation(gate.astype(jnp.float32), up.astype(jnp.float32))
    return activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
