"""Figures to compare the model of scale with: records, published figures, fitted constants."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from performance_data import DEFAULTS, RESULTS, ROOT, Record, newest

from jax_ep.bench import records as bench_records
from jax_ep.scale import H200, Machine, Workload, predict

PUBLISHED = ROOT / "benchmarks" / "published.json"
FITTED = "2xH200-2026-11-30-window-1-process.json"
KERNELS = "kernels_h200.json"
SHARED = "h200-shared-2026-11-29-baselines.json"
MEASURED_SLACK, PUBLISHED_SLACK = 0.15, 0.25
_OPS = ("plan", "dispatch", "dispatch_cached", "combine")
_GROUPS, _BEST = 8, 4  # of the benchmarks' routing "group-limited"


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure beside its prediction.

    Attributes:
        name: What was measured or published.
        figure: Microseconds, or GB/s of published figures.
        predicted: The prediction of the model.
        kind: The key of a deviation in ``DEVIATIONS``.
        fitted: Whether a constant was fitted on this figure.
    """

    name: str
    figure: float
    predicted: float
    kind: tuple[str | int, ...]
    fitted: bool = False

    @property
    def deviation(self) -> float:
        """The deviation of the prediction, as a share of the figure."""
        return self.predicted / self.figure - 1


_FEW_ROWS = (
    "The fixed cost of combine is fitted with thousands of tokens, where many waves of rows follow one "
    "another. With at most 128 tokens the op ends 2 to 3 us sooner than that, probably because a warp "
    "has one row at most."
)
_FEW_EXPERT_ROWS = (
    "An expert gets about 8 tokens. The op takes 6 to 7 us more than the model has, probably because "
    "the steps for so few rows (load, add or spread, hand over) follow one another and do not overlap."
)
_TWO_HOSTS = (
    "With 8 and with 16 SMs alike, the NIC carries 31 to 38 of its 47 GB/s and NVLink at most 220 of "
    "its 335, so the kernel is the bound and no link. The model has no such bound for other libraries."
)
_EXPERT_PLAN = (
    "The plan is fitted in layout token. In layout expert it also gives each of a token's choices its "
    "row, which takes 3 us with 4096 tokens."
)
_LOADED_EARLY = (
    "A dispatch loads its first rows while its plan runs. With so few tokens these are most or all of "
    "them, so that 4 to 5 us of the op lie behind the plan."
)
_DENSE = (
    "The 24 SMs make rows dense in shared memory, which takes longer than the link. The model has no "
    "such bound; with 64 SMs, in layout expert, memory is the bound, which it has."
)
_EXPERT_128 = ("expert", "none", "uniform", "exact", 128)
# Figures that the model misses by more than it should, by kind, with the reason.
DEVIATIONS: dict[tuple[str | int, ...], str] = {
    **{
        ("combine", "token", "none", "uniform", "exact", tokens): _FEW_ROWS
        for tokens in (1, 64, 128)
    },
    **{(op, *_EXPERT_128): _FEW_EXPERT_ROWS for op in ("dispatch", "dispatch_cached", "combine")},
    **{
        ("dispatch", "token", "quantized", "uniform", "exact", tokens): _LOADED_EARLY
        for tokens in (64, 128)
    },
    **{
        (op, "token", "fp8-dense", "uniform", "exact", 4096): _DENSE
        for op in ("dispatch", "dispatch_cached")
    },
    ("plan", "expert", "none", "uniform", "exact", 4096): _EXPERT_PLAN,
    ("Hybrid-EP", 16, "combine"): _TWO_HOSTS,
}


def skipped(record: Record) -> str | None:
    """Why a record is not compared; None if it is."""
    if record["op"] in (
        "ceiling",
        "link",
        "exchange",
        "layer",
        "round_trip",
        "overlap",
        "pretrain",
        "timeline",
    ):
        return f"op {record['op']}: no op of the model"
    if record["op"] in ("grouped_dot", "loads", "kernel", "decode_phases"):
        return f"op {record['op']}: no whole op"
    if record.get("mode") == "latency":
        return "latency mode: the model has kernels of throughput mode"
    if record["routing"] not in ("uniform", "group-limited"):
        return f"routing {record['routing']}: not what the model expects of tokens"
    if not record["gpus"] or record["gpus"] < record["ranks"]:
        return "ranks that share a GPU: no link, and one memory for all"
    if "hosts" in record:
        return "logical hosts: no network between them"
    if not record["correct"] or record["median_us"] is None:
        return "no figure"
    return None


