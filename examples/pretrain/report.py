"""The report of a run: one HTML file with its figures and plots, which needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.pretrain.config import Config
from examples.pretrain.metrics import rate_text

Line = dict[str, Any]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }}
details {{ margin: 1rem 0; }}
</style></head><body>
<h1>{title}</h1>
{summary}
{pictures}
<details><summary>Configuration</summary>{configuration}</details>
</body></html>
"""


def write_report(folder: pathlib.Path, config: Config, lines: list[Line]) -> pathlib.Path:
    """Write ``report.html`` into ``folder``.

    Args:
        folder: The folder of the run.
        config: Its configuration.
        lines: Its lines of metrics, as ``metrics.Log`` has them.

    Returns:
        The file.
    """
    pictures = [
        _picture("Loss", _draw_loss, lines),
        _picture("Speed", _draw_speed, lines),
        _picture("Gradients", _draw_gradients, lines),
        _picture("Balance of the experts", _draw_balance, lines),
        _picture("Load of the experts at the end", _draw_load, lines),
    ]
    path = folder / "report.html"
    path.write_text(
        _PAGE.format(
            title=html.escape(f"Pretraining run {config.name}"),
            summary=_table(_summary(lines)),
            pictures="\n".join(filter(None, pictures)),
            configuration=_table(_settings(config)),
        )
    )
    return path


def _summary(lines: list[Line]) -> list[tuple[str, str]]:
    rows = [("steps", str(max((line["step"] for line in lines), default=0)))]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    if held_out := [line["held_out_loss"] for line in lines if "held_out_loss" in line]:
        rows.append(("held-out loss", f"{held_out[-1]:.4f} nats per token"))
    if rates:
        rows.append(("speed, median", rate_text(float(np.median(rates)))))
    if mfu := [line["mfu"] for line in lines if "mfu" in line]:
        rows.append(("MFU, median", f"{np.median(mfu):.1%}"))
    if exchange := [line["exchange_share"] for line in lines if "exchange_share" in line]:
        text = f"{np.median(exchange):.1%} of a step's time"
        rows.append(("plan, dispatch and combine", text))
    if goodput := [line["goodput"] for line in lines if "goodput" in line]:
        rows.append(("goodput", f"{goodput[-1]:.1%} of the time went into steps that count"))
    if skipped := [line["num_skipped"] for line in lines if "num_skipped" in line]:
        rows.append(("skipped steps, last part", str(skipped[-1])))
    return rows


def _settings(config: Config) -> list[tuple[str, str]]:
    sections = dataclasses.asdict(config)
    return [
        (f"{section}.{key}", str(value))
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _picture(title: str, draw: Any, lines: list[Line]) -> str:
    """A plot with its title; nothing where there are no figures for it."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    try:
        if not draw(axes, lines):
            return ""
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
    finally:
        plt.close(figure)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">'


def _curve(lines: list[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have ``name``."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, int), np.array(values, float)


def _draw_loss(axes: Axes, lines: list[Line]) -> bool:
    steps, loss = _curve(lines, "loss")
    if len(steps):
        axes.plot(steps, loss, color="tab:blue", linewidth=0.8, label="training")
    at, held_out = _curve(lines, "held_out_loss")
    if len(at):
        axes.plot(at, held_out, "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="nats per token")
    if len(steps) or len(at):
        axes.legend()
    return bool(len(steps) or len(at))


def _draw_speed(axes: Axes, lines: list[Line]) -> bool:
    steps, rate = _curve(lines, "tokens_per_second")
    axes.plot(steps, rate, color="tab:green")
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    at, mfu = _curve(lines, "mfu")
    if len(at):
        right = axes.twinx()
        right.plot(at, 100 * mfu, color="tab:gray", linewidth=0.8)
        right.set_ylabel("MFU (%)")
        right.set_ylim(bottom=0)
    return bool(len(steps))


def _draw_gradients(axes: Axes, lines: list[Line]) -> bool:
    steps, norm = _curve(lines, "grad_norm")
    axes.plot(steps, norm, color="tab:red")
    axes.set(xlabel="step", ylabel="global norm, before clipping", yscale="log")
    return bool(len(steps))


def _draw_balance(axes: Axes, lines: list[Line]) -> bool:
    steps, entropy = _curve(lines, "load_entropy")
    axes.plot(steps, entropy, color="tab:purple")
    axes.set(xlabel="step", ylabel="entropy of the load (1: equal)")
    right = axes.twinx()
    at, dropped = _curve(lines, "dropped")
    right.plot(at, 100 * dropped, color="tab:brown", linewidth=0.8)
    right.set_ylabel("dropped (%)")
    right.set_ylim(bottom=0)
    return bool(len(steps))


def _draw_load(axes: Axes, lines: list[Line]) -> bool:
    last = next((line["load"] for line in reversed(lines) if "load" in line), None)
    if last is None:
        return False
    load = np.array(last, float)  # [layers, E]
    share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    image = axes.imshow(share, aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer with experts")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="times the mean")
    return True
