"""The model of scale: its expectations, its shape, its agreement with figures, and its command."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import typer
import typer.testing

from jax_ep.scale import H200, Machine, Workload, predict, show
from jax_ep.scale import expectation as expected

pytestmark = pytest.mark.one_process("computes on the host")

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOSTS = (1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def page():
    """The script that writes docs/scale.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))  # the script imports its neighbours
        return importlib.import_module("render_scale")


@pytest.fixture(scope="module")
def data(page):
    return sys.modules["scale_data"]


@pytest.fixture(scope="module")
def records(data):
    return list(data.load())


def chosen_of(order: tuple[int, ...], top_k: int, num_groups: int, top_groups: int) -> list[int]:
    """The experts of a token: the best in the groups of the best, best first."""
    in_group = len(order) // num_groups
    groups = list(dict.fromkeys(expert // in_group for expert in order))[:top_groups]
    return [expert for expert in order if expert // in_group in groups][:top_k]


@pytest.mark.parametrize(
    ("units", "top_k", "num_groups", "top_groups"),
    [
        (3, 2, 1, 1),
        (6, 3, 3, 2),
        (2, 3, 2, 1),
        (3, 3, 6, 3),
        (6, 2, 3, 1),
        (2, 6, 6, 6),
        (1, 2, 2, 1),
    ],
)
def test_distinct_units_of_all_orders(units, top_k, num_groups, top_groups):
    """The exact mean over every order of six experts."""
    counts = [
        len({e // (6 // units) for e in chosen_of(order, top_k, num_groups, top_groups)})
        for order in itertools.permutations(range(6))
    ]
    found = expected.distinct_units(
        units, experts=6, top_k=top_k, num_groups=num_groups, top_groups=top_groups
    )
    assert found == pytest.approx(np.mean(counts), abs=1e-12)


@pytest.mark.parametrize(
    ("units", "num_groups", "top_groups"), [(64, 1, 1), (8, 1, 1), (64, 8, 4), (8, 8, 4), (2, 8, 4)]
)
def test_distinct_units_of_random_scores(units, num_groups, top_groups):
    """E = 256, K = 8, as in training; groups are kept by their best expert."""
    tokens = 4000
    scores = np.random.default_rng(0).random((tokens, 256), np.float32)
    best = scores.reshape(tokens, num_groups, -1).max(axis=-1)
    kept = np.argsort(-best, axis=-1)[:, :top_groups]
    allowed = np.zeros_like(best, bool)
    np.put_along_axis(allowed, kept, True, axis=-1)
    scores[~np.repeat(allowed, 256 // num_groups, axis=-1)] = -1
    units_of = np.argpartition(-scores, 7, axis=-1)[:, :8] // (256 // units)
    counts = np.array([len(set(of_token)) for of_token in units_of.tolist()])
    found = expected.distinct_units(
        units, experts=256, top_k=8, num_groups=num_groups, top_groups=top_groups
    )
    error = counts.std() / math.sqrt(tokens)
    assert abs(counts.mean() - found) < 5 * error + 1e-9


@pytest.mark.parametrize(("top_k", "groups", "kept"), [(8, 8, 4), (32, 8, 8), (3, 1, 1), (5, 4, 1)])
def test_counts_of_groups_are_a_distribution(top_k, groups, kept):
    found = expected.count_distribution(top_k, groups, kept, 256 // groups)
    assert sum(share for _, share in found) == pytest.approx(1, abs=1e-12)
    for counts, _ in found:
        assert sum(counts) == top_k and len(counts) <= kept


@pytest.mark.parametrize(
    ("tokens", "probability", "alignment"),
    [(40, 0.25, 8), (7, 0.5, 1), (12, 1.0, 8), (300, 0.02, 16)],
)
def test_padded_rows_against_all_counts(tokens, probability, alignment):
    def share(count):
        there = probability**count * (1 - probability) ** (tokens - count)
        return math.comb(tokens, count) * there

    exact = sum(share(n) * -(-n // alignment) * alignment for n in range(tokens + 1))
    assert expected.padded_rows(tokens, probability, alignment) == pytest.approx(exact, rel=1e-9)


def test_padded_rows_of_many_tokens():
    """With a mean of 1024 tokens, padding adds half of a multiple on average, less half a row."""
    assert expected.padded_rows(32768, 1 / 32, 128) == pytest.approx(1024 + 63.5, rel=1e-3)
    assert expected.padded_rows(2048 * 4096, 1 / 256, 128) == pytest.approx(32768 + 63.5, rel=1e-3)


def test_bytes_by_hand():
    """Two hosts of two ranks, four experts, K = 1: each token needs one rank of four."""
    workload = Workload(tokens=8, hidden=128, top_k=1, experts=4, quantization="quantized")
    found = predict(workload, hosts=2, ranks_per_host=2)
    assert (found.ranks_per_token, found.hosts_per_token) == (1, 1)
    fp8, bf16 = 128 + 4, 256
    assert found.dispatch.network_bytes == pytest.approx(4 * fp8)  # half of the tokens leave
    assert found.dispatch.nvlink_bytes == pytest.approx(4 * fp8)  # half of the rows are next door
    assert found.dispatch.memory_bytes == pytest.approx((8 + 8 + 4 * 4) * fp8)
    assert found.combine.network_bytes == pytest.approx(4 * bf16)
    assert found.combine.nvlink_bytes == pytest.approx(4 * bf16)
    assert found.combine.memory_bytes == pytest.approx((8 + 4 * 4 + 8) * bf16)
    memory = found.memory
    assert (memory.rows, memory.lossless_rows) == (8 * fp8, 4 * 8 * fp8)
    assert memory.ring == 2 * H200.ring_rows * bf16
    assert (memory.scratch, memory.workspace) == (0, H200.workspace_bytes)
    cast = dataclasses.replace(workload, quantization="fp8-dense", capacity=None)
    memory = predict(cast, hosts=2, ranks_per_host=2).memory
    assert (memory.scratch, memory.rows) == (8 * fp8, 4 * 8 * bf16)


def test_time_is_fixed_cost_and_the_slowest_resource():
    machine = Machine(
        nvlink_gbs=400.0, nic_gbs=50.0, memory_gbs=4e3, network_us=3.0, dispatch_us=10.0
    )
    found = predict(hosts=8, machine=machine).dispatch
    assert found.fixed_us == 13
    assert found.network_us == pytest.approx(found.network_bytes / 50e3)
    assert found.nvlink_us == pytest.approx(found.nvlink_bytes / 400e3)
    assert found.us == pytest.approx(13 + found.network_us)
    assert found.bound == "network"
    for changes, bound in (
        ({"nic_gbs": 5e3}, "NVLink"),
        ({"nvlink_gbs": 1e9, "nic_gbs": 1e9}, "memory"),
        ({"sm_store_gbs": 0.1}, "SMs"),
        ({"dispatch_us": 1e6}, "fixed cost"),
    ):
        other = predict(hosts=8, machine=dataclasses.replace(machine, **changes)).dispatch
        assert other.bound == bound, changes
        resources = (other.nvlink_us, other.network_us, other.memory_us, other.sm_us)
        assert other.us == pytest.approx(other.fixed_us + max(resources) + other.serial_us)


@pytest.mark.parametrize("layout", ["token", "expert"])
def test_monotonous(layout):
    base = Workload(layout=layout)
    by_hosts = [predict(base, hosts=hosts) for hosts in HOSTS]
    for fewer, more in itertools.pairwise(by_hosts):
        assert fewer.hosts_per_token < more.hosts_per_token <= more.ranks_per_token <= base.top_k
        for op in ("dispatch", "combine"):
            assert getattr(fewer, op).us < getattr(more, op).us
            assert getattr(fewer, op).nvlink_bytes < getattr(more, op).nvlink_bytes
            assert getattr(fewer, op).network_bytes < getattr(more, op).network_bytes
        assert fewer.memory.ring < more.memory.ring
        if layout == "token":  # else fewer experts of a rank may need less padding
            assert 2 * fewer.memory.lossless_rows == more.memory.lossless_rows
    plain = predict(base, hosts=8)
    for changes in (
        {"tokens": 2048},
        {"top_k": 4},
        {"hidden": 3584},
        {"num_groups": 8, "top_groups": 4},
    ):
        less = predict(dataclasses.replace(base, **changes), hosts=8)
        assert less.layer.forward_us < plain.layer.forward_us
        assert less.layer.backward_us < plain.layer.backward_us
    fp8 = predict(dataclasses.replace(base, quantization="quantized"), hosts=8)
    assert fp8.dispatch.us < 0.6 * plain.dispatch.us
    assert fp8.combine == plain.combine and fp8.layer.backward_us == plain.layer.backward_us
    roomy = predict(dataclasses.replace(base, capacity=None), hosts=8)
    assert roomy.dispatch.memory_bytes > plain.dispatch.memory_bytes
    assert roomy.memory.rows == plain.memory.lossless_rows > plain.memory.rows
    faster = predict(base, hosts=8, machine=dataclasses.replace(H200, nic_gbs=94.0))
    assert faster.dispatch.us < plain.dispatch.us
    assert plain.layer.forward_us == plain.plan.us + plain.dispatch.us + plain.combine.us


def test_one_rank_moves_nothing_over_links():
    found = predict(hosts=1, ranks_per_host=1)
    assert found.dispatch.nvlink_bytes == found.dispatch.network_bytes == found.memory.ring == 0
    assert found.ranks_per_token == found.hosts_per_token == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"workload": {"layout": "rows"}}, "layout: expected one of expert, token, got 'rows'"),
        ({"workload": {"tokens": 0}}, "tokens: expected 1 or more, got 0"),
        (
            {"workload": {"hidden": 100, "quantization": "fp8"}},
            "hidden: expected a multiple of 128",
        ),
        ({"workload": {"capacity": 0.5}}, "capacity: expected at least 1 times"),
        ({"workload": {"num_sms": 0}}, "num_sms: expected 1 or more"),
        ({"workload": {"num_groups": 7}}, "num_groups: expected a divisor of the 256 experts"),
        ({"workload": {"num_groups": 8, "top_groups": 9}}, "top_groups: expected 1 to 8 groups"),
        ({"workload": {"top_k": 9, "num_groups": 32}}, "top_k: expected 1 to 8 experts, got 9"),
        ({"hosts": 0}, "hosts: expected 1 or more, got 0"),
        ({"hosts": 3}, r"experts: expected a multiple of the 24 ranks \(3 hosts of 8\), got 256"),
        ({"machine": {"nic_gbs": 0.0}}, "nic_gbs: expected a rate above 0"),
        ({"machine": {"plan_us": -1.0}}, "plan_us: expected 0 or more"),
        (
            {"workload": {"experts": 24, "num_groups": 3, "top_groups": 3}},
            "num_groups: expected groups within units or units within groups",
        ),
    ],
)
def test_errors_name_the_argument(arguments, text):
    with pytest.raises(ValueError, match=text):
        predict(
            Workload(**arguments.get("workload", {})),
            hosts=arguments.get("hosts", 1),
            machine=dataclasses.replace(H200, **arguments.get("machine", {})),
        )


def test_constants_are_those_that_records_say(data, records):
    """The fitted constants, rounded, are those in machine.py."""
    fitted = data.fit(records)
    assert len(fitted) == 14
    for name, value in fitted.items():
        assert getattr(H200, name) == pytest.approx(value, rel=5e-3), name


def held(checks, deviations, slack):
    """Checks that the model misses, and names in the table of deviations that match no check."""
    missed = {c.name: c.deviation for c in checks if abs(c.deviation) > slack}
    unnamed = {c.name for c in checks if c.name in missed and c.kind not in deviations}
    needed = {c.kind for c in checks if c.name in missed}
    present = {c.kind for c in checks}
    return unnamed, {kind for kind in deviations if kind in present} - needed


def test_measurements(data, records):
    """Within 15 %, or named with a reason. All names are needed, and no record is left out."""
    checks = data.measured(records)
    assert held(checks, data.DEVIATIONS, data.MEASURED_SLACK) == (set(), set())
    assert len(checks) + sum(data.skipped(record) is not None for _, record in records) == len(
        records
    )
    assert len(checks) >= 90 and sum(not check.fitted for check in checks) >= 80
    assert {check.kind for check in checks if check.fitted} == data.FIT_KINDS
    assert sum(abs(check.deviation) < 0.05 for check in checks) > len(checks) / 2
    changed = [dataclasses.replace(check, predicted=1.2 * check.figure) for check in checks]
    assert held(changed, data.DEVIATIONS, data.MEASURED_SLACK)[0]


def test_published_figures(data):
    """Within 25 %, or named with a reason."""
    checks = data.published()
    assert len(checks) == 16
    assert held(checks, data.DEVIATIONS, data.PUBLISHED_SLACK) == (set(), set())


def test_every_deviation_has_a_figure(data, records):
    kinds = {check.kind for check in (*data.measured(records), *data.published())}
    assert data.DEVIATIONS.keys() <= kinds


def test_page_is_current(page, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["render_scale.py", "--check"])
    assert page.main() == 0, capsys.readouterr().out
    monkeypatch.setattr(page, "PAGE", tmp_path / "scale.md")
    assert page.main() == 1
    assert "scale.md is out of date: run python docs/render_scale.py" in capsys.readouterr().out
    text = page.render("<!-- table: uniform -->")
    assert sum(line.startswith("| **EP64** | **8** |") for line in text.splitlines()) == 1
    with pytest.raises(ValueError, match="there is no table 'none'"):
        page.render("<!-- table: none -->")


@pytest.fixture
def command():
    """Runs the command line."""
    from jax_ep.scale.__main__ import main

    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: typer.testing.CliRunner().invoke(app, list(arguments))


def test_command_prints_and_writes(command, tmp_path):
    path, picture = tmp_path / "out" / "scale.json", tmp_path / "scale.png"
    done = command(
        *("--experts", "2048", "--groups", "8", "--top-groups", "4", "--layout", "expert"),
        *("--quantization", "fp8", "--nic", "94", "--json", str(path), "--plot", str(picture)),
    )
    assert done.exit_code == 0, done.output
    for text in ("EP8 ", "EP2048", "network", "NVLink", "4 of 8 groups", "not measurements"):
        assert text in done.output
    document = json.loads(path.read_text())
    assert document.keys() == {"note", "workload", "machine", "predictions"}
    assert document["machine"]["nic_gbs"] == 94 and document["machine"]["name"] != H200.name
    assert document["workload"]["num_groups"] == 8
    assert [p["hosts"] for p in document["predictions"]] == [2**n for n in range(9)]
    workload = Workload(
        experts=2048, num_groups=8, top_groups=4, layout="expert", quantization="fp8"
    )
    last = predict(workload, hosts=256, machine=Machine(**document["machine"]))
    told = document["predictions"][-1]
    assert told["ranks"] == 2048 and told["dispatch"] == dataclasses.asdict(last.dispatch)
    fields = {field.name for field in dataclasses.fields(last)} - {"workload", "machine"}
    assert told.keys() == fields | {"ranks"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(show.row(last)) == len(show.COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--hosts", "1,x"), "--hosts: expected integers"),
        (("--hosts", "512"), "--hosts: expected 1 to 256"),
        (("--hosts", "3"), "expected a multiple of the 24 ranks"),
        (("--experts", "100"), "--experts: expected a multiple of the 8 ranks"),
        (("--capacity", "much"), "--capacity: expected a number or 'any'"),
        (("--ranks-per-host", "0"), "--ranks-per-host: expected 1 or more"),
        (("--dtype", "int8"), "dtype: expected one of bfloat16"),
        (("--nic", "0"), "nic_gbs: expected a rate above 0"),
    ],
)
def test_command_refuses(command, arguments, text):
    done = command(*arguments)
    assert done.exit_code == 2
    assert text in " ".join(done.output.replace("│", " ").split())


def test_command_takes_hosts_and_any_routing(command):
    done = command("--hosts", "1,8", "--capacity", "any")
    assert done.exit_code == 0
    assert "EP64" in done.output and "EP16" not in done.output
