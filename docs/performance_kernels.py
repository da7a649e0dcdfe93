"""Tables of docs/performance.md from records that jax_ep.bench does not write: single kernels."""

from __future__ import annotations

from typing import Any

from page_text import microseconds, nothing, number, table
from performance_data import Record


def grouped_dot(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each pass and shape of the experts' matmul."""
    rows = [
        [
            *(r["device"], r["pass"], r["dtype"], str(r["rows"]), f"{r['inner']} → {r['outer']}"),
            *(str(r["groups"]), r["distribution"], microseconds(r["median_us"])),
            *(number(r["dense_us"]), number(r["ratio"], 2), number(r["tflops"])),
            "yes" if r["correct"] else "NO",
        ]
        for r in results
        if r["op"] == "grouped_dot"
    ]
    if not rows:
        return nothing("python benchmarks/grouped_dot.py")
    head = "device, pass, dtype, rows, matrix, groups, distribution, us, dense us, ratio, TFLOP/s"
    return table([*head.split(", "), "correct"], rows)


def loads(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each mover in each use, a column for each number of blocks."""
    cases: dict[tuple[str, ...], dict[int, list[Record]]] = {}
    for r in results:
        if r["op"] == "loads":
            case = (r["device"], r["memory"], r["use"], str(r["row_bytes"]), r["mover"])
            cases.setdefault(case, {}).setdefault(r["blocks"], []).append(r)
    if not cases:
        return nothing("benchmarks/loads.cu")
    blocks = sorted({count for by_blocks in cases.values() for count in by_blocks})
    rows = [
        [
            *case,
            *(_best_gbs(by_blocks.get(count, [])) for count in blocks),
            number(max(r["ceiling_gbs"] for some in by_blocks.values() for r in some), 0),
        ]
        for case, by_blocks in cases.items()
    ]
    columns = [f"{count} blocks" for count in blocks]
    head = ["device", "memory", "use", "row bytes", "mover", *columns, "cudaMemcpyAsync"]
    return table(head, rows)


def kernels(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each kernel, layout and format; a column for each number of SMs."""
    cases: dict[tuple[str, ...], dict[int, str]] = {}
    for r in results:
        if r["op"] == "kernel":
            rows = r["quantization"] or r["dtype"]
            case = (r["device"], r["kernel"], r["layout"], rows, str(r["ranks"]), str(r["tokens"]))
            us = number(r["us"], 1) if r["correct"] else "WRONG"
            cases.setdefault(case, {})[r["blocks"]] = us
    if not cases:
        return nothing("python benchmarks/kernels.py")
    blocks = sorted({count for by_blocks in cases.values() for count in by_blocks})
    rows = [
        [*case, *(by_blocks.get(count, "") for count in blocks)]
        for case, by_blocks in cases.items()
    ]
    columns = [f"{count} SMs" for count in blocks]
    return table(["device", "kernel", "layout", "rows", "ranks", "T", *columns], rows)


def latency_bound(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each op of latency mode whose ranks share a GPU, ordered by tokens."""
    from jax_ep.bench import latency, records

    order = ("op", "layout", "quantization", "tokens")
    bounded = [r for r in results if "moved_bytes" in r]
    rows = [
        [
            *(records.label(r), f"{r['moved_bytes'] / 1e6:.2f}", microseconds(r["median_us"])),
            number(latency.bound_us(r["moved_bytes"])),
            *(str(r["num_sms"] or ""), _verdict(r)),
        ]
        for r in sorted(bounded, key=lambda r: [r[field] for field in order])
    ]
    if not rows:
        return nothing(
            "python -m jax_ep.bench --suite decode --ranks 2 --processes 2"
            " --json benchmarks/results/NAME.json"
        )
    return table(["op", "MB moved", "us", "bound us", "SMs", "bound"], rows)


def _verdict(record: Record) -> str:
    if not record["correct"]:
        return "WRONG"
    if record["median_us"] is None:
        return "too noisy"
    return "kept" if record["within_bound"] else "missed"


def decode_phases(_: dict[str, Any], results: list[Record]) -> str:
    """For each workload a table: a row for each phase, a column for each launch."""
    found: dict[tuple[Any, ...], dict[tuple[str, str, str], Record]] = {}
    for r in results:
        if r["op"] == "decode_phases":
            case = (r["device"], r["ranks"], r["gpus"], r["layout"], r["tokens"], r["blocks"])
            launches = found.setdefault(case, {})
            launches[r["kernel"], r["quantization"], r["call"]] = r  # the newest
    if not found:
        return nothing(
            "python benchmarks/decode_phases.py --output benchmarks/results/NAME-decode-phases.json"
        )
    return "\n\n".join(_phases_of(case, launches) for case, launches in found.items())


def _phases_of(case: tuple[Any, ...], launches: dict[tuple[str, str, str], Record]) -> str:
    device, ranks, gpus, layout, tokens, blocks = case
    records = list(launches.values())
    names = [phase["phase"] for phase in max(records, key=lambda r: len(r["phases"]))["phases"]]
    columns = [
        [
            *(_passed(r, name) for name in names),
            number(r["gap_us"], 2),
            number(r["phases"][-1]["last_us"] + r["gap_us"], 2),
            number(r["op_us"], 2),
            number(r["plain_us"], 2),
            number(r["skew_us"], 2) if r["skew_us"] is not None else "",
            str(r["resolution_ns"]),
            "yes" if r["correct"] else "NO",
        ]
        for r in records
    ]
    head = [
        f"{kernel}{'' if quantization == 'none' else f' ({quantization})'}, "
        + ("one call" if call == "whole" else f"{call} call")
        for kernel, quantization, call in launches
    ]
    last = ["until the next launch", "phases and that", "whole op", "without stamps"]
    last += ["ranks apart at launch", "tick of the clock, ns", "correct"]
    where = f"{ranks} ranks on {gpus} × {device}, layout {layout}, T = {tokens}, {blocks} blocks"
    rows = zip([*names, *last], *columns, strict=True)
    return f"{where}:\n\n{table(['phase', *head], rows)}"


def _passed(record: Record, name: str) -> str:
    """When the first warp, half of the blocks and the last block have passed, and what it takes."""
    for phase in record["phases"]:
        if phase["phase"] == name:
            times = " / ".join(f"{phase[f'{when}_us']:.2f}" for when in ("first", "median", "last"))
            return f"{times} (+{phase['takes_us']:.2f})"
    return ""


def _best_gbs(records: list[Record]) -> str:
    if not all(r["correct"] for r in records):
        return "WRONG"
    return number(max((r["gbs"] for r in records), default=None), 0)
