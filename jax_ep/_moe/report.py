"""What ``moe`` reports besides its output: losses and statistics over all tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jax_ep.routing import (
    Routing,
    expert_load,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)


class MoEAux(NamedTuple):
    """What a mixture-of-experts layer reports besides its output.

    Losses and statistics are those of all tokens, the same on every device. Losses are not yet scaled.

    Attributes:
        aux_loss: Scalar load-balancing loss (``routing.load_balancing_loss``): 1 where all experts are
            used equally. None for routes without scores that ``moe`` was given.
        load: ``[E]`` int32 routes to each expert from all tokens, dropped ones included.
        num_dropped: Scalar int32, (token, expert) pairs that did not fit the capacity.
        num_invalid: Scalar int32, entries of a custom router out of range or repeated.
        z_loss: Scalar router z-loss of the logits (``routing.router_z_loss``). None for routes that
            ``moe`` was given, which have no logits.
        sequence_loss: Scalar load-balancing loss within each sequence
            (``routing.sequence_balancing_loss``) of the K experts of the largest scores. None without
            ``sequence_loss=True``.
        routing: The routes that were taken, split and shaped as ``x`` is: ``topk_idx`` ``[..., K]``,
            −1 for none, ``topk_weights`` ``[..., K]``, 0 there, and ``scores`` ``[..., E]``, 0 for
            masked tokens. With them as ``routing``, the layer gives the same output. None without
            ``return_routing=True``.
        logits: ``[..., E]`` float32, without noise, 0 for masked tokens. None without
            ``return_routing=True``, and for routes that ``moe`` was given.
    """

    # The types are those of calls with a router; only a call without one has neither of two losses.
    aux_loss: Float32[Array, ""]
    load: Int32[Array, " experts"]
    num_dropped: Int32[Array, ""]
    num_invalid: Int32[Array, ""]
    z_loss: Float32[Array, ""] = None  # type: ignore[assignment]
    sequence_loss: Float32[Array, ""] | None = None
    routing: Routing | None = None
    logits: Float32[Array, "*batch experts"] | None = None


class Parts(NamedTuple):
    """Which parts a report has besides the statistics.

    Attributes:
        scores: Those that follow from scores: the load-balancing loss.
        logits: Those that follow from logits: the z-loss.
        sequence_loss: As ``moe`` takes it.
        routing: The routes, with logits if there are any.
    """

    scores: bool
    logits: bool
    sequence_loss: bool
    routing: bool

    @classmethod
    def of(cls, routing: Any, *, sequence_loss: Any, return_routing: Any) -> Parts:
        """Those of a call of ``moe`` with these arguments, which are not checked yet."""
        has_scores = not isinstance(routing, Routing) or routing.scores is not None
        return cls(has_scores, routing is None, sequence_loss, return_routing)

    def fill(self, statistic: Any, loss: Any, of_tokens: Any) -> MoEAux:
        """A report with one value for each statistic, each loss and each array of the tokens."""
        routes = Routing(of_tokens, of_tokens, of_tokens if self.scores else None)
        none: Any = None
        return MoEAux(
            aux_loss=loss if self.scores else none,
            load=statistic,
            num_dropped=statistic,
            num_invalid=statistic,
            z_loss=loss if self.logits else none,
            sequence_loss=loss if self.sequence_loss else None,
            routing=routes if self.routing else None,
            logits=of_tokens if self.routing and self.logits else None,
        )


class Sequences(NamedTuple):
    """How the tokens of all ranks, one after the other, form sequences.

    Attributes:
        number: How many there are.
        length: Tokens of each.
    """

    number: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Sequences:
        """Those of tokens ``[..., S, H]``; those of ``[T, H]`` are one."""
        return cls(math.prod(shape[:-2]), math.prod(shape[-2:-1]))


def report(
    topk_idx: Int32[Array, "tokens top_k"],
    routing: Routing,
    logits: Float32[Array, "tokens experts"] | None,
    mask: Bool[Array, " tokens"] | None,
    *,
    num_dropped: Int32[Array, "1"],
    num_invalid: Int32[Array, "1"],
    num_experts: int,
    num_used_experts: int,
    axis_names: tuple[str, ...],
    parts: Parts,
    sequences: Sequences,
    token_idx: Int32[Array, " tokens"] | None,
) -> MoEAux:
    """The report of the tokens of all ranks along ``axis_names``.

    Args:
        topk_idx: The routes that were taken.
        routing: The routes that were chosen.
        logits: Those that they were made from; None where no router ran.
        mask: The tokens that take part; None for all.
        num_dropped: Of this rank.
        num_invalid: Likewise.
        num_experts: E.
        num_used_experts: Of these exist.
        axis_names: Mesh axes that the tokens are split over.
        parts: What the report has.
        sequences: Those of the tokens.
        token_idx: Indices of this rank's tokens among all; only a ``sequence_loss`` needs them.
    """
    counts = (
        expert_load(topk_idx, num_experts),
        num_dropped.sum(dtype=jnp.int32),
        num_invalid.sum(dtype=jnp.int32),
    )
    load, dropped, invalid = lax.psum(counts, axis_names)
    scores = routing.scores
    over: dict[str, Any] = {"axis_names": axis_names, "num_used_experts": num_used_experts}
    aux_loss: Any = None if scores is None else load_balancing_loss(topk_idx, scores, **over)
    z_loss: Any = None if logits is None else router_z_loss(logits, mask=mask, **over)
    sequence_loss = routes = None
    if parts.sequence_loss:
        assert scores is not None and token_idx is not None
        best = lax.top_k(scores[:, :num_used_experts], topk_idx.shape[1])[1]
        best = best if mask is None else jnp.where(mask[:, None], best, -1)
        sequence_idx = token_idx // max(sequences.length, 1)
        sequence_loss = sequence_balancing_loss(
            best, scores, sequence_idx, sequences.number, **over
        )
    if parts.routing:
        weights = jnp.where(topk_idx >= 0, routing.topk_weights, 0)
        if scores is not None:  # those of a custom router are of the experts that exist
            scores = jnp.pad(scores, ((0, 0), (0, num_experts - scores.shape[1])))
            scores = scores if mask is None else jnp.where(mask[:, None], scores, 0)
        routes = Routing(topk_idx, weights, scores)
    return MoEAux(
        aux_loss=aux_loss,
        load=load,
        num_dropped=dropped,
        num_invalid=invalid,
        z_loss=z_loss,
        sequence_loss=sequence_loss,
        routing=routes,
        logits=logits if parts.routing else None,
    )


def report_of_no_token(
    parts: Parts, batch: tuple[int, ...], *, num_experts: int, top_k: int
) -> MoEAux:
    """The report of a batch without a token, or of tokens without a channel."""
    zero, of_experts = jnp.int32(0), jnp.zeros((*batch, num_experts), jnp.float32)
    aux = parts.fill(zero, jnp.float32(0), of_experts)
    aux = aux._replace(load=jnp.zeros((num_experts,), jnp.int32))
    if aux.routing is None:
        return aux
    shape = (*batch, top_k)
    none = aux.routing._replace(
        topk_idx=jnp.full(shape, -1, jnp.int32), topk_weights=jnp.zeros(shape, jnp.float32)
    )
    return aux._replace(routing=none)
