"""``python -m jax_ep.bench`` on devices: figures that are wrong, noise or impossible are found."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_ep
from conftest import PLATFORM
from jax_ep import _compat
from jax_ep.bench import (
    ceilings,
    clock,
    expected,
    half_ops,
    latency_arms,
    latency_beside,
    layer,
    layer_ops,
    ops,
    overlap_ops,
    peers,
    records,
    table,
    timing,
    traffic,
)
from jax_ep.bench.layer import Experts
from jax_ep.bench.session import Session
from jax_ep.bench.timing import Chain, Spread, Step
from spmd import need_devices
from test_bench import TINY

pytestmark = pytest.mark.skipif(PLATFORM != "cpu", reason="sets up CPU devices of its own")


def emulated_ragged_all_to_all(operand, output, starts, sizes, lands_at, received, *, axis_name):
    """``lax.ragged_all_to_all``, made of ops that XLA has on CPU, by its documentation."""
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


def test_chunks_in_flight_give_the_bits_of_the_same_chunks_in_line():
    """Outputs and all gradients; the sum of two chunks' gradients has no order."""
    need_devices(2)
    case = dataclasses.replace(
        TINY, op="layer", intermediate=16, dtype="float32", alignment=1, tokens=7
    )
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    problem = session.problem(case)
    sizes, inputs = (
        layer_ops.sizes_of(session, case, problem),
        layer_ops.inputs_of(session, case, problem),
    )
    steps = [layer_ops.step_of(arm, sizes) for arm in (layer.CHUNKS, layer.IN_LINE)]
    found, wanted = session.on_all_ranks(lambda x: [step.run(x) for step in steps])(inputs)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert expected.same_bits(np.asarray(got), np.asarray(want)) and np.abs(want).max() > 0


def takes_20_us(*given, measure=timing.measure):
    """``timing.measure``, for which the clock has another figure."""
    return dataclasses.replace(measure(*given), spread=Spread(20.0, 20.0, 20.0))


def test_bounds_of_ops_in_flight_worked_by_hand(monkeypatch):
    """What bounds are made of, with figures that are given."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    base = dataclasses.replace(TINY, dtype="float32", layout="token", intermediate=16)

    monkeypatch.setattr(timing, "measure", takes_20_us)
    monkeypatch.setattr(session, "link", lambda *_: Spread(1.0, 1.0, 1.0))
    calls = half_ops.Both(Spread(2.0, 2, 2), Spread(3.0, 3, 3), "", 0)
    latency = dataclasses.replace(base, op="overlap", mode="latency")
    monkeypatch.setattr(half_ops, "both_of", lambda *_: calls)
    for alone, within in ((13.0, False), (14.0, True)):  # 19 of 1.05 * (13 + 5) = 18.9
        session.kept[latency_beside._key(latency, "grouped_dot")] = alone
        record = latency_beside.measure(
            session, dataclasses.replace(latency, name="dispatch beside grouped_dot")
        )
        records.check(record)
        assert record["bound_us"] == pytest.approx(1.05 * (alone + 5))
        assert record["within_bound"] is within and record["correct"]
        assert ("within its bound" in table.line(record)) is within
    # An op of 8 us on 24 of 132 SMs beside a product of 10 us; the collective takes 2.
    flying = dataclasses.replace(base, op="overlap", name="dispatch beside " + overlap_ops.LEAVING)
    monkeypatch.setattr(overlap_ops, "_free_sms", lambda *_: 108)
    monkeypatch.setattr(_compat, "num_multiprocessors", lambda: 132)
    for name, us in {overlap_ops.NOTHING: 2.0, "dispatch": 10.0, "grouped_dot": 12.0}.items():
        session.kept[overlap_ops._key(flying, name)] = Spread(us, us, us)
    record = overlap_ops.measure(session, flying)
    records.check(record)
    assert record["num_sms"] == 24 and record["median_us"] == 18.0
    assert record["bound_us"] == pytest.approx(1.05 * 10 * 132 / 108)
    assert record["within_bound"] is False and record["share_hidden"] == pytest.approx(0)
    assert table.bounds([record, record | {"within_bound": True}]) == [
        "1 of 2 figures are within their bounds",
        f"{records.label(record)}: 18.0 us, OVER its bound of 12.8 us",
    ]
    assert table.bounds([{"op": "plan"}]) == []


def test_an_op_that_waits_for_a_late_peer_is_over_its_bound(monkeypatch):
    """As on CPU, where the start half is the whole op; and results are checked in these chains too."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=2, command="")
    case = dataclasses.replace(
        TINY, op="overlap", mode="latency", layout="token", dtype="float32", intermediate=16
    )
    monkeypatch.setattr(latency_beside, "LATE_US", 5_000.0)  # far more than a busy machine adds
    late = dataclasses.replace(case, name="combine" + latency_arms.LATE)
    record = latency_beside.measure(session, late)
    records.check(record)
    assert record["correct"] and record["late_us"] > 2_000
    if record["median_us"] is not None:  # not too noisy
        assert record["median_us"] > 2_000 and record["within_bound"] is False
        assert "late by" in table.line(record) and "OVER its bound" in table.row(record)[0]
    done = jax_ep.dispatch_done

    def moves_wrongly(ticket):
        out = done(ticket)
        return dataclasses.replace(out, tokens=out.tokens.at[1, 3].set(100))

    monkeypatch.setattr(jax_ep, "dispatch_done", moves_wrongly)
    between = dataclasses.replace(case, name=latency_arms.BETWEEN + "dispatch")
    record = latency_beside.measure(session, between)
    records.check(record)
    assert not record["correct"] and "rows differ" in record["error"]


