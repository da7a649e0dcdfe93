"""Routers: which experts a token goes to, with what weights, and how evenly they are used.

Pure JAX over one rank's tokens. All scores are float32. Ties go to the lowest expert id, so the same
logits give the same routes everywhere.

Symbols: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from jax_ep._core import arguments
from jax_ep._core.balancing import (
    check_num_used,
    expert_load,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    update_bias,
)
from jax_ep._core.noise import add_noise, seed_of
from jax_ep._core.top_k import (
    Routing,
    Scoring,
    check_logits,
    group_limited_top_k,
    sigmoid_top_k,
    softmax_top_k,
)

__all__ = [
    "Router",
    "Routing",
    "expert_load",
    "group_limited_top_k",
    "load_balancing_loss",
    "router_z_loss",
    "sequence_balancing_loss",
    "sigmoid_top_k",
    "softmax_top_k",
    "update_bias",
]

Kind = Literal["softmax", "sigmoid", "group_limited"]


@dataclasses.dataclass(frozen=True)
class Router:
    """The settings of a router, as the layers take them; hashable.

    Attributes:
        kind: "softmax", "sigmoid" or "group_limited".
        renormalize: Divide the weights by their sum over the k experts.
        scale: Factor of the weights.
        num_groups: "group_limited" only: see ``group_limited_top_k``.
        top_groups: "group_limited" only.
        scoring: "group_limited" only.
        noise_std: Standard deviation of Gaussian noise on the logits, which lets tokens try experts
            that they would not choose (Shazeer et al. 2017, arXiv:1701.06538, section 2.1, without
            the learned scale). It takes a key, which a training step gives; without one, as in
            evaluation, there is no noise. As there, the choice, the weights and the scores are all
            made from the logits with noise.
    """

    kind: Kind = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int | None = None
    top_groups: int | None = None
    scoring: Scoring = "sigmoid"
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        arguments.check_one_of(
            "routing.Router", "kind", self.kind, ("softmax", "sigmoid", "group_limited")
        )
        self._check_noise_std()
        grouped = self.num_groups is not None and self.top_groups is not None
        if self.kind == "group_limited" and not grouped:
            raise arguments.value_error(
                "routing.Router",
                "num_groups",
                "num_groups and top_groups with kind 'group_limited'",
                f"{self.num_groups} and {self.top_groups}",
                "pass routing.Router('group_limited', num_groups=8, top_groups=4) or the like",
            )

    def _check_noise_std(self) -> None:
        std: Any = self.noise_std
        wanted, fix = "a finite number, 0 or more", "pass the standard deviation as a Python float"
        if isinstance(std, bool) or not isinstance(std, int | float):
            got = type(std).__name__
            raise arguments.type_error("routing.Router", "noise_std", wanted, got, fix)
        if not (math.isfinite(std) and std >= 0):
            raise arguments.value_error("routing.Router", "noise_std", wanted, std, fix)

    def __call__(
        self,
        logits: Float[Array, "tokens experts"],
        k: int,
        bias: Float32[Array, " experts"] | None = None,
        *,
        num_used_experts: int | None = None,
        key: PRNGKeyArray | None = None,
        token_idx: Int32[Array, " tokens"] | None = None,
    ) -> Routing:
        """Route tokens to their ``k`` experts.

        Args:
            logits: ``[T, E]`` of any float dtype.
            k: Experts per token.
            bias: ``[E]`` added to the scores for the choice only; it has no gradient.
            num_used_experts: Only this many experts exist, those with the lowest ids. None: all.
            key: Key of ``jax.random`` for the noise; None for no noise.
            token_idx: ``[T]`` int32 indices of these tokens in the whole batch, which the noise of each
                depends on. None stands for 0 to T − 1.

        Returns:
            The routes.

        Raises:
            TypeError: if ``logits`` is no array, or ``k`` or ``num_used_experts`` no int.
            ValueError: if the sizes do not fit each other, or if there is a key for a router without
                noise.
        """
        if key is not None:
            op = "routing.Router"
            if self.noise_std == 0:
                raise arguments.value_error(
                    op, "key", "None without noise", "a key", "set noise_std, or leave the key out"
                )
            check_logits(op, logits)
            used = logits.shape[1] if num_used_experts is None else num_used_experts
            check_num_used(op, used, logits.shape[1])
            if token_idx is None:
                token_idx = jnp.arange(logits.shape[0], dtype=jnp.int32)
            logits = logits.astype(jnp.float32)
            logits = add_noise(logits, seed_of(key), token_idx, self.noise_std, used)
        if self.kind == "group_limited":
            assert self.num_groups is not None and self.top_groups is not None  # __post_init__
            return group_limited_top_k(
                logits,
                k,
                num_groups=self.num_groups,
                top_groups=self.top_groups,
                bias=bias,
                renormalize=self.renormalize,
                scale=self.scale,
                scoring=self.scoring,
                num_used_experts=num_used_experts,
            )
        top_k = softmax_top_k if self.kind == "softmax" else sigmoid_top_k
        return top_k(
            logits,
            k,
            bias=bias,
            renormalize=self.renormalize,
            scale=self.scale,
            num_used_experts=num_used_experts,
        )