def load(folder: pathlib.Path = RESULTS) -> Iterator[tuple[str, Record]]:
    """The committed records that no later run has measured again, each with the name of its file."""
    found = [
        (path.name, {**DEFAULTS, **record})
        for path in sorted(folder.glob("*.json"))
        for record in json.loads(path.read_text())
    ]
    kept = {id(record) for record in newest([record for _, record in found])}
    yield from ((name, record) for name, record in found if id(record) in kept)


def workload_of(record: Record) -> Workload:
    """The workload that a record of the benchmarks was measured on."""
    limited = record["routing"] == "group-limited"
    wide = record["quantization"] == "quantized"  # then the field dtype is that of the rows
    return Workload(
        tokens=record["tokens"],
        hidden=record["hidden"],
        top_k=record["top_k"],
        experts=record["experts"],
        num_groups=_GROUPS if limited else 1,
        top_groups=_BEST if limited else 1,
        layout=record["layout"],
        dtype="bfloat16" if wide else record["dtype"],
        quantization=record["quantization"],
        alignment=16 if record["tokens"] <= 512 else 128,  # as in suites "decode" and "baselines"
        capacity=None if record["capacity"] == "default" else 1.0,
        num_sms=record["num_sms"],
    )


def predicted_us(record: Record, machine: Machine = H200) -> float:
    """The model's prediction for a record of the benchmarks on one host."""
    found = predict(workload_of(record), hosts=1, ranks_per_host=record["ranks"], machine=machine)
    return {
        "plan": found.plan.us,
        "dispatch": found.planned_dispatch_us,
        "dispatch_cached": found.dispatch.us,
        "combine": found.combine.us,
    }[record["op"]]


def kind_of(record: Record) -> tuple[str | int, ...]:
    """The key of a deviation of a record: its op, layout, rows, routing and tokens."""
    return (
        *(record["op"], record["layout"], record["quantization"], record["routing"]),
        *(record["capacity"], record["tokens"]),
    )


def measured(found: Iterable[tuple[str, Record]]) -> list[Check]:
    """The records that the model is compared with, beside its predictions."""
    return [
        Check(
            name=f"{bench_records.label(record)}, {record['processes']} process(es)",
            figure=record["median_us"],
            predicted=predicted_us(record),
            kind=kind_of(record),
            fitted=file == FITTED and kind_of(record) in FIT_KINDS,
        )
        for file, record in found
        if skipped(record) is None
    ]


def published(path: pathlib.Path = PUBLISHED) -> list[Check]:
    """Published figures in GB/s of rows for each (token, host), beside the model's predictions.

    The constants are not those of other libraries' kernels. So these predictions have no fixed
    cost, no limit of SMs, and nothing that does not overlap.
    """
    data = json.loads(path.read_text())
    checks = []
    for figure in data["figures"]:
        for op in ("dispatch", "combine"):
            machine = Machine(
                nvlink_gbs=data["machines"][figure["machine"]]["nvlink_gbs"][op],
                nic_gbs=H200.nic_gbs,
                memory_gbs=H200.memory_gbs,
            )
            workload = Workload(
                **{
                    field: figure[field]
                    for field in ("tokens", "experts", "num_groups", "top_groups", "quantization")
                }
            )
            found = predict(workload, hosts=figure["hosts"], machine=machine)
            checks.append(
                Check(
                    name=f"{figure['library']}, EP{found.ranks}, {op}, {figure['machine']}",
                    figure=figure[op],
                    predicted=found.host_gbs(op),
                    kind=(figure["library"], found.ranks, op),
                )
            )
    return checks


# The kinds of records that constants are fitted on.
def _kind(op: str, layout: str, quantization: str = "none", tokens: int = 4096) -> Any:
    return (op, layout, quantization, "uniform", "exact", tokens)


