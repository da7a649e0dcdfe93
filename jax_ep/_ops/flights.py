"""Which ops of a trace are in flight, between their start and done halves.

Each op in flight holds a channel of its group. Ops on one channel run one after the other, because a
channel is also a stream of XLA's; those on different channels may run at the same time, so together
they have to leave room for what else waits on the GPU. Both are decided while JAX traces: an op that
starts with no other in flight has all its SMs, and one that starts beside others has what they leave.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from jax_ep import _compat
from jax_ep._core import arguments
from jax_ep._core.flight import IN_LINE, Flight
from jax_ep._groups import gpu_side
from jax_ep._groups.group import Group, free_sms_of
from jax_ep._groups.room import MOST_CHANNELS

# How an op is issued, given the SMs that it or its gradient takes if it can, and whether latency mode
# runs it.
Issue = Callable[[int, bool], Flight]

_FEWEST_SMS = 2

logger = logging.getLogger("jax_ep")


@dataclasses.dataclass(eq=False)
class Opened:
    """An op in flight; not equal to any other.

    Attributes:
        group_id: Of its group.
        channel: The channel that it holds.
        num_sms: The SMs that it may occupy, it or its gradient.
        trace: The trace that it was started in.
        free_sms: The SMs that it leaves to compute, with the ops on other channels that were in flight
            when it started; None where it holds none.
        is_open: Whether it is not done yet.
    """

    group_id: int
    channel: int
    num_sms: int
    trace: Any
    free_sms: int | None = None
    is_open: bool = True


_all: weakref.WeakSet[Opened] = weakref.WeakSet()  # tickets keep them


def in_line(group: Group, num_sms: int) -> Flight:
    """How to issue an op in the order of the program, which takes ``num_sms`` SMs if it can."""
    return _limited(group, 0, num_sms)


def take_off(
    op: str, group: Group, num_sms: int, after: Opened | None = None, *, latency: bool = False
) -> tuple[Flight, Opened]:
    """Put an op in flight.

    Args:
        op: For errors.
        group: Its group.
        num_sms: The SMs that it or its gradient takes if it can.
        after: An op that begins before this one, which takes over its channel. In latency mode this
            one takes another, because a channel is held by one op there until that is done.
        latency: Whether latency mode runs it, in two calls in line with the program.

    Raises:
        ValueError: if all channels of the group are held, or it lacks the channel of ``after``.
    """
    latency = latency and group.backend == "cuda"
    if after is not None and not latency:
        channel = after.channel
        if channel > group.channels:
            raise arguments.value_error(
                op,
                "after",
                f"a ticket on one of the {group.channels} channels of the group",
                f"one on channel {channel} of another group",
                f"make the group with create_group(channels={channel})",
            )
    else:
        held = {o.channel for o in _in_flight() if o.group_id == group.id}
        free = [c for c in range(1, group.channels + 1) if c not in held]
        if not free:
            fix = "finish one with its done half"
            if not latency:
                fix += ", or order this op behind one with after="
            if (more := group.channels + 1) <= MOST_CHANNELS:
                fix = f"{more} ops in flight at once take create_group(channels={more}); else {fix}"
            raise arguments.value_error(
                op,
                "group",
                "a group with a channel that no op in flight holds",
                f"one of create_group(channels={group.channels}), all held by tickets that are not "
                "done",
                fix,
            )
        channel = free[0]
    flight = _limited(group, channel, num_sms)
    if latency:  # nothing of the op runs between its calls
        opened = Opened(group.id, channel, 0, _compat.trace_state())
        _all.add(opened)
        return flight, opened
    most = num_sms if flight.most_sms is None else min(num_sms, flight.most_sms)
    if group.backend == "cuda":
        most = min(most, gpu_side.max_blocks(group.id))
    opened = Opened(group.id, channel, most, _compat.trace_state())
    if why := why_in_line(group):
        _warn_of_start(why)
        flight = dataclasses.replace(flight, channel=0)
    elif group.backend == "cuda":
        taken = most + sum(_taken_beside(channel).values())
        opened.free_sms = free_sms_of(group, taken)
    _all.add(opened)
    return flight, opened


def why_in_line(group: Group) -> str | None:
    """Why starts of a group of GPUs do all the work in line with the program, or None.

    Those of latency mode never do.
    """
    if group.backend != "cuda":
        return None
    if group.transport != "peer":
        return "the group spans hosts"
    if (why := gpu_side.why_staged(group.id)) is not None:
        return f"operands are copied before peers read them, because {why}"
    return None


def _in_flight() -> list[Opened]:
    """The ops of the current trace that are not done."""
    state = _compat.trace_state()
    return [opened for opened in _all if opened.is_open and opened.trace == state]


def _limited(group: Group, channel: int, num_sms: int) -> Flight:
    """A flight whose SMs fit beside those of ops on other channels, of any group."""
    if group.backend != "cuda":
        return dataclasses.replace(IN_LINE, channel=channel)
    taken = _taken_beside(channel)
    if not taken:
        return Flight(channel)
    left = max(gpu_side.max_blocks(group.id) - sum(taken.values()), _FEWEST_SMS)
    return Flight(channel, left if left < num_sms else None)


def _taken_beside(channel: int) -> dict[int, int]:
    """The SMs that ops in flight on other channels may occupy, by channel."""
    taken: dict[int, int] = {}
    for other in _in_flight():
        if other.channel != channel:
            taken[other.channel] = max(taken.get(other.channel, 0), other.num_sms)
    return taken


@functools.cache
def _warn_of_start(why: str) -> None:
    logger.warning("start halves do all the work, and nothing overlaps: %s", why)
