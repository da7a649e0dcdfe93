"""The doctor's test of a network between ranks: on logical hosts, and on ops that go wrong."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import jax_ep
import machine
from jax_ep._groups import network
from jax_ep.doctor import job, programs, self_test, table, transport
from jax_ep.doctor.finding import Finding
from jax_ep.doctor.self_test import SelfTest, Sizes
from spmd import need_devices

pytestmark = pytest.mark.one_process("makes groups of this process's devices, and starts processes")

TINY = Sizes(
    hidden=16,
    num_tokens=4,
    latency_trips=2,
    bandwidth_trips=1,
    repeats=2,
    load_tokens=6,
    load_hidden=8,
    load_top_k=3,
    load_steps=5,
)
HOSTS = ((0, 1, 2), (3, 4, 5))


def make_test(ranks: int, ranks_per_host: int | None, seconds: float = 0.6) -> SelfTest:
    need_devices(ranks)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:ranks]), (programs.AXIS,))
    group = jax_ep.create_group(
        mesh, programs.AXIS, backend="reference", ranks_per_host=ranks_per_host
    )
    return SelfTest(group, seconds=seconds, sizes=TINY)


def test_logical_hosts():
    """All pairs are timed, all values right, and the table has a line for each pair of hosts."""
    test = make_test(4, 2)
    test.seconds = 5.0  # more than the pairs take; under load it is spent
    found = {finding.name: finding for finding in test.pairs()}
    assert set(found) == {"latency", "bandwidth"}
    assert all(finding.status == "ok" for finding in found.values())
    assert found["latency"].detail == "12 of 12 pairs of ranks, all rows right"
    test.seconds = 0.1
    [load] = test.load()
    assert load.status == "ok"
    assert int(load.detail.split()[0]) >= 2 * TINY.load_steps
    [text] = test.tables
    lines = text.splitlines()
    assert [line.split()[:4] for line in lines[3:]] == [
        ["0", "to", "0", "2"],
        ["0", "to", "1", "4"],
        ["1", "to", "0", "4"],
        ["1", "to", "1", "2"],
    ]
    assert f"{TINY.num_tokens * TINY.hidden * 2} bytes there and back" in text


def test_no_time_for_all_pairs(monkeypatch):
    """At least one pair is timed, and the finding says how many were not."""
    monkeypatch.setattr(programs, "pair", lambda group, **sizes: lambda *numbers: np.zeros((2, 1)))
    latency, bandwidth = make_test(2, 1, seconds=1e-9).pairs()
    for finding in (latency, bandwidth):
        assert finding.status == "note" and "--seconds" in finding.mend
        assert finding.detail.startswith("1 of 2 pairs of ranks")


def test_one_value_that_is_lost_on_its_way_back(monkeypatch):
    """Pairs tell between whom."""
    combine = jax_ep.combine

    def lossy(rows, handle, *, group):
        y = combine(rows, handle, group=group)
        return y.at[-1, 3].set(jax.numpy.where(jax.lax.axis_index("rank") == 1, -1, y[-1, 3]))

    monkeypatch.setattr(jax_ep, "combine", lossy)
    latency, *_ = make_test(2, None).pairs()
    assert latency.status == "fail"
    assert latency.detail.endswith("rows came back wrong between [(0, 1), (1, 0)]")
    assert latency.mend


def stale(rows, handle, *, group, combine):
    """Rank 1 reads the row of another token of the same step."""
    first = jax.lax.axis_index("rank") == 1
    return combine(rows.at[0].set(jax.numpy.where(first, rows[1], rows[0])), handle, group=group)


def test_rows_that_are_mixed_up_under_load(monkeypatch):
    combine = jax_ep.combine
    monkeypatch.setattr(
        jax_ep,
        "combine",
        lambda rows, handle, *, group: stale(rows, handle, group=group, combine=combine),
    )
    [load] = make_test(2, None).load()
    assert load.status == "fail" and load.name == "order under load"
    assert "rank(s) got wrong values: rank 0 got" in load.detail
    assert load.detail.endswith("from step 0 on")
    assert "NVSHMEM_IB_ENABLE_RELAXED_ORDERING" in load.mend


def test_rows_of_the_step_before_are_seen(monkeypatch):
    """Contents change from step to step: rows of another step are wrong ones."""
    dispatch = jax_ep.dispatch
    need_devices(2)

    def late(x, topk_idx, *, group, num_experts):
        out = dispatch(x, topk_idx, group=group, num_experts=num_experts)
        before = programs._token_ids(jax.lax.axis_index("rank"), x.shape[0], jax.numpy.int32(0))
        old = programs._values(before, x.shape[1], 0xFFFF).astype(x.dtype)
        other = dispatch(old, topk_idx, group=group, num_experts=num_experts)
        return dataclasses.replace(out, tokens=other.tokens)

    monkeypatch.setattr(jax_ep, "dispatch", late)
    [load] = make_test(2, None).load()
    assert load.status == "fail"
    assert load.detail.endswith("from step 1 on")  # in step 0 both are the same


def test_after_a_part_that_fails_there_are_no_others(monkeypatch):
    test = make_test(2, None)
    monkeypatch.setattr(test, "pairs", lambda: iter([Finding("fail", "a", "b")]))
    monkeypatch.setattr(test, "load", lambda: pytest.fail("it goes on"))
    assert [finding.name for finding in test.run()] == ["a"]

    def pairs():
        raise RuntimeError("a rank is gone")
        yield

    monkeypatch.setattr(test, "pairs", pairs)
    [finding] = test.run()
    assert (finding.status, finding.name) == ("fail", "pairs")
    assert finding.detail == "RuntimeError: a rank is gone"


def test_order_of_pairs():
    """Those as rows travel come first: equal indices on two hosts; those within a host last."""
    pairs = self_test.pairs_in_order(HOSTS)
    assert len(pairs) == len(set(pairs)) == 30
    assert set(pairs[:6]) == {(0, 3), (1, 4), (2, 5), (3, 0), (4, 1), (5, 2)}
    assert all((a < 3) != (b < 3) for a, b in pairs[:18])
    assert all((a < 3) == (b < 3) for a, b in pairs[18:])


def test_reach():
    hosts = {rank: i for i, ranks in enumerate(HOSTS) for rank in ranks}
    matrix = np.equal.outer([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1])
    [finding] = self_test.reach_findings(matrix, hosts)
    assert finding.status == "ok"
    assert finding.detail.startswith("of 18 pairs of ranks of different hosts, 18 need the network")
    assert table.of_reach(matrix, HOSTS).splitlines()[1].split() == ["0", "...", "nnn"]
    matrix[0, 4] = True
    [finding] = self_test.reach_findings(matrix, hosts)
    assert "17 need the network, and 1 reach each other" in finding.detail
    assert table.of_reach(matrix, HOSTS).splitlines()[1].split() == ["0", "...", "n.n"]
    matrix[3, 5] = False
    [finding] = self_test.reach_findings(matrix, hosts)
    assert finding.status == "fail" and "[(3, 5)]" in finding.detail


def test_reach_is_gathered_by_processes(monkeypatch):
    """Ranks and processes may be numbered differently."""
    test = make_test(2, 1)
    topology = types.SimpleNamespace(hosts=((0,), (1,)), processes=((1, 0),))
    test.group = types.SimpleNamespace(transport="nvshmem", topology=topology)
    library = types.SimpleNamespace(reaches=lambda process: process == 1)
    monkeypatch.setattr(self_test.network, "library", lambda: library)
    # Process 0, which is rank 1, says that it does not reach process 1, which is rank 0.
    monkeypatch.setattr(test, "_gather", lambda mine: [[False, True], mine])
    [finding] = test.reach()
    assert finding.status == "ok"
    assert [line.split() for line in test.tables[0].splitlines()[1:]] == [
        ["0", ".", "n"],
        ["1", "n", "."],
    ]


def test_worst_pairs():
    """The slowest and the one with the lowest rate are named."""
    latency = {(0, 3): 1e-5, (1, 4): 3e-5, (2, 5): 2e-5}
    hosts = {rank: i for i, ranks in enumerate(HOSTS) for rank in ranks}
    text = table.of_pairs(latency, {(0, 3): 1e-3, (1, 4): 2e-3}, 10**7, hosts)
    assert text.splitlines()[-1].split("  ")[-1].strip() == "1 to 4"
    assert text.splitlines()[-1].split() == (
        ["0", "to", "1", "3", "20", "30", "1", "to", "4", "15", "10", "1", "to", "4"]
    )


def test_sizes_fit_the_settings():
    """Rows fit a chunk, choices fit a message; load_tokens counts each top_k times."""
    limits = network.Settings(num_lanes=1, chunk_bytes=8192, message_bytes=2000)
    sizes = Sizes.fitting("gpu", limits)
    assert (sizes.hidden, sizes.num_tokens, sizes.load_tokens) == (3584, 1000, 250)
    assert Sizes.fitting("gpu", None) == Sizes()
    assert Sizes.fitting("cpu", None).hidden < 3584


@pytest.mark.parametrize(
    ("backend", "taken", "hosts", "text"),
    [
        ("cuda", "nvshmem", ((0, 1), (2, 3)), "takes 'nvshmem': it spans 2 hosts of 2 rank(s)"),
        ("cuda", "peer", ((0, 1, 2, 3),), "takes 'peer': its GPUs are of one host"),
        ("cpu", None, ((0, 1, 2, 3),), "takes none: its CPU devices share the memory"),
        ("reference", None, ((0, 1), (2, 3)), "because there is a reason"),
    ],
)
def test_transport_of_a_group(backend, taken, hosts, text):
    topology = types.SimpleNamespace(hosts=hosts, ranks_per_host=len(hosts[0]))
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    group = types.SimpleNamespace(
        size=4, backend=backend, transport=taken, topology=topology, mesh=mesh
    )
    finding = transport.of_group(group, "there is a reason")
    assert text in finding.detail
    assert finding.status == ("note" if backend == "reference" else "ok")
    assert ("docs/network.md" in finding.mend) == (backend == "reference")


def test_process_0_hears_of_the_others(monkeypatch):
    said = ["[]", '[{"status": "fail", "name": "load", "detail": "wrong", "mend": "this"}]']
    monkeypatch.setattr(job._compat, "all_gather_text", lambda key, text, timeout: said)
    found = job._of_others(job.Job("h:1", 2, 0), [])
    assert found == [Finding("fail", "process 1: load", "wrong", "this")]
    assert job._of_others(job.Job("h:1", 2, 1), []) == []

    def gone(key, text, timeout):
        raise TimeoutError("process 1 did not come")

    monkeypatch.setattr(job._compat, "all_gather_text", gone)
    [finding] = job._of_others(job.Job("h:1", 2, 0), [])
    assert finding.status == "fail" and "process 1 did not come" in finding.detail


def test_two_processes():
    """A whole job, on two CPU devices that count as two hosts."""
    address = f"127.0.0.1:{machine.free_port()}"
    arguments = ["--network", "--coordinator", address, "--num-processes", "2"]
    arguments += ["--ranks-per-host", "1", "--seconds", "0.3"]
    flags = "--xla_backend_optimization_level=0"  # to compile quickly; integers are exact anyway
    root = str(pathlib.Path(jax_ep.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jax_ep.doctor", *arguments, "--process-id", str(index)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    (out, errors), (other, _) = ends
    assert [process.returncode for process in processes] == [0, 0], errors + out
    assert "The network works." in out and "of 2 pairs of ranks" in out
    assert "because the group spans 2 hosts" in out
    assert "pairs of ranks" not in other  # process 0 prints it all
