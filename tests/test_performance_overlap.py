"""The tables of docs/performance.md about ops in flight, and profiles that they are made of."""

from __future__ import annotations

import gzip
import json

from jax_ep.bench import trace
from jax_ep.bench.cases import Case
from performance_page import benchmark, data, page, record, rows, targets


def test_bounds_of_ops_in_flight():
    """A bound is marked where the figure is over it; layers in chunks are in the table too."""
    layer = {"op": "layer", "layout": "expert", "intermediate": 2048, "capacity": "default"}
    bound = {"bound_us": 170.04, "intermediate": 7168}
    results = [
        record(op="overlap", name="dispatch beside x", mode="latency", within_bound=True, **bound),
        record(op="overlap", name="dispatch beside y", within_bound=False, **bound),
        record(**layer, name="jax_ep in chunks", share_hidden=0.5),
        record(**layer, name="jax_ep"),
    ]
    found = [row.split(" | ")[1:4] for row in rows(targets, results, "overlap")]
    us = f"{record()['median_us']:.1f}"
    assert found == [
        ["what", "us", "bound us"],
        ["---", "---", "---"],
        [f"dispatch beside x, {record()['layout']}, latency mode, T = 4096", us, "170.0"],
        [f"dispatch beside y, {record()['layout']}", us, "**over** 170.0"],
        ["jax_ep in chunks, F=2048", us, ""],
    ]


def test_timelines():
    """The record of a profile made by hand, and its table: an op, half beside a matmul."""
    timeline, case = benchmark("timeline"), Case(op="layer", intermediate=2048, experts=16)
    kernels = [
        trace.Event("Stream #1", "tiny", 1, 500.0, 1000.0),
        trace.Event("Stream #2", "DispatchKernel<x>", 24, 1000.0, 11000.0),
        trace.Event("Stream #1", "matmul", 108, 4000.0, 8000.0),
        trace.Event("Stream #1", "more", 1, 7000.0, 9000.0),
        trace.Event("Stream #3", "CombineKernel", 24, 1000.0, 11000.0),
    ]
    assert trace.hidden(kernels[1], kernels) == 5000.0  # no op hides another
    made = timeline.record_of("jax_ep in chunks", kernels, case)
    assert (made["us"], made["ops_us"], made["hidden_us"]) == (10.5, 20.0, 10.0)
    assert made["kernels"][2] == {
        "stream": "Stream #1",
        "name": "matmul",
        "blocks": 108,
        "start_us": 3.5,
        "us": 4.0,
    }
    machine = {"ranks": 1, "gpus": 1, "device": "NVIDIA H200", "versions": {}, "command": ""}
    record = made | machine
    assert not data.TIMELINE_FIELDS - record.keys()
    layer = "1 × NVIDIA H200 | T=4096 H=7168 E=16 F=2048 | jax_ep in chunks"
    assert rows(targets, [record], "timeline")[2:] == [
        f"| {layer} | all |  | 10.5 | 20.0 | 50% |",
        "|  |  |  | dispatch | 0.5 |  | 10.0 | 50% |",
        "|  |  |  | combine | 0.5 |  | 10.0 | 50% |",
    ]
    assert "timeline.py" in page.TABLES["timeline"](targets, [])


def test_kernels_of_a_profile(tmp_path):
    """Kernels of GPUs alone, by GPU and stream, in order; times are in microseconds there."""
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream #7"}},
    ]
    details = {"kernel_details": "regs:168 grid:108,1,1 block:384,1,1"}
    kernels = [
        {"ph": "X", "name": "CombineKernel", "pid": 1, "tid": 7, "ts": 9.0, "dur": 2.0},
        {"ph": "X", "name": "dot", "pid": 1, "tid": 7, "ts": 5.0, "dur": 1.5, "args": details},
        {"ph": "X", "name": "no kernel", "pid": 1, "tid": 8, "ts": 5.0, "dur": 1.5},
        {"ph": "X", "name": "of the host", "pid": 2, "tid": 7, "ts": 5.0, "dur": 1.5},
    ]
    text = json.dumps({"traceEvents": names + kernels})
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "x.trace.json.gz").write_bytes(gzip.compress(text.encode()))
    dot = trace.Event("Stream #7", "dot", 108, 5000.0, 6500.0)
    combine = trace.Event("Stream #7", "CombineKernel", 0, 9000.0, 11000.0)
    assert trace.kernels_of(tmp_path) == {"/device:GPU:0": [dot, combine]}
    assert combine.is_op and not dot.is_op
