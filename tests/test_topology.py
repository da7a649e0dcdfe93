"""Where ranks are: logical hosts, what ``create_group`` says of them, and the order of sums."""

from __future__ import annotations

import dataclasses
import math
import types
import unittest.mock

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_ep
import oracle
import routings
from jax_ep._core import libraries
from jax_ep._groups import create, gpu_side, meetings, network, places
from jax_ep._groups.room import Room
from jax_ep._groups.topology import Topology, most_on_a_gpu
from spmd import make_group, make_mesh, need_devices, stacked_jit

RANKS, TOKENS, HIDDEN, EXPERTS = 4, 16, 8, 8


def devices(*processes: int) -> np.ndarray:
    return np.array([types.SimpleNamespace(process_index=p) for p in processes])


def fake_gpus(sizes, names, devices_per_process) -> types.SimpleNamespace:
    """The parts of a mesh of H200s that the code looks at."""
    gpus = []
    for i in range(math.prod(sizes)):
        gpu = unittest.mock.Mock(spec=jax.Device, platform="gpu", compute_capability="9.0")
        gpu.id, gpu.core_count = i, 132
        gpu.process_index, gpu.local_hardware_id = divmod(i, devices_per_process)
        gpus.append(gpu)
    return types.SimpleNamespace(devices=np.array(gpus).reshape(sizes), axis_names=names)


def test_places():
    one = Topology.of(devices(0, 0, 0, 0)[None])
    assert one.hosts == ((0, 1, 2, 3),) and one.ranks_per_host == 4
    assert one.all_processes == [0] and not one.spans_processes
    side_by_side = Topology.of(np.stack([devices(0, 1), devices(3, 2)]), 1)
    assert side_by_side.hosts == ((0,), (1,)) and side_by_side.ranks_per_host == 1
    assert side_by_side.processes == ((0, 1), (3, 2)) and side_by_side.spans_processes
    assert side_by_side.all_processes == [0, 1, 2, 3]
    assert not Topology.of(np.stack([devices(0, 0), devices(1, 1)])).spans_processes
    assert Topology.of(devices(0, 0)[None], 2) == Topology.of(devices(0, 0)[None])


def test_ranks_that_share_a_gpu():
    topology = Topology.of(np.stack([devices(0, 1), devices(2, 3)]))
    assert topology.gpus is None and topology.ranks_per_gpu is None
    for gpus, most in (
        ((("a", "b"), ("c", "d")), 1),
        ((("a", "b"), ("a", "d")), 2),
        ((("a", "a"), ("a", "d")), 3),
    ):
        assert dataclasses.replace(topology, gpus=gpus).ranks_per_gpu == most