def test_a_layer_in_chunks_says_what_it_hides(monkeypatch):
    """It takes 20 us, 30 in line, 25 of which are ops, and 19.2 without chunks."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    case = dataclasses.replace(
        TINY, op="layer", intermediate=16, dtype="float32", alignment=1, capacity="default"
    )
    monkeypatch.setattr(timing, "measure", takes_20_us)
    monkeypatch.setattr(session, "link", lambda *_: Spread(0.0, 0.0, 0.0))
    for name, us in zip(layer.CHUNKED, (19.2, 30.0, 25.0), strict=False):
        session.kept[layer_ops._key(case, name)] = us
    record = layer_ops.measure(session, dataclasses.replace(case, name=layer.CHUNKS.name))
    records.check(record)
    assert record["correct"] and record["share_hidden"] == pytest.approx(10 / 25)
    assert record["bound_us"] == pytest.approx(1.03 * 19.2) and not record["within_bound"]


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


def test_wrong_results_are_found(monkeypatch):
    """A dispatch that moves one row wrongly, and a combine that loses one, are not correct."""
    need_devices(2)
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


def test_packed_scales_are_checked(monkeypatch):
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=2, command="")
    case = dataclasses.replace(TINY, quantization="fp8-packed", hidden=640)
    assert case.out_row_bytes == 640 + 8
    assert ops.measure(session, case)["correct"]
    dispatch = jax_ep.dispatch

    def packs_wrongly(*args, **kwargs):
        out = dispatch(*args, **kwargs)
        tokens = out.tokens._replace(scales=out.tokens.scales.at[1, 2].add(1))
        return dataclasses.replace(out, tokens=tokens)

    monkeypatch.setattr(jax_ep, "dispatch", packs_wrongly)
    record = ops.measure(session, case)
    records.check(record)
    assert not record["correct"] and "scales differ" in record["error"]


def test_wrong_results_of_two_calls_are_found(monkeypatch):
    """Both calls are measured in one run, and a result that is wrong makes both records wrong."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=2, command="")
    case = dataclasses.replace(TINY, mode="latency", layout="token")
    done = jax_ep.dispatch_done

    def moves_wrongly(ticket):
        out = done(ticket)
        return dataclasses.replace(out, tokens=out.tokens.at[1, 3].set(100))

    monkeypatch.setattr(jax_ep, "dispatch_done", moves_wrongly)
    for op in ("dispatch_start", "dispatch_done"):
        record = half_ops.measure(session, dataclasses.replace(case, op=op))
        records.check(record)
        assert not record["correct"] and "rows differ" in record["error"]
    record = half_ops.measure(session, dataclasses.replace(case, op="combine_done"))
    records.check(record)
    assert record["correct"] and record["op"] == "combine_done"


def test_noise_is_no_figure_and_no_failure():
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    record = session.record(TINY, Spread(3.0, 1.0, 4.5), traffic.Traffic(9, 9, 9), correct=True)
    records.check(record)
    assert record["median_us"] is None and record["correct"]
    assert record["error"] == "too noisy: 1.0 to 4.5 us around 3.0"
    assert table.row(record)[-1] == "too noisy" and "too noisy: 1.0" in table.line(record)


@pytest.mark.parametrize("links", [False, True])
def test_impossible_rates_are_wrong(monkeypatch, links):
    """629 GB/s over a link of 391, and more than the memory has; 5 % above are within the error."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    session.has_links = links
    kind = "link" if links else "memory"
    monkeypatch.setattr(session, "ways", lambda: [ceilings.Ceiling("copies", 391.0, kind)])

    def record(num_bytes):
        moved = traffic.Traffic(num_bytes, num_bytes, num_bytes)
        return session.record(TINY, Spread(93.0, 92.0, 94.0), moved, correct=True)

    wrong = record(58_491_000)
    assert not wrong["correct"]
    assert wrong["error"].startswith(f"impossible: 629 GB/s, where the {kind} has 391")
    assert "NO" in table.row(wrong)[-1] and "impossible" in table.line(wrong)
    assert record(36_363_000 + 1_700_000)["correct"]
    assert not record(36_363_000 + 2_000_000)["correct"]


def test_ops_of_latency_mode_have_a_bound_where_ranks_share_a_gpu(monkeypatch):
    """What one GPU moves, and whether the op takes longer; elsewhere there is no bound."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    monkeypatch.setattr(session, "ways", list)
    moved = traffic.Traffic(9, 9, 9, moved=6_000_000)

    def record(median_us, num_bytes=moved):
        spread = Spread(median_us, median_us, median_us)
        return session.record(TINY, spread, num_bytes, correct=True)

    assert "bound_us" not in record(10.0)
    session.on_gpu, session.gpus = True, 1
    kept, missed = record(10.5), record(10.6)
    records.check(kept)
    assert (kept["moved_bytes"], kept["bound_us"]) == (6_000_000, 10.5)
    assert kept["within_bound"] and not missed["within_bound"]
    assert table.line(kept).endswith(", 6.00 MB moved, within its bound of 10.5 us")
    assert "OVER its bound" in table.row(missed)[0]
    assert "bound_us" not in record(9.0, moved._replace(moved=0))
    session.has_links, session.gpus = True, 2
    assert "bound_us" not in record(10.0)


