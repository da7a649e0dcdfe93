"""``python -m jax_ep.bench``: what it counts, and what it finds wrong."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jax_ep
from conftest import PLATFORM
from jax_ep.bench import (
    expected,
    layer,
    layer_ops,
    memory,
    patterns,
    peers,
    records,
    suites,
    traffic,
)
from jax_ep.bench.cases import Case
from jax_ep.bench.launch import check_processes
from jax_ep.bench.layer import Experts
from jax_ep.bench.problems import Problem
from jax_ep.bench.session import Session
from spmd import need_devices

TINY = Case(tokens=6, hidden=128, top_k=2, experts=8)
on_cpu = pytest.mark.skipif(PLATFORM != "cpu", reason="sets up CPU devices of its own")

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
    assert traffic.of_rows(np.array([[5, 1], [3, 0]]), 10) == (30, 80)  # rank 0 receives 3, and 8


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


@pytest.mark.parametrize("name", suites.NAMES)
def test_suites_name_each_case_once(name):
    cases = suites.suite(name)
    assert cases and len(set(cases)) == len(cases)
    flags = [case.xla_flags for case in cases]
    assert flags == sorted(flags)


def emulated_ragged_all_to_all(operand, output, starts, sizes, lands_at, received, *, axis_name):
    """``lax.ragged_all_to_all`` of what XLA has on CPU, by its documentation."""
    operands, starts, sizes, lands_at = (
        lax.all_gather(x, axis_name) for x in (operand, starts, sizes, lands_at)
    )
    mine = lax.axis_index(axis_name)
    row = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        within = row - lands_at[source, mine]
        rows = jnp.take(operands[source], starts[source, mine] + within, axis=0, mode="clip")
        here = (within >= 0) & (within < sizes[source, mine])
        output = jnp.where(here[:, None], rows, output)
    return output


@on_cpu
def test_arms_of_the_layer_are_one_layer(monkeypatch):
    """All arms against the layer in NumPy; ragged rows, tokens without experts."""
    need_devices(2)
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    case = dataclasses.replace(
        TINY, op="layer", intermediate=16, dtype="float32", alignment=1, ragged=True
    )
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    problem = session.problem(case)
    sizes = layer_ops.sizes_of(session, case, problem)
    experts = layer_ops.make_experts(session, case)
    inputs = (
        session.put(lambda rank: problem.rows(0, rank)[0]),
        session.put(lambda rank: problem.topk_idx[0][rank]),
        session.put(lambda rank: problem.weights(0, rank)),
    )
    want = layer_in_numpy(case, problem, Experts(*map(np.asarray, experts)))
    for name in ("jax_ep", "ragged_all_to_all", "all_to_all", "plain"):
        arm = layer.BY_NAME[name]
        program = session.on_all_ranks(lambda given, a=arm: a.layer(*given, sizes))
        got = np.asarray(program((inputs, experts)))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)
    for name in ("jax_ep", "ragged_all_to_all", "plain"):
        record = layer_ops.measure(session, dataclasses.replace(case, name=name))
        assert record["correct"], record  # the gradients too


def layer_in_numpy(case, problem, experts):
    x = np.concatenate([problem.rows(0, rank)[0] for rank in range(2)])
    weights = np.concatenate([problem.weights(0, rank) for rank in range(2)])
    ids = problem.topk_idx[0].reshape(weights.shape)
    y = np.zeros_like(x)
    for token, k in np.argwhere(ids >= 0):
        gate, up, down = (w[ids[token, k]] for w in experts)
        gated = x[token] @ gate
        gated = gated / (1 + np.exp(-gated)) * (x[token] @ up)
        y[token] += weights[token, k] * (gated @ down)
    return y


@on_cpu
def test_wrong_results_are_found(monkeypatch):
    """A dispatch that moves one row wrongly, and a combine that loses one, are not correct."""
    need_devices(2)
    from jax_ep.bench import ops

    session = Session(ranks=2, gpus=0, repeat=1, command="")
    dispatch, combine = jax_ep.dispatch, jax_ep.combine

    def moves_wrongly(*args, **kwargs):
        out = dispatch(*args, **kwargs)
        return dataclasses.replace(out, tokens=out.tokens.at[1, 3].set(100))

    def loses(*args, **kwargs):
        return combine(*args, **kwargs).at[2].set(0)

    monkeypatch.setattr(jax_ep, "dispatch", moves_wrongly)
    record = ops.measure(session, TINY)
    assert not record["correct"] and "rows differ" in record["error"]
    monkeypatch.setattr(jax_ep, "dispatch", dispatch)
    assert ops.measure(session, TINY)["correct"]
    monkeypatch.setattr(jax_ep, "combine", loses)
    record = ops.measure(session, dataclasses.replace(TINY, op="combine"))
    assert not record["correct"] and "sums are off" in record["error"]


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


def test_ranks_that_share_a_gpu_need_no_collectives(monkeypatch):
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    monkeypatch.setattr(session, "shares_gpus", True)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    (way,) = session.fastest_ways() or [None]
    assert way is None or way.name == "local copy, GPU shared"
    for case in suites.exchanges(TINY)[:1] + suites.layers(TINY, intermediate=64)[:1]:
        measure = peers.measure if case.op == "exchange" else layer_ops.measure
        with pytest.raises(ValueError, match="2 ranks share 0 GPUs: NCCL"):
            measure(session, case)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    session.need_collectives()
