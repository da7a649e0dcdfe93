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
    for column in ("SMs", "us", "p10 to p90", "GB/s", "of ceiling", "logical GB/s", "MiB"):
        out.add_column(column, justify="right", no_wrap=column == "p10 to p90")
    out.add_column("correct")
    for record in found:
        out.add_row(*row(record), style=None if record["correct"] else "red")
    return out


CAPTION = (
    "us: median device time of the slowest rank. GB/s: bytes between ranks over a link, or, where "
    "ranks share memory, read and written there by all of them; ceiling: the fastest way in this run "
    "(op ceiling); logical: bytes that stay on their rank counted too. MiB: workspace + scratch; of a "
    "layer, all temporaries of its program. MB moved: of an op in latency mode, in the memory that "
    "ranks share."
)


def row(record: dict[str, Any]) -> list[str]:
    """The cells of a record."""
    if record["median_us"] is None:
        return [records.label(record), *[""] * 7, "too noisy" if record["correct"] else "failed"]
    temporary = record.get("temporary_bytes", record["scratch_bytes"])
    memory = (record["workspace_bytes"] + temporary) / _MIB
    return [
        records.label(record) + notes(record),
        str(record["num_sms"] or ""),
        f"{record['median_us']:.1f}",
        f"{record['p10_us']:.1f} to {record['p90_us']:.1f}",
        f"{gbs:.1f}" if (gbs := records.rate(record)) else "",
        share(record),
        f"{record['logical_gbs']:.1f}" if record["logical_gbs"] else "",
        f"{memory:.1f}" if memory else "",
        "yes" if record["correct"] else "NO",
    ]


def notes(record: dict[str, Any]) -> str:
    """What a record says besides its figure: what is hidden, who was late, its bound."""
    text = f", {record['share_hidden']:.0%} hidden" if "share_hidden" in record else ""
    if "moved_bytes" in record:
        text += f", {record['moved_bytes'] / 1e6:.2f} MB moved"
    if "late_us" in record:
        text += f", late by {record['late_us']:.0f} us"
    if "bound_us" in record:
        kept = "within" if record["within_bound"] else "OVER"
        text += f", {kept} its bound of {record['bound_us']:.1f} us"
    return text


def share(record: dict[str, Any]) -> str:
    """How much of the ceiling of its run a record reaches."""
    gbs, ceiling = records.rate(record), record["ceiling_gbs"]
    return f"{gbs / ceiling:.0%}" if gbs and ceiling and record["op"] != "ceiling" else ""


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    name = records.label(record)
    if record["median_us"] is None or not record["correct"]:
        state = "too noisy" if record["correct"] else "FAILED"
        return f"{name}: {state}: {record.get('error', '')}"
    if record["op"] == "ceiling":
        return f"{name}: {records.rate(record):.1f} GB/s"
    spread = f"{record['p10_us']:.1f} to {record['p90_us']:.1f}"
    of_ceiling = f", {share(record)} of the ceiling" if share(record) else ""
    return f"{name}: {record['median_us']:.1f} us ({spread}){of_ceiling}{notes(record)}"


def failures(found: list[dict[str, Any]]) -> list[str]:
    """Why records have no figure or are not right, one line each reason."""
    reasons: dict[str, list[str]] = {}
    for record in found:
        if not record["correct"] or record["median_us"] is None:
            reasons.setdefault(record.get("error", ""), []).append(records.label(record))
    return [f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def bounds(found: list[dict[str, Any]]) -> list[str]:
    """How many figures are within their bounds, and which are not, one line each."""
    bound = [record for record in found if "bound_us" in record]
    over = [record for record in bound if not record["within_bound"]]
    lines = [f"{len(bound) - len(over)} of {len(bound)} figures are within their bounds"]
    for record in over:
        us, most = record["median_us"], record["bound_us"]
        lines.append(f"{records.label(record)}: {us:.1f} us, OVER its bound of {most:.1f} us")
    return lines if bound else []


def ratios(found: list[dict[str, Any]]) -> list[str]:
    """How others compare with jax_ep at the same layer or round trip, one line each."""
    lines = []
    compared = [r for r in found if r["op"] in ("layer", "round_trip") and r["median_us"]]
    ours = {
        _workload(r): r for r in compared if r.get("name", "jax_ep") == "jax_ep" and _is_exact(r)
    }
    for record in compared:
        base = ours.get(_workload(record))
        if base is not None and base is not record:
            ratio = record["median_us"] / base["median_us"]
            lines.append(f"{records.label(record)}: {ratio:.2f} x the time of jax_ep's")
    return lines


def _is_exact(record: dict[str, Any]) -> bool:
    return record.get("capacity", "exact") == "exact"


def _workload(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(field) for field in ("op", *records.LAYER_SHAPE))


def _title(found: list[dict[str, Any]]) -> str:
    if not found:
        return "nothing was measured"
    first = found[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{first['ranks']} rank(s) on {first['gpus']} GPU(s), {first['processes']} process(es), "
        f"{first['device']}; {versions}"
    )
