"""Records of the benchmarks as tuning reads them."""

from __future__ import annotations

from typing import Any

import jax_ep


def record(num_sms: int | None, median_us: float | None, **changes: Any) -> dict[str, Any]:
    """The fields that tuning looks at, of a right dispatch of 4000 tokens."""
    fields = {
        "device": "cpu",
        "ranks": 2,
        "op": "dispatch",
        "layout": "token",
        "dtype": "bfloat16",
        "quantization": "none",
        "mode": "auto",
        "hidden": 7168,
        "tokens": 4000,
        "num_sms": num_sms,
        "median_us": median_us,
        "correct": True,
        "versions": {"jax_ep": jax_ep.__version__},
    }
    return {**fields, **changes}
