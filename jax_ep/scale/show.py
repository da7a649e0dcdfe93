"""Predictions as rows of a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jax_ep.scale.model import OpCost, Prediction

NOTE = "predictions of a model, not measurements"
COLUMNS = (
    *("EP", "hosts", "ranks a token", "hosts a token", "plan us", "dispatch us", "bound by"),
    *("combine us", "bound by", "layer forward us", "backward us"),
    *("NVLink MB", "NIC MB", "memory MB", "rows GiB", "for any routing GiB", "fixed MiB"),
)
CAPTION = (
    "dispatch: along a handle, so without the plan. A layer: communication alone. MB: dispatch and "
    "combine together, over NVLink and NIC in one direction, in memory read and written. rows: room "
    "for dispatched rows, as asked and so that any routing fits. fixed: workspace, staging ring and "
    "scratch."
)


def row(found: Prediction) -> list[str]:
    """The cells of a prediction, as many as ``COLUMNS``."""
    memory, both = found.memory, (found.dispatch, found.combine)
    return [
        *(f"EP{found.ranks}", str(found.hosts)),
        *(f"{found.ranks_per_token:.2f}", f"{found.hosts_per_token:.2f}"),
        f"{found.plan.us:.1f}",
        *(f"{found.dispatch.us:.0f}", found.dispatch.bound),
        *(f"{found.combine.us:.0f}", found.combine.bound),
        *(f"{found.layer.forward_us:.0f}", f"{found.layer.backward_us:.0f}"),
        *(
            f"{sum(getattr(cost, field) for cost in both) / 1e6:.0f}"
            for field in ("nvlink_bytes", "network_bytes", "memory_bytes")
        ),
        *(f"{memory.rows / 2**30:.2f}", f"{memory.lossless_rows / 2**30:.2f}"),
        f"{(memory.workspace + memory.ring + memory.scratch) / 2**20:.0f}",
    ]


def as_json(found: Sequence[Prediction]) -> str:
    """What was asked and assumed, and one object for each number of hosts.

    Raises:
        ValueError: for a machine with an infinite rate, which JSON cannot express.
    """
    predictions: list[dict[str, Any]] = []
    for prediction in found:
        fields = dataclasses.asdict(prediction)
        del fields["workload"], fields["machine"]
        predictions.append({"ranks": prediction.ranks, **fields})
    document = {
        "note": NOTE,
        "workload": dataclasses.asdict(found[0].workload),
        "machine": dataclasses.asdict(found[0].machine),
        "predictions": predictions,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def plot(found: Sequence[Prediction], path: pathlib.Path) -> None:
    """Draw times with their parts, and bytes; the file's ending says which format.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {
        "whole op": "us",
        "NVLink": "nvlink_us",
        "network": "network_us",
        "memory": "memory_us",
        "SMs": "sm_us",
        "fixed cost": "fixed_us",
    }
    places = range(len(found))
    names = [f"EP{prediction.ranks}" for prediction in found]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, op in zip(axes, ("dispatch", "combine"), strict=False):
        costs: list[OpCost] = [getattr(prediction, op) for prediction in found]
        for name, field in parts.items():
            times = [getattr(cost, field) for cost in costs]
            style: dict[str, Any] = {"linewidth": 3, "color": "black"} if field == "us" else {}
            axis.plot(places, [time or None for time in times], marker="o", label=name, **style)
        axis.set_yscale("log")
        axis.set_ylabel("us")
        axis.set_title(op)
        axis.legend()
    for name, field in (("NVLink", "nvlink_bytes"), ("NIC", "network_bytes")):
        sums = [
            (getattr(prediction.dispatch, field) + getattr(prediction.combine, field)) / 1e6
            for prediction in found
        ]
        axes[2].plot(places, sums, marker="o", label=name)
    axes[2].set_ylabel("MB of a rank in one direction")
    axes[2].set_title("dispatch and combine")
    axes[2].legend()
    for axis in axes:
        axis.set_xticks(places, names)
    figure.suptitle(f"{found[0].machine.name}: {NOTE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
