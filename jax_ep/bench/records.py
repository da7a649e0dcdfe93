"""Records: a JSON object for each figure, with everything needed to read and to repeat it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

FIELDS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "layout": (str,),
    "dtype": (str,),  # of the rows given: float8_e4m3fn where they are Quantized
    "quantization": (str,),
    "mode": (str,),
    "routing": (str,),
    "ranks": (int,),
    "gpus": (int,),
    "processes": (int,),
    "tokens": (int,),  # of a rank
    "hidden": (int,),
    "top_k": (int,),
    "experts": (int,),
    "num_sms": (int, type(None)),  # None: jax_ep does not set it
    "median_us": (float, type(None)),  # None: it failed, or, if correct, was too noisy
    "p10_us": (float, type(None)),
    "p90_us": (float, type(None)),
    "wire_bytes": (int,),  # of the busiest rank in its busier direction, between ranks only
    "wire_gbs": (float, type(None)),
    "logical_gbs": (float, type(None)),  # counts what stays on its rank too
    "ceiling_gbs": (
        float,
        type(None),
    ),  # of what wire_gbs, or memory_gbs, is held against, in this run
    "workspace_bytes": (int,),
    "scratch_bytes": (int,),
    "staged": (bool,),
    "correct": (bool,),
    "device": (str,),
    "versions": (dict,),
    "command": (str,),
}
OPTIONAL: dict[str, tuple[type, ...]] = {
    "name": (str,),  # the implementation, if not jax_ep's own kernels
    "hosts": (int,),  # logical hosts that the ranks are split into; one, if it is not there
    "intermediate": (int,),  # width of an expert (op "layer") or of the compute ("overlap")
    # Of the shorter of op and compute, the share that ran while the other did (op "overlap").
    "share_hidden": (float,),
    "bound_us": (float,),  # what the median may be
    "within_bound": (bool,),
    "late_us": (float,),  # how much later than the others the last rank started the op
    "capacity": (str,),  # room: "exact" for the rows that come, "default" for any routing
    # Where ranks share memory: at least what all ranks of a GPU (on CPU, of the machine) read and
    # write. Then ceiling_gbs is that of the memory.
    "memory_gbs": (float, type(None)),
    # Of an op in latency mode whose ranks share a GPU: the bytes that they move in its memory.
    "moved_bytes": (int,),
    # Of the whole program (op "layer"), by XLA's analysis; the scratch memory is part of it.
    "temporary_bytes": (int,),
    "error": (str,),  # why there is no figure, or what was wrong with the result
}
# A figure above its ceiling times this is taken to be wrong.
_SLACK = 1.05


LAYER_SHAPE = ("hidden", "experts", "top_k", "intermediate", "tokens", "dtype")


def check(record: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``record`` has exactly the fields above, of the right types."""
    missing = FIELDS.keys() - record.keys()
    unknown = record.keys() - FIELDS.keys() - OPTIONAL.keys()
    if missing or unknown:
        raise ValueError(
            f"record: expected the fields of jax_ep.bench.records, got {sorted(missing)} missing "
            f"and {sorted(unknown)} besides."
        )
    for field, value in record.items():
        types = FIELDS.get(field) or OPTIONAL[field]
        if type(value) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"record: field {field}: expected {expected}, got {value!r}.")


def bind(record: dict[str, Any], microseconds: float) -> None:
    """Put the bound of a record's median into it, and whether the median is within; if there is one."""
    if record["median_us"] is not None:
        record["bound_us"] = float(microseconds)
        record["within_bound"] = bool(record["median_us"] <= microseconds)


def rate(record: dict[str, Any]) -> float | None:
    """GB/s that the record's ceiling bounds: over a link, or in memory that ranks share."""
    return record["memory_gbs"] if "memory_gbs" in record else record["wire_gbs"]


def impossible(record: dict[str, Any]) -> str | None:
    """Why the figure of a record is impossible (it is above the ceiling of its run), or None."""
    gbs, ceiling = rate(record), record["ceiling_gbs"]
    if not gbs or not ceiling or gbs <= _SLACK * ceiling:
        return None
    what = "memory" if "memory_gbs" in record else "link"
    return f"impossible: {gbs:.0f} GB/s, where the {what} has {ceiling:.0f}: not all was done"


def save(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Write records as a JSON list, one a line; readers never see a half-written file."""
    for record in records:
        check(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"[\n{lines}\n]\n" if records else "[]\n")
    part.replace(path)


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file, checked."""
    loaded = json.loads(path.read_text())
    for record in loaded:
        check(record)
    return loaded


def label(record: dict[str, Any]) -> str:
    """A short name of what was measured."""
    parts = [record["op"]]
    if record.get("name"):
        parts.append(record["name"])
    if record["op"] not in ("exchange", "layer", "ceiling", "link"):
        parts.append(record["layout"])
    if record["op"] == "layer":
        parts.append(f"F={record['intermediate']}")
    if record["op"] not in ("ceiling", "link", "plan"):
        rows = record["dtype"]
        if record["quantization"].startswith("fp8"):
            rows += f" ({record['quantization']})"
        parts.append(rows)
    parts.append(f"T={record['tokens']}")
    if record.get("mode") == "latency":
        parts.append("latency")
    if record["routing"] != "uniform":
        parts.append(record["routing"])
    if record.get("capacity", "exact") != "exact":
        parts.append(f"{record['capacity']} capacity")
    return " ".join(parts)
