"""Records as a table for the terminal."""

from __future__ import annotations

from typing import Any

import rich.table

from jax_ep.bench import records

_MIB = 2**20


def table(found: list[dict[str, Any]]) -> rich.table.Table:
    """One row a record: the figure with its spread, the link's share, what it took."""
    out = rich.table.Table(title=_title(found), caption=CAPTION)
    out.add_column("op", overflow="fold")
    for column in ("SMs", "us", "p10 to p90", "wire GB/s", "of ceiling", "logical GB/s", "MiB"):
        out.add_column(column, justify="right", no_wrap=column == "p10 to p90")
    out.add_column("correct")
    for record in found:
        out.add_row(*row(record), style=None if record["correct"] else "red")
    return out


CAPTION = (
    "us: median device time of the slowest rank. wire: bytes between ranks; ceiling: the link's "
    "speed in this run (op ceiling); logical: bytes that stay counted too. MiB: workspace + scratch."
)


def row(record: dict[str, Any]) -> list[str]:
    """The cells of a record."""
    if record["median_us"] is None:
        return [records.label(record), *[""] * 7, "failed"]
    wire, ceiling = record["wire_gbs"], record["ceiling_gbs"]
    memory = (record["workspace_bytes"] + record["scratch_bytes"]) / _MIB
    return [
        records.label(record),
        str(record["num_sms"] or ""),
        f"{record['median_us']:.1f}",
        f"{record['p10_us']:.1f} to {record['p90_us']:.1f}",
        f"{wire:.1f}" if wire else "",
        f"{wire / ceiling:.0%}" if wire and ceiling and record["op"] != "ceiling" else "",
        f"{record['logical_gbs']:.1f}" if record["logical_gbs"] else "",
        f"{memory:.1f}" if memory else "",
        "yes" if record["correct"] else "NO",
    ]


def failures(found: list[dict[str, Any]]) -> list[str]:
    """Why records have no figure or are not correct, one line each reason."""
    reasons: dict[str, list[str]] = {}
    for record in found:
        if not record["correct"]:
            reasons.setdefault(record.get("error", ""), []).append(records.label(record))
    return [f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def layer_ratios(found: list[dict[str, Any]]) -> list[str]:
    """How the arms of each layer compare with jax_ep's, one line each."""
    lines = []
    layers = [r for r in found if r["op"] == "layer" and r["median_us"]]
    ours = {
        tuple(r[f] for f in records.LAYER_SHAPE): r for r in layers if r.get("name") == "jax_ep"
    }
    for record in layers:
        base = ours.get(tuple(record[field] for field in records.LAYER_SHAPE))
        if base is not None and base is not record and base["median_us"] > 0:
            ratio = record["median_us"] / base["median_us"]
            lines.append(f"{records.label(record)}: {ratio:.2f} x the time of jax_ep's")
    return lines


def _title(found: list[dict[str, Any]]) -> str:
    if not found:
        return "nothing was measured"
    first = found[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{first['ranks']} rank(s) on {first['gpus']} GPU(s), {first['processes']} process(es), "
        f"{first['device']}; {versions}"
    )
