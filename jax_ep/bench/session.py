"""What the cases of one process share: mesh, group, figures of the machine, the rest of a record."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._groups import gpu_side
from jax_ep.bench import ceilings, records, timing
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem
from jax_ep.bench.timing import Spread
from jax_ep.bench.traffic import Traffic

AXIS = "expert"
OUR_TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_combine_vjp")
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
        self._reference: jax_ep.Group | None = None
        self.on_gpu = devices[0].platform == "gpu"
        self.shares_gpus = self.on_gpu and self.gpus < self.ranks
        # Whether bytes between ranks cross a link; else they move in the memory that ranks share.
        self.has_links = self.on_gpu and self.ranks == self.gpus > 1
        if why := libraries.why_unavailable("cuda" if self.on_gpu else "cpu"):
            raise RuntimeError(f"benchmarks read the clock of jax_ep's own library: {why}")
        self._problem: Problem | None = None
        self._links: dict[tuple[int, int], Spread] = {}
        self.untold_links: list[tuple[int, int]] = []  # measured, but in no record yet
        self._ceilings: list[ceilings.Ceiling] | None = None
        self._exchanges = 0
        self.axis = AXIS
        self.kept: dict[Any, Any] = {}  # what several cases use, by what it was made for

    @property
    def reference_group(self) -> jax_ep.Group:
        """The same ranks over the reference backend."""
        if self._reference is None:
            self._reference = jax_ep.create_group(self.mesh, AXIS, timeout=120, backend="reference")
        return self._reference

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

    def chain(self, estimate_us: float, calls: Sequence[str] = ()) -> timing.Chain:
        """How ops of about so many microseconds are timed here: on GPUs in chains of some 4 ms."""
        length = 0
        if self.on_gpu:
            length = int(2 ** np.clip(np.round(np.log2(4000 / max(estimate_us, 1))), 3, 5))
        return self.chain_of(length, calls)

    def chain_of(
        self, length: int, calls: Sequence[str] = (), *, repeat: int | None = None
    ) -> timing.Chain:
        """A chain of a given length, 0 for a loop; ``calls`` are those of an op, if they count."""
        return timing.Chain(
            length=length,
            repeat=repeat or self.repeat,
            grows=not self.on_gpu,
            calls=calls,
            completed=self.completed_calls if calls else None,
            largest=self.largest,
        )

    def completed_calls(self) -> list[int]:
        """Calls of our ops that each rank of this process has completed."""
        if self.group.backend == "cuda":
            library = gpu_side.library()
            by_ordinal, error = library.completed_ops(self.group.id)
            if error is not None:
                raise RuntimeError(error)
            return [by_ordinal[ordinal] for ordinal in sorted(by_ordinal)]
        counts = importlib.import_module("jax_ep._cpu").call_counts()
        ranks = len(self.my_ranks())
        return [sum(counts[target] for target in OUR_TARGETS) // ranks] * ranks

    def link(self, tokens: int, top_k: int) -> Spread:
        """Time of the link that chains ops on ``[T, K]`` ids."""
        key = (tokens, top_k)
        if key not in self._links:
            ids = np.arange(tokens * top_k, dtype=np.int32).reshape(tokens, top_k)
            sets = [
                self.put(dict.fromkeys(range(self.ranks), ids + s).__getitem__) for s in range(3)
            ]
            chain = self.chain_of(_LINK_LENGTH if self.on_gpu else 0)
            measured = timing.measure(timing.link_step(), sets, self.mesh, chain)
            self._links[key] = self.slowest(measured.spread)
            self.untold_links.append(key)
        return self._links[key]

    def ways(self) -> list[ceilings.Ceiling]:
        """How fast this machine moves bytes, the fastest way first."""
        if self._ceilings is None:
            self._ceilings = ceilings.measure(self)
        return self._ceilings

    def ceiling(self) -> ceilings.Ceiling | None:
        """The fastest way."""
        return self.ways()[0] if self.ways() else None

    def slowest(self, spread: Spread) -> Spread:
        """The spread of the process with the largest median, told to all processes."""
        values = self.exchange(" ".join(map(repr, spread)))
        return max(Spread(*map(float, text.split())) for text in values)

    def largest(self, value: float) -> float:
        """The largest of the numbers that the processes have, told to all."""
        return max(map(float, self.exchange(repr(float(value)))))

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
        """The record of a case; without a spread, of one that failed.

        A figure that its own spread drowns is left out, and one that the machine cannot reach is wrong;
        the record says why.
        """
        if spread is not None and spread.is_noise and error is None:
            error = f"too noisy: {spread.p10:.1f} to {spread.p90:.1f} us around {spread.median:.1f}"
            spread = None

        def rate(num_bytes: int) -> float | None:
            return None if spread is None else num_bytes / spread.median / 1e3

        record: dict[str, Any] = {
            "op": op or case.op,
            "layout": case.layout,
            "dtype": case.row_dtype,
            "quantization": case.quantization,
            "mode": case.mode,
            "routing": case.pattern,
            "capacity": case.capacity,
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
            "ceiling_gbs": None,
            "workspace_bytes": workspace_bytes,
            "scratch_bytes": scratch_bytes,
            "staged": staged,
            "correct": correct,
            "device": self.mesh.devices.flat[0].device_kind,
            "versions": versions(),
            "command": self.command,
        }
        ceiling = self.ceiling()
        if ceiling is not None:
            record["ceiling_gbs"] = ceiling.gbs
        if not self.has_links:
            record["memory_gbs"] = rate(traffic.memory // max(self.gpus, 1))
        if name is not None:
            record["name"] = name
        if case.intermediate is not None:
            record["intermediate"] = case.intermediate
        if error is None:
            error = records.impossible(record)
            record["correct"] = correct and error is None
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
