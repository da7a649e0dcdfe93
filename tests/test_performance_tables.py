"""The tables of docs/performance.md: what each makes of records, targets and figures of others."""

from __future__ import annotations

import dataclasses
import json

import pytest

from performance_page import (
    benchmark,
    data,
    kernel,
    loads,
    page,
    phases,
    record,
    rows,
    targets,
    with_peers,
)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "met"),  # within three percent
        ({"median_us": 203.5}, "missed: 1.10 x the target"),
        ({"num_sms": 25}, "over the budget of 24 SMs"),
        ({"correct": False}, "wrong or failed"),
        ({"error": "faster than the link"}, "wrong or failed"),
        ({"median_us": None}, "too noisy"),
        ({"median_us": None, "correct": False}, "wrong or failed"),
    ],
)
def test_verdicts(changes, verdict):
    row = rows(targets, [record(**{"median_us": 190.0, **changes})])[2]
    assert row.startswith("| dispatch bf16, token, T = 4096 |")
    assert row.endswith(f"| {verdict} |")


@pytest.mark.parametrize(
    "changes",
    [
        *({"ranks": 4}, {"routing": "zipf"}, {"tokens": 2048}, {"name": "reference"}),
        *({"gpus": 0}, {"gpus": 1}),
    ],
)
def test_other_figures_are_not_taken_for_a_target(changes):
    text = page.TABLES["targets"](targets, [record(**changes)])
    assert (
        "No results are committed yet" in text
        and "195" not in text.split("| dispatch bf16")[1][:60]
    )


def test_every_target_can_be_measured():
    """A case of the suites measures each target, on its number of ranks."""
    from jax_ep.bench import suites
    from jax_ep.bench.machine import Machine

    machine = Machine(ranks=2, processes=2, gpus=2)
    cases = suites.suite("baselines", machine) + suites.suite("decode", machine)
    without = set()
    for figure in targets["figures"]:
        match = {k: v for k, v in figure["match"].items() if k not in ("ranks", "dtype")}
        hits = [
            case
            for case in cases
            if all(getattr(case, f, data.DEFAULTS.get(f)) == value for f, value in match.items())
            and case.row_dtype == figure["match"]["dtype"]
        ]
        if not hits:
            without.add((figure["figure"], match["layout"], match["tokens"]))
        best = min([peer.us for peer in data.peers_of(targets, figure["match"])], default=1e9)
        assert max(figure["floor_us"]) <= figure["target_us"] < best
        budget = None if "mode" in match else {"token": 24, "expert": 64}[match["layout"]]
        assert figure["max_num_sms"] == budget and ("mode" in match) == (match["tokens"] == 128)
    assert not without


def test_bounds_of_latency_mode():
    shared = {"mode": "latency", "gpus": 1, "moved_bytes": 10_880_000}
    results = [
        record(tokens=128, median_us=12.5, within_bound=False, **shared),
        record(tokens=8, median_us=8.9, within_bound=True, **shared),
        record(tokens=64, median_us=None, **shared),
        record(tokens=1, correct=False, **shared),
        record(tokens=32, mode="latency"),
    ]
    found = rows(targets, results, "latency_bound")[2:]
    assert [line.split(" | ")[-1] for line in found] == [
        "WRONG |", "kept |", "too noisy |", "missed |"
    ]  # fmt: skip
    assert found[1] == "| dispatch token bfloat16 T=8 latency | 10.88 | 8.9 | 12.1 | 24 | kept |"


