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


def _best_gbs(records: list[Record]) -> str:
    if not all(r["correct"] for r in records):
        return "WRONG"
    return number(max((r["gbs"] for r in records), default=None), 0)
