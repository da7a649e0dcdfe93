"""What ``moe`` reports besides its output: losses and statistics over all tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jax_ep.routing import Routing, expert_load, load_balancing_loss


class MoEAux(NamedTuple):
    """What a mixture-of-experts layer reports besides its output; the same on every device.

    Attributes:
        aux_loss: Scalar load-balancing loss over all tokens (``routing.load_balancing_loss``), not
            yet scaled: 1 where all experts are used equally.
        load: ``[E]`` int32 routes to each expert from all tokens, dropped ones included.
        num_dropped: Scalar int32, (token, expert) pairs that did not fit the capacity.
        num_invalid: Scalar int32, entries of a custom router out of range or repeated.
    """

    aux_loss: Float32[Array, ""]
    load: Int32[Array, " experts"]
    num_dropped: Int32[Array, ""]
    num_invalid: Int32[Array, ""]


def report(
    topk_idx: Int32[Array, "tokens top_k"],
    routing: Routing,
    *,
    num_dropped: Int32[Array, "1"],
    num_invalid: Int32[Array, "1"],
    num_experts: int,
    num_used_experts: int,
    axis_names: tuple[str, ...],
) -> MoEAux:
    """Losses and statistics of the tokens of all ranks along ``axis_names``."""
    counts = (
        expert_load(topk_idx, num_experts),
        num_dropped.sum(dtype=jnp.int32),
        num_invalid.sum(dtype=jnp.int32),
    )
    load, dropped, invalid = lax.psum(counts, axis_names)
    aux_loss = load_balancing_loss(
        topk_idx, routing.scores, axis_names=axis_names, num_used_experts=num_used_experts
    )
    return MoEAux(aux_loss, load, dropped, invalid)
