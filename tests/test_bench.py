"""``python -m jax_ep.bench``: what it counts, its cases and suites, and its records."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep
from jax_ep.bench import __main__ as command
from jax_ep.bench import (
    clock,
    expected,
    half_ops,
    latency,
    latency_arms,
    layer,
    memory,
    overlap_ops,
    patterns,
    peers,
    records,
    suites,
    traffic,
)
from jax_ep.bench.cases import HALVES, Case
from jax_ep.bench.machine import NCCL_SHARES, Machine, check_processes, left_out
from jax_ep.bench.problems import Problem
from jax_ep.bench.timing import Spread

TINY = Case(tokens=6, hidden=128, top_k=2, experts=8)
ON_CPU = Machine(ranks=2, processes=1, gpus=0)
ON_GPUS = Machine(ranks=2, processes=2, gpus=2)
ON_ONE_GPU = Machine(ranks=2, processes=2, gpus=1)

# Two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1.
ROUTES = np.array(
    [
        [[0, 1], [0, 2], [3, 2]],  # rank 0: home; both; away
        [[2, -1], [-1, -1], [1, 0]],  # rank 1: home; nowhere; away
    ],
    np.int32,
)


def test_wire_bytes_of_a_routing_worked_by_hand():
    # Rows by (source, destination): 0→0: tokens 0, 1; 0→1: tokens 1, 2; 1→0: token 2; 1→1: token 0.
    np.testing.assert_array_equal(expected.rank_rows(ROUTES, experts=4), [[2, 2], [1, 1]])
    # Pairs: 0→0: 0, 1, 0; 0→1: 2, 3, 2; 1→0: 1, 0; 1→1: 2.
    np.testing.assert_array_equal(expected.rank_pairs(ROUTES, experts=4), [[3, 3], [2, 1]])
    moved = traffic.of_dispatch(ROUTES, experts=4, row_bytes=10)
    assert moved.wire == 20  # rank 0 sends two rows away
    assert moved.logical == 40  # and keeps two
    rows = traffic.of_rows(np.array([[5, 1], [3, 0]]), 10)
    assert (rows.wire, rows.logical) == (30, 80)  # rank 0 receives 3, and 8


def test_memory_traffic_of_ops_worked_by_hand(monkeypatch):
    """Six rows that are sent, nine (token, expert) pairs, room for 4 rows on each of two ranks."""
    case = Case(tokens=3, hidden=5, top_k=2, experts=4)
    problem = Problem(case, 2)
    problem.topk_idx, problem.capacity = [ROUTES], 4

    def memory_of(**changes):
        return traffic.of_op(dataclasses.replace(case, **changes), problem).memory

    assert memory_of(op="plan") == 0
    assert memory_of(op="dispatch") == 10 * (6 + 2 * 4)
    assert memory_of(op="combine") == 10 * (9 + 2 * 3)
    assert memory_of(op="combine", layout="token") == 10 * (6 + 2 * 3)
    assert memory_of(op="round_trip") == 10 * (6 + 2 * 4 + 9 + 2 * 3)


@pytest.mark.parametrize(
    ("op", "layout", "given", "words", "results", "handle"),
    [
        # Of each rank: 3 tokens of 16 bytes with 2 ids and 2 weights, and twice 6 words of ids. Of
        # all: three rows that cross, twice, in 2 words and one of weights. Then 4 rows with 2
        # weights, or one.
        ("dispatch", "token", 3 * (16 + 16) + 2 * 96, 2 * 3 * 48, 4 * (16 + 8), 3 * 6 * 4 + 4 * 12),
        ("dispatch", "expert", 3 * (16 + 16) + 2 * 96, 2 * 3 * 48, 4 * (16 + 4), 3 * 8 * 4 + 4 * 4),
        # Of both ranks six rows, or nine. Sums that cross have no weights.
        ("combine", "token", 6 * 16 // 2, 2 * 3 * 32, 3 * 16, 3 * 6 * 4),
        ("combine", "expert", 9 * 16 // 2, 2 * 3 * 32, 3 * 16, 3 * 8 * 4),
    ],
)
def test_bytes_of_latency_mode_worked_by_hand(op, layout, given, words, results, handle):
    case = Case(op=op, layout=layout, mode="latency", tokens=3, hidden=8, top_k=2, experts=4)
    problem = Problem(case.workload, 2)
    problem.topk_idx, problem.capacity = [ROUTES], 4
    moved = traffic.of_op(case, problem)
    assert moved.moved == 2 * (given + results + handle) + words > moved.memory
    assert traffic.of_op(dataclasses.replace(case, mode="throughput"), problem).moved == 0


def test_words_of_a_row():
    """Four parts of 150 words with 14 scales in 5 words, and 8 weights in 3."""
    assert latency.row_words(7168, scaled=True, num_weights=8) == 4 * (150 + 5) + 3
    assert latency.row_words(2 * 7168, scaled=False, num_weights=0) == 8 * 150
    assert latency.row_words(1792 + 128, scaled=True, num_weights=1) == (150 + 5) + (11 + 1) + 1
    source = (pathlib.Path(__file__).parents[1] / "csrc/cuda/decode/inbox.h").read_text()
    for name, value in (
        ("kPartBytes", latency.PART_BYTES),
        ("kWordBytes", latency.WORD_BYTES),
        ("kIdsOfWord", latency.IDS_OF_WORD),
    ):
        assert f" {name} = {value};" in source
    assert f"sizeof(StampedWord) == {latency.STORED_BYTES}" in source


def test_the_bound_of_latency_mode():
    """8.5 us, and the bytes at 3 TB/s: 30 MB in ten microseconds."""
    assert latency.bound_us(0) == 8.5 and latency.bound_us(30_000_000) == pytest.approx(18.5)


def test_sums_round_once_a_rank_and_once_at_home():
    x = np.array([[1.0], [1.0], [1.0]], ml_dtypes.bfloat16)  # 8 bits: 256 + 1 is 256
    nothing = np.nan
    factors = [
        np.array([[256, 1, 1], [256, 1, nothing], [nothing, nothing, nothing]], np.float32),
        np.array([[1, 1, nothing], [1, 1, 1], [nothing, 3, nothing]], np.float32),
    ]
    got = expected.rounded_sums(x, factors)
    # 258 + 2; 256 (of 257, to even) + 3, of which 259 goes to 260 (to even); 3.
    assert got.astype(np.float32).tolist() == [[260], [260], [3]]
    assert got.dtype == x.dtype


@pytest.mark.parametrize(
    ("case", "row_bytes"),
    [
        (Case(hidden=7168), 14336),
        (Case(hidden=7168, dtype="float32"), 28672),
        (Case(hidden=7168, quantization="quantized"), 7168 + 224),
        (Case(hidden=7168, quantization="fp8-dense"), 7168 + 224),
        (Case(hidden=7168, op="combine"), 14336),
    ],
)
def test_bytes_of_a_row(case, row_bytes):
    assert case.wire_row_bytes == row_bytes


def test_rows_of_a_routing_worked_by_hand():
    def rows(rank, layout, alignment=1):
        found = expected.row_sources(ROUTES, rank, experts=4, layout=layout, alignment=alignment)
        return found.tolist()

    # (source · 3 + token) · 2 + k, by expert.
    assert rows(0, "expert") == [0, 2, 11, 1, 10]
    assert rows(1, "expert", 4) == [3, 5, 6, -1, 4, -1, -1, -1]
    assert rows(0, "token") == [0, 1, 5]
    assert rows(1, "token") == [1, 2, 3]
    assert expected.capacity([ROUTES], experts=4, layout="expert", alignment=4) == 128


@pytest.mark.parametrize("routing", ["uniform", "group-limited", "zipf", "all-to-one"])
@pytest.mark.parametrize("ragged", [False, True])
def test_patterns(routing, ragged):
    case = Case(routing=routing, ragged=ragged, tokens=64, hidden=8, top_k=4, experts=32)
    topk = patterns.topk_idx(case, ranks=2, rng=np.random.default_rng(0))
    assert topk.shape == (2, 64, 4) and topk.dtype == np.int32
    real = [patterns.num_real_tokens(64, rank, 2) for rank in range(2)] if ragged else [64, 64]
    assert [(rows[:, 0] >= 0).sum() for rows in topk] == real
    used = topk[topk[..., 0] >= 0]
    assert (used >= 0).all() and (used < 32).all()
    assert all(len(set(token)) == 4 for token in used.tolist())
    if routing == "group-limited":
        assert max(len({expert // 4 for expert in token}) for token in used.tolist()) <= 4
    if routing == "all-to-one":
        assert (used < 16).all()
    if routing == "zipf":
        counts = np.bincount(used.reshape(-1), minlength=32)
        assert counts[:4].sum() > 4 * counts[-4:].sum()


def test_float8_rows_are_those_of_the_library():
    rows = Problem(TINY, 1).rows(0, 0)[0]
    values, scales = expected.quantize(rows)
    quantized = jax_ep.quantize(jnp.asarray(rows))
    assert expected.same_bits(values, np.asarray(quantized.values))
    assert expected.same_bits(scales, np.asarray(quantized.scales))
    dense = np.asarray(jax_ep.dequantize(quantized, jnp.bfloat16))
    assert expected.same_bits(expected.dequantize(values, scales, "bfloat16"), dense)


def test_scratch_is_what_follows_the_results():
    def call(target, results):
        return f'  %c = ({results}) custom-call(%a), custom_call_target="{target}", api_version=X\n'

    arrays = "bf16[256,128]{1,0}, f32[0]{0}, f32[256]{0}"
    text = call("jax_ep_dispatch", arrays + ", u8[4096]{0}") * 2  # two calls, one after the other
    text += call("jax_ep_combine", "bf16[6,128]{1,0}, f32[0]{0}")
    assert memory.scratch_bytes(text) == 4096
    plan = ", ".join(["s32[8]{0}"] * 10)
    assert memory.scratch_bytes(text + call("jax_ep_plan", plan + ", s32[100]{0}")) == 4096 + 400


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": 0}, "tokens: expected 1 or more"),
        ({"top_k": 9}, "top_k: expected at most 8"),
        ({"hidden": 64, "quantization": "fp8"}, "hidden: expected a multiple of 128"),
        ({"op": "combine_done"}, "mode: expected 'latency' for op 'combine_done', got 'auto'"),
    ],
)
def test_impossible_cases_say_so(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TINY, **change)


def test_impossible_processes_say_so():
    check_processes(4, 4, 1)  # four ranks share a GPU
    check_processes(4, 2, 0)
    with pytest.raises(ValueError, match="at most 1 GPUs for one process"):
        check_processes(2, 1, 1)
    with pytest.raises(ValueError, match="one for each of the 4 ranks"):
        check_processes(4, 2, 4)


@pytest.mark.parametrize("machine", [ON_CPU, ON_GPUS, ON_ONE_GPU], ids=str)
@pytest.mark.parametrize("name", suites.NAMES)
def test_suites_name_each_case_once_and_suit_the_machine(name, machine):
    cases = suites.suite(name, machine)
    assert cases and len(set(cases)) == len(cases)
    largest = max(case.tokens * case.hidden for case in cases)
    if name != "smoke":
        assert (largest <= 2**20) == (machine.gpus == 0)
    labels = [records.label({**c.to_json(), "routing": c.pattern}) for c in cases]
    assert len(set(zip(labels, cases, strict=True))) == len(cases)


def test_times_of_two_calls_worked_by_hand():
    """Two ranks, two ops: what each call takes with a reading, and a reading alone, which takes 2."""
    starts, dones = [[5, 7], [9, 11]], [[20, 30], [26, 28]]
    stamps = []
    for rank in range(2):
        now, of_rank = 100.0 * rank, []
        for start, done in zip(starts[rank], dones[rank], strict=True):
            of_rank += [now, *(now + start + 2 * i for i in range(half_ops.READINGS))]
            now = of_rank[-1] + done
        stamps.append([*of_rank, now])
    assert half_ops.times_of(np.array(stamps)) == (10.0, 27.0, 2.0)


def test_the_calls_of_latency_mode_come_last():
    for machine in (ON_CPU, ON_GPUS):
        cases = suites.suite("decode", machine)
        assert {case.op for case in cases[-12:]} == set(HALVES)
        assert not {case.op for case in cases[:-12]} & set(HALVES)


def test_what_users_do_by_default_has_cases_of_its_own():
    for name, op in (("baselines", "dispatch"), ("baselines", "combine"), ("layer", "layer")):
        kinds = {c.capacity for c in suites.suite(name, ON_GPUS) if c.op == op}
        assert kinds == {"exact", "default"}
    assert {8192, 4096} <= {case.tokens for case in suites.suite("baselines", ON_GPUS)}
    assert {1, 8, 32, 64, 128, 256, 512} == {c.tokens for c in suites.suite("decode", ON_GPUS)}
    shared = suites.suite("baselines", ON_ONE_GPU)
    assert {2048, 4096} == {case.tokens for case in shared}


@pytest.mark.parametrize("asked", [("exact",), ("default",), ("exact", "default")])
def test_a_capacity_that_is_asked_for_is_that_of_the_layer(asked):
    fields = [
        ("uniform", "64", "expert", "bfloat16", "none", None, each, "layer") for each in asked
    ]
    sizes = {"hidden": 64, "top_k": 2, "experts": 8, "mode": "auto", "weights": True}
    cases = command._cases(fields, ragged=False, intermediate=32, **sizes)
    assert tuple(c.capacity for c in cases if c.name == "jax_ep") == asked
    assert sum(c.name == "products" for c in cases) == 1


def test_default_capacity_is_that_of_dispatch():
    case = dataclasses.replace(TINY, capacity="default", alignment=4)
    assert Problem(case, 2).capacity == 2 * 6 * 2 + 4 * 3
    assert Problem(dataclasses.replace(case, layout="token"), 2).capacity == 12


def test_records_are_checked(tmp_path):
    good = {name: types[0]() for name, types in records.FIELDS.items()}
    records.save(tmp_path / "a.json", [good])
    assert records.load(tmp_path / "a.json") == [good]
    for bad in ({**good, "extra": 1}, {**good, "ranks": 1.5}, {**good, "correct": None}):
        with pytest.raises(ValueError, match="record: "):
            records.check(bad)
    (tmp_path / "b.json").write_text(json.dumps([{"op": "plan"}]))
    with pytest.raises(ValueError, match="missing"):
        records.load(tmp_path / "b.json")


def test_what_cannot_run_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.delenv(NCCL_SHARES, raising=False)
    cases = [TINY, *suites.exchanges(TINY), *suites.layers(TINY, intermediate=64)]
    kept, reasons = left_out(cases, ON_CPU)
    assert [case.name for case in kept] == [
        *(None, peers.ALL_TO_ALL),
        *("jax_ep", "jax_ep", "products", "all_to_all"),
    ]
    assert reasons == {"XLA has no ragged_all_to_all on CPU": 6}
    assert left_out(cases, ON_GPUS) == (cases, {})
    kept, reasons = left_out(cases, ON_ONE_GPU)
    assert kept == [TINY]
    assert len(reasons) == 1 and "2 ranks share 1 GPU(s): NCCL" in next(iter(reasons))
    monkeypatch.setenv(NCCL_SHARES, "1")
    assert left_out(cases, ON_ONE_GPU) == (cases, {})


def test_arms_of_ops_in_flight_that_suit_a_machine(monkeypatch):
    """Figures with a bound come first, each behind those that it is made of."""
    monkeypatch.delenv(NCCL_SHARES, raising=False)
    one_rank = Machine(ranks=1, processes=1, gpus=1)
    cases = suites.suite("overlap", one_rank)
    kept, reasons = left_out(cases, one_rank)
    assert reasons == {"nobody can be late for one rank": 2}
    names = [(c.name, c.intermediate) for c in kept if c.op == "layer"]
    assert names == [(name, width) for width in (2048, 256) for name in layer.CHUNKED]
    names = [c.name for c in kept if c.op == "overlap" and c.mode != "latency"]
    bound = [*overlap_ops.BOUND_ARMS]
    assert names[: len(bound)] == bound
    kept, reasons = left_out(suites.suite("overlap", ON_ONE_GPU), ON_ONE_GPU)
    assert {case.mode for case in kept} == {"latency"} and len(reasons) == 2
    names = [case.name for case in kept]
    assert names[:3] == ["grouped_dot", "dispatch beside grouped_dot", "combine beside grouped_dot"]
    assert names[3:] == [*latency_arms.BETWEEN_ARMS, *latency_arms.LATE_ARMS]
    parsed = [latency_arms.parse(name) for name in names[1:]]
    assert [arm.op for arm in parsed] == 3 * ["dispatch", "combine"]
    assert [arm.kind for arm in parsed[::2]] == ["", latency_arms.BETWEEN, latency_arms.LATE]
    with pytest.raises(ValueError, match="expected an arm of latency mode, got 'dispatch'"):
        latency_arms.parse("dispatch")


def test_spreads_larger_than_their_figure_are_noise():
    assert Spread(-2.8, -9.0, 4.0).is_noise
    assert Spread(3.0, 1.0, 4.5).is_noise
    assert not Spread(3.0, 2.0, 4.5).is_noise
    assert Spread(float("nan"), 0.0, 1.0).is_noise


def test_stamps_are_64_bits():
    stamps = np.array([[2**32 - 1, 0], [499, 1]], np.uint32)
    assert clock.microseconds(stamps).tolist() == [0.0, 0.5]


def test_compiler_options_have_their_types():
    (decomposed,) = (c for c in suites.exchanges(TINY) if c.compiler_options)
    assert list(decomposed.options.values()) == [True]
    assert dataclasses.replace(TINY, compiler_options="a=b=c").options == {"a": "b=c"}
    assert TINY.options == {}
