"""What the cases of one process share: mesh, group, figures of the machine, the rest of a record."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _compat
from jax_ep.bench import ceilings, timing
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem
from jax_ep.bench.timing import Spread
from jax_ep.bench.traffic import Traffic

AXIS = "expert"
_LINK_LENGTH = 64

logger = logging.getLogger("jax_ep.bench")


@dataclasses.dataclass
class Session:
    """One process' part of a run.

    Attributes:
        ranks: Devices that take part.
        gpus: GPUs that they are on; 0 on CPU.
        repeat: Samples of each figure.
        command: The command line that the user gave.
    """

    ranks: int
    gpus: int
    repeat: int
    command: str

    def __post_init__(self) -> None:
        devices = jax.devices()
        if len(devices) < self.ranks:
            raise ValueError(f"ranks: expected at most {len(devices)} devices, got {self.ranks}.")
        self.mesh = jax.sharding.Mesh(np.array(devices[: self.ranks]), (AXIS,))
        self.sharding = NamedSharding(self.mesh, P(AXIS))
        self.group = jax_ep.create_group(self.mesh, AXIS, timeout=120)
        self.on_gpu = devices[0].platform == "gpu"
        self.shares_gpus = self.on_gpu and self.gpus < self.ranks
        self._problem: Problem | None = None
        self._links: dict[tuple[int, int], Spread] = {}
        self._ceilings: list[ceilings.Ceiling] | None = None
        self._exchanges = 0
        self.programs: dict[Any, Any] = {}  # that several cases use, by what they were made for

    def problem(self, case: Case) -> Problem:
        """The inputs of a case; only those of the last workload are kept."""
        if self._problem is None or self._problem.case != case.workload:
            self._problem = Problem(case.workload, self.ranks)
        return self._problem

    def put(self, make: Callable[[int], np.ndarray]) -> jax.Array:
        """A global array of which ``make(rank)`` is the part of each rank."""
        first, mine = self.my_ranks()[0], {}
        mine[first] = make(first)
        rows = mine[first].shape[0]
        shape = (self.ranks * rows, *mine[first].shape[1:])

        def part(index: Any) -> np.ndarray:
            rank = (index[0].start or 0) // rows
            return mine[rank] if rank in mine else make(rank)

        return jax.make_array_from_callback(shape, self.sharding, part)

    def my_ranks(self) -> list[int]:
        """Ranks whose devices are of this process."""
        mine = jax.process_index()
        return [r for r, d in enumerate(self.mesh.devices.flat) if d.process_index == mine]

    def on_all_ranks(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``function`` of what one rank sees, jitted, as a function of global arrays."""
        spec = P(AXIS)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=(spec,), out_specs=spec, check_vma=False
        )
        return jax.jit(mapped)

    def parts(self, array: jax.Array) -> dict[int, np.ndarray]:
        """The parts of a global array that belong to this process' ranks."""
        rank_of = {device: rank for rank, device in enumerate(self.mesh.devices.flat)}
        return {rank_of[s.device]: np.asarray(s.data) for s in array.addressable_shards}

    def length(self, estimate_us: float) -> int:
        """How many ops a chain has: on GPUs some 4 ms of them."""
        if not self.on_gpu:
            return 1
        return int(2 ** np.clip(np.round(np.log2(4000 / max(estimate_us, 1))), 3, 6))

    def link(self, tokens: int, top_k: int) -> Spread:
        """Time of the link that chains ops on ``[T, K]`` ids."""
        key = (tokens, top_k)
        if key not in self._links:
            ids = np.arange(tokens * top_k, dtype=np.int32).reshape(tokens, top_k)
            sets = [
                self.put(dict.fromkeys(range(self.ranks), ids + s).__getitem__) for s in range(3)
            ]
            length = _LINK_LENGTH if self.on_gpu else 1
            measured = timing.measure(
                timing.link_step(), sets, self.mesh, length=length, repeat=self.repeat
            )
            self._links[key] = self.slowest(measured.spread)
        return self._links[key]

    def links(self) -> dict[tuple[int, int], Spread]:
        """The links measured so far."""
        return self._links

    def need_collectives(self) -> None:
        """Raise ``ValueError`` where XLA's collectives cannot run."""
        if self.shares_gpus and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
            raise ValueError(
                f"{self.ranks} ranks share {self.gpus} GPUs: NCCL, which XLA's collectives run on, "
                "wants a GPU for each, or NCCL_MULTI_RANK_GPU_ENABLE=1 (from 2.30 on)."
            )

    def fastest_ways(self) -> list[ceilings.Ceiling]:
        """How fast this machine moves bytes between the ranks, the fastest way first."""
        if self._ceilings is None:
            measured = ceilings.measure(
                self.mesh, self.sharding, on_gpu=self.on_gpu, shares_gpus=self.shares_gpus
            )
            spreads = [self.slowest(Spread(-c.gbs, -c.gbs, -c.gbs)) for c in measured]
            slowest = [c._replace(gbs=-s.median) for c, s in zip(measured, spreads, strict=True)]
            # A slope that is not positive says that the machine was busy, and nothing about it.
            self._ceilings = sorted((c for c in slowest if c.gbs > 0), key=lambda c: -c.gbs)
        return self._ceilings

    def ceiling_gbs(self) -> float | None:
        """GB/s of the fastest way."""
        ways = self.fastest_ways()
        return ways[0].gbs if ways else None

    def slowest(self, spread: Spread) -> Spread:
        """The spread of the process with the largest median, told to all processes."""
        values = self.exchange(" ".join(map(repr, spread)))
        return max(Spread(*map(float, text.split())) for text in values)

    def exchange(self, text: str) -> list[str]:
        """Everybody's ``text``, by process; call it in all processes, in one order."""
        self._exchanges += 1
        return _compat.all_gather_text(f"jax_ep/bench/{self._exchanges}", text)

    def record(
        self,
        case: Case,
        spread: Spread | None,
        traffic: Traffic,
        *,
        correct: bool,
        num_sms: int | None = None,
        name: str | None = None,
        workspace_bytes: int = 0,
        scratch_bytes: int = 0,
        staged: bool = False,
        error: str | None = None,
        op: str | None = None,
    ) -> dict[str, Any]:
        """The record of a case; without a spread, of one that failed."""

        def rate(num_bytes: int) -> float | None:
            if spread is None or spread.median <= 0:
                return None
            return num_bytes / spread.median / 1e3

        record: dict[str, Any] = {
            "op": op or case.op,
            "layout": case.layout,
            "dtype": case.row_dtype,
            "quantization": case.quantization,
            "mode": case.mode,
            "routing": case.pattern,
            "ranks": self.ranks,
            "gpus": self.gpus,
            "processes": jax.process_count(),
            "tokens": case.tokens,
            "hidden": case.hidden,
            "top_k": case.top_k,
            "experts": case.experts,
            "num_sms": num_sms,
            "median_us": spread and spread.median,
            "p10_us": spread and spread.p10,
            "p90_us": spread and spread.p90,
            "wire_bytes": traffic.wire,
            "wire_gbs": rate(traffic.wire),
            "logical_gbs": rate(traffic.logical),
            "ceiling_gbs": self.ceiling_gbs(),
            "workspace_bytes": workspace_bytes,
            "scratch_bytes": scratch_bytes,
            "staged": staged,
            "correct": correct,
            "device": self.mesh.devices.flat[0].device_kind,
            "versions": versions(),
            "command": self.command,
        }
        if name is not None:
            record["name"] = name
        if case.intermediate is not None:
            record["intermediate"] = case.intermediate
        if error is not None:
            record["error"] = error
        return record


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    found = {"jax_ep": jax_ep.__version__}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-nccl-cu13"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
