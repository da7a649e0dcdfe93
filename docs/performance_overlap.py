"""Tables of docs/performance.md about ops in flight."""

from __future__ import annotations

from typing import Any

from page_text import microseconds, nothing, number, spread, table, where
from performance_data import Record


def overlap(_: dict[str, Any], results: list[Record]) -> str:
    """Ops in flight, alone and beside compute, and layers in chunks."""
    rows = []
    for r in results:
        if r["op"] != "overlap" and (r["op"] != "layer" or "chunks" not in r["name"]):
            continue
        what = f"F={r['intermediate']}" if r["op"] == "layer" else r["layout"]
        if r["mode"] == "latency":
            what += f", latency mode, T = {r['tokens']}"
        hidden = f"{r['share_hidden']:.0%}" if "share_hidden" in r else ""
        bound = f"{r['bound_us']:.1f}" if "bound_us" in r else ""
        if bound and not r["within_bound"]:
            bound = f"**over** {bound}"
        rows.append(
            [
                where(r),
                f"{r['name']}, {what}",
                microseconds(r["median_us"]),
                bound,
                spread(r),
                hidden,
            ]
        )
    if not rows:
        return nothing("python -m jax_ep.bench --suite overlap --json benchmarks/results/NAME.json")
    return table(["machine", "what", "us", "bound us", "p10 to p90", "hidden"], rows)


def timeline(_: dict[str, Any], results: list[Record]) -> str:
    """What of the ops of a layer ran beside other kernels; of one in chunks, each op by itself."""
    newest = {
        (r["device"], r["ranks"], r["hidden"], r["intermediate"], r["name"]): r
        for r in results
        if r["op"] == "timeline"
    }
    if not newest:
        return nothing(
            "python benchmarks/timeline.py --output benchmarks/results/NAME-timeline.json"
        )
    rows = []
    for r in newest.values():
        layer = f"T={r['tokens']} H={r['hidden']} E={r['experts']} F={r['intermediate']}"
        place = [f"{r['ranks']} × {r['device']}", layer, r["name"]]
        rows.append([*place, "all", "", number(r["us"]), *_hidden(r["ops_us"], r["hidden_us"])])
        for kernel in r["kernels"]:
            if "hidden_us" in kernel and r["hidden_us"]:
                name = "combine" if "Combine" in kernel["name"] else "dispatch"
                times = _hidden(kernel["us"], kernel["hidden_us"])
                rows.append(["", "", "", name, number(kernel["start_us"]), "", *times])
    head = ["machine", "layer", "arm", "kernel", "begins, us", "step, us", "op, us", "hidden"]
    return table(head, rows)


def _hidden(whole: float, part: float) -> list[str]:
    return [number(whole), f"{part / whole:.0%}" if whole else ""]
