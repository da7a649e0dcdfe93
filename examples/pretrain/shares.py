"""The share of a step's time that plans, dispatches and combines take, from a profile of the step.

An op's time is from its start to its end on a device, so it includes the wait for other ranks. Times
of both passes count, and ops that run at once count once.

A GPU's kernels are known by their names. On CPU the profile has the instructions of the program: an op
starts with an event of its name and ends, perhaps on another thread, with another event that has the
number of the first. What an instruction calls is in the text of the compiled program.
"""

from __future__ import annotations

import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from jax_ep.bench import trace

_KINDS = ("plan", "dispatch", "combine")
SHARES = (*(f"{kind}_share" for kind in _KINDS), "exchange_share", "exposed_share")
# Kernels of csrc/cuda by their names, which are mangled or not. The casts are parts of dispatch.
_KERNELS = {
    "plan": re.compile(r"jax_ep.*(PushPlan|Count|Number|Choose|Place)Kernel"),
    "dispatch": re.compile(r"jax_ep.*(Dispatch|Cast|Quantize|Dequantize)Kernel"),
    "combine": re.compile(r"jax_ep.*Combine(Vjp)?Kernel"),
}
_INSTRUCTION = re.compile(
    r"^ *(?:ROOT )?%?(\S+) = .*custom_call_target=\"jax_ep_(?:\w+_)?(plan|dispatch|combine)", re.M
)
# Batches that come and metrics that go are no work of the step.
_TO_AND_FRO = ("MemcpyH2D", "MemcpyD2H")


class Event(NamedTuple):
    """Something that ran on a device.

    Attributes:
        kind: "plan", "dispatch", "combine"; None for everything else.
        start: When it began, in any unit.
        end: When it had ended.
    """

    kind: str | None
    start: float
    end: float


def read(folder: pathlib.Path, program: Callable[[], str] | None) -> dict[str, float]:
    """The shares in the profile that ``jax.profiler`` has written to ``folder``.

    Args:
        folder: With one profile.
        program: Gives the text of the compiled step, if it ran on CPU devices; None if not.

    Returns:
        ``plan_share``, ``dispatch_share``, ``combine_share``, and ``exchange_share`` for all three.
        Each is the ops' time over that from the first to the last event, and a mean over the devices in
        the profile. On GPUs also ``exposed_share``, the time in which only these ops ran. Nothing if
        there is no op of jax_ep, as where its reference backend runs.
    """
    events: Mapping[Any, list[Event]]
    events = _gpu_events(folder) if program is None else _cpu_events(folder, program())
    found = [_of_device(of_device) for of_device in events.values()]
    if not any(shares["exchange_share"] for shares in found):
        return {}
    mean = {name: sum(shares[name] for shares in found) / len(found) for name in found[0]}
    if program is not None:
        # A loop is an event too, from before its first instruction to after its last one.
        del mean["exposed_share"]
    return mean


def _of_device(events: list[Event]) -> dict[str, float]:
    span = max(event.end for event in events) - min(event.start for event in events)
    ops = [event for event in events if event.kind is not None]
    others = [event for event in events if event.kind is None]
    shares = {
        f"{kind}_share": _covered(event for event in ops if event.kind == kind) / span
        for kind in _KINDS
    }
    shares["exchange_share"] = _covered(ops) / span
    shares["exposed_share"] = (_covered(events) - _covered(others)) / span
    return shares


def _covered(events: Iterable[Event]) -> float:
    """The time in which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def _gpu_events(folder: pathlib.Path) -> dict[str, list[Event]]:
    """The kernels of each GPU in the profile."""
    found = {
        plane: [
            Event(kind_of_kernel(kernel.name), kernel.start, kernel.end)
            for kernel in kernels
            if not kernel.name.startswith(_TO_AND_FRO)
        ]
        for plane, kernels in trace.kernels_of(folder).items()
    }
    return {plane: events for plane, events in found.items() if events}


def kind_of_kernel(name: str) -> str | None:
    """What a kernel is a part of."""
    return next((kind for kind, pattern in _KERNELS.items() if pattern.search(name)), None)


def _cpu_events(folder: pathlib.Path, program: str) -> dict[int, list[Event]]:
    """The instructions that each CPU device ran."""
    (path,) = folder.rglob("*.xplane.pb")
    module = program.split(maxsplit=2)[1].rstrip(",")
    kinds = dict(_INSTRUCTION.findall(program))
    starts: list[tuple[int, str, int, float, float]] = []
    ends: dict[tuple[str, int], float] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            start, end = event.start_ns, event.start_ns + event.duration_ns
            details = _details(event)
            if event.name.startswith("end: "):
                ends[event.name.removeprefix("end: "), details.get("_c", 0)] = end
            elif details.get("hlo_module") == module:
                device, number = int(details["device_ordinal"]), details.get("_p", 0)
                starts.append((device, event.name, number, start, end))
    found: dict[int, list[Event]] = {}
    for device, name, number, start, end in starts:
        end = max(end, ends.get((name, number), end))
        found.setdefault(device, []).append(Event(kinds.get(name), start, end))
    return found


def _details(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The first look warns about the binding's own type (jaxlib 0.11.2), and a process in which
        # warnings are errors would end there, inside native code.
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(event.stats)
