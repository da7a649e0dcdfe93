"""Write docs/performance.md from its template and the committed records.

Usage: ``python docs/render_performance.py [--check]``. Prose is in ``performance.in.md``; a marker
``<!-- table: NAME -->`` there becomes the table of that name below. Targets and the figures of others
are in ``benchmarks/targets.json``, records in ``benchmarks/results/*.json``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "docs" / "performance.in.md"
PAGE = ROOT / "docs" / "performance.md"
TARGETS = ROOT / "benchmarks" / "targets.json"
RESULTS = ROOT / "benchmarks" / "results"
NOTE = """\
<!-- Written by python docs/render_performance.py from docs/performance.in.md,
benchmarks/targets.json and benchmarks/results/; change those. -->"""

Record = dict[str, Any]
GROUPED_DOT_FIELDS = {
    *("op", "pass", "dtype", "rows", "inner", "outer", "groups", "distribution", "median_us"),
    *(
        "p10_us",
        "p90_us",
        "dense_us",
        "ratio",
        "tflops",
        "correct",
        "device",
        "versions",
        "command",
    ),
}
LOADS_FIELDS = {
    *("op", "mover", "in_flight", "use", "memory", "row_bytes", "blocks", "rows", "us", "p10_us"),
    *("p90_us", "gbs", "ceiling_gbs", "correct", "device", "versions", "command"),
}
KERNEL_FIELDS = {
    *("op", "kernel", "layout", "dtype", "quantization", "ranks", "gpus", "tokens", "hidden"),
    *("top_k", "experts", "alignment", "blocks", "us", "correct", "device", "versions", "command"),
}
# Of records that jax_ep.bench does not write, by op.
OTHER_FIELDS = {
    "grouped_dot": GROUPED_DOT_FIELDS,
    "loads": LOADS_FIELDS,
    "kernel": KERNEL_FIELDS,
}


def load_results(folder: pathlib.Path) -> list[Record]:
    """The records of all files, by name of file.

    Raises:
        ValueError: for a file with something else in it, by name.
    """
    from jax_ep.bench import records

    found: list[Record] = []
    for path in sorted(folder.glob("*.json")):
        for record in json.loads(path.read_text()):
            try:
                fields = OTHER_FIELDS.get(record.get("op"))
                if fields is None:
                    records.check(record)
                elif missing := fields - record.keys():
                    raise ValueError(f"record: fields {sorted(missing)} are missing.")
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            found.append(record)
    return found


def render(template: str, targets: dict[str, Any], results: list[Record]) -> str:
    """The page."""

    def table(marker: re.Match[str]) -> str:
        name = marker[1]
        if name not in TABLES:
            raise ValueError(f"performance.in.md: there is no table {name!r}.")
        return TABLES[name](targets, results)

    page = re.sub(r"<!-- table: (\w+) -->", table, template)
    return page.replace("<!-- generated -->", NOTE)


def _targets(targets: dict[str, Any], results: list[Record]) -> str:
    """A row for each target, or for each record of it."""
    rows = []
    for figure in targets["figures"]:
        others = "; ".join(f"{peer['name']}: {peer['us']:g}" for peer in figure["peers"])
        records = [r for r in _ours(results) if _matches(r, figure["match"])]
        aim = [f"{figure['target_us']:g}", f"{figure['floor_us']:g}", others or "–"]
        if not records:
            rows.append([figure["figure"], "not measured", "", "", "", *aim, ""])
        for record in records:
            verdict = _verdict(record, figure, targets["slack"])
            rows.append(
                [
                    *(figure["figure"], _us(record), _sms(record), str(record["processes"])),
                    *(_share(record), *aim, verdict),
                ]
            )
    head = "op, us, SMs, processes, of ceiling, target, floor, others, verdict"
    text = _markdown(head, rows)
    if all("not measured" in row for row in rows):
        text = f"{_nothing('baselines')} Suite decode has the last two rows.\n\n{text}"
    return text


def _verdict(record: Record, figure: dict[str, Any], slack: float) -> str:
    if not record["correct"] or record["median_us"] is None:
        return "wrong or failed"
    budget = figure["max_num_sms"]
    if budget is not None and (record["num_sms"] or 0) > budget:
        return f"over the budget of {budget} SMs"
    ratio = record["median_us"] / figure["target_us"]
    return "met" if ratio <= 1 + slack else f"missed: {ratio:.2f} x the target"


def _source(targets: dict[str, Any], _: list[Record]) -> str:
    return targets["source"]


def _ceilings(_: dict[str, Any], results: list[Record]) -> str:
    rows = []
    for record in results:
        if record["op"] == "ceiling":
            rows.append([_where(record), record["name"], _number(record["logical_gbs"])])
        elif record["op"] == "link":
            name = f"link between chained ops, T = {record['tokens']}, K = {record['top_k']}"
            rows.append([_where(record), name, f"{_us(record)} us"])
    return _table("machine, what, GB/s of a rank in one direction", rows, "baselines")


def _parts(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in _ours(results) if r["op"] in ("plan", "dispatch_cached")]
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
        for r in _ours(results)
        if r["gpus"] and r["op"] in ("dispatch", "combine") and r["median_us"] is not None
    ]
    aim = f"Target: at most {limit:.0f} MiB with {memory['ranks']} ranks on one host ({others})."
    table = _table("op, ranks, workspace MiB, scratch MiB, both MiB", rows, "baselines")
    return f"{aim}\n\n{table}"


def _routing(_: dict[str, Any], results: list[Record]) -> str:
    patterns = {r["routing"] for r in _ours(results)} - {"uniform"}
    records = [
        r
        for r in _ours(results)
        if patterns
        and r["op"] in ("dispatch", "combine")
        and r["tokens"] > 128
        and r["dtype"] == "bfloat16"
        and r["quantization"] == "none"
    ]
    return _table(_OP_HEAD, map(_op_row, records), "routing")


def _exchange(_: dict[str, Any], results: list[Record]) -> str:
    records = [r for r in results if r["op"] == "exchange"]
    rows = [[*_op_row(r)[:-1], "" if r["correct"] else _failure(r)] for r in records]
    return _table(_OP_HEAD.replace("correct", "failure"), rows, "baselines")


def _layer(_: dict[str, Any], results: list[Record]) -> str:
    from jax_ep.bench.records import LAYER_SHAPE

    rows = []
    layers = [r for r in results if r["op"] == "layer"]
    ours = {
        tuple(r[field] for field in (*LAYER_SHAPE, "ranks", "processes")): r["median_us"]
        for r in layers
        if r["name"] == "jax_ep" and r["median_us"]
    }
    for r in layers:
        base = ours.get(tuple(r[field] for field in (*LAYER_SHAPE, "ranks", "processes")))
        ratio = f"{r['median_us'] / base:.2f}" if base and r["median_us"] else ""
        shape = (
            f"T={r['tokens']} H={r['hidden']} E={r['experts']} K={r['top_k']} F={r['intermediate']}"
        )
        state = "" if r["correct"] else _failure(r)
        rows.append([_where(r), shape, r["dtype"], r["name"], _us(r), ratio, state])
    return _table("machine, layer, dtype, arm, us, times jax_ep's, failure", rows, "layer")


def _grouped_dot(_: dict[str, Any], results: list[Record]) -> str:
    rows = [
        [
            *(r["device"], r["pass"], r["dtype"], str(r["rows"]), f"{r['inner']} → {r['outer']}"),
            *(str(r["groups"]), r["distribution"], _us(r), _number(r["dense_us"])),
            *(_number(r["ratio"], 2), _number(r["tflops"]), "yes" if r["correct"] else "NO"),
        ]
        for r in results
        if r["op"] == "grouped_dot"
    ]
    head = "device, pass, dtype, rows, matrix, groups, distribution, us, dense us, ratio, TFLOP/s"
    if rows:
        return _markdown(f"{head}, correct", rows)
    return "No results are committed yet. `python benchmarks/grouped_dot.py` makes them."


def _loads(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each mover in each use, a column for each number of blocks."""
    cases: dict[tuple[str, ...], dict[int, list[Record]]] = {}
    for r in results:
        if r["op"] == "loads":
            case = (r["device"], r["memory"], r["use"], str(r["row_bytes"]), r["mover"])
            cases.setdefault(case, {}).setdefault(r["blocks"], []).append(r)
    if not cases:
        return "No results are committed yet. `benchmarks/loads.cu` makes them."
    blocks = sorted({count for by_blocks in cases.values() for count in by_blocks})
    rows = [
        [
            *case,
            *(_best_gbs(by_blocks.get(count, [])) for count in blocks),
            _number(max(r["ceiling_gbs"] for some in by_blocks.values() for r in some), 0),
        ]
        for case, by_blocks in cases.items()
    ]
    columns = ", ".join(f"{count} blocks" for count in blocks)
    return _markdown(f"device, memory, use, row bytes, mover, {columns}, cudaMemcpyAsync", rows)


