"""The part of the performance page about ``examples/pretrain``, from the records of its runs."""

from __future__ import annotations

from typing import Any

import page_text
from performance_data import Record

_SHARES = ("plan_share", "dispatch_share", "combine_share")


def runs(_: dict[str, Any], results: list[Record]) -> str:
    """Each run: its speed, where its time went, and how its losses fell."""
    found = [r for r in results if r["op"] == "pretrain"]
    if not found:
        return page_text.nothing("python -m examples.pretrain.train --config 1b")
    head = ["run", "attention", "tokens/s", "MFU", "ms a step", "ops of jax_ep", "GB", "loss"]
    return page_text.table(head, [_row(record) for record in found])


def _row(record: Record) -> list[str]:
    losses = dict(record["loss"])
    shown = sorted({1, 50, 100, record["steps"]} & losses.keys())
    held_out = record.get("held_out_loss", [])
    curve = ", ".join(f"{losses[step]:.2f} (step {step})" for step in shown)
    if held_out:
        curve += f"; held out {held_out[-1][1]:.2f}"
    step, shares = record["step_ms"], record.get("shares", {})
    ops = f"{sum(shares[name] for name in _SHARES):.1%}" if shares else ""
    memory = record.get("peak_memory_gb")
    where = f"{record['devices']} x {record['device']}, jax {record['versions']['jax']}"
    return [
        f"`{record['name']}`, {where}",
        record["settings"]["model"].get("attention", "blockwise"),
        f"{record['tokens_per_second']:,.0f}",
        f"{record['mfu']:.1%}" if record["mfu"] else "",
        f"{step['median']:.0f} ({step['p10']:.0f} to {step['p90']:.0f})",
        ops,
        f"{memory:.1f}" if memory else "",
        curve,
    ]
