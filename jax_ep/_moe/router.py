"""The router of ``moe``: from the tokens of one rank to their routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jax_ep._core import arguments
from jax_ep._core.numerics import expert_ids
from jax_ep._moe import checks, router_checks
from jax_ep._moe.logits import router_logits
from jax_ep.routing import Router, Routing

AnyRouter = Router | Callable[..., Routing]
RouterLike = Literal["softmax", "sigmoid"] | AnyRouter


def resolve_router(router: Any) -> AnyRouter:
    """The router that ``moe`` was given, where a name stands for one; an error if it is none."""
    if isinstance(router, str):
        arguments.check_one_of("moe", "router", router, ("softmax", "sigmoid"))
        return Router(router)
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
    *,
    top_k: int,
    num_used_experts: int,
) -> Routing:
    """The routes of the tokens, with int32 ids; those of experts that do not exist are invalid."""
    logits = router_logits(x, kernel)
    bias = None if bias is None else lax.stop_gradient(bias)
    num_experts, used = kernel.shape[1], num_used_experts
    if isinstance(router, Router):
        return router(logits, top_k, bias, num_used_experts=used)
    logits, bias = logits[:, :used], None if bias is None else bias[:used]
    routing = router(logits, bias) if inputs is None else router(logits, bias, inputs)
    router_checks.check_routing(routing, top_k, logits.shape)
    topk_idx = expert_ids(routing.topk_idx)
    return routing._replace(topk_idx=jnp.where(topk_idx < used, topk_idx, num_experts))