def _kernels(_: dict[str, Any], results: list[Record]) -> str:
    """A row for each kernel, layout and format; a column for each number of SMs."""
    cases: dict[tuple[str, ...], dict[int, str]] = {}
    for r in results:
        if r["op"] == "kernel":
            rows = r["quantization"] or r["dtype"]
            case = (r["device"], r["kernel"], r["layout"], rows, str(r["ranks"]), str(r["tokens"]))
            us = _number(r["us"], 1) if r["correct"] else "WRONG"
            cases.setdefault(case, {})[r["blocks"]] = us
    if not cases:
        return "No results are committed yet. `python benchmarks/kernels.py` makes them."
    blocks = sorted({count for by_blocks in cases.values() for count in by_blocks})
    rows = [
        [*case, *(by_blocks.get(count, "") for count in blocks)]
        for case, by_blocks in cases.items()
    ]
    columns = ", ".join(f"{count} SMs" for count in blocks)
    return _markdown(f"device, kernel, layout, rows, ranks, T, {columns}", rows)


def _best_gbs(records: list[Record]) -> str:
    if not all(r["correct"] for r in records):
        return "WRONG"
    return _number(max((r["gbs"] for r in records), default=None), 0)


TABLES: dict[str, Callable[[dict[str, Any], list[Record]], str]] = {
    "targets": _targets,
    "source": _source,
    "ceilings": _ceilings,
    "parts": _parts,
    "memory": _memory,
    "routing": _routing,
    "exchange": _exchange,
    "layer": _layer,
    "grouped_dot": _grouped_dot,
    "loads": _loads,
    "kernels": _kernels,
}
_OP_HEAD = "machine, op, us, p10 to p90, SMs, wire GB/s, of ceiling, logical GB/s, correct"


