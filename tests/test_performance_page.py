"""docs/performance.md: rendered from records, and current."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from jax_ep.bench import records

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "render_performance.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("render_performance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def targets(page):
    return json.loads(page.TARGETS.read_text())


def record(**changes):
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


def loads(**changes):
    """As benchmarks/loads.cu writes it."""
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


def kernel(**changes):
    """As benchmarks/kernels.py writes it."""
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


def rows(page, targets, results, name="targets"):
    return page.TABLES[name](targets, results).splitlines()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "met"),  # within three percent
        ({"median_us": 209.0}, "missed: 1.10 x the target"),
        ({"num_sms": 25}, "over the budget of 24 SMs"),
        ({"correct": False}, "wrong or failed"),
        ({"median_us": None}, "wrong or failed"),
    ],
)
def test_verdicts(page, targets, changes, verdict):
    row = rows(page, targets, [record(**changes)])[2]
    assert row.startswith("| dispatch bf16, one row per (token, rank) |")
    assert row.endswith(f"| {verdict} |")


@pytest.mark.parametrize(
    "changes",
    [
        *({"ranks": 4}, {"routing": "zipf"}, {"tokens": 2048}, {"name": "reference"}),
        *({"gpus": 0}, {"gpus": 1}),
    ],
)
def test_other_figures_are_not_taken_for_a_target(page, targets, changes):
    text = page.TABLES["targets"](targets, [record(**changes)])
    assert (
        "No results are committed yet" in text
        and "195" not in text.split("| dispatch bf16")[1][:60]
    )


def test_every_target_can_be_measured(targets):
    """By a case of the suites, on the ranks that it is for."""
    from jax_ep.bench import suites

    cases = suites.suite("baselines") + suites.suite("decode")
    for figure in targets["figures"]:
        match = {k: v for k, v in figure["match"].items() if k not in ("ranks", "dtype")}
        hits = [
            case
            for case in cases
            if all(getattr(case, field) == value for field, value in match.items())
            and case.row_dtype == figure["match"]["dtype"]
        ]
        assert len(hits) == 1, figure["figure"]
        assert (
            figure["floor_us"]
            <= figure["target_us"]
            < min([peer["us"] for peer in figure["peers"]], default=1e9)
        )


def test_other_tables(page, targets):
    layer = {"op": "layer", "layout": "expert", "intermediate": 256, "num_sms": None}
    results = [
        record(op="ceiling", name="device_put", logical_gbs=391.0),
        record(op="plan", wire_gbs=0.0),
        record(routing="zipf"),
        record(op="exchange", name="jax.lax.all_to_all"),
        record(op="exchange", name="broken", median_us=None, correct=False, error="it | broke"),
        record(**layer, name="jax_ep", median_us=1000.0),
        record(**layer, name="plain", median_us=2500.0),
        {
            **dict.fromkeys(page.GROUPED_DOT_FIELDS, 1.0),
            "op": "grouped_dot",
            "pass": "forward",
            "dtype": "bfloat16",
            "device": "H200",
            "distribution": "equal",
            "correct": True,
        },
        loads(),
        kernel(),
    ]
    text = page.render(page.TEMPLATE.read_text(), targets, results)
    assert "<!-- table" not in text and text.count("No results are committed yet") == 1  # targets
    assert "device_put | 391.0 |" in text
    assert "| plain | 2500.0 | 2.50 |" in text
    assert "it / broke" in text
    assert "| 1.0 | 2.0 | 3.0 |" in text  # memory
    assert "| H200 | forward |" in text
    assert "| local | copy | 14336 | ld.global | 1000 | 2000 |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_loads(page, targets):
    assert "No results are committed yet" in page.TABLES["loads"](targets, [record()])
    results = [
        loads(),
        loads(in_flight=8, gbs=1500.0),  # the better one counts
        loads(blocks=8, gbs=400.0),
        loads(row_bytes=7392, gbs=900.0),
        loads(mover="bulk", in_flight=0, gbs=1200.0),
        loads(mover="bulk", in_flight=0, blocks=8, gbs=300.0, correct=False),
    ]
    assert rows(page, targets, results, "loads") == [
        "| device | memory | use | row bytes | mover | 8 blocks | 24 blocks | cudaMemcpyAsync |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| NVIDIA H200 | local | copy | 14336 | ld.global | 400 | 1500 | 2000 |",
        "| NVIDIA H200 | local | copy | 7392 | ld.global |  | 900 | 2000 |",
        "| NVIDIA H200 | local | copy | 14336 | bulk | WRONG | 1200 | 2000 |",
    ]


def test_kernels(page, targets):
    assert "No results are committed yet" in page.TABLES["kernels"](targets, [record()])
    results = [
        kernel(),
        kernel(blocks=24, us=400.0),
        kernel(quantization="fp8", us=100.0),
        kernel(kernel="combine", correct=False),
    ]
    assert rows(page, targets, results, "kernels") == [
        "| device | kernel | layout | rows | ranks | T | 24 SMs | 64 SMs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| NVIDIA H200 | dispatch | expert | bfloat16 | 2 | 2048 | 400.0 | 190.0 |",
        "| NVIDIA H200 | dispatch | expert | fp8 | 2 | 2048 |  | 100.0 |",
        "| NVIDIA H200 | combine | expert | bfloat16 | 2 | 2048 |  | WRONG |",
    ]


def test_records_of_kernels():
    """What kernels_test prints becomes records; other output does not."""
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "benchmarks" / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    output = """\
R=2 T=2048 K=8 E=128 H=7168 C=20480 expert bf16 blocks=32
  plan             11.2 us
  dispatch        190.0 us   146.4 GB/s
  combine_vjp     410.1 us    71.6 GB/s
  combine         200.5 us   136.9 GB/s
  all right
"""
    made = kernels.records_of(output, "expert", None, 64)
    assert [(r["kernel"], r["us"]) for r in made] == [
        ("plan", 11.2),
        ("dispatch", 190.0),
        ("combine_vjp", 410.1),
        ("combine", 200.5),
    ]
    assert all(r["correct"] and r["blocks"] == 64 and r["quantization"] is None for r in made)
    (only,) = kernels.records_of(output.replace("all right", "3 WRONG"), "expert", "fp8", 64)
    assert (only["kernel"], only["quantization"], only["correct"]) == ("dispatch", "fp8", False)
    with pytest.raises(ValueError, match="expected times of kernels"):
        kernels.records_of("no CUDA-capable device is detected", "expert", None, 64)


def test_unknown_tables_and_records_say_so(page, targets, tmp_path):
    with pytest.raises(ValueError, match="no table 'speed'"):
        page.render("<!-- table: speed -->", targets, [])
    (tmp_path / "a.json").write_text(json.dumps([{"op": "grouped_dot"}]))
    with pytest.raises(ValueError, match=r"a\.json: record: fields .*'pass'"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"op": "loads"}]))
    with pytest.raises(ValueError, match=r"a\.json: record: fields .*'mover'"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{**record(), "extra": 1}]))
    with pytest.raises(ValueError, match=r"a\.json: record: .*extra"):
        page.load_results(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([record(), loads()]))
    assert page.load_results(tmp_path) == [record(), loads()]


def test_page_is_current():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
