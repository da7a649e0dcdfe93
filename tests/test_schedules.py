"""What XLA runs beside ops in flight, from programs that are compiled for H200s without a GPU.

It takes jax-cuda13-plugin and jax-cuda13-pjrt in jaxlib's version, installed or in the folder that
``JAX_EP_CUDA_PLUGIN`` names (``pip install --no-deps --target``), so that other tests start without.
"""

from __future__ import annotations

import itertools
import json
import pathlib

import pytest

import gpu_compiler
from jax_ep._core import libraries

pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
pytestmark = pytest.mark.one_process("compiles programs, and runs none")

# Why NVSHMEM's library, with which groups that span hosts are compiled, does not load here, or None.
NO_NETWORK = libraries._load_nvshmem()
# Chains of the benchmark, of two turns: what a turn has of calls and compute, in order.
COMPUTES = {
    "matmul": ["matmul"],
    "grouped_dot": ["grouped_dot"],
    "dispatch beside matmul": ["latency_dispatch_start", "matmul", "latency_dispatch_done"],
    "grouped_dot between the calls of dispatch": [
        *("latency_dispatch_start", "clock", "grouped_dot", "clock", "latency_dispatch_done"),
    ],
    "combine beside grouped_dot, a peer late": [
        *("latency_combine", "clock", "while", "clock"),
        *("latency_combine_start", "grouped_dot", "latency_combine_done", "clock"),
    ],
}
PROGRAM = pathlib.Path(__file__).parent / "support" / "gpu_schedules.py"


@pytest.fixture(scope="module")
def compiled():
    """What the program prints, by name."""
    names = ["same text", "free", "after", "grouped_dot", "chunks", "kernels", "shared_expert"]
    names += ["latency", "latency gradient", "latency without names"]
    names += ["readings of dispatch", "readings of combine"]
    names += [*(f"bench of {name}" for name in COMPUTES), "bench on one rank"]
    names.append("chunks without regions")  # which takes them away for good
    names += ["memory", *(["hosts"] if NO_NETWORK is None else [])]  # on meshes of their own
    lines = [json.loads(line) for line in gpu_compiler.run(str(PROGRAM), *names).splitlines()]
    return {line.pop("name"): line for line in lines}


def beside(ops: list[str], op: str) -> list[str]:
    """What runs between start and done of ``op``."""
    return ops[ops.index(f"start {op}") + 1 : ops.index(f"done {op}")]


def test_chunks_hide_rows_behind_experts(compiled):
    """The middle ops of each pass: dispatch of chunk B, combine of chunk A; backward the same."""
    ops = compiled["chunks"]["ops"]
    kinds = [
        "dispatch 1",
        "dispatch 2",
        "combine 1",
        "combine 2",
    ]  # backward, a combine's is a dispatch
    kinds += ["dispatch 3", "dispatch 4", "combine 3", "combine 4"]
    assert [op for op in ops if op.startswith("start ")] == [f"start {kind}" for kind in kinds]
    dones = [ops.index(f"done {kind}") for kind in kinds]
    assert dones == sorted(dones)  # one channel: each ends before the next begins
    for kind in "dispatch 2", "combine 1", "dispatch 4", "combine 3":
        assert beside(ops, kind).count("matmul") >= 2, kind
    for before, after in itertools.pairwise(kinds):
        assert ops.index(f"done {before}") < ops.index(f"start {after}")
    assert not {"dispatch", "combine"} & set(ops)  # none is in line


def test_after_orders_ops_in_flight(compiled):
    assert not compiled["free"]["found"] and compiled["after"]["found"]


def test_experts_leave_an_op_its_sms(compiled):
    """In both passes the first kernel beside an op leaves it 24 SMs of 132; no other kernel does."""
    ops = compiled["kernels"]["ops"]
    for kind in "dispatch 2", "combine 1", "dispatch 4", "combine 3":
        assert beside(ops, kind)[0] == "grouped_dot 108", kind
    assert ops.count("grouped_dot 108") == 4 and ops.count("grouped_dot 132") == 2 * 6 - 4


def test_nothing_overlaps_without_regions(compiled):
    """What the tests above would see if the annotation were lost."""
    ops = compiled["chunks without regions"]["ops"]
    assert not [op for op in ops if op.startswith(("start", "done"))]
    assert ops.count("combine_async") == 4


def test_the_shared_expert_hides_the_dispatch(compiled):
    ops = compiled["shared_expert"]["ops"]
    assert "matmul" in beside(ops, "dispatch 1")
    assert not {"dispatch", "combine"} & set(ops)


def test_named_work_runs_between_the_calls_of_latency_mode(compiled):
    """Also in the forward pass of a gradient. Other work may run anywhere else."""
    for name in "latency", "latency gradient":
        ops = compiled[name]["ops"]
        for op in "dispatch", "combine":
            start, done = (ops.index(f"latency_{op}_{half}") for half in ("start", "done"))
            assert ops[start + 1 : done] == ["matmul"], (name, op)
    ops = compiled["latency without names"]["ops"]
    assert ops.index("latency_dispatch_done") == ops.index("latency_dispatch_start") + 1


def test_memory_follows_the_room_for_rows(compiled):
    """With 8 ranks, room for a quarter more rows than come under even routing takes as much more."""
    found = compiled["memory"]["found"]
    assert 1.15 * found["exact"] < found["rank"] <= 1.27 * found["exact"]
    assert found["default"] > 1.5 * found["exact"]


def test_groups_that_span_hosts_compile_too(compiled):
    """Hosts are the processes of the topology."""
    if NO_NETWORK is not None:
        pytest.skip(NO_NETWORK)
    found = compiled["hosts"]["found"]
    wanted = "Group(expert=8, ranks_per_host=2, backend='cuda', transport='nvshmem')"
    assert found["group"] == wanted
    passes = ["plan", "dispatch", "combine", "dispatch", "combine"]
    assert found["calls"] == [f"jax_ep_network_{op}" for op in passes]


def test_programs_are_those_of_real_gpus(compiled):
    found = compiled["same text"]["found"]
    assert found["same"] and found["calls"] > 8
    assert found["native groups"] == 1  # the other one was made without


def test_kernels_follow_the_devices_of_the_program(compiled):
    """Not those that JAX starts with, which are CPUs here."""
    assert compiled["grouped_dot"]["found"] == {"h200": 1, "cpu": 0}


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_the_clock_is_read_around_each_call(compiled, op):
    """Of the chain that times the two calls, the link to the next op is all that runs beside them."""
    calls = [f"latency_{op}_start", *["clock"] * 16, f"latency_{op}_done", "fusion", "clock"]
    assert compiled[f"readings of {op}"]["ops"] == ["clock", *calls, *calls]


@pytest.mark.parametrize("name", COMPUTES)
def test_benchmarks_of_latency_mode_time_what_they_say(compiled, name):
    """No turn is merged with another or dropped, and the compute is between the calls."""
    ops = compiled[f"bench of {name}"]["ops"]
    if name.startswith("combine"):
        assert ops.pop(0) == "latency_dispatch"  # which makes the rows
    assert ops == 2 * COMPUTES[name]


def test_the_benchmark_hides_ops_on_one_rank(compiled):
    """XLA would not, without a collective; the sum over the ranks of the others is none there."""
    ops = compiled["bench on one rank"]["ops"]
    assert [beside(ops, f"dispatch {turn}") for turn in (1, 2)] == 2 * [["grouped_dot 68"]]