@pytest.mark.parametrize(
    ("axes", "num_hosts"),
    [
        ("expert", 1),
        (("data", "expert"), 4),
        ("data", 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("devices_per_process", [1, 8])
def test_hosts_are_those_of_each_group(axes, num_hosts, devices_per_process, monkeypatch):
    """Four hosts of eight GPUs, data 4 x expert 8."""
    mesh = fake_gpus((4, 8), ("data", "expert"), devices_per_process)
    host = {device.process_index: f"host {device.id // 8}" for device in mesh.devices.flat}
    facts = {p: {"host": h, "unavailable": "", "version": "1"} for p, h in host.items()}
    monkeypatch.setattr(
        meetings, "facts_of", lambda processes, *_: {p: facts[p] for p in processes}
    )
    monkeypatch.setattr(libraries, "why_unavailable", lambda native: None)
    monkeypatch.setattr(network, "obstacle", lambda *_: None)
    instances = create._instances(mesh, mesh.devices, (axes,) if isinstance(axes, str) else axes)
    topology, reason = places.place_gpus(instances, None, "auto")
    assert len(topology.hosts) == num_hosts
    if num_hosts > 1 and devices_per_process > 1:
        assert reason is not None and "one process for each GPU" in reason
    else:
        assert reason is None
    _, reason = places.place_gpus(instances, None, "peer" if num_hosts > 1 else "nvshmem")
    assert (
        reason is not None and ("spans 4 hosts" if num_hosts > 1 else "within one host") in reason
    )


@pytest.mark.parametrize("hosts", ["aabb bbaa", "abab abab", "aaab aabb", "aaaa bbbc"], ids=str)
def test_uneven_hosts_are_refused(hosts, monkeypatch):
    """Each host has as many ranks of a group, one after the other, or there is a reason."""
    mesh = fake_gpus((2, 4), ("data", "expert"), 1)
    facts = {p: {"host": h, "unavailable": ""} for p, h in enumerate(hosts.replace(" ", ""))}
    monkeypatch.setattr(
        meetings,
        "facts_of",
        lambda processes, *_: {p: {**facts[p], "version": "1"} for p in processes},
    )
    monkeypatch.setattr(libraries, "why_unavailable", lambda native: None)
    monkeypatch.setattr(network, "obstacle", lambda *_: None)
    instances = create._instances(mesh, mesh.devices, ("expert",))
    topology, reason = places.place_gpus(instances, None, "auto")
    if hosts == "aabb bbaa":
        assert topology.ranks_per_host == 2 and reason is None
    else:
        assert reason is not None and "different numbers of ranks" in reason


@pytest.mark.parametrize(("ranks_per_host", "is_wrong"), [(4, True), (2, False), (1, False)])
def test_logical_hosts_lie_within_hosts(ranks_per_host, is_wrong, monkeypatch):
    """Ranks of one host map each other's memory, which those of two machines cannot."""
    mesh = fake_gpus((2, 4), ("data", "expert"), 1)
    facts = {p: {"host": h, "unavailable": "", "version": "1"} for p, h in enumerate("aabbccdd")}
    monkeypatch.setattr(
        meetings, "facts_of", lambda processes, *_: {p: facts[p] for p in processes}
    )
    monkeypatch.setattr(libraries, "why_unavailable", lambda native: None)
    monkeypatch.setattr(network, "obstacle", lambda *_: None)
    instances = create._instances(mesh, mesh.devices, ("expert",))
    _, reason = places.place_gpus(instances, ranks_per_host, "auto")
    if is_wrong:
        assert reason is not None and "4 ranks_per_host are on several hosts" in reason
    else:
        assert reason is None


def test_gpus_of_one_process_are_distinct(monkeypatch):
    """They are told apart without asking for UUIDs, which nobody exchanges then."""
    monkeypatch.setattr(
        gpu_side, "library", lambda: types.SimpleNamespace(create_group=lambda *_: None)
    )
    mesh = fake_gpus((2, 2), ("data", "expert"), 4)
    ranks = gpu_side.ranks_of(create._instances(mesh, mesh.devices, ("expert",)))
    gpus = gpu_side.create(
        7, ranks, Topology.of(create._instances(mesh, mesh.devices, ("expert",))), 1.0, Room(1)
    )
    assert gpus == (("0", "1"), ("2", "3")) and most_on_a_gpu(gpus) == 1


@pytest.mark.one_process("asks for backends that serve one process")
def test_groups_of_logical_hosts(native_backend):
    need_devices(RANKS)
    mesh = make_mesh(RANKS)
    group = jax_ep.create_group(mesh, ranks_per_host=2, backend="reference")
    assert group.topology.hosts == ((0, 1), (2, 3))
    assert repr(group) == "Group(expert=4, ranks_per_host=2, backend='reference')"
    assert group is jax_ep.create_group(mesh, ranks_per_host=2, backend="reference")
    flat = jax_ep.create_group(mesh, backend="reference")
    assert flat.id != group.id and "ranks_per_host" not in repr(flat)
    assert flat is jax_ep.create_group(mesh, ranks_per_host=RANKS, backend="reference")
    # Native backends serve one host: asked for they refuse, and otherwise are passed over.
    with pytest.raises(ValueError, match=r"argument backend: .* spans 2 hosts, which the cpu"):
        jax_ep.create_group(mesh, ranks_per_host=2, backend=native_backend)
    assert jax_ep.create_group(mesh, ranks_per_host=2) is group
    assert jax_ep.create_group(mesh, ranks_per_host=RANKS).backend == native_backend


def test_room_for_any_routing_across_hosts_has_a_bound():
    """It grows with the ranks of all hosts, so from a size on the caller has to say how much."""
    need_devices(RANKS)
    tokens, top_k = 2**15, 8  # of 4 ranks, just as many as may be
    mesh = make_mesh(RANKS)

    def rows(more=0, **options):
        group = jax_ep.create_group(mesh, backend="reference", **options.pop("hosts"))

        def run(x, idx):
            return jax_ep.dispatch(x, idx, group=group, num_experts=64, **options).tokens

        specs = {"in_specs": jax.P("expert"), "out_specs": jax.P("expert")}
        shapes = [(RANKS * (tokens + more), size) for size in (HIDDEN, top_k)]
        arguments = map(jax.ShapeDtypeStruct, shapes, (np.float32, np.int32))
        return jax.eval_shape(jax.shard_map(run, mesh=mesh, **specs), *arguments).shape[0] // RANKS

    two_hosts = {"ranks_per_host": 2}
    assert rows(hosts=two_hosts) == 2**20
    assert rows(1, hosts={}) == 2**20 + 32
    assert rows(1, hosts=two_hosts, capacity=2**21) == 2**21
    with pytest.raises(ValueError, match=r"argument capacity: .* 1048576 rows at most, got None"):
        rows(1, hosts=two_hosts)


@pytest.mark.parametrize(
    ("ranks_per_host", "error", "text"),
    [
        (
            3,
            ValueError,
            "expected a positive divisor of the group's 4 ranks, got 3; give every host",
        ),
        (0, ValueError, "expected a positive divisor"),
        (8, ValueError, "expected a positive divisor"),
        (2.0, TypeError, "expected a Python int or None, got float"),
        (True, TypeError, "expected a Python int or None, got bool"),
    ],
)
def test_wrong_numbers(ranks_per_host, error, text):
    need_devices(RANKS)
    with pytest.raises(error, match=f"create_group: argument ranks_per_host: {text}"):
        jax_ep.create_group(make_mesh(RANKS), ranks_per_host=ranks_per_host)


@pytest.mark.needs_collectives
@pytest.mark.parametrize("layout", ["token", "expert"])
def test_sums_once_a_rank_once_a_host_and_once_at_home(layout):
    """The bits are those of the oracle, and differ from those of one host."""
    need_devices(RANKS)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(ml_dtypes.bfloat16)
    idx = routings.make("uniform", ranks=RANKS, tokens=TOKENS, top_k=4, experts=EXPERTS)
    capacity = RANKS * TOKENS * 2 if layout == "expert" else RANKS * TOKENS
    bounds = oracle.Limits(capacity, oracle.INT32_MAX)
    plan = oracle.plan(idx, num_experts=EXPERTS, layout=layout, alignment=1, bounds=bounds)
    rows = rng.standard_normal((RANKS, capacity, HIDDEN)).astype(ml_dtypes.bfloat16)
    found = {}
    for ranks_per_host in (1, 2, None):
        group = make_group(RANKS, "reference", ranks_per_host=ranks_per_host)

        def run(x, idx, rows, group=group):
            out = jax_ep.dispatch(
                x,
                idx,
                group=group,
                num_experts=EXPERTS,
                layout=layout,
                alignment=1,
                capacity=capacity,
            )
            return jax_ep.combine(rows, out.handle, group=group)

        found[ranks_per_host] = stacked_jit(run, group.mesh)(x, idx, rows)
        want = oracle.combine(rows, plan, ranks_per_host=ranks_per_host)
        oracle.assert_same(found[ranks_per_host], want, f"{ranks_per_host} ranks a host")
    assert (found[2] != found[None]).any()
    # If each rank is a host, the hosts round values that are rounded already.
    oracle.assert_same(found[1], found[None], "hosts of one rank")


@pytest.mark.needs_collectives
@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("layout", ["token", "expert"])
def test_handles_across_hosts(layout, capacity):
    """Rows are as on one host, in a list of entries; no array is as long as all ranks' tokens."""
    need_devices(RANKS)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.standard_normal((RANKS, TOKENS, 2)).astype(np.float32)
    idx = routings.make("uniform", ranks=RANKS, tokens=TOKENS, top_k=2, experts=EXPERTS)
    idx[1, :, 0] = -1
    found = {}
    for ranks_per_host in (2, None):
        group = make_group(RANKS, "reference", ranks_per_host=ranks_per_host)

        def run(x, weights, idx, group=group):
            def loss(weights):
                out = jax_ep.dispatch(
                    x,
                    idx,
                    weights,
                    group=group,
                    num_experts=EXPERTS,
                    layout=layout,
                    alignment=1,
                    capacity=capacity,
                )
                used = out.weights if layout == "expert" else out.weights.sum(axis=1)
                return (out.tokens[:, 0] * used).sum(), out

            gradient, out = jax.grad(loss, has_aux=True)(weights)
            return gradient, out.tokens, out.weights, out.handle

        found[ranks_per_host] = stacked_jit(run, group.mesh)(x, weights, idx)
    (*values, handle), (*want, flat) = found[2], found[None]
    for value, expected in zip(values, want, strict=True):
        oracle.assert_same(value, expected, "gradient, rows, weights")
    assert handle.dest_row is None and handle.recv_rows is None
    assert flat.recv_start is None and flat.recv_token is None and flat.recv_row is None
    most = max(handle.recv_src.shape[1], TOKENS * 2 * (1 if layout == "expert" else 99))
    assert all(leaf[0].size <= most for leaf in jax.tree.leaves(handle))
    for rank in range(RANKS):
        starts = handle.recv_start[rank]
        for source in range(RANKS):
            own = slice(*starts[source : source + 2])
            of_source = flat.recv_rows[rank].reshape(RANKS, TOKENS, -1)[source]
            np.testing.assert_array_equal(handle.recv_row[rank, own], of_source[of_source >= 0])
            np.testing.assert_array_equal(
                handle.recv_token[rank, own], np.argwhere(of_source >= 0)[:, 0]
            )
        assert (handle.recv_row[rank, starts[-1] :] == -1).all()
        assert (handle.recv_token[rank, starts[-1] :] == -1).all()
    oracle.assert_same(handle.recv_src, flat.recv_src, "recv_src")
