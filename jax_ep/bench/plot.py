"""Records as a picture: times with their spread, and wire rates beside the link's ceiling."""

from __future__ import annotations

import pathlib
from typing import Any

from jax_ep.bench import records


def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the records that have a figure; the file's ending says which format.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in found if r["median_us"] is not None and r["op"] not in ("ceiling", "link")]
    shown.reverse()  # the first at the top
    places = range(len(shown))
    figure, (times, rates) = pyplot.subplots(
        1, 2, sharey=True, figsize=(13, 1.5 + 0.32 * max(len(shown), 1)), layout="constrained"
    )
    medians = [record["median_us"] for record in shown]
    below = [max(r["median_us"] - r["p10_us"], 0) for r in shown]
    above = [max(r["p90_us"] - r["median_us"], 0) for r in shown]
    colours = ["tab:blue" if r.get("name", "jax_ep") == "jax_ep" else "tab:gray" for r in shown]
    times.barh(places, medians, xerr=[below, above], color=colours)
    if medians and min(medians) > 0:
        times.set_xscale("log")
    times.set_yticks(places, [records.label(r) + ("" if r["correct"] else " WRONG") for r in shown])
    times.set_xlabel("us, median with 10th to 90th percentile")
    rates.barh(places, [record["wire_gbs"] or 0 for record in shown], color=colours)
    ceilings = [record["ceiling_gbs"] for record in shown if record["ceiling_gbs"]]
    if ceilings:
        rates.axvline(max(ceilings), color="tab:red", label="ceiling measured in this run")
        rates.legend()
    rates.set_xlabel("GB/s between ranks")
    if shown:
        figure.suptitle(f"{shown[0]['device']}, {shown[0]['ranks']} rank(s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