def test_other_tables():
    layer = {"op": "layer", "layout": "expert", "intermediate": 256, "num_sms": None}
    results = [
        record(op="ceiling", name="device_put", logical_gbs=391.0),
        record(op="plan", wire_gbs=0.0),
        record(routing="zipf"),
        record(mode="latency", tokens=7, moved_bytes=10**6, within_bound=True),
        record(hosts=2),
        record(op="overlap", name="dispatch beside matmul", share_hidden=0.62, intermediate=7168),
        record(op="exchange", name="jax.lax.all_to_all"),
        record(op="exchange", name="broken", median_us=None, correct=False, error="it | broke"),
        record(**layer, name="jax_ep", median_us=1000.0),
        record(**layer, name="plain", median_us=2500.0),
        record(**layer, name="products", median_us=700.0),
        {
            **dict.fromkeys(data.GROUPED_DOT_FIELDS, 1.0),
            "op": "grouped_dot",
            "pass": "forward",
            "dtype": "bfloat16",
            "device": "H200",
            "distribution": "equal",
            "correct": True,
        },
        loads(),
        kernel(),
        phases(),
        {
            **dict.fromkeys(data.TIMELINE_FIELDS, 1),
            "op": "timeline",
            "name": "",
            "kernels": [],
            "versions": {},
        },
        {
            **dict.fromkeys(data.PRETRAIN_FIELDS, 1),
            "op": "pretrain",
            "name": "1b",
            "device": "H200",
            "versions": {"jax": "0.11.2"},
            "steps": 60,
            "tokens_per_second": 93_394.0,
            "mfu": 0.302,
            "loss": [[1, 9.0], [60, 4.5]],
            "step_ms": {"median": 700.0, "p10": 692.0, "p90": 705.0},
            "settings": {"model": {"attention": "cudnn"}},
        },
    ]
    text = page.render(page.TEMPLATE.read_text(), targets, results)
    assert "<!-- table" not in text and text.count("No results are committed yet") == 1  # targets
    assert "device_put | 391.0 |" in text
    assert "T=7 latency |" in text and " as 2 hosts, " in text
    assert "| dispatch beside matmul, token | 195.0 |  | 194.0 to 197.0 | 62% |" in text
    assert "| plain | 2500.0 | 2.50 |" in text
    assert "it / broke" in text
    assert "| 1.0 | 2.0 | 3.0 |" in text  # memory
    assert "| H200 | forward |" in text
    assert "| local | copy | 14336 | ld.global | 1000 | 2000 |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_loads():
    assert "No results are committed yet" in page.TABLES["loads"](targets, [record()])
    results = [
        loads(),
        loads(in_flight=8, gbs=1500.0),  # the better one counts
        loads(blocks=8, gbs=400.0),
        loads(row_bytes=7392, gbs=900.0),
        loads(mover="bulk", in_flight=0, gbs=1200.0),
        loads(mover="bulk", in_flight=0, blocks=8, gbs=300.0, correct=False),
    ]
    assert rows(targets, results, "loads") == [
        "| device | memory | use | row bytes | mover | 8 blocks | 24 blocks | cudaMemcpyAsync |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| NVIDIA H200 | local | copy | 14336 | ld.global | 400 | 1500 | 2000 |",
        "| NVIDIA H200 | local | copy | 7392 | ld.global |  | 900 | 2000 |",
        "| NVIDIA H200 | local | copy | 14336 | bulk | WRONG | 1200 | 2000 |",
    ]


def test_kernels():
    assert "No results are committed yet" in page.TABLES["kernels"](targets, [record()])
    results = [
        kernel(),
        kernel(blocks=24, us=400.0),
        kernel(quantization="fp8", us=100.0),
        kernel(kernel="combine", correct=False),
    ]
    assert rows(targets, results, "kernels") == [
        "| device | kernel | layout | rows | ranks | T | 24 SMs | 64 SMs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| NVIDIA H200 | dispatch | expert | bfloat16 | 2 | 2048 | 400.0 | 190.0 |",
        "| NVIDIA H200 | dispatch | expert | fp8 | 2 | 2048 |  | 100.0 |",
        "| NVIDIA H200 | combine | expert | bfloat16 | 2 | 2048 |  | WRONG |",
    ]


def test_phases_of_latency_mode():
    """A table for each workload, a column for each launch; the newest record of a launch counts."""
    assert "No results are committed yet" in page.TABLES["decode_phases"](targets, [record()])
    results = [
        phases(op_us=1.0),
        phases(),
        phases(kernel="combine", call="start", quantization="none", skew_us=None, correct=False),
        phases(tokens=8),
    ]
    assert rows(targets, results, "decode_phases")[:13] == [
        "2 ranks on 1 × NVIDIA H200, layout token, T = 128, 50 blocks:",
        "",
        "| phase | dispatch (quantized), one call | combine, start call |",
        "| --- | --- | --- |",
        "| launched | 0.00 / 0.30 / 0.50 (+0.50) | 0.00 / 0.30 / 0.50 (+0.50) |",
        "| end | 5.00 / 6.00 / 7.25 (+6.75) | 5.00 / 6.00 / 7.25 (+6.75) |",
        "| until the next launch | 1.25 | 1.25 |",
        "| phases and that | 8.50 | 8.50 |",
        "| whole op | 8.50 | 8.50 |",
        "| without stamps | 8.00 | 8.00 |",
        "| ranks apart at launch | 0.40 |  |",
        "| tick of the clock, ns | 32 | 32 |",
        "| correct | yes | NO |",
    ]