def chained(session, step, **chain):
    x = session.put(lambda rank: np.full((4, 8), rank, np.int32))
    return timing.measure(step, [x, x + 10], session.mesh, Chain(**chain))


@pytest.mark.parametrize("length", [0, 6])
def test_ops_that_were_not_run_are_noticed(length):
    """The group is asked how many ops it has completed."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    step = Step(run=lambda x: x + 1, link=lambda x, y, now: now(timing.after(x, y)))
    done = iter([[5, 5], [6, 5]])
    with pytest.raises(RuntimeError, match=r"were to bring the group from \[5, 5\]"):
        chained(
            session,
            step,
            length=length,
            repeat=2,
            grows=length == 0,
            completed=lambda: next(done),
        )


def test_calls_that_were_merged_are_noticed(monkeypatch):
    """Two equal calls that XLA sees as one."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    step = Step(run=lambda x: clock.read(x)[0], link=lambda x, y, now: now(timing.after(x, y)))
    calls = ("jax_ep_clock", "jax_ep_clock")
    with pytest.raises(RuntimeError, match="a chain of 8 ops was compiled to 10 of jax_ep_clock"):
        chained(session, step, length=6, repeat=1, calls=calls)


@pytest.mark.parametrize("form", ["unrolled", "loop", "growing"])
def test_chains_time_what_an_op_takes(form):
    """An op that waits for three milliseconds, in each form of chain."""
    need_devices(2)
    import time

    def sleep(x):
        time.sleep(0.003)
        return x

    def run(x):
        return jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    session = Session(ranks=1, gpus=0, repeat=1, command="")
    step = Step(run=run, link=lambda x, y, now: now(timing.after(x, y)))
    measured = chained(
        session, step, length=6 if form == "unrolled" else 0, repeat=6, grows=form == "growing"
    )
    assert 3_000 <= measured.spread.p10 <= measured.spread.median < 30_000
    # The last op was given the second set, where sets go in turn.
    assert np.asarray(measured.result)[0, 0] == (10 if form == "unrolled" else 0)
    assert measured.last_set == (1 if form == "unrolled" else 0)


@pytest.mark.parametrize("op", ["exchange", "round_trip"])
@pytest.mark.parametrize("name", [peers.ALL_TO_ALL, peers.RAGGED])
@pytest.mark.parametrize("length", [0, 4])
def test_rows_of_exchanges_come_back(monkeypatch, name, op, length):
    """Each exchange sends what the one before received; one that loses a row is noticed."""
    need_devices(2)
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    chain = dataclasses.replace(session.chain_of(length), grows=length == 0)
    monkeypatch.setattr(session, "chain", lambda *_: chain)
    monkeypatch.setattr(session, "chain_of", lambda *_: chain)
    case = dataclasses.replace(TINY, op=op, name=name, routing="zipf", layout="token")
    record = peers.measure(session, case)
    assert record["correct"] and record["name"] == name, record

    def loses(exchange):
        def wrong(*args, **kwargs):
            return exchange(*args, **kwargs).at[1].set(0)

        return wrong

    for function in ("ragged_all_to_all", "all_to_all"):
        monkeypatch.setattr(lax, function, loses(getattr(lax, function)))
    record = peers.measure(session, case)
    assert not record["correct"] and "rows did not come back" in record["error"]


def test_round_trips_are_checked(monkeypatch):
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=1, command="")
    for name in (None, ops.REFERENCE):
        record = ops.measure(session, dataclasses.replace(TINY, op="round_trip", name=name))
        assert record["correct"] and record.get("name") == name
    combine = jax_ep.combine
    monkeypatch.setattr(jax_ep, "combine", lambda *a, **k: combine(*a, **k).at[2].set(0))
    record = ops.measure(session, dataclasses.replace(TINY, op="round_trip"))
    assert not record["correct"] and "sums are off" in record["error"]


@pytest.mark.parametrize("op", ["dispatch_cached", "combine"])
def test_the_reference_along_a_handle_is_not_moved_out_of_the_loop(op):
    """The reference reads no ``topk_idx``, which chains ops; without it a turn takes no time."""
    need_devices(2)
    session = Session(ranks=2, gpus=0, repeat=5, command="")
    case = dataclasses.replace(TINY, op=op, name=ops.REFERENCE, tokens=512, hidden=1024)
    record = ops.measure(session, case)
    assert record["correct"] and record["median_us"] > 100, record
