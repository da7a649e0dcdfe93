"""Tries the network out between all ranks of a group, by the ops themselves.

All processes of the group run the same steps. They agree beforehand on how many there are, so that none
waits for others that have stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_ep import _compat
from jax_ep._groups import network
from jax_ep._groups.group import Group
from jax_ep.doctor import finding, programs, table
from jax_ep.doctor.finding import Finding

_GATHER_TIMEOUT_S = 120.0  # for what all processes say
_SHARE = 1 / 3  # of the time, for each of latency, bandwidth and load
_MOST_CALLS = 10_000
_KEY = "jax_ep/doctor/"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the programs are.

    Attributes:
        hidden: H of the rows that are timed, in bfloat16.
        num_tokens: Of them, where the bandwidth is timed; the latency is that of one.
        latency_trips: Round trips in a program that times the latency.
        bandwidth_trips: The same for the bandwidth.
        repeats: How often a pair is timed; the shortest time counts.
        load_tokens: T of each rank under load.
        load_hidden: H under load, in float32.
        load_top_k: K under load, at most.
        load_steps: Steps of a program under load.
    """

    hidden: int = 7168
    num_tokens: int = 4096
    latency_trips: int = 64
    bandwidth_trips: int = 4
    repeats: int = 3
    load_tokens: int = 256
    load_hidden: int = 256
    load_top_k: int = 4
    load_steps: int = 64

    @classmethod
    def of(cls, group: Group) -> Sizes:
        """Those that suit a group."""
        limits = network.settings_of(group.id) if group.transport == "nvshmem" else None
        return cls.fitting(group.mesh.devices.flat[0].platform, limits)

    @classmethod
    def fitting(cls, platform: str, limits: network.Settings | None) -> Sizes:
        """Those that suit devices of a platform, and that the network's settings have room for."""
        if platform != "gpu":
            return cls(
                hidden=128,
                num_tokens=64,
                latency_trips=4,
                bandwidth_trips=2,
                load_tokens=32,
                load_hidden=64,
                load_steps=16,
            )
        sizes = cls()
        if limits is None:
            return sizes
        most = limits.max_choices
        return dataclasses.replace(
            sizes,
            hidden=min(sizes.hidden, limits.max_row_bytes // 2 // 128 * 128),
            num_tokens=min(sizes.num_tokens, most),
            load_tokens=max(1, min(sizes.load_tokens, most // sizes.load_top_k)),
        )


class SelfTest:
    """The test of one group; ``tables`` has what it measured, as text, when it is over."""

    def __init__(self, group: Group, *, seconds: float, sizes: Sizes | None = None) -> None:
        self.group = group
        self.sizes = Sizes.of(group) if sizes is None else sizes
        self.seconds = seconds * _SHARE
        self.tables: list[str] = []
        self._num_gathered = 0
        self._hosts = {rank: i for i, host in enumerate(group.topology.hosts) for rank in host}
        me = jax.process_index()
        devices = enumerate(group.mesh.devices.flat)
        self._mine = [rank for rank, device in devices if device.process_index == me]

    def run(self) -> Iterator[Finding]:
        """Each part of the test in turn. After a part that fails or raises, there are no others."""
        for part in (self.reach, self.pairs, self.load):
            found = list(finding.of(part))
            yield from found
            if any(one.status == "fail" for one in found):
                return

    def reach(self) -> Iterator[Finding]:
        """Which ranks reach each other's network memory by loads and stores."""
        if self.group.transport != "nvshmem":
            return
        (row,) = self.group.topology.processes
        reaches = network.library().reaches
        matrix = np.array(self._gather([bool(reaches(process)) for process in row]))
        matrix = matrix[np.array(row)]  # by ranks: what is gathered is by processes
        self.tables.append(table.of_reach(matrix, self.group.topology.hosts))
        yield from reach_findings(matrix, self._hosts)

    def pairs(self) -> Iterator[Finding]:
        """Times between two ranks while all others are silent, and whether rows come back right."""
        sizes = self.sizes
        order = pairs_in_order(self.group.topology.hosts)
        times = []
        for name, num_tokens, num_trips in (
            ("latency", 1, sizes.latency_trips),
            ("bandwidth", sizes.num_tokens, sizes.bandwidth_trips),
        ):
            program = programs.pair(
                self.group, num_tokens=num_tokens, hidden=sizes.hidden, num_trips=num_trips
            )
            measured, wrong = self._time(program, order)
            times.append({pair: value / num_trips for pair, value in measured.items()})
            what = f"{len(measured)} of {len(order)} pairs of ranks"
            if wrong:
                detail = f"{what}; rows came back wrong between {wrong[:4]}"
                yield Finding("fail", name, detail, _MEND)
            elif len(measured) < len(order):
                yield Finding("note", name, f"{what}, those of equal index first", _MORE_TIME)
            else:
                yield Finding("ok", name, f"{what}, all rows right")
        latency, bandwidth = times
        num_bytes = sizes.num_tokens * sizes.hidden * 2
        self.tables.append(table.of_pairs(latency, bandwidth, num_bytes, self._hosts))

    def load(self) -> Iterator[Finding]:
        """Many steps of all ranks at once, each with other rows and other routing."""
        sizes, group = self.sizes, self.group
        program = programs.load(
            group,
            num_tokens=sizes.load_tokens,
            hidden=sizes.load_hidden,
            top_k=min(sizes.load_top_k, programs.LOCAL_EXPERTS * group.size),
            num_steps=sizes.load_steps,
        )
        found = [program(0)]
        start = time.monotonic()
        found.append(program(sizes.load_steps))
        more = self._fitting(time.monotonic() - start, _MOST_CALLS)
        found += [program((2 + call) * sizes.load_steps) for call in range(more)]
        counts = np.stack(found)  # [calls, ranks of this process, 2]
        mine = {}
        for position, rank in enumerate(self._mine):
            steps = counts[:, position, 1]
            if counts[:, position, 0].any():
                mine[rank] = (int(counts[:, position, 0].sum()), int(steps[steps >= 0].min()))
        wrong = {int(rank): bad for said in self._gather(mine) for rank, bad in said.items()}
        what = f"{len(found) * sizes.load_steps} steps"
        if not wrong:
            yield Finding("ok", "order under load", f"{what}, all values right")
            return
        rank, (count, step) = min(wrong.items())
        yield Finding(
            "fail",
            "order under load",
            f"{what}; {len(wrong)} rank(s) got wrong values: rank {rank} got {count}, from step {step} "
            "on",
            _MEND,
        )

    def _time(
        self, program: programs.Program, order: list[tuple[int, int]]
    ) -> tuple[dict[tuple[int, int], float], list[tuple[int, int]]]:
        """Seconds of the program for as many pairs as there is time for; and those that were wrong."""
        repeats = self.sizes.repeats
        program(*order[0], 0)  # compiles
        start = time.monotonic()
        program(*order[0], 1)
        most = self._fitting((time.monotonic() - start) * repeats, len(order))
        measured, wrong = [], []
        for number, (sender, receiver) in enumerate(order[: max(1, most)]):
            seconds = []
            for repeat in range(repeats):
                start = time.monotonic()
                bad = program(sender, receiver, number * repeats + repeat)
                seconds.append(time.monotonic() - start)
                if bad.any():
                    wrong.append((sender, receiver))
            if sender in self._mine:  # it has all rows back; others are ready earlier
                measured.append((sender, receiver, min(seconds)))
        all_said: list[Any] = self._gather([measured, wrong])
        times = {(a, b): value for said, _ in all_said for a, b, value in said}
        return times, sorted({(a, b) for _, said in all_said for a, b in said})

    def _fitting(self, seconds: float, most: int) -> int:
        """How often something fits the time that a part has: by the slowest process, in all alike."""
        slowest = max(self._gather(seconds))
        return int(min(most, self.seconds / max(slowest, 1e-6)))

    def _gather(self, value: Any) -> list[Any]:
        """What each process says, by index."""
        self._num_gathered += 1
        key = f"{_KEY}{self.group.id}/{self._num_gathered}"
        texts = _compat.all_gather_text(key, json.dumps(value), timeout=_GATHER_TIMEOUT_S)
        return [json.loads(text) for text in texts]


_MEND = (
    "do not train on this network: see NVSHMEM_IB_ENABLE_RELAXED_ORDERING and adaptive routing in "
    "docs/network.md, try NVSHMEM_IB_ENABLE_IBGDA=0, and report it"
)
_MORE_TIME = "--seconds gives the test more time"


def pairs_in_order(hosts: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """All pairs of ranks, the most telling first: equal indices on two hosts, as rows travel."""
    per_host = len(hosts[0])

    def telling(pair: tuple[int, int]) -> tuple[int, int, int]:
        a, b = (divmod(rank, per_host) for rank in pair)
        # Pairs within a host tell nothing of the network.
        return (a[0] == b[0], (b[1] - a[1]) % per_host, (b[0] - a[0]) % len(hosts))

    ranks = [rank for host in hosts for rank in host]
    return sorted(((a, b) for a in ranks for b in ranks if a != b), key=telling)


def reach_findings(matrix: np.ndarray, hosts: dict[int, int]) -> Iterator[Finding]:
    """What follows from which rank (row) reaches which (column)."""
    pairs = [(a, b) for a in hosts for b in hosts if a != b]
    apart = [(a, b) for a, b in pairs if hosts[a] == hosts[b] and not matrix[a, b]]
    if apart:
        yield Finding(
            "fail",
            "reach",
            f"ranks of one host do not reach each other's memory: {apart[:4]}",
            "python -m jax_ep.doctor shows the links of a host; unset NVSHMEM_DISABLE_P2P",
        )
        return
    across = [bool(matrix[a, b]) for a, b in pairs if hosts[a] != hosts[b]]
    by_network = len(across) - sum(across)
    yield Finding(
        "ok",
        "reach",
        f"of {len(across)} pairs of ranks of different hosts, {by_network} need the network, and "
        f"{sum(across)} reach each other by loads and stores",
    )
