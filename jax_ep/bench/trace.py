"""Kernels in a profile: when each ran, on which stream, and how much of an op others ran beside."""

from __future__ import annotations

import gzip
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Kernels of a CUDA graph may be one event of a profile, so the programs of profiles have no graphs.
WITHOUT_GRAPHS: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1_000_000}


class Event(NamedTuple):
    """A kernel in a profile.

    Attributes:
        line: The stream that it ran on.
        name: Its name.
        blocks: The first number of its grid; 0 where the profile does not say.
        start: When it began, in nanoseconds.
        end: When it had ended.
    """

    line: str
    name: str
    blocks: int
    start: float
    end: float

    @property
    def is_op(self) -> bool:
        """Whether it moves rows."""
        return "Dispatch" in self.name or "Combine" in self.name

    def overlaps(self, other: Event) -> bool:
        """Whether both ran at the same time."""
        return min(self.end, other.end) > max(self.start, other.start)


def kernels_of(folder: pathlib.Path) -> dict[str, list[Event]]:
    """The kernels of a profile, by GPU, in the order in which they began.

    From the profile's JSON: ``jax.profiler.ProfileData`` ended the process where it read the details of
    some kernels (jaxlib 0.11.2).
    """
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    called = [event for event in events if event.get("ph") == "M"]
    planes = {e["pid"]: e["args"]["name"] for e in called if e["name"] == "process_name"}
    lines = {(e["pid"], e["tid"]): e["args"]["name"] for e in called if e["name"] == "thread_name"}
    found: dict[str, list[Event]] = {}
    for event in events:
        plane = planes.get(event.get("pid"), "")
        line = lines.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and plane.startswith("/device:GPU") and line.startswith("Stream"):
            found.setdefault(plane, []).append(_event(line, event))
    return {plane: sorted(kernels, key=lambda k: k.start) for plane, kernels in found.items()}


def _event(line: str, event: dict[str, Any]) -> Event:
    """An event of a profile; its times are in microseconds."""
    grid = re.search(r"grid:(\d+)", str(event.get("args", {}).get("kernel_details", "")))
    blocks = int(grid[1]) if grid else 0
    start, end = 1e3 * event["ts"], 1e3 * (event["ts"] + event["dur"])
    return Event(line, event["name"], blocks, start, end)


def hidden(op: Event, events: Sequence[Event]) -> float:
    """Nanoseconds of an op in which kernels on other streams, which move no rows, ran beside it."""
    beside = [e for e in events if not e.is_op and e.line != op.line and e.overlaps(op)]
    total, reached = 0.0, op.start
    for event in sorted(beside, key=lambda e: e.start):
        start, end = max(event.start, reached), min(event.end, op.end)
        total += max(end - start, 0.0)
        reached = max(reached, end)
    return total
