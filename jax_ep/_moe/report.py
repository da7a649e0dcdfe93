"""What ``moe`` reports besides its output: losses and statistics over all tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from jax_ep._moe.exchange import Exchanged
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
    out: Exchanged,
    routing: Routing,
    *,
    num_experts: int,
    num_used_experts: int,
    axis_names: tuple[str, ...],
) -> MoEAux:
    """Losses and statistics of the tokens of all ranks along ``axis_names``."""
    # The handle's routes: those of a custom router, less the invalid ones.
    used = out.topk_idx
    load, num_dropped, num_invalid = lax.psum(
        (
            expert_load(used, num_experts),
            out.num_dropped.sum(dtype=jnp.int32),
            out.num_invalid.sum(dtype=jnp.int32),
        ),
        axis_names,
    )
    aux_loss = load_balancing_loss(
        used, routing.scores, axis_names=axis_names, num_used_experts=num_used_experts
    )
    return MoEAux(aux_loss, load, num_dropped, num_invalid)
