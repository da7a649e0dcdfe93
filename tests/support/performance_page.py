"""The script that renders docs/performance.md, and records for it as benchmarks write them.

Importing this module puts docs/ on the path, because the script imports its neighbours there.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types
from typing import Any

from jax_ep.bench import records

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "render_performance.py"
sys.path.insert(0, str(SCRIPT.parent))

import performance_data as data  # noqa: E402
import performance_headline as headline  # noqa: E402, F401 (for tests)
import render_performance as page  # noqa: E402

targets = page.load_targets(page.TARGETS)


def with_peers(
    *figures: tuple[str, int, float], op: str = "dispatch_bf16_token", tokens: int = 4096
) -> dict[str, Any]:
    """The targets with these figures of other libraries: (library, SMs, microseconds)."""
    workload = (2, tokens, 7168, 8, 256)
    peers = [data.Peer(name, op, workload, sms, us, us - 1, us + 1) for name, sms, us in figures]
    return {**targets, "peers": {**targets["peers"], "figures": peers}}


def benchmark(name: str) -> types.ModuleType:
    """The script benchmarks/NAME.py, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(**changes: Any) -> dict[str, Any]:
    """A record as ``python -m jax_ep.bench`` writes it."""
    fields = {
        "op": "dispatch",
        "layout": "token",
        "dtype": "bfloat16",
        "quantization": "none",
        "mode": "auto",
        "routing": "uniform",
        "ranks": 2,
        "gpus": 2,
        "processes": 1,
        "tokens": 4096,
        "hidden": 7168,
        "top_k": 8,
        "experts": 256,
        "num_sms": 24,
        "median_us": 195.0,
        "p10_us": 194.0,
        "p90_us": 197.0,
        "wire_bytes": 58_700_000,
        "wire_gbs": 301.0,
        "logical_gbs": 602.0,
        "ceiling_gbs": 391.0,
        "workspace_bytes": 2**20,
        "scratch_bytes": 2**21,
        "staged": False,
        "correct": True,
        "device": "NVIDIA H200",
        "versions": {"jax_ep": "0"},
        "command": "",
    }
    made = {**fields, **changes}
    records.check(made)
    return made


def loads(**changes: Any) -> dict[str, Any]:
    """A record as benchmarks/loads.cu writes it."""
    fields = {
        "op": "loads",
        "mover": "ld.global",
        "in_flight": 4,
        "use": "copy",
        "memory": "local",
        "row_bytes": 14336,
        "blocks": 24,
        "rows": 36864,
        "us": 528.5,
        "p10_us": 528.0,
        "p90_us": 529.0,
        "gbs": 1000.0,
        "ceiling_gbs": 2000.0,
        "correct": True,
        "device": "NVIDIA H200",
        "versions": {"cuda": 13000, "driver": 13000},
        "command": "",
    }
    return {**fields, **changes}


def kernel(**changes: Any) -> dict[str, Any]:
    """A record as benchmarks/kernels.py writes it."""
    fields = {
        "op": "kernel",
        "kernel": "dispatch",
        "layout": "expert",
        "dtype": "bfloat16",
        "quantization": None,
        "ranks": 2,
        "gpus": 1,
        "tokens": 2048,
        "hidden": 7168,
        "top_k": 8,
        "experts": 128,
        "alignment": 128,
        "blocks": 64,
        "us": 190.04,
        "correct": True,
        "device": "NVIDIA H200",
        "versions": {"driver": "580"},
        "command": "",
    }
    return {**fields, **changes}


def phases(**changes: Any) -> dict[str, Any]:
    """A record as benchmarks/decode_phases.py writes it, with two phases only."""
    passed = [
        {"phase": "launched", "blocks": 50, "first_us": 0.0, "median_us": 0.3, "last_us": 0.5},
        {"phase": "end", "blocks": 50, "first_us": 5.0, "median_us": 6.0, "last_us": 7.25},
    ]
    fields = {
        "op": "decode_phases",
        "kernel": "dispatch",
        "call": "whole",
        "layout": "token",
        "dtype": "bfloat16",
        "quantization": "quantized",
        "ranks": 2,
        "gpus": 1,
        "tokens": 128,
        "hidden": 7168,
        "top_k": 8,
        "experts": 256,
        "blocks": 50,
        "ops": 1000,
        "op_us": 8.5,
        "plain_us": 8.0,
        "gap_us": 1.25,
        "skew_us": 0.4,
        "resolution_ns": 32,
        "phases": [p | {"takes_us": t} for p, t in zip(passed, (0.5, 6.75), strict=True)],
        "correct": True,
        "device": "NVIDIA H200",
        "versions": {"driver": "580"},
        "command": "",
    }
    return {**fields, **changes}


def rows(
    targets: dict[str, Any], results: list[dict[str, Any]], name: str = "targets"
) -> list[str]:
    """The lines of a table: two of its head, then one a row."""
    return page.TABLES[name](targets, results).splitlines()