def test_records_of_kernels():
    """What kernels_test prints becomes records; other output does not."""
    kernels = benchmark("kernels")
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


def test_headline_takes_figures_from_records_and_from_others():
    targets = with_peers(("DeepEP V2", 24, 300.0), ("DeepEP V2", 64, 250.0), ("NCCL EP", 0, 400.0))

    def first(*results):
        return rows(targets, list(results), "headline")[2]

    theirs = "DeepEP V2 250.0 @64"
    start = "| 4096 | dispatch bf16 | token |"
    found = record(processes=2)
    assert first(found) == f"{start} 195.0 @24 | {theirs} | 0.78 | 185 | 168 to 175 |"
    slower = record(processes=2, median_us=275.0, num_sms=16)
    assert first(slower) == f"{start} 275.0 @16 | {theirs} | 1.10 | 185 | 168 to 175 |"
    assert first() == f"{start} not measured | {theirs} | – | 185 | 168 to 175 |"
    assert "| wrong or failed |" in first(record(processes=2, correct=False))
    assert "| wrong or failed |" in first({**found, "error": "faster than the link"})
    assert "| 275.0 @16 |" in first(found, slower)  # the newest file's
    lines = rows(targets, [found], "headline")
    assert all("not measured | – | – |" in line for line in lines[3:])


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": 1},  # the others' conditions differ
        {"device": "NVIDIA H100"},
        {"gpus": 1},
        {"capacity": "default"},
    ],
)
def test_headline_compares_like_with_like(changes):
    row = rows(targets, [{**record(processes=2), **changes}], "headline")[2]
    assert "| not measured |" in row


def test_headline_takes_records_that_say_their_capacity():
    row = rows(targets, [{**record(processes=2), "capacity": "exact"}], "headline")[2]
    assert "| 195.0 @24 |" in row


def test_best_of_each_library():
    """From the committed figures: the fastest first, each library once, none along a handle."""
    match = targets["figures"][0]["match"]
    best = data.peers_of(targets, match)
    assert [peer.name for peer in best] == ["DeepEP V2", "DeepEP V1", "NCCL EP"]
    assert [peer.num_sms for peer in best] == [64, 24, 0]
    assert all(peer.op == "dispatch_bf16_token" for peer in best)
    cast = data.peers_of(
        targets, {**match, "tokens": 128, "layout": "expert", "quantization": "fp8"}
    )
    assert [peer.name for peer in cast] == ["DeepEP V1 low latency"]
    assert data.peers_of(targets, {**match, "quantization": "fp8"}) == []
    assert data.peers_of(targets, {**match, "hidden": 2048}) == []


def test_summary_names_where_jax_ep_is_slower():
    targets = with_peers(("DeepEP V2", 64, 100.0))

    def summary(*results):
        return page.TABLES["summary"](targets, list(results)).replace("\n", " ")

    assert "were not measured on the same op yet" in summary()
    assert summary(record(processes=2, median_us=80.0)).startswith(
        "Of 1 rows with figures of both, jax_ep is faster in 1 (0.80 of the best other time). Half"
    )
    assert summary(record(processes=2, median_us=140.0)).startswith(
        "Of 1 rows with figures of both, jax_ep is faster in 0 and slower in 1 (1.40 of it): "
        "with T = 4096 dispatch bf16 (token). Half"
    )
    both = {**targets["peers"], "figures": targets["peers"]["figures"] * 2}
    both["figures"][1] = dataclasses.replace(both["figures"][0], op="combine_bf16_token")
    text = page.TABLES["summary"]({**targets, "peers": both}, [record(processes=2)])
    assert "1 more have figures of others only." in text.replace("\n", " ")
    text = summary(record(processes=2, median_us=100.0, p10_us=90.0, p90_us=120.0))
    assert "15.0% to 15.0% for jax_ep (in the middle 15.0%) and 1.0% to 1.0% for the others" in text


