"""Write docs/performance.md, its picture and README's table from the committed records.

Usage: ``python docs/render_performance.py [--check]``. Prose is in ``performance.in.md``; a marker
``<!-- table: NAME -->`` there becomes the table of that name below. Targets are in
``benchmarks/targets.json``, the figures of others in ``benchmarks/peers/``, records in
``benchmarks/results/*.json``. ``performance.png`` is drawn again if its data changed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import page_text
import performance_headline as headline
import performance_kernels as kernels
import performance_overlap
import performance_plot as plot
import performance_pretrain
from page_text import number, spread, where, wrapped
from performance_data import (
    RESULTS,
    ROOT,
    TARGETS,
    Record,
    good,
    load_results,
    load_targets,
    matches,
    newest,
    ours,
)

TEMPLATE = ROOT / "docs" / "performance.in.md"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.png"
README = ROOT / "README.md"
NOTE = """\
<!-- Written by python docs/render_performance.py from docs/performance.in.md,
benchmarks/targets.json, benchmarks/peers/ and benchmarks/results/; change those. -->"""


def render(template: str, targets: dict[str, Any], results: list[Record]) -> str:
    """The page."""

    def table(marker: re.Match[str]) -> str:
        name = marker[1]
        if name not in TABLES:
            raise ValueError(f"performance.in.md: there is no table {name!r}.")
        return TABLES[name](targets, results)

    page = re.sub(r"<!-- table: (\w+) -->", table, template)
    return page.replace("<!-- generated -->", NOTE)


def _headline(targets: dict[str, Any], results: list[Record]) -> str:
    """jax_ep beside the best of the others."""
    return headline.table(headline.rows(targets, results))


def _summary(targets: dict[str, Any], results: list[Record]) -> str:
    """The headline in sentences."""
    rows = headline.rows(targets, results)
    return wrapped(f"{headline.summary(rows)} {headline.spread(rows)}".rstrip())


def _layer_ratio(targets: dict[str, Any], results: list[Record]) -> str:
    return wrapped(headline.layer(targets, results))


def _targets(targets: dict[str, Any], results: list[Record]) -> str:
    """A row for each record of a target."""
    rows = []
    for figure in targets["figures"]:
        name = f"{figure['figure']}, {figure['match']['layout']}, T = {figure['match']['tokens']}"
        records = [r for r in ours(results) if matches(r, figure["match"])]
        aim = f"{figure['target_us']:g}"
        if not records:
            rows.append([name, headline.NOT_MEASURED, "", "", "", "", aim, ""])
        for record in records:
            verdict = _verdict(record, figure, targets["slack"])
            rows.append(
                [
                    *(name, _us(record), spread(record), _sms(record), str(record["processes"])),
                    *(_share(record), aim, verdict),
                ]
            )
    head = "op, us, p10 to p90, SMs, processes, of ceiling, target, verdict"
    text = _markdown(head, rows)
    if all(headline.NOT_MEASURED in row for row in rows):
        text = f"{_nothing('baselines')} Suite decode has T = 128.\n\n{text}"
    return text


def _verdict(record: Record, figure: dict[str, Any], slack: float) -> str:
    if not good(record):
        return headline.no_figure(record)
    budget = figure["max_num_sms"]
    if budget is not None and (record["num_sms"] or 0) > budget:
        return f"over the budget of {budget} SMs"
    ratio = record["median_us"] / figure["target_us"]
    return "met" if ratio <= 1 + slack else f"missed: {ratio:.2f} x the target"


def _peers(targets: dict[str, Any], _: list[Record]) -> str:
    """All figures of others, as in their file."""
    rows = [
        [
            *(str(peer.workload[1]), peer.op.replace("_", " "), peer.name, f"{peer.us:.1f}"),
            *(f"{peer.p10:.1f} to {peer.p90:.1f}", headline.at_sms(peer.num_sms).strip(" @")),
        ]
        for peer in sorted(targets["peers"]["figures"], key=lambda p: (-p.workload[1], p.op, p.us))
    ]
    return _markdown("T, op, library, us, p10 to p90, SMs", rows)


def _source(targets: dict[str, Any], _: list[Record]) -> str:
    peers = targets["peers"]
    return wrapped(f"The file is `benchmarks/{peers['file']}`. {peers['versions']}.")


def _beyond(targets: dict[str, Any], results: list[Record]) -> str:
    """Which rates over links are above the ceiling of their run, and what that ceiling was."""
    records = [r for r in results if "wire_gbs" in r and "memory_gbs" not in r and good(r)]
    over = [
        r
        for r in records
        if r["op"] != "ceiling"
        if r["wire_gbs"] and r["ceiling_gbs"] and r["wire_gbs"] > r["ceiling_gbs"]
    ]
    above = [r["wire_gbs"] / r["ceiling_gbs"] for r in over]
    if not above:
        return "No rate on this page is above the ceiling of its run."
    movers = " and ".join(f"{m['name']} {m['gbs']} GB/s" for m in targets["movers"]["figures"])
    bounds = {r["ceiling_gbs"] for r in over}
    measured = [r for r in records if r["op"] == "ceiling" and r["ceiling_gbs"] in bounds]
    names = ", ".join(sorted({f"`{r['name']}`" for r in measured}))
    return wrapped(
        f"{len(above)} records have a rate above the ceiling of their run, by up to "
        f"{max(above) - 1:.1%}: it is what {names or 'a copy'} reached, and other movers are faster: "
        f"{movers} ({targets['movers']['when']})."
    )


def _ceilings(_: dict[str, Any], results: list[Record]) -> str:
    rows = []
    for record in results:
        if record["op"] == "ceiling":
            memory = ", read and written in memory" if "memory_gbs" in record else ""
            rows.append([where(record), record["name"] + memory, number(record["logical_gbs"])])
        elif record["op"] == "link":
            name = f"link between chained ops, T = {record['tokens']}, K = {record['top_k']}"
            rows.append([where(record), name, f"{_us(record)} us"])
    head = "machine, what, GB/s of a rank in one direction or of a GPU's memory"
    return _table(head, rows, "baselines")


def _parts(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in ours(results) if r["op"] in ("plan", "dispatch_cached")]
    return _table(_OP_HEAD, map(_op_row, records), "baselines")


def _memory(targets: dict[str, Any], results: list[Record]) -> str:
    memory = targets["memory"]
    others = ", ".join(f"{p['name']} {p['bytes'] / 2**20:.0f} MiB" for p in memory["peers"])
    limit = memory["max_bytes"] / 2**20
    rows = [
        [
            *(_name(r), str(r["ranks"]), _mib(r["workspace_bytes"]), _mib(r["scratch_bytes"])),
            _mib(r["workspace_bytes"] + r["scratch_bytes"]),
        ]
        for r in ours(results)
        if r["gpus"] and r["op"] in ("dispatch", "combine") and r["median_us"] is not None
    ]
    aim = (
        f"Target: at most {limit:.0f} MiB with {memory['ranks']} ranks on one host ({others}, "
        f"measured on {memory['when']})."
    )
    table = _table("op, ranks, workspace MiB, scratch MiB, both MiB", rows, "baselines")
    return f"{aim}\n\n{table}"


def _routing(_: dict[str, Any], results: list[Record]) -> str:
    patterns = {r["routing"] for r in ours(results)} - {"uniform"}
    records = [
        r
        for r in ours(results)
        if patterns
        and r["op"] in ("dispatch", "combine")
        and r["tokens"] > 128
        and r["dtype"] == "bfloat16"
        and r["quantization"] == "none"
    ]
    return _table(_OP_HEAD, map(_op_row, records), "routing")


def _latency(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in results if r.get("mode") == "latency" and r["op"] in _OPS + _CALLS]
    return _table(_OP_HEAD, map(_op_row, records), "decode")


def _hosts(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in results if r.get("hosts", 1) > 1 and r["op"] in _OPS]
    return _table(_OP_HEAD, map(_op_row, records), "baselines --hosts 2")


def _exchange(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in results if r["op"] == "exchange"]
    rows = [[*_op_row(r)[:-1], _failure(r)] for r in records]
    return _table(_OP_HEAD.replace("correct", "failure"), rows, "baselines")


def _layer(_: dict[str, Any], results: list[Record]) -> str:
    from jax_ep.bench.records import LAYER_SHAPE

    rows = []
    layers = [r for r in results if r["op"] == "layer"]
    place = (*LAYER_SHAPE, "ranks", "processes", "gpus")
    mine = {
        tuple(r[field] for field in place): r["median_us"]
        for r in layers
        if r["name"] == "jax_ep" and r.get("capacity") != "default" and good(r)
    }
    for r in layers:
        base = mine.get(tuple(r[field] for field in place))
        ratio = f"{r['median_us'] / base:.2f}" if base and r["median_us"] else ""
        shape = (
            f"T={r['tokens']} H={r['hidden']} E={r['experts']} K={r['top_k']} F={r['intermediate']}"
        )
        state = _failure(r)
        arm = r["name"] + (", default capacity" if r.get("capacity") == "default" else "")
        rows.append([where(r), shape, r["dtype"], arm, _us(r), ratio, state])
    return _table("machine, layer, dtype, arm, us, times jax_ep's, failure", rows, "layer")


def _layer_floor(_: dict[str, Any], results: list[Record]) -> str:
    from jax_ep.bench.records import LAYER_SHAPE

    place = (*LAYER_SHAPE, "ranks", "processes", "gpus", "device", "command")
    layers = [r for r in results if r["op"] == "layer" and good(r) and r["gpus"] == r["ranks"] > 1]
    products = {
        tuple(r[field] for field in place): r["median_us"]
        for r in layers
        if r["name"] == "products"
    }
    rows = []
    for r in layers:
        dense = products.get(tuple(r[field] for field in place))
        if r["name"] != "jax_ep" or dense is None or not r["ceiling_gbs"]:
            continue
        link = r["wire_bytes"] / r["ceiling_gbs"] / 1e3
        shape = (
            f"T={r['tokens']} H={r['hidden']} F={r['intermediate']}, {r.get('capacity', 'exact')}"
        )
        ratio = f"{r['median_us'] / (dense + link):.2f}"
        rows.append([where(r), shape, _us(r), f"{dense:.0f}", f"{link:.0f}", ratio])
    return _table("machine, layer and capacity, us, products us, link us, ratio", rows, "layer")


TABLES: dict[str, Callable[[dict[str, Any], list[Record]], str]] = {
    "headline": _headline,
    "summary": _summary,
    "layer_ratio": _layer_ratio,
    "targets": _targets,
    "peers": _peers,
    "source": _source,
    "beyond": _beyond,
    "ceilings": _ceilings,
    "parts": _parts,
    "memory": _memory,
    "routing": _routing,
    "latency": _latency,
    "latency_bound": kernels.latency_bound,
    "hosts": _hosts,
    "overlap": performance_overlap.overlap,
    "exchange": _exchange,
    "layer": _layer,
    "layer_floor": _layer_floor,
    "grouped_dot": kernels.grouped_dot,
    "loads": kernels.loads,
    "kernels": kernels.kernels,
    "decode_phases": kernels.decode_phases,
    "timeline": performance_overlap.timeline,
    "pretrain": performance_pretrain.runs,
}
_OPS = ("plan", "dispatch", "combine")
_CALLS = tuple(f"{op}_{call}" for op in _OPS[1:] for call in ("start", "done"))  # latency mode
_OP_HEAD = "machine, op, us, p10 to p90, SMs, wire GB/s, of ceiling, logical GB/s, correct"


def _op_row(record: Record) -> list[str]:
    return [
        *(where(record), _name(record), _us(record), spread(record), _sms(record)),
        *(number(record["wire_gbs"]), _share(record), number(record["logical_gbs"])),
        "yes" if record["correct"] and not record.get("error") else "NO",
    ]


def _table(head: str, rows: Iterable[list[str]], suite: str) -> str:
    rows = list(rows)
    return _markdown(head, rows) if rows else _nothing(suite)


def _nothing(suite: str) -> str:
    return page_text.nothing(
        f"python -m jax_ep.bench --suite {suite} --json benchmarks/results/NAME.json"
    )


def _markdown(head: str, rows: Iterable[list[str]]) -> str:
    return page_text.table(head.split(", "), rows)


def _name(record: Record) -> str:
    from jax_ep.bench import records

    return records.label(record)


def _us(record: Record) -> str:
    return page_text.microseconds(record["median_us"])


def _sms(record: Record) -> str:
    return str(record["num_sms"] or "")


def _share(record: Record) -> str:
    wire, ceiling = record["wire_gbs"], record["ceiling_gbs"]
    return f"{wire / ceiling:.0%} of {ceiling:.0f} GB/s" if wire and ceiling else ""


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _failure(record: Record) -> str:
    return "" if good(record) else record.get("error", "wrong")[:80]


def main() -> int:
    """Write page, picture and README's part, or with --check say which are not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if one is out of date")
    parser.add_argument("--redraw", action="store_true", help="draw the picture in any case")
    options = parser.parse_args()
    targets, results = load_targets(TARGETS), newest(load_results(RESULTS))
    rows, machine = headline.rows(targets, results), _machine(targets)
    texts = {
        PAGE: render(TEMPLATE.read_text(), targets, results),
        README: headline.readme(README.read_text(), targets, results),
    }
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    redraw = plot.stored_hash(PICTURE) != plot.data_hash(rows, machine)
    if options.check:
        for path in [*stale, *([PICTURE] if redraw else [])]:
            name = path.relative_to(ROOT)
            print(f"{name} is out of date: run python docs/render_performance.py")
        return 1 if stale or redraw else 0
    for path in stale:
        path.write_text(texts[path])
    if redraw or options.redraw:
        try:
            plot.draw(rows, machine, PICTURE)
        except ImportError as error:
            print(f"docs/performance.png needs matplotlib: pip install 'jax-ep[bench]' ({error})")
            return 1
    return 0


def _machine(targets: dict[str, Any]) -> str:
    """The machine in words, such as "2 × NVIDIA H200, 2 processes"."""
    where = targets["peers"]["conditions"]
    return f"{targets['workload']['ranks']} × {where['device']}, {where['processes']} processes"


if __name__ == "__main__":
    sys.exit(main())
