"""A picture of a run's metrics."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from common.metrics import smooth


def plot(
    records: list[dict[str, Any]], path: pathlib.Path, *, unigram_loss: float, title: str
) -> None:
    """Draw loss curves above, and below each expert's share of the load over time.

    Args:
        records: As ``Metrics`` holds them.
        path: The PNG to write.
        unigram_loss: Drawn as a line, in nats per byte; a model that learns gets below it.
        title: Title of the picture.
    """
    training = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    steps = np.array([record["step"] for record in training])
    figure, (losses, loads) = plt.subplots(
        2, 1, figsize=(9, 8), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    loss = np.array([record["loss"] for record in training])
    losses.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    losses.plot(steps, smooth(loss[:, None])[:, 0], color="tab:blue", label="training")
    losses.plot(
        [record["step"] for record in held_out],
        [record["held_out_loss"] for record in held_out],
        "o-",
        color="tab:orange",
        label="held out",
    )
    losses.axhline(unigram_loss, color="gray", linestyle="--", label="byte frequencies, held out")
    losses.set_ylabel("loss (nats/byte)")
    losses.legend()
    losses.set_title(title)
    load = np.array([record["load"] for record in training], float)  # [steps, E]
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1.0)
    for expert, curve in enumerate(smooth(share).T):
        loads.plot(steps, 100 * curve, linewidth=1.0, label=f"{expert}")
    loads.axhline(100 / load.shape[1], color="gray", linestyle="--")
    loads.set_ylim(bottom=0)
    loads.set_ylabel("load of each expert (%)")
    loads.set_xlabel("step")
    if load.shape[1] <= 16:
        loads.legend(title="expert", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
