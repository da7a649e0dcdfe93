"""The router of ``moe``: from the tokens of one rank to their routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from jax_ep._core import arguments
from jax_ep._core.noise import add_noise
from jax_ep._core.numerics import expert_ids
from jax_ep._moe import checks, router_checks
from jax_ep._moe.logits import router_logits
from jax_ep.routing import Router, Routing

AnyRouter = Router | Callable[..., Routing]
RouterLike = Literal["softmax", "sigmoid"] | AnyRouter


class Noise(NamedTuple):
    """What the noise of a training step follows from.

    Attributes:
        seed: From ``seed_of``, the same on all ranks.
        token_idx: ``[T]`` indices of this rank's tokens among those of all ranks.
    """

    seed: UInt32[Array, "2"]
    token_idx: Int32[Array, " tokens"]


class Routed(NamedTuple):
    """Routes, and what they were made from.

    Attributes:
        routing: With int32 ids; those of experts that do not exist are invalid.
        logits: ``[T, E]`` without noise; None where no router ran.
    """

    routing: Routing
    logits: Float32[Array, "tokens experts"] | None


def resolve_router(router: Any) -> AnyRouter:
    """The router that ``moe`` was given, where a name stands for one; an error if it is none."""
    if isinstance(router, str):
        arguments.check_one_of("moe", "router", router, ("softmax", "sigmoid"))
        return Router("softmax" if router == "softmax" else "sigmoid")
    if not callable(router):
        raise arguments.type_error(
            "moe",
            "router",
            "'softmax', 'sigmoid', a jax_ep.routing.Router or a function",
            type(router).__name__,
            "leave it out for 'softmax'",
        )
    checks.check_function("router", router)
    return router


def route(
    router: AnyRouter,
    x: Float[Array, "tokens hidden"],
    kernel: Float[Array, "hidden experts"],
    bias: Float32[Array, " experts"] | None,
    inputs: Any,
    noise: Noise | None,
    *,
    top_k: int,
    num_experts: int,
    num_used_experts: int,
) -> Routed:
    """The routes that the router gives the tokens."""
    logits = router_logits(x, kernel)
    bias = None if bias is None else lax.stop_gradient(bias)
    used = num_used_experts
    if isinstance(router, Router):
        seen = logits
        if noise is not None:
            seen = add_noise(logits, noise.seed, noise.token_idx, router.noise_std, used)
        return Routed(router(seen, top_k, bias, num_used_experts=used), logits)
    seen, bias = logits[:, :used], None if bias is None else bias[:used]
    routing = router(seen, bias) if inputs is None else router(seen, bias, inputs)
    router_checks.check_routing(routing, top_k, seen.shape)
    return Routed(_only_used(routing, used, num_experts), logits)


def replay(routing: Routing, *, num_experts: int, num_used_experts: int) -> Routed:
    """The routes that ``moe`` was given, in place of those of a router."""
    return Routed(_only_used(routing, num_used_experts, num_experts), None)


def _only_used(routing: Routing, num_used_experts: int, num_experts: int) -> Routing:
    """Ids as int32, and those of experts that do not exist out of range."""
    idx = expert_ids(routing.topk_idx)
    return routing._replace(topk_idx=jnp.where(idx < num_used_experts, idx, num_experts))