def test_layer_ratio():
    layer = {"op": "layer", "layout": "expert", "intermediate": 256, "processes": 2}
    mine = record(**layer, name="jax_ep", median_us=5000.0)
    other = record(**layer, name="all_to_all", median_us=20000.0)

    def ratio(*results):
        return page.TABLES["layer_ratio"](targets, list(results)).replace("\n", " ")

    assert "takes 5.00 ms; the same layer" in ratio(mine, other)
    assert "takes 20.00 ms, 4.0 times as long." in ratio(mine, other)
    for results in ((mine,), (other,), (mine, {**other, "correct": False}), ()):
        assert ratio(*results).endswith("`jax.lax.all_to_all`: not measured.")
    assert "not measured" in ratio({**mine, "tokens": 128}, other)
    # Room for any routing is a time of its own, whatever order the records have.
    roomy = {**mine, "capacity": "default", "median_us": 6000.0}
    for results in ((roomy, mine, other), (mine, other, roomy)):
        assert "takes 5.00 ms; the same layer" in ratio(*results)
        assert ratio(*results).endswith("room for any routing, jax_ep takes 6.00 ms.")
        table = rows(targets, list(results), "layer")
        assert any("jax_ep, default capacity" in row and "1.20" in row for row in table)
    # Ranks that share a GPU have times, and ratios, of their own.
    shared = {**mine, "gpus": 1, "median_us": 9000.0}
    for results in ((shared, mine, other), (mine, other, shared)):
        assert "takes 5.00 ms; the same layer" in ratio(*results)
        table = rows(targets, list(results), "layer")
        assert any("all_to_all" in row and "4.00" in row for row in table)


def test_rates_above_the_ceiling():
    ceiling = record(op="ceiling", name="ppermute", wire_gbs=300.0, ceiling_gbs=300.0)
    slow, fast = (record(wire_gbs=rate, ceiling_gbs=300.0) for rate in (290.0, 330.0))

    def beyond(*results):
        return page.TABLES["beyond"](targets, list(results)).replace("\n", " ")

    assert beyond(ceiling, slow) == "No rate on this page is above the ceiling of its run."
    text = beyond(ceiling, slow, fast, loads(), record(wire_gbs=None))
    assert "it is what `ppermute` reached, and other movers" in text
    assert text.startswith("1 records have a rate above the ceiling of their run, by up to 10.0%:")
    # Copies in memory that ranks share are no ceiling of a link, and rates there are none over a
    # link.
    memory = {"memory_gbs": 400.0, "ranks": 2, "gpus": 1}
    copies = record(op="ceiling", name="bulk copies", ceiling_gbs=4000.0, **memory)
    shared = record(wire_gbs=9000.0, ceiling_gbs=4000.0, **memory)
    assert beyond(ceiling, slow, fast, loads(), record(wire_gbs=None), copies, shared) == text
    for mover in targets["movers"]["figures"]:
        assert f"{mover['name']} {mover['gbs']} GB/s" in text


def test_figures_of_others():
    """All figures of the file are on the page; a file with something else is refused."""
    lines = (page.TARGETS.parent / targets["peers"]["file"]).read_text().splitlines()
    assert len(rows(targets, [], "peers")) == 2 + len(lines)
    fastest = min((json.loads(line) for line in lines), key=lambda fields: fields["us"])
    assert f"| {fastest['us']:.1f} |" in page.TABLES["peers"](targets, [])


def test_files_of_others_are_checked(tmp_path):
    names, path = targets["peers"]["names"], tmp_path / "peers.jsonl"
    line = {**dict.fromkeys(data.PEER_FIELDS, 1), "tag": "v2p", "op": "dispatch_bf16_token"}
    path.write_text(json.dumps(line) + "\n")
    assert data.load_peers(path, names)[0].name == "DeepEP V2"
    path.write_text(json.dumps({**line, "tag": "v9"}))
    with pytest.raises(ValueError, match=r"peers\.jsonl: line 1: expected a tag of .*'v9'"):
        data.load_peers(path, names)
    path.write_text(json.dumps({"op": "dispatch"}))
    with pytest.raises(ValueError, match=r"peers\.jsonl: line 1: fields .*'us'"):
        data.load_peers(path, names)
