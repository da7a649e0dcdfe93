"""Shared by the cases of a process: the ranks, figures of the machine, the rest of a record."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jax_ep
from jax_ep._groups import gpu_side
from jax_ep._groups.latency_mode import MOST_TOKENS
from jax_ep.bench import ceilings, latency, records, timing
from jax_ep.bench.cases import Case
from jax_ep.bench.problems import Problem
from jax_ep.bench.ranks import Ranks
from jax_ep.bench.timing import Spread
from jax_ep.bench.traffic import Traffic

OUR_TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_combine_vjp")
_LINK_LENGTH = 64

logger = logging.getLogger("jax_ep.bench")


@dataclasses.dataclass
class Session(Ranks):
    """One process' part of a run.

    Attributes:
        ranks: Devices that take part.
        gpus: GPUs that they are on; 0 on CPU.
        hosts: Logical hosts that they are split into.
        repeat: Samples of each figure.
        command: The command line that the user gave.
    """

    repeat: int
    command: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference: jax_ep.Group | None = None
        self._latency: dict[int, jax_ep.Group] = {}  # by channels
        self._problem: Problem | None = None
        self._links: dict[tuple[int, int], Spread] = {}
        self.untold_links: list[tuple[int, int]] = []  # measured, but in no record yet
        self._ceilings: list[ceilings.Ceiling] | None = None
        self.kept: dict[Any, Any] = {}  # values that several cases use, by their purpose

    @property
    def reference_group(self) -> jax_ep.Group:
        """The same ranks over the reference backend."""
        if self._reference is None:
            self._reference = self.make_group("reference")
        return self._reference

    def group_of(self, case: Case) -> jax_ep.Group:
        """The group that runs a case of ours: where it asks for latency mode, one with inboxes."""
        if case.mode != "latency":
            return self.group
        channels = case.hidden * (2 if case.dtype == "float32" else 1)
        if channels not in self._latency:
            self._latency[channels] = self.make_group("auto", MOST_TOKENS, channels)
        return self._latency[channels]

    def problem(self, case: Case) -> Problem:
        """The inputs of a case; only those of the last workload are kept."""
        if self._problem is None or self._problem.case != case.workload:
            self._problem = Problem(case.workload, self.ranks)
        return self._problem

    def chain(self, estimate_us: float, calls: Sequence[str] = ()) -> timing.Chain:
        """How ops of about ``estimate_us`` are timed here: on GPUs in chains of about 4 ms."""
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
            total: collections.Counter[int] = collections.Counter()
            for group in (self.group, *self._latency.values()):
                by_ordinal, error = gpu_side.library().completed_ops(group.id)
                if error is not None:
                    raise RuntimeError(error)
                total.update(by_ordinal)
            return [total[ordinal] for ordinal in sorted(total)]
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
        temporary_bytes: int | None = None,
        staged: bool = False,
        error: str | None = None,
        op: str | None = None,
    ) -> dict[str, Any]:
        """The record of a case; without a spread, of one that failed.

        A figure that is no larger than its spread is left out, and one that the machine cannot
        reach is marked as wrong. The record says why.
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
            **({} if self.hosts == 1 else {"hosts": self.hosts}),
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
            if traffic.moved and self.on_gpu:
                record["moved_bytes"] = traffic.moved // self.gpus
                records.bind(record, latency.bound_us(record["moved_bytes"]))
        if name is not None:
            record["name"] = name
        if temporary_bytes is not None:
            record["temporary_bytes"] = temporary_bytes
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