def _op_row(record: Record) -> list[str]:
    spread = ""
    if record["median_us"] is not None:
        spread = f"{record['p10_us']:.1f} to {record['p90_us']:.1f}"
    return [
        *(_where(record), _name(record), _us(record), spread, _sms(record)),
        *(_number(record["wire_gbs"]), _share(record), _number(record["logical_gbs"])),
        "yes" if record["correct"] else "NO",
    ]


def _ours(results: list[Record]) -> list[Record]:
    """Records of jax_ep's own kernels with a GPU for each rank: those that share one have no link."""
    ops = ("plan", "dispatch", "dispatch_cached", "combine")
    ours = [r for r in results if r["op"] in ops and "name" not in r]
    return [r for r in ours if r["gpus"] == r["ranks"]]


def _matches(record: Record, match: dict[str, Any]) -> bool:
    return all(record[field] == value for field, value in match.items())


def _table(head: str, rows: Iterable[list[str]], suite: str) -> str:
    rows = list(rows)
    return _markdown(head, rows) if rows else _nothing(suite)


def _nothing(suite: str) -> str:
    return (
        "No results are committed yet. "
        f"`python -m jax_ep.bench --suite {suite} --json benchmarks/results/NAME.json` makes them."
    )


def _markdown(head: str, rows: list[list[str]]) -> str:
    names = head.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _name(record: Record) -> str:
    from jax_ep.bench import records

    return records.label(record)


def _where(record: Record) -> str:
    gpus = f"{record['gpus']} × {record['device']}" if record["gpus"] else record["device"]
    return f"{record['ranks']} rank(s), {record['processes']} process(es), {gpus}"


def _us(record: Record) -> str:
    return "failed" if record["median_us"] is None else f"{record['median_us']:.1f}"


def _sms(record: Record) -> str:
    return str(record["num_sms"] or "")


def _share(record: Record) -> str:
    wire, ceiling = record["wire_gbs"], record["ceiling_gbs"]
    return f"{wire / ceiling:.0%} of {ceiling:.0f} GB/s" if wire and ceiling else ""


def _number(value: float | None, digits: int = 1) -> str:
    return "" if not value else f"{value:.{digits}f}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _failure(record: Record) -> str:
    return record.get("error", "wrong")[:80]


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    targets = json.loads(TARGETS.read_text())
    page = render(TEMPLATE.read_text(), targets, load_results(RESULTS))
    if not options.check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/performance.md is out of date: run python docs/render_performance.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
