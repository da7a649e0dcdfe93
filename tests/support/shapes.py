"""The static configurations of the suite, named once.

Compilation dominates the suite's time, so routings are data, and the configurations are a covering
array: every pair of levels of any two factors below stands in at least one case (a test holds the
table to that), plus a few that people use most. All sizes are tiny.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np

import oracle

FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 3, 4, 8),
    "layout": ("expert", "token"),
    "dtype": ("float32", "bfloat16", "float16"),
    # How rows travel: as they are, quantized by the op with either scale format, or quantized by
    # the caller.
    "quantization": (None, "f32", "ue8m0", "input"),
    "output": ("dense", "quantized"),
    "alignment": (1, 8, 128),
    "bound": ("lossless", "capacity", "factor"),
    "tokens": (13, 4),
    "top_k": (1, 3, 8),
    "local_experts": (1, 3, 8),
    "width": ("least", "odd"),
    "weighted": (True, False),  # topk_weights travel along
    "fused": (True, False),  # combine multiplies by weights
}
# Pairs of levels that make no sense together.
IMPOSSIBLE = (
    {"quantization": None, "output": "quantized"},
    {"quantization": "input", "output": "dense"},
    {"layout": "token", "bound": "factor"},
    {"layout": "token", "fused": True},
)
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CAPACITY_FACTOR = 0.75


@dataclasses.dataclass(frozen=True)
class Case:
    """One level of each factor."""

    ranks: int
    layout: str
    dtype: str
    quantization: str | None
    output: str
    alignment: int
    bound: str
    tokens: int
    top_k: int
    local_experts: int
    width: str
    weighted: bool
    fused: bool

    @property
    def num_experts(self) -> int:
        return self.ranks * self.local_experts

    @property
    def np_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def hidden(self) -> int:
        """The least that is allowed, or more channels than a dot product has lanes."""
        if self.quantization is None:
            return 16 // self.np_dtype.itemsize if self.width == "least" else 264
        return 128 if self.width == "least" else 384

    @property
    def capacity(self) -> int | None:
        """The argument ``capacity``: about half of what a uniform routing needs, or None."""
        if self.bound != "capacity":
            return None
        rows = max(1, self.tokens * self.top_k // 2)
        return oracle.round_up(rows, self.alignment if self.layout == "expert" else 1)

    @property
    def limits(self) -> oracle.Limits:
        return oracle.limits(
            num_ranks=self.ranks,
            num_tokens=self.tokens,
            top_k=self.top_k,
            num_experts=self.num_experts,
            layout=self.layout,
            alignment=self.alignment,
            capacity=self.capacity,
            capacity_factor=CAPACITY_FACTOR if self.bound == "factor" else None,
        )

    @property
    def dispatch_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``jax_ep.dispatch`` besides the group."""
        bound = {
            "lossless": {},
            "capacity": {"capacity": self.capacity},
            "factor": {"capacity_factor": CAPACITY_FACTOR},
        }[self.bound]
        wire: dict[str, Any] = {}
        if self.quantization in ("f32", "ue8m0"):
            wire = {
                "quantization": "fp8",
                "scale_format": self.quantization,
                "output": self.output,
            }
        return {
            "num_experts": self.num_experts,
            "layout": self.layout,
            "alignment": self.alignment,
            **bound,
            **wire,
        }

    def on(self, devices: int) -> Case:
        """This case, with as many ranks as ``devices`` allow; two at least, if it has several."""
        ranks = min(self.ranks, max(2, devices))
        # So that a token still has top_k experts to choose from.
        local_experts = max(self.local_experts, -(-self.top_k // ranks))
        return dataclasses.replace(self, ranks=ranks, local_experts=local_experts)

    def __str__(self) -> str:
        return "-".join(
            str(part)
            for part in (
                f"R{self.ranks}",
                self.layout,
                self.dtype,
                self.quantization or "plain",
                self.output,
                f"A{self.alignment}",
                self.bound,
                f"T{self.tokens}K{self.top_k}L{self.local_experts}H{self.hidden}",
                "weighted" if self.weighted else "bare",
                "fused" if self.fused else "sum",
            )
        )


COVERING = (
    # ranks, layout, dtype, quantization, output, alignment, bound, tokens, top_k, local_experts,
    # width, weighted, fused
    Case(1, "expert", "float16", None, "dense", 128, "factor", 13, 1, 1, "least", False, True),
    Case(
        1, "token", "bfloat16", "input", "quantized", 8, "lossless", 13, 3, 3, "least", False, False
    ),
    Case(1, "token", "float16", "f32", "dense", 8, "lossless", 4, 8, 8, "least", True, False),
    Case(1, "token", "float32", "ue8m0", "quantized", 1, "capacity", 4, 8, 8, "odd", True, False),
    Case(2, "expert", "bfloat16", "ue8m0", "dense", 128, "lossless", 13, 1, 1, "odd", False, True),
    Case(2, "expert", "float16", None, "dense", 1, "factor", 4, 8, 8, "odd", True, False),
    Case(2, "expert", "float32", "f32", "quantized", 128, "factor", 4, 3, 3, "odd", True, True),
    Case(
        2, "token", "float32", "input", "quantized", 8, "capacity", 13, 1, 1, "least", False, False
    ),
    Case(3, "expert", "bfloat16", "input", "quantized", 1, "factor", 13, 8, 8, "odd", False, True),
    Case(
        3, "expert", "float16", "ue8m0", "quantized", 8, "lossless", 13, 1, 1, "least", False, True
    ),
    Case(3, "expert", "float32", "f32", "quantized", 128, "capacity", 4, 1, 1, "least", True, True),
    Case(3, "token", "float16", None, "dense", 8, "capacity", 13, 3, 3, "odd", True, False),
    Case(4, "expert", "bfloat16", "ue8m0", "quantized", 8, "factor", 4, 8, 3, "least", False, True),
    Case(4, "expert", "float32", None, "dense", 1, "lossless", 4, 3, 8, "odd", True, False),
    Case(4, "token", "bfloat16", "f32", "dense", 128, "capacity", 13, 1, 8, "odd", False, False),
    Case(
        4, "token", "float16", "input", "quantized", 128, "capacity", 13, 1, 1, "odd", False, False
    ),
    Case(8, "expert", "bfloat16", None, "dense", 8, "factor", 13, 8, 1, "least", True, True),
    Case(
        8, "expert", "float16", "input", "quantized", 128, "lossless", 4, 8, 8, "least", True, True
    ),
    Case(8, "expert", "float32", "ue8m0", "dense", 1, "lossless", 13, 3, 1, "odd", False, True),
    Case(8, "token", "bfloat16", "f32", "dense", 1, "capacity", 13, 1, 3, "least", True, False),
)
USUAL = (
    Case(8, "expert", "bfloat16", "f32", "dense", 128, "lossless", 13, 8, 8, "odd", True, True),
    Case(4, "expert", "bfloat16", None, "dense", 8, "capacity", 13, 3, 3, "odd", True, True),
    Case(3, "expert", "float32", None, "dense", 1, "factor", 13, 3, 3, "odd", True, True),
    Case(
        2, "token", "bfloat16", "ue8m0", "quantized", 128, "lossless", 13, 8, 8, "odd", True, False
    ),
)
# On GPUs its plan is too large for the usual kernel and runs in the other one
# (test_large_plans.py).
LARGE_PLANS = (
    Case(1, "expert", "bfloat16", None, "dense", 1, "lossless", 13, 3, 4096, "least", True, True),
)
CASES = COVERING + USUAL + LARGE_PLANS


def level_pairs() -> set[frozenset[tuple[str, Any]]]:
    """Every pair of levels of different factors that can stand together."""
    levels = [(name, level) for name in FACTORS for level in FACTORS[name]]
    impossible = {frozenset(pair.items()) for pair in IMPOSSIBLE}
    pairs = {frozenset(pair) for pair in itertools.combinations(levels, 2)}
    return {p for p in pairs if len({name for name, _ in p}) == 2} - impossible


def covered_pairs(cases: tuple[Case, ...]) -> set[frozenset[tuple[str, Any]]]:
    """The pairs of levels that ``cases`` have."""
    return {
        frozenset(pair)
        for case in cases
        for pair in itertools.combinations(dataclasses.asdict(case).items(), 2)
    }
