"""The gated MLPs of a layer: those of the local experts, and the shared one."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_ep._core.types import Dispatched, Quantized
from jax_ep._moe.params import MoEParams, SharedExpert

GroupedDot = Callable[[Array, Array, Array], Array]
Activation = Callable[[Array], Array]


def apply_experts(
    out: Dispatched, params: MoEParams, grouped_dot: GroupedDot, activation: Activation
) -> Float[Array, "rows hidden"]:
    """The outputs of the local experts for the rows that came, weighted."""
    rows, weights = out.tokens, out.weights
    assert weights is not None and not isinstance(rows, Quantized)  # as was asked of dispatch
    gate, up, down = (w.astype(rows.dtype) for w in (params.gate, params.up, params.down))
    gated = _gated(
        grouped_dot(rows, gate, out.group_sizes),
        grouped_dot(rows, up, out.group_sizes),
        activation,
    )
    # The down projection is linear: its few input channels are cheaper to weight than its outputs.
    weighted = (gated * weights[:, None]).astype(rows.dtype)
    return grouped_dot(weighted, down, out.group_sizes)


def shared_inner(
    x: Float[Array, "tokens hidden"], shared: SharedExpert, activation: Activation
) -> Float[Array, "tokens inner"]:
    """The inner channels of the shared expert."""
    gate, up = shared.gate.astype(x.dtype), shared.up.astype(x.dtype)
    return _gated(x @ gate, x @ up, activation).astype(x.dtype)


def shared_outputs(
    inner: Float[Array, "tokens inner"], shared: SharedExpert
) -> Float[Array, "tokens hidden"]:
    """The outputs of the shared expert for its inner channels."""
    return inner @ shared.down.astype(inner.dtype)


def _gated(gate: Array, up: Array, activation: Activation) -> Float32[Array, "rows intermediate"]:
    return activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)
