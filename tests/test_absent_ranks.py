"""Groups with absent ranks: results, errors, and who makes such a group."""

from __future__ import annotations

import dataclasses
import types
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import oracle
import routings
from jax_ep import _cpu
from jax_ep._groups import absent, create, meetings, places, tuning
from jax_ep._groups.topology import Topology
from spmd import make_group, native_calls, ranks_at_most, stacked_jit

RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 6, 3, 16
EXPERTS = 2 * RANKS
LAST = RANKS - 1


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    idx = routings.invalid(rng, RANKS, TOKENS, TOP_K, EXPERTS)
    return x, rng.random(idx.shape).astype(np.float32), idx


def make(backend: str = "reference", **kwargs: Any) -> jax_ep.Group:
    sizes = {"latency_tokens": TOKENS, "latency_hidden": 2 * HIDDEN}
    return make_group(RANKS, backend, **sizes | {"absent_ranks": (LAST,)} | kwargs)


def without(idx: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """The choices that count: none of an absent rank's tokens or experts."""
    idx = idx.copy()
    for entry in np.ndindex(idx.shape):
        if entry[0] in ranks or idx[entry] // 2 in ranks:
            idx[entry] = -1
    return idx


@pytest.mark.parametrize("layout", ["expert", "token"])
@pytest.mark.parametrize("ranks", [(LAST,), (0, LAST)][: 1 + (RANKS > 2)], ids=str)
def test_entries_of_absent_ranks_count_as_none(backend, layout, ranks):
    if backend == "cuda" and jax.process_count() > 1:
        pytest.skip("the process of an absent rank makes no group; test_gpu_processes.py has that")
    group = make(backend, absent_ranks=list(reversed(ranks)))
    assert group.absent_ranks == ranks and f"absent_ranks={ranks}" in repr(group)

    def run(x, weights, idx):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, layout=layout, alignment=1
        )
        return out.tokens, jax_ep.combine(out.tokens, out.handle, group=group), out.handle

    x, weights, idx = data()
    tokens, y, handle = stacked_jit(run, group.mesh)(x, weights, idx)
    kept = without(idx, ranks)
    assert (kept >= 0).any() and (kept != idx).any()
    sizes = {"num_ranks": RANKS, "num_tokens": TOKENS, "top_k": TOP_K, "num_experts": EXPERTS}
    bounds = oracle.limits(**sizes, layout=layout, alignment=1)
    routes = oracle.plan(kept, num_experts=EXPERTS, layout=layout, alignment=1, bounds=bounds)
    for name in "topk_idx", "dest_row", "counts", "demand", "num_dropped", "num_invalid":
        oracle.assert_same(getattr(handle, name), getattr(routes, name), name)
    rows = oracle.move(x, routes)
    oracle.assert_same(tokens, rows, "tokens")
    oracle.assert_same(y, oracle.combine(rows, routes), "y")
    assert not np.any(y[list(ranks)])


def test_a_group_is_another_one_without_a_rank():
    plain, group = make(absent_ranks=()), make()
    assert group is make(absent_ranks=[LAST]) and group is not plain and group.id != plain.id
    assert plain.absent_ranks == () and "absent" not in repr(plain)

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=plain, num_experts=EXPERTS)
        return jax_ep.combine(out.tokens, out.handle, group=group)

    with pytest.raises(ValueError, match="argument handle: expected a handle of this group"):
        trace(run, group)


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        (
            "op combine, phase arrival: waited 0.250000 s for rank 12; expected the sum of latency",
            12,
        ),
        ("op plan, phase close: the process of rank 0 is gone", 0),
        ("the process of rank 3 has ended. The group takes no more ops; start the job again.", 3),
        ("op combine: another rank of the group failed while this one waited for rank 2", None),
        ("op combine: rank 2 is at another op", None),
    ],
)
def test_errors_say_which_rank_is_missing(text, peer):
    error = jax_ep.CommunicationError(f"rank 1: {text}")
    assert error.peer == peer


@pytest.mark.parametrize(
    ("ranks", "error", "text"),
    [
        (1, TypeError, "expected a sequence of Python ints, got 1"),
        ((True,), TypeError, "expected a sequence of Python ints"),
        ((0, 0), ValueError, r"expected different ranks .*got \(0, 0\)"),
        ((-1,), ValueError, rf"ranks of the group's 0 to {LAST}, got \(-1,\)"),
        ((RANKS,), ValueError, "expected different ranks"),
        (range(RANKS), ValueError, f"at least one rank to take part, got all {RANKS}"),
    ],
    ids=str,
)
def test_what_absent_ranks_may_be(ranks, error, text):
    with pytest.raises(error, match=f"jax_ep.create_group: argument absent_ranks: .*{text}"):
        make(absent_ranks=ranks)


# GPUs ---------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(
    not _cpu.build_info()["with_cuda"],
    reason="this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF",
)


