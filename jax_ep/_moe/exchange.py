"""The way of a rank's tokens to their experts and back: at once, or in chunks behind each other.

With chunks, the ops are in flight in this order, each over the experts of the chunk before it::

    dispatch 0 | dispatch 1 | combine 0 | dispatch 2 | combine 1 | ... | combine n - 1
               | experts 0    | experts 1              | experts 2 ...

All share one channel of the group, so each has the whole link, and at most two chunks of rows are
there at once. They are ops of throughput mode: those of latency mode would hold a channel each. The
backward pass goes the other way along the same order.

On GPUs the first dispatch and the last combine are beside no experts, in both passes, so they take all
their SMs. Those between them take only the SMs that keep the link busy, and the experts are told how
many that leaves them (``Beside``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_ep import _compat
from jax_ep._core.capacity import round_up
from jax_ep._core.numerics import expert_ids
from jax_ep._core.quota import sanitise
from jax_ep._core.types import DispatchConfig, Dispatched, without_latency
from jax_ep._groups.group import Group, link_sms_of
from jax_ep._moe.experts import Beside
from jax_ep._ops.combine import combine
from jax_ep._ops.dispatch import dispatch
from jax_ep._ops.flights import why_in_line
from jax_ep._ops.overlap import Ticket, combine_done, combine_start, dispatch_done, dispatch_start

Experts = Callable[[Dispatched, Beside], Float[Array, "rows hidden"]]


class Exchanged(NamedTuple):
    """What came home.

    Attributes:
        y: ``[T, H]``, the sums of the experts' outputs.
        topk_idx: ``[T, K]``, the routes that were chosen, dropped ones too; −1 where there is none.
        num_dropped: ``[1]`` rows of this rank's experts that did not fit.
        num_invalid: ``[1]`` choices of this rank's tokens that were invalid.
    """

    y: Float[Array, "tokens hidden"]
    topk_idx: Int32[Array, "tokens top_k"]
    num_dropped: Int32[Array, "1"]
    num_invalid: Int32[Array, "1"]


def exchange(
    x: Float[Array, "tokens hidden"],
    topk_idx: Int32[Array, "tokens top_k"],
    topk_weights: Float[Array, "tokens top_k"],
    experts: Experts,
    *,
    in_flight: bool = False,
    num_chunks: int = 1,
    **options: Any,
) -> Exchanged:
    """Send tokens to their experts, and sum what comes back.

    Args:
        x: As in ``dispatch``, as are the next two.
        topk_idx: The experts of each token.
        topk_weights: Their weights.
        experts: Computes on the rows that came, beside what it is told.
        in_flight: Whether the ops are in flight, so that independent work may run beside them.
        num_chunks: In how many parts, of equal numbers of tokens up to one; fewer if there are fewer
            tokens.
        **options: Of ``dispatch``. ``capacity`` is divided among the chunks, and
            ``capacity_factor`` holds for each.
    """
    group = options["group"]
    if not in_flight:
        out = dispatch(x, topk_idx, topk_weights, **options)
        y = combine(experts(out, Beside()), out.handle, group=group)
        return _chosen(_exchanged([out], [y]), topk_idx, options)
    sizes = chunk_sizes(len(x), num_chunks)
    # The transpose of a split joins the parts. That of slices would add zeros to them.
    parts = zip(*(_split(array, sizes) for array in (x, topk_idx, topk_weights)), strict=True)
    bounds = [options | capacity_of_chunk(options, size, len(x)) for size in sizes]
    waiting = list(zip(parts, bounds, strict=True))

    config = without_latency(options.get("config"))
    hidden = config_of_hidden(config, group)

    def start(after: Ticket | None) -> Ticket:
        part, bounded = waiting.pop(0)
        how = {"config": config if after is None else hidden}
        return dispatch_start(*part, after=after, **(bounded | how))

    outs: list[Dispatched] = []
    combines: list[Ticket] = []
    dispatches = [start(None)]
    last = dispatches[0]
    for index in range(len(sizes)):
        beside = combines[-1:]
        if waiting:
            last = start(last)
            dispatches.append(last)
            beside.append(last)
        out = dispatch_done(dispatches.pop(0))
        rows = experts(out, _beside(beside))
        how = hidden if index + 1 < len(sizes) else config
        last = combine_start(rows, out.handle, group=group, after=last, config=how)
        outs.append(out)
        combines.append(last)
    found = _exchanged(outs, [combine_done(ticket) for ticket in combines])
    return _chosen(found, topk_idx, options)


def config_of_hidden(config: DispatchConfig | None, group: Group) -> DispatchConfig | None:
    """How an op that is beside experts uses the machine: as ``config`` says, else with few SMs."""
    flies = group.backend == "cuda" and why_in_line(group) is None
    if not flies or (config is not None and config.num_sms is not None):
        return config
    return dataclasses.replace(config or DispatchConfig(), num_sms=link_sms_of(group))


def _beside(tickets: list[Ticket]) -> Beside:
    """What experts are beside while these are in flight, one after the other."""
    free = [ticket.free_sms for ticket in tickets if ticket.free_sms is not None]
    return Beside(min(free), len(free)) if free else Beside()


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Tokens of each chunk: equal numbers, but one more in the first ones."""
    count = max(min(num_chunks, num_tokens), 1)
    return [num_tokens // count + (i < num_tokens % count) for i in range(count)]


def capacity_of_chunk(options: dict[str, Any], size: int, num_tokens: int) -> dict[str, Any]:
    """The part of ``capacity`` that a chunk gets: that of its tokens, rounded up to the alignment."""
    capacity, alignment = options.get("capacity"), options.get("alignment") or 1
    if capacity is None:
        return {}
    return {"capacity": round_up(math.ceil(capacity * size / num_tokens), alignment)}


def _split(array: Array, sizes: list[int]) -> list[Array]:
    return [array] if len(sizes) == 1 else list(lax.split(array, sizes))


def _chosen(found: Exchanged, topk_idx: Array, options: dict[str, Any]) -> Exchanged:
    """With the routes that were chosen where quotas took some out of the handle's."""
    if options.get("drop_policy") != "score":
        return found
    chosen, _ = sanitise(expert_ids(topk_idx), options["num_experts"])
    axes = _compat.varying_axes(found.topk_idx)
    return found._replace(topk_idx=_compat.cast_varying(chosen, axes))


def _exchanged(outs: list[Dispatched], ys: list[Array]) -> Exchanged:
    if len(outs) == 1:
        (out,) = outs
        return Exchanged(ys[0], out.handle.topk_idx, out.num_dropped, out.num_invalid)
    return Exchanged(
        jnp.concatenate(ys),
        jnp.concatenate([out.handle.topk_idx for out in outs]),
        jnp.stack([out.num_dropped for out in outs]).sum(axis=0, dtype=jnp.int32),
        jnp.stack([out.num_invalid for out in outs]).sum(axis=0, dtype=jnp.int32),
    )
