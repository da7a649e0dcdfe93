"""Dispatch and combine in two halves, so that other work can run between them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_ep._core import arguments
from jax_ep._core.types import DispatchConfig, Dispatched, Handle, Quantized
from jax_ep._groups.group import Group
from jax_ep._ops.combine import combine
from jax_ep._ops.dispatch import dispatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ticket:
    """An op in flight: give it to the done half of the same op, in the same function.

    A pytree that holds every buffer that the op uses until it is done. Not a result of ``jit`` and
    not a carry of ``scan``.

    Attributes:
        payload: What the done half gives back.
        op: "dispatch" or "combine".
    """

    payload: Any
    op: Literal["dispatch", "combine"] = dataclasses.field(metadata={"static": True})


def dispatch_start(
    x: Array | Quantized, *args: Any, group: Group, after: Ticket | None = None, **kwargs: Any
) -> Ticket:
    """Begin a ``dispatch``; ``dispatch_done`` gives its result.

    Work that depends on neither half may run between them::

        ticket = jax_ep.dispatch_start(x, topk_idx, topk_weights, group=group, num_experts=E)
        shared = shared_expert(x)
        out = jax_ep.dispatch_done(ticket)

    Results and gradients are those of ``dispatch``. So far all backends do all the work in this half;
    on CPU, XLA still runs independent work beside it, since ops never block a thread there.

    Args:
        x: As in ``dispatch``.
        *args: As in ``dispatch``.
        group: As in ``dispatch``.
        after: A ticket of an op that must begin before this one.
        **kwargs: As in ``dispatch``.

    Returns:
        The ticket for ``dispatch_done``.

    Raises:
        TypeError, ValueError: as ``dispatch``.
    """
    x = _order(x, after, "dispatch_start")
    return Ticket(dispatch(x, *args, group=group, **kwargs), op="dispatch")


def dispatch_done(ticket: Ticket) -> Dispatched:
    """Finish the dispatch that ``ticket`` stands for.

    Args:
        ticket: What ``dispatch_start`` returned.

    Returns:
        As ``dispatch``.

    Raises:
        TypeError: if ``ticket`` is not a ticket of ``dispatch_start``.
    """
    return _finish(ticket, "dispatch")


def combine_start(
    rows: Float[Array, "capacity hidden"],
    handle: Handle,
    *,
    group: Group,
    weights: Float[Array, " capacity"] | None = None,
    after: Ticket | None = None,
    config: DispatchConfig | None = None,
) -> Ticket:
    """Begin a ``combine``; ``combine_done`` gives its result. See ``dispatch_start``.

    Args:
        rows: As in ``combine``.
        handle: As in ``combine``.
        group: As in ``combine``.
        weights: As in ``combine``.
        after: A ticket of an op that must begin before this one.
        config: As in ``combine``.

    Returns:
        The ticket for ``combine_done``.

    Raises:
        TypeError, ValueError: as ``combine``.
    """
    rows = _order(rows, after, "combine_start")
    y = combine(rows, handle, group=group, weights=weights, config=config)
    return Ticket(y, op="combine")


def combine_done(ticket: Ticket) -> Float[Array, "tokens hidden"]:
    """Finish the combine that ``ticket`` stands for.

    Args:
        ticket: What ``combine_start`` returned.

    Returns:
        As ``combine``.

    Raises:
        TypeError: if ``ticket`` is not a ticket of ``combine_start``.
    """
    return _finish(ticket, "combine")


def _order(x: Any, after: Ticket | None, op: str) -> Any:
    """``x``, available only once the op of ``after`` has given its first result."""
    if after is None:
        return x
    if not isinstance(after, Ticket):
        raise arguments.type_error(
            op, "after", "a Ticket or None", type(after).__name__, "pass what a start half returned"
        )
    first = lax.stop_gradient(jax.tree.leaves(after)[0].reshape(-1)[:1])
    # Never true, but XLA cannot know that. From a barrier, XLA would drop an operand whose result
    # is not used.
    never = ((first > 0) & (first < 0)).any()
    return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), x)


def _finish(ticket: Any, op: str) -> Any:
    if not isinstance(ticket, Ticket) or ticket.op != op:
        is_ticket = isinstance(ticket, Ticket)
        got = f"a ticket of {ticket.op}_start" if is_ticket else type(ticket).__name__
        raise arguments.type_error(
            f"{op}_done",
            "ticket",
            f"the ticket of {op}_start",
            got,
            "finish each op with the done half of its own kind",
        )
    return ticket.payload
