"""The record of a run: its figures with everything needed to read and to repeat them, as JSON.

``report.json`` is a list of one object, as files in ``benchmarks/results/`` are, so it can be committed
there as it is.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from examples.pretrain import flops
from examples.pretrain.rows import Summary
from examples.pretrain.shares import SHARES
from examples.pretrain.step import Setup
from jax_ep.bench.session import versions

Line = dict[str, Any]


def write_record(
    folder: pathlib.Path, setup: Setup, data: Summary, lines: Sequence[Line], *, command: str
) -> pathlib.Path:
    """Write ``report.json`` into ``folder``.

    Args:
        folder: The folder of the run.
        setup: What it trained.
        data: What it trained on.
        lines: Its lines of metrics, as ``metrics.Log`` has them.
        command: The command line of its last part.

    Returns:
        The file.
    """
    config = setup.config
    sections = dataclasses.asdict(config)
    found = {
        "op": "pretrain",
        "name": config.name,
        "device": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.devices.size,
        "processes": jax.process_count(),
        "mesh": dict(setup.mesh.shape),
        "weights": _num_weights(setup),
        "active_weights": flops.active_weights(config.model),
        "flops_per_token": flops.flops_per_token(config.model, seq_len=config.data.seq_len),
        "rows": data.num_rows | {"digest": data.digest},
        **figures(lines),
        "peak_memory_gb": _peak_memory(setup),
        "settings": {name: part for name, part in sections.items() if isinstance(part, dict)},
        "versions": versions(),
        "command": command,
    }
    path = folder / "report.json"
    path.write_text(f"[\n{json.dumps(found)}\n]\n")
    return path


def figures(lines: Sequence[Line]) -> dict[str, Any]:
    """What the lines of a run say of its speed and its losses.

    Returns:
        ``steps``; medians over lines of ``tokens_per_second`` and ``mfu`` (None where the peak is not
        known); ``step_ms``, the median and the 10th and 90th percentiles of the lines' mean steps, each
        the mean of ``steps_per_line`` steps; ``goodput`` and ``num_skipped`` of the last line; medians
        of the ``shares`` that profiles have; ``dropped``, the mean over lines; ``loss`` and
        ``held_out_loss``, pairs of a step and a loss.
    """
    steps = [line["step"] for line in lines if "num_skipped" in line]
    seconds = _values(lines, "step_seconds")
    return {
        "steps": max(steps, default=0),
        "steps_per_line": int(np.median(np.diff([0, *steps]))) if steps else None,
        "tokens_per_second": _median(lines, "tokens_per_second"),
        "mfu": _median(lines, "mfu"),
        "step_ms": {
            name: 1e3 * float(np.percentile(seconds, percent)) if seconds else None
            for name, percent in (("median", 50), ("p10", 10), ("p90", 90))
        },
        "goodput": _last(lines, "goodput"),
        "num_skipped": _last(lines, "num_skipped"),
        "shares": {name: _median(lines, name) for name in SHARES if _values(lines, name)},
        "dropped": float(np.mean(_values(lines, "dropped") or [0.0])),
        "loss": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "held_out_loss": [
            [line["step"], line["held_out_loss"]] for line in lines if "held_out_loss" in line
        ],
    }


def _values(lines: Sequence[Line], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = _values(lines, name)
    return float(np.median(values)) if values else None


def _last(lines: Sequence[Line], name: str) -> float | None:
    values = _values(lines, name)
    return values[-1] if values else None


def _num_weights(setup: Setup) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(setup.abstract_state().params))


def _peak_memory(setup: Setup) -> float | None:
    """Of a device of this process, in GB, by XLA's allocator; None where it does not say."""
    stats = setup.mesh.local_devices[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else peak / 1e9