def trace(run: Any, group: jax_ep.Group, tokens: int = TOKENS) -> list[str]:
    """The targets that a program calls."""
    mapped = jax.shard_map(run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
    x = jax.ShapeDtypeStruct((RANKS * tokens, HIDDEN), jnp.float32)
    idx = jax.ShapeDtypeStruct((RANKS * tokens, TOP_K), jnp.int32)
    return [call["target"] for call in native_calls(jax.make_jaxpr(mapped)(x, idx).jaxpr)]


def on_gpus(**kwargs: Any) -> jax_ep.Group:
    """A group as programs for GPUs see it while they are traced."""
    return dataclasses.replace(make(**kwargs), backend="cuda")


@needs_cuda
def test_gpus_take_latency_mode_up_to_its_limits():
    """Also where throughput mode would be faster, and in flight."""
    group = on_gpus(latency_tokens=512)

    def run(x, idx):
        ticket = jax_ep.dispatch_start(x, idx, group=group, num_experts=EXPERTS)
        out = jax_ep.dispatch_done(ticket)
        return jax_ep.combine(out.tokens, out.handle, group=group)

    assert trace(run, group, tokens=300) == [
        f"jax_ep_latency_{what}" for what in ("dispatch_start", "dispatch_done", "combine")
    ]


def throughput(group, x, idx):
    config = jax_ep.DispatchConfig(mode="throughput")
    return jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, config=config).tokens


def along_a_handle(group, x, idx):
    handle = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS).handle
    return jax_ep.dispatch(x, handle=handle, group=group).tokens


def combine_in_throughput(group, x, idx):
    config = jax_ep.DispatchConfig(mode="throughput")
    out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
    return jax_ep.combine(out.tokens, out.handle, group=group, config=config)


def gradient(group, x, idx):
    def loss(x):
        return jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS).tokens.sum()

    return jax.grad(loss)(x)


def too_many_tokens(group, x, idx):
    x, idx = jnp.concatenate([x, x]), jnp.concatenate([idx, idx])
    return jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS).tokens


@pytest.mark.parametrize(
    ("run", "op"),
    [
        (throughput, "dispatch"),
        (along_a_handle, "dispatch"),
        (combine_in_throughput, "combine"),
        (gradient, "dispatch"),
        (too_many_tokens, "dispatch"),
    ],
)
@needs_cuda
def test_gpus_have_nothing_but_latency_mode(run, op):
    group = on_gpus()
    text = rf"jax_ep.{op}: argument group: .*absent ranks on GPUs.*got absent_ranks=\({LAST},\)"
    with pytest.raises(ValueError, match=text):
        trace(lambda x, idx: run(group, x, idx), group)


@needs_cuda
def test_no_counts_of_all_ranks_on_gpus():
    group = on_gpus()

    def run(x, idx):
        scores = jnp.ones(idx.shape, jnp.float32)
        return jax_ep.dispatch(
            x,
            idx,
            scores,
            group=group,
            num_experts=EXPERTS,
            capacity_factor=1.0,
            drop_policy="score",
        ).tokens

    with pytest.raises(ValueError, match="argument drop_policy: expected 'position' on GPUs"):
        trace(run, group)


@pytest.mark.parametrize(
    ("processes", "hosts", "latency", "text"),
    [
        ((0, 1), ((0, 1),), (8, 64), None),
        ((0, 1), ((0,), (1,)), (8, 64), "expected none where a group of GPUs spans hosts"),
        ((0, 1), ((0, 1),), (0, 0), "pass latency_tokens and latency_hidden"),
        ((1, 0), ((0, 1),), (8, 64), "all that process 0 has"),
        ((1, 2), ((0, 1),), (8, 64), None),  # it has no rank at all
        ((0, 0), ((0, 1),), (8, 64), None),
    ],
    ids=str,
)
@pytest.mark.one_process("states who has which rank")
def test_who_makes_a_group_of_gpus(processes, hosts, latency, text):
    """Rank 1 is absent, and this is process 0."""
    topology = Topology(hosts, (processes,), absent=(1,))
    assert topology.all_processes == [processes[0]]
    if text is None:
        absent.check_gpus(topology, latency, compile_only=False)
        return
    with pytest.raises(ValueError, match=text):
        absent.check_gpus(topology, latency, compile_only=False)


@pytest.mark.one_process("states who has which rank")
def test_absent_processes_are_asked_nothing(monkeypatch):
    """Not for the host, and not for the tuning table, which is then that of the next one."""
    devices = [types.SimpleNamespace(id=i, process_index=i, platform="gpu") for i in (1, 2, 0)]
    asked = []

    def facts_of(processes, *_):
        asked.append(tuple(processes))
        return {p: {"host": "a", "unavailable": "", "version": "1"} for p in processes}

    monkeypatch.setattr(meetings, "facts_of", facts_of)
    monkeypatch.setattr(places._compat, "compute_capability", lambda _: "9.0")
    monkeypatch.setattr(places._compat, "is_compile_only", lambda _: False)
    monkeypatch.setattr(places.libraries, "why_unavailable", lambda *_: None)
    instances = np.array([devices])
    resolved, topology = create._resolve(instances, None, "cuda", "auto", (0,))
    assert resolved == "cuda" and topology.hosts == ((0, 1, 2),) and topology.absent == (0,)
    assert set(asked) == {(0, 2)}
    told = []
    monkeypatch.setattr(tuning._compat, "broadcast_text", lambda *a, **_: told.append(a) or "[]")
    mesh = unittest.mock.Mock(spec=jax.sharding.Mesh, devices=instances)
    assert tuning.agreed_table(mesh, "x", topology.all_processes) == {}
    assert told == [("jax_ep/tuning/x", None)]  # process 2 tells