FIT_KINDS = {
    *(_kind("plan", "token"), _kind("plan", "token", tokens=128), _kind("dispatch", "token")),
    *(_kind("dispatch_cached", "token", rows) for rows in ("none", "quantized", "fp8")),
    *(_kind("dispatch_cached", "expert", rows) for rows in ("none", "quantized")),
    *(_kind("combine", layout) for layout in ("token", "expert")),
}


def fit(found: Iterable[tuple[str, Record]]) -> dict[str, float]:
    """The measured constants of ``jax_ep.scale.machine.H200``, computed anew from records."""
    all_records = list(found)
    us = {
        kind_of(record): record["median_us"]
        for file, record in all_records
        if file == FITTED and record["op"] in _OPS
    }
    ceilings = {
        file: record
        for file, record in all_records
        if record["op"] == "ceiling" and record["name"] == "bulk copies"
    }
    kernels = {
        (record["kernel"], record["layout"], record["quantization"], record["blocks"]): record["us"]
        for file, record in all_records
        if file == KERNELS
    }
    nvlink = ceilings[FITTED]["wire_gbs"]
    memory = ceilings[SHARED]["memory_gbs"]
    bare = Machine(nvlink_gbs=nvlink, nic_gbs=1.0, memory_gbs=memory)

    def part(op: str, layout: str, quantization: str = "none") -> tuple[float, float, float]:
        """Us of the busiest resource, thousands of further rows of a (token, rank), us measured."""
        workload = Workload(layout=layout, quantization=quantization)
        cost = getattr(predict(workload, ranks_per_host=2, machine=bare), op)
        first = workload.tokens * workload.distinct(2)
        rows = workload.written_rows(2) if op == "dispatch" else workload.tokens * workload.top_k
        name = "dispatch_cached" if op == "dispatch" else op
        return cost.us, (rows - first) / 1e3, us[_kind(name, layout, quantization)]

    bytes_us, _, whole = part("dispatch", "token")
    dispatch_us = whole - bytes_us
    bytes_us, _, whole = part("combine", "token")
    combine_us = whole - bytes_us
    spreads = [
        (whole - dispatch_us - bytes_us) / rows
        for bytes_us, rows, whole in (part("dispatch", "expert", q) for q in ("none", "quantized"))
    ]
    bytes_us, rows, whole = part("combine", "expert")
    few, many = (us[_kind("plan", "token", tokens=tokens)] for tokens in (128, 4096))
    plan_slope = (many - few) / ((4096 - 128) * 8)
    cast_us = us[_kind("dispatch_cached", "token", "fp8")]
    cast_us -= us[_kind("dispatch_cached", "token", "quantized")]
    # Two ranks of 2048 tokens on one GPU have the rows of one rank of 4096 with two GPUs.
    both = Workload(layout="expert")
    needed, written = both.tokens * both.distinct(2), both.written_rows(2)
    pairs, row = both.tokens * both.top_k, both.dense_row_bytes

    def sm_us(kernel: str, layout: str, blocks: int, fixed: float) -> float:
        return (kernels[kernel, layout, None, blocks] - fixed) * blocks

    copy = sm_us("dispatch", "token", 16, dispatch_us) / needed
    store = (sm_us("dispatch", "expert", 24, dispatch_us) - needed * copy) / (written - needed)
    add = sm_us("combine", "token", 16, combine_us) / needed
    total = (sm_us("combine", "expert", 24, combine_us) - pairs * add) / needed - add
    return {
        "nvlink_gbs": nvlink,
        "memory_gbs": memory,
        "dispatch_us": dispatch_us,
        "combine_us": combine_us,
        "plan_us": few - plan_slope * 128 * 8,
        "plan_ns": plan_slope * 1e3,
        "beside_plan_us": many
        + us[_kind("dispatch_cached", "token")]
        - us[_kind("dispatch", "token")],
        "spread_ns": sum(spreads) / len(spreads),
        "gather_ns": (whole - combine_us - bytes_us) / rows,
        "cast_gbs": both.tokens * row / cast_us / 1e3,
        "sm_load_gbs": row / (copy - store) / 1e3,
        "sm_store_gbs": row / store / 1e3,
        "sm_add_gbs": row / add / 1e3,
        "sm_sum_gbs": row / total / 1e3,
    }
