"""The sources of docs/performance.md: records, targets and the figures of other libraries."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGETS = ROOT / "benchmarks" / "targets.json"
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]
GROUPED_DOT_FIELDS = {
    *("op", "pass", "dtype", "rows", "inner", "outer", "groups", "distribution", "median_us"),
    *("p10_us", "p90_us", "dense_us", "ratio", "tflops", "correct"),
    *("device", "versions", "command"),
}
LOADS_FIELDS = {
    *("op", "mover", "in_flight", "use", "memory", "row_bytes", "blocks", "rows", "us", "p10_us"),
    *("p90_us", "gbs", "ceiling_gbs", "correct", "device", "versions", "command"),
}
KERNEL_FIELDS = {
    *("op", "kernel", "layout", "dtype", "quantization", "ranks", "gpus", "tokens", "hidden"),
    *("top_k", "experts", "alignment", "blocks", "us", "correct", "device", "versions", "command"),
}
PRETRAIN_FIELDS = {
    *("op", "name", "device", "devices", "steps", "tokens_per_second", "mfu", "step_ms", "loss"),
    *("settings", "versions", "command"),
}
DECODE_PHASES_FIELDS = {
    *(
        "op",
        "kernel",
        "call",
        "layout",
        "dtype",
        "quantization",
        "ranks",
        "gpus",
        "tokens",
        "hidden",
    ),
    *("top_k", "experts", "blocks", "ops", "op_us", "plain_us", "gap_us", "skew_us"),
    *("resolution_ns", "phases", "correct", "device", "versions", "command"),
}
TIMELINE_FIELDS = {
    *(
        "op",
        "name",
        "dtype",
        "tokens",
        "hidden",
        "top_k",
        "experts",
        "intermediate",
        "ranks",
        "gpus",
    ),
    *("us", "ops_us", "hidden_us", "kernels", "device", "versions", "command"),
}
# Fields of records that jax_ep.bench does not write, by op.
OTHER_FIELDS = {
    "grouped_dot": GROUPED_DOT_FIELDS,
    "loads": LOADS_FIELDS,
    "kernel": KERNEL_FIELDS,
    "decode_phases": DECODE_PHASES_FIELDS,
    "pretrain": PRETRAIN_FIELDS,
    "timeline": TIMELINE_FIELDS,
}
PEER_FIELDS = {"lib", "op", "ranks", "T", "H", "K", "E", "sms", "us", "p10", "p90", "tag"}
# The values of optional fields that a record leaves out.
DEFAULTS = {"capacity": "exact"}
# What was measured, and where. A later record takes the place of one that agrees in these fields.
_SUBJECT = (
    *("op", "name", "layout", "dtype", "quantization", "mode", "routing", "capacity", "tokens"),
    *("hidden", "top_k", "experts", "num_sms", "intermediate"),
    *("ranks", "gpus", "hosts", "processes", "device"),
)
_ROWS = {"none": "bf16", "quantized": "fp8", "fp8": "fp8cast"}  # in the ops of the peers' files


@dataclasses.dataclass(frozen=True)
class Peer:
    """The time of another library for an op.

    Attributes:
        name: The library.
        op: Op, rows and layout, as in "dispatch_bf16_token".
        workload: Ranks, tokens of a rank, hidden size, top-k and experts.
        num_sms: SMs that it was given; 0 where it chooses.
        us: Median; `p10` and `p90` are percentiles.
    """

    name: str
    op: str
    workload: tuple[int, int, int, int, int]
    num_sms: int
    us: float
    p10: float
    p90: float


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


def newest(results: list[Record]) -> list[Record]:
    """The records without those of jax_ep.bench that a later run has measured again."""
    found: dict[Any, Record] = {}
    for number, record in enumerate(results):
        known = record["op"] not in OTHER_FIELDS
        subject = tuple(record.get(field, DEFAULTS.get(field)) for field in _SUBJECT)
        key = subject if known else number
        found.pop(key, None)  # so that it has the place of the later one
        found[key] = record
    return list(found.values())


def load_targets(path: pathlib.Path) -> dict[str, Any]:
    """The targets, with the figures of other libraries as ``["peers"]["figures"]``."""
    targets = json.loads(path.read_text())
    peers = targets["peers"]
    peers["figures"] = load_peers(path.parent / peers["file"], peers["names"])
    for figure in targets["figures"]:
        figure["match"] = {**targets["workload"], **figure["match"]}
    return targets


def load_peers(path: pathlib.Path, names: dict[str, str]) -> list[Peer]:
    """The figures of a file, one JSON object a line; ``names`` has the library of each tag.

    Raises:
        ValueError: for a line without the fields, or a tag without a name.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = json.loads(line)
        if missing := PEER_FIELDS - fields.keys():
            raise ValueError(f"{path}: line {number}: fields {sorted(missing)} are missing.")
        if fields["tag"] not in names:
            raise ValueError(
                f"{path}: line {number}: expected a tag of {sorted(names)}, got {fields['tag']!r}. "
                f"Names of libraries are in {TARGETS.name}."
            )
        workload = tuple(fields[size] for size in ("ranks", "T", "H", "K", "E"))
        times = {time: fields[time] for time in ("us", "p10", "p90")}
        found.append(Peer(names[fields["tag"]], fields["op"], workload, fields["sms"], **times))
    return found


def peers_of(targets: dict[str, Any], match: dict[str, Any]) -> list[Peer]:
    """The best figure of each library for an op, the fastest first.

    A library stands once for all numbers of SMs. Figures along a handle are of other ops.
    """
    op = f"{match['op']}_{_ROWS[match['quantization']]}_{match['layout']}"
    workload = tuple(match[size] for size in ("ranks", "tokens", "hidden", "top_k", "experts"))
    best: dict[str, Peer] = {}
    for peer in targets["peers"]["figures"]:
        if (peer.op, peer.workload) != (op, workload):
            continue
        if peer.name not in best or peer.us < best[peer.name].us:
            best[peer.name] = peer
    return sorted(best.values(), key=lambda peer: peer.us)


def matches(record: Record, match: dict[str, Any]) -> bool:
    """Whether a record has the fields of ``match``; a missing field counts as its default."""
    return all(record.get(field, DEFAULTS.get(field)) == value for field, value in match.items())


def ours(results: list[Record]) -> list[Record]:
    """Records of jax_ep's own kernels with a GPU for each rank: those that share one have no link."""
    ops = ("plan", "dispatch", "dispatch_cached", "combine")
    found = [r for r in results if r["op"] in ops and "name" not in r]
    return [r for r in found if r["gpus"] == r["ranks"] and "hosts" not in r]


def good(record: Record) -> bool:
    """Whether a record's figure counts: it exists, its result is correct, and it is possible."""
    return bool(record["median_us"] and record["correct"] and not record.get("error"))
