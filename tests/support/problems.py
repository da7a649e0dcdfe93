"""Data of one case under one routing pattern, and what the oracle says about it.

Everything is seeded by the case and the pattern, so every backend gets the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

import logical_hosts
import oracle
import routings
from shapes import Case

# Rows that only move may hold any bits. Rows that are summed have no subnormal numbers, because XLA
# flushes these to zero on CPU.
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs and the oracle's results for one case and one pattern, stacked over ranks.

    Attributes:
        inputs: Arrays for the jitted function, by name.
        plan: The oracle's plan.
        expected: The oracle's results, by name.
    """

    inputs: dict[str, np.ndarray]
    plan: oracle.Plan
    expected: dict[str, np.ndarray]


@functools.lru_cache(maxsize=16)
def make(case: Case, pattern: str) -> Problem:
    """The problem of ``case`` under ``pattern``; pattern "zipf" has special values in its data."""
    rng = np.random.default_rng([case.ranks, case.tokens, *pattern.encode()])
    special = pattern == "zipf"
    sizes = {"ranks": case.ranks, "tokens": case.tokens, "top_k": case.top_k}
    idx = routings.make(pattern, **sizes, experts=case.num_experts)
    plan = oracle.plan(
        idx,
        num_experts=case.num_experts,
        layout=case.layout,
        alignment=case.alignment,
        bounds=case.limits,
    )
    capacity = plan.capacity
    by_row = (capacity,) if case.layout == "expert" else (capacity, case.top_k)
    inputs = {
        "topk_idx": idx,
        "x": _normal(rng, case, case.tokens, special=special),
        "x_again": _normal(rng, case, case.tokens),
        "rows": _normal(rng, case, capacity, special=special),
        "dy": _normal(rng, case, case.tokens),
        "d_rows": _normal(rng, case, capacity),
        "topk_weights": _weights(rng, idx.shape, special),
        "row_weights": _weights(rng, (case.ranks, capacity), False),
        "d_row_weights": _weights(rng, (case.ranks, *by_row), special),
    }
    # Padding and unused rows are not read.
    unused = plan.recv_src < 0
    for name in ("rows", "d_rows", "row_weights", "d_row_weights"):
        inputs[name][unused] = np.nan
    if case.quantization == "input":
        inputs["x"], inputs["x_scales"] = oracle.quantize(inputs["x"])
        inputs["x_again"], inputs["x_again_scales"] = oracle.quantize(inputs["x_again"], "ue8m0")
    return Problem(inputs, plan, _values(case, inputs, plan))


def _values(case: Case, inputs: dict[str, np.ndarray], plan: oracle.Plan) -> dict[str, Any]:
    per_host = logical_hosts.of_first(case.ranks)
    expected = plan.arrays(per_host)
    for name in ("x", "x_again"):
        expected |= _moved(case, inputs, name, plan)
    if case.weighted:
        expected["weights"] = oracle.move_weights(inputs["topk_weights"], plan)
    weights = inputs["row_weights"] if case.fused else None
    expected["y"] = oracle.combine(inputs["rows"], plan, weights, per_host)
    return expected


def _moved(case: Case, inputs: dict[str, np.ndarray], name: str, plan: oracle.Plan):
    x = inputs[name]
    if case.quantization is None:
        return {f"{name}.rows": oracle.move(x, plan)}
    if case.quantization == "input":
        values, scales = x, inputs[f"{name}_scales"]
    else:
        values, scales = oracle.quantize(x, case.quantization)
    if case.output == "dense":
        return {f"{name}.rows": oracle.move(oracle.dequantize(values, scales, x.dtype), plan)}
    return {
        f"{name}.values": oracle.move(values, plan),
        f"{name}.scales": oracle.move(scales, plan),
    }


def _normal(
    rng: np.random.Generator, case: Case, rows: int, *, special: bool = False
) -> np.ndarray:
    x = rng.standard_normal((case.ranks, rows, case.hidden), np.float32)
    x *= np.exp2(rng.integers(-6, 7, size=(case.ranks, rows, 1))).astype(np.float32)
    x = x.astype(case.np_dtype)
    if special and rows:
        where = rng.random(x.shape) < 2 / case.hidden
        x[where] = rng.choice(SPECIAL, size=where.sum()).astype(case.np_dtype)
    return x


def _weights(rng: np.random.Generator, shape: tuple[int, ...], special: bool) -> np.ndarray:
    weights = rng.standard_normal(shape).astype(np.float32)
    if special:
        where = rng.random(shape) < 0.2
        weights[where] = rng.choice([*SPECIAL, 1e-40], size=where.sum())
    return weights
