"""Dispatch and combine in two halves, so that other work can run between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_ep._core import arguments
from jax_ep._core.flight import Flight
from jax_ep._core.types import DispatchConfig, Dispatched, Handle, Quantized
from jax_ep._groups.group import Group
from jax_ep._ops import combine, dispatch, flights, halves
from jax_ep._ops.flights import Opened


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ticket:
    """An op in flight: give it to the done half of the same op, in the same function.

    A pytree that holds every buffer that the op uses until it is done. Not a result of ``jit`` and
    not a carry of ``scan``.

    Attributes:
        payload: What the done half gives back; in latency mode on GPUs, what it takes for that.
        op: "dispatch" or "combine".
        opened: Its place among the ops in flight.
    """

    payload: Any
    op: Literal["dispatch", "combine"] = dataclasses.field(metadata={"static": True})
    opened: Opened = dataclasses.field(metadata={"static": True})

    @property
    def free_sms(self) -> int | None:
        """SMs of a GPU that the op in flight, and its gradient, leave to work beside them.

        It is for ``grouped_dot(num_sms=ticket.free_sms)``. Ops that were in flight on other channels
        when this one started are counted too, so take the last of several tickets. None where no SM
        is held: on CPU, with the reference, in latency mode, and where the start half does all the
        work.
        """
        return self.opened.free_sms

    def beside(self, work: Callable[..., Any], *args: Any) -> tuple[Ticket, Any]:
        """Run ``work(*args)`` between the halves of the op.

        On GPUs an op of latency mode has two calls in line with the program, and XLA runs the second
        one right after the first, unless it is told what comes between. This tells it: the work
        depends on the first call, and the second call depends on the work. Elsewhere XLA finds such
        work itself, or has no use for it, so there this is only ``work(*args)``.

        Args:
            work: A function of arrays that returns arrays. It must need nothing that the op gives.
            *args: Its arguments, pytrees of arrays; at least one array.

        Returns:
            The ticket to give to the done half in place of this one, and the result of ``work``.

        Raises:
            TypeError: if there are no arguments, or if ``work`` returns no arrays with elements.
        """
        if not jax.tree.leaves(args):
            raise arguments.type_error(
                "Ticket.beside",
                "args",
                "the arrays that the work is computed from",
                "none",
                "give the work what it reads as arguments",
            )
        if not isinstance(self.payload, halves.Sent):
            return self, work(*args)
        payload, results = halves.run_between(self.payload, work, args)
        return dataclasses.replace(self, payload=payload), results


def dispatch_start(
    x: Array | Quantized, *args: Any, group: Group, after: Ticket | None = None, **kwargs: Any
) -> Ticket:
    """Begin a ``dispatch``; ``dispatch_done`` gives its result.

    Work that depends on neither half may run between them::

        ticket = jax_ep.dispatch_start(x, topk_idx, topk_weights, group=group, num_experts=E)
        shared = shared_expert(x)
        out = jax_ep.dispatch_done(ticket)

    Results and gradients are those of ``dispatch``, and the gradient is in flight in the same way: the
    backward pass of the done half starts it, and that of the start half finishes it. In forward mode
    the tangents are in flight on the same channel, behind the op. The plan of new routes runs at once,
    in line with the program; only the rows are in flight.

    On GPUs the op runs on a stream beside that of the program. XLA places the two halves: it moves
    independent work between them, wherever that work stands in the program. It looks for such work
    only in programs that hold a collective of XLA's own, such as the sum of gradients, or ``moe``'s
    statistics (jaxlib 0.10.2 and 0.11.2). An op in flight is not part of a command buffer (CUDA
    graph). On CPU, ops never block a thread, so XLA runs independent work beside each of them. Where
    a group of GPUs spans hosts or copies its operands (``python -m jax_ep.doctor`` says so), the start
    half does all the work, and a warning says so once. Mode "auto" is "throughput" here, however few
    the tokens are.

    In mode "latency" on GPUs the start half is a call that sends the rows and waits for nothing, and
    the done half is one that waits for the rows of the others. Both are in line with the program and
    may be part of a command buffer. Between them the op holds no SM, so work there has the whole GPU.
    ``Ticket.beside`` says which work XLA runs there::

        ticket = jax_ep.dispatch_start(x, topk_idx, group=group, num_experts=E, config=latency)
        ticket, shared = ticket.beside(shared_expert, x)
        out = jax_ep.dispatch_done(ticket)

    The gradient of such an op is in line with the program.

    The op needs streaming multiprocessors (SMs) of its own. But a large matmul, XLA's as well as
    ``grouped_dot``, runs one block on each SM of the GPU until all of it is done. If the matmul begins
    first, the op waits for its end, and nothing is hidden. If the op begins first, the blocks that find
    no SM run in a second wave, and the matmul takes about twice as long. ``grouped_dot`` can leave the
    op its SMs::

        ticket = jax_ep.dispatch_start(x, topk_idx, topk_weights, group=group, num_experts=E)
        rows = jax_ep.grouped_dot(rows, matrices, group_sizes, num_sms=ticket.free_sms)
        out = jax_ep.dispatch_done(ticket)

    Only work that is about as long as the op should leave SMs: longer work loses them for its whole
    time. An op whose time is hidden may take fewer SMs itself (``DispatchConfig(num_sms=24)``).
    ``moe(overlap="chunks")`` does both. XLA's matmuls leave no SMs, so several short ones are better
    beside an op than one that is long: at most one of them waits or makes the op wait.

    A group has ``create_group(channels=)`` channels, 1 by default, and an op in flight holds one until
    its done half is called; so two in flight at once take ``channels=2``, unless one comes ``after=``
    the other. Ops on different channels may run at the same time. Then the one that was
    started later takes only the SMs that those before it leave of all but 32.

    Args:
        x: As in ``dispatch``.
        *args: As in ``dispatch``.
        group: As in ``dispatch``.
        after: A ticket of an op that must begin before this one. This op then takes over its channel,
            and begins where that op ends; so it counts as one more op in flight only once that is done.
            In mode "latency" on GPUs it takes a channel of its own, and only begins behind that op.
        **kwargs: As in ``dispatch``.

    Returns:
        The ticket for ``dispatch_done``.

    Raises:
        TypeError, ValueError: as ``dispatch``; ValueError also where all channels are held.
    """
    begin = _Start("dispatch_start", group, after)
    out = dispatch.dispatch_by(
        begin.issue,
        x,
        *args,
        group=group,
        order=begin.order,
        send=halves.dispatch_start,
        **kwargs,
    )
    return Ticket(out, op="dispatch", opened=begin.opened)


def dispatch_done(ticket: Ticket) -> Dispatched:
    """Finish the dispatch that ``ticket`` stands for.

    Args:
        ticket: What ``dispatch_start`` returned.

    Returns:
        As ``dispatch``.

    Raises:
        TypeError: if ``ticket`` is not a ticket of ``dispatch_start``.
    """
    payload = _finish(ticket, "dispatch")
    if not isinstance(payload, halves.SentDispatch):
        return payload
    return dispatch.dispatched(*halves.dispatch_done(payload))


def combine_start(
    rows: Float[Array, "*capacity hidden"],
    handle: Handle,
    *,
    group: Group,
    weights: Float[Array, "*capacity"] | None = None,
    after: Ticket | None = None,
    config: DispatchConfig | None = None,
) -> Ticket:
    """Begin a ``combine``; ``combine_done`` gives its result. See ``dispatch_start``.

    Args:
        rows: As in ``combine``.
        handle: As in ``combine``.
        group: As in ``combine``.
        weights: As in ``combine``.
        after: As in ``dispatch_start``.
        config: As in ``combine``.

    Returns:
        The ticket for ``combine_done``.

    Raises:
        TypeError, ValueError: as ``combine``; ValueError also where all channels are held.
    """
    begin = _Start("combine_start", group, after)
    y = combine.combine_by(
        begin.issue,
        rows,
        handle,
        group=group,
        weights=weights,
        config=config,
        order=begin.order,
        send=halves.combine_start,
    )
    return Ticket(y, op="combine", opened=begin.opened)


def combine_done(ticket: Ticket) -> Float[Array, "tokens hidden"]:
    """Finish the combine that ``ticket`` stands for.

    Args:
        ticket: What ``combine_start`` returned.

    Returns:
        As ``combine``.

    Raises:
        TypeError: if ``ticket`` is not a ticket of ``combine_start``.
    """
    payload = _finish(ticket, "combine")
    if not isinstance(payload, halves.SentCombine):
        return payload
    return combine.combined(halves.combine_done(payload))


class _Start:
    """What a start half tells the op: the flight that it takes, and what it comes after.

    Attributes:
        opened: The op in flight, once ``issue`` was called.
    """

    opened: Opened

    def __init__(self, op: str, group: Group, after: Ticket | None) -> None:
        if after is not None and not isinstance(after, Ticket):
            raise arguments.type_error(
                op,
                "after",
                "a Ticket or None",
                type(after).__name__,
                "pass what a start half returned",
            )
        self._op, self._group, self._after = op, group, after
        self._chained = False

    def issue(self, num_sms: int, latency: bool) -> Flight:
        """Put the op in flight."""
        after = None if self._after is None else self._after.opened
        flight, self.opened = flights.take_off(
            self._op, self._group, num_sms, after, latency=latency
        )
        # On GPUs the calls of a channel are ordered themselves (_backends/region.py), and those of
        # latency mode are all in line with the program. Other ops are on streams of their own.
        behind_latency = self._after is not None and isinstance(self._after.payload, halves.Sent)
        self._chained = self._group.backend == "cuda" and latency == behind_latency
        return flight

    def order(self, routes: Any) -> Any:
        """``routes``, available only once the op that comes before has given its first result."""
        if self._after is None or self._chained:
            return routes
        first = lax.stop_gradient(jax.tree.leaves(self._after)[0].reshape(-1)[:1])
        # Never true, but XLA cannot know that. From a barrier, XLA would drop an operand whose result
        # is not used.
        never = ((first > 0) & (first < 0)).any()
        return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), routes)


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
    ticket.opened.is_open = False
    return ticket.payload
