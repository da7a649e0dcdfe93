"""The CUDA kernels on the CPU, by tests/cuda/emulator: bit by bit against the CPU backend,
without one of their waits, which must be noticed, and with ranks that fail."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import emulated_decode
import emulated_network
from jax_ep import _cpu
from performance_page import benchmark, data, page, targets

pytestmark = pytest.mark.one_process("runs programs of its own")

_ROOT = pathlib.Path(__file__).parent
_HEADERS = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"

_SMALL = "tokens=40 experts=12 topk=4 blocks=2 repeat=1 alignment=8 timeout=60"
# Rows that are cast beside their dispatch, which is launched behind its plan.
_CAST = "layout=token ranks=2 hidden=1024 fp8=1 behind=1 cast_blocks=2"
# The same for rows that come dense.
_CAST_DENSE = "layout=expert ranks=2 hidden=1024 cast=fp8 dense=1 behind=1 cast_blocks=2"
_KERNELS = [
    "layout=expert ranks=2 hidden=2048",
    "layout=expert ranks=3 hidden=1032 plan=pull",
    "layout=token ranks=2 hidden=1032 plan=pull",
    "layout=token ranks=3 hidden=2048",
    "layout=expert ranks=3 hidden=1036 dtype=f32 plan=pull",
    "layout=token ranks=2 hidden=516 dtype=f32 plan=pull",
    "layout=expert ranks=2 hidden=1032 dtype=f16 plan=pull",
    "layout=expert ranks=3 hidden=1152 fp8=1 plan=pull",
    "layout=token ranks=2 hidden=1024 fp8=1 plan=pull",
    "layout=expert ranks=1 hidden=264 plan=pull",
    "layout=expert ranks=3 hidden=136 capacity=48 plan=pull",
    "layout=expert ranks=3 hidden=136 capacity=48 plan=push",
    "layout=expert ranks=2 hidden=16 experts=140 topk=6 tokens=60 capacity=64 alignment=1 plan=push",
    "layout=expert ranks=2 hidden=16 experts=140 topk=6 tokens=60 capacity=64 plan=pull",
    "layout=expert ranks=4 hidden=7168 tokens=20 plan=pull",
    "layout=expert ranks=2 hidden=24 tokens=300 topk=12 blocks=1",
    # Gradients by one warp at a time; one token; no more rows than warps; rows without a source.
    "layout=expert ranks=2 hidden=52000 tokens=3 experts=4 topk=2 plan=pull",
    "layout=expert ranks=3 hidden=4104 tokens=1 capacity=2000 more_blocks=1 plan=pull",
    "layout=expert ranks=2 hidden=264 tokens=1 experts=4 topk=1 capacity=16 plan=pull",
    "layout=token ranks=2 hidden=264 tokens=1 capacity=17 plan=pull",
    "layout=token ranks=2 hidden=136 tokens=300 blocks=1 capacity=700 plan=pull",
    # Sums in parts, in float32, where the order of the terms shows.
    "layout=token ranks=3 hidden=1028 dtype=f32 more_blocks=1 plan=pull",
    # More terms than are loaded at a time; a ring of one slot.
    "layout=expert ranks=1 hidden=136 experts=24 topk=20 dtype=f32 plan=pull",
    "layout=expert ranks=4 hidden=3000000 tokens=2 experts=4 topk=2 alignment=1 plan=pull",
    # Many unused rows, which stay as they are.
    "layout=expert ranks=3 hidden=1032 capacity=704 weighted=1 keeps_unused=1 plan=pull",
    "layout=token ranks=2 hidden=1024 fp8=1 capacity=300 keeps_unused=1 plan=pull",
    # Dispatches and combines in flight at the same time, on two channels.
    "layout=expert ranks=3 hidden=1032 repeat=4 at_once=1",
    # A dispatch launched behind its plan.
    "layout=expert ranks=3 hidden=1032 behind=1",
    _CAST,
    _CAST_DENSE,
    # Rows that come dense, in one, two and three chunks, whose scales begin anywhere in 16 bytes.
    "layout=token ranks=2 hidden=4224 cast=fp8 dense=1 tokens=20 capacity=100 plan=pull",
    "layout=expert ranks=3 hidden=1152 dtype=f16 cast=ue8m0 dense=1 plan=pull",
    "layout=expert ranks=2 hidden=4224 dtype=f32 cast=fp8 dense=1 tokens=9 plan=pull",
    "layout=token ranks=2 hidden=128 cast=ue8m0 dense=1 capacity=300 keeps_unused=1 plan=pull",
]
# The same with this many slots of the ring, for rows in one, two and four parts.
_SHORT_RINGS = {
    "ranks=2 hidden=1544 more_blocks=1": 3,
    "ranks=3 hidden=1028 dtype=f32 tokens=20": 1,
    "ranks=4 hidden=2056 weighted=1 tokens=12 more_blocks=1": 2,
    "ranks=3 hidden=8 weighted=1": 1,
    "ranks=3 hidden=1032 capacity=48 weighted=1": 2,
    "ranks=2 hidden=2056 experts=24 topk=24 weighted=1 tokens=20": 3,
    "ranks=3 hidden=4104 tokens=1 weighted=1": 1,
    "ranks=8 hidden=1540 dtype=f32 tokens=3 experts=16 blocks=1": 1,
}

# Kernels that have room for this many of their four blocks at a time.
_LITTLE_ROOM = {
    "layout=expert ranks=2 hidden=2048": 1,
    "layout=expert ranks=3 hidden=1032 weighted=1 more_blocks=1": 1,
    "layout=expert ranks=4 hidden=1540 dtype=f32 tokens=12": 3,
    "layout=expert ranks=2 hidden=1152 fp8=1": 2,
    "layout=token ranks=3 hidden=1032": 1,
    "layout=token ranks=2 hidden=1024 fp8=1": 1,
}

# The ring, which has 1024 slots here, goes round too.
_STRESS = "blocks=2 timeout=1"
_RING = "layout=expert plan=pull tokens=1600 hidden=8 steps=4"
_BEHIND = "layout=token plan=push steps=2 tokens=24 hidden=64 behind=1 timeout=20"
_STEPS = [
    "layout=expert plan=push steps=3",
    "layout=expert plan=pull ranks=3 steps=6",
    "layout=token plan=pull steps=6",
    _RING,
    _BEHIND,
]
# The wait that is taken out (test_hooks.cuh; from 101 on emulator.h), and a case that must notice
# it.
_MUTATIONS = {
    1: "layout=token plan=pull steps=6",
    2: "layout=token plan=pull steps=6",
    3: "layout=expert plan=pull steps=6",
    4: _RING,
    5: "layout=expert plan=push steps=3",
    6: "layout=expert plan=pull steps=6",
    21: _BEHIND,
    22: _BEHIND,
    101: "layout=expert plan=pull steps=6",
    102: "layout=token plan=pull steps=6",
    103: "layout=expert plan=pull steps=6",
}
_SEEDS = 12  # a mutation must show in one of this many schedules

# A rank that fails, and the slots of the ring. Peers wait for its inputs, or until it has read
# theirs, or for its sums, or for slots that it has not read (in the last of these, all rows are
# that rank's). Its process may be gone then. Or it arrives, but some of its words do not. Or peers
# find it at another op. Each peer has a record and a text that say which word it waited for.
_OF_FAILURES = f"{_SMALL} hidden=264"
_LONGER = "timeout_ms=2000"  # of a dispatch behind its plan, whose threads are many
_FAILURES = {
    "op=dispatch failure=absent layout=expert ranks=3": 1024,
    "op=dispatch failure=absent layout=token ranks=2 failing=0": 1024,
    "op=dispatch failure=absent layout=expert ranks=2 fp8=1 hidden=256": 1024,
    "op=dispatch failure=absent layout=token ranks=2 cast=fp8 dense=1 hidden=256": 1024,
    "op=dispatch failure=absent layout=expert ranks=3 behind=1": 1024,
    "op=dispatch failure=stops layout=token ranks=2 behind=1": 1024,
    "op=dispatch failure=gone layout=token ranks=3 behind=1": 1024,
    "op=dispatch failure=mismatch layout=expert ranks=3 failing=0 other=combine_vjp behind=1": 1024,
    "op=combine failure=absent layout=expert ranks=3": 1024,
    "op=combine failure=absent layout=token ranks=2": 1024,
    "op=combine_vjp failure=absent layout=expert ranks=3 failing=1": 1024,
    "op=dispatch failure=stops layout=expert ranks=3": 1024,
    "op=dispatch failure=stops layout=token ranks=2": 1024,
    "op=combine failure=stops layout=expert ranks=3 items=1000": 1024,
    "op=combine failure=stops layout=token ranks=2": 1024,
    "op=combine_vjp failure=stops layout=expert ranks=3": 1024,
    "op=combine failure=stops phase=rows layout=expert ranks=2": 1024,
    "op=combine failure=stops phase=rows layout=expert ranks=3 tokens=100 items=1": 1024,
    "op=combine failure=stops phase=rows layout=expert ranks=3 tokens=100 items=1 weighted=1": 2,
    "op=combine failure=stops word=sum layout=expert ranks=2": 1024,
    "op=combine failure=stops word=receipt layout=expert ranks=2 routes=first": 1,
    "op=dispatch failure=withholds word=address layout=expert ranks=3": 1024,
    "op=combine failure=withholds word=address layout=token ranks=2 failing=0": 1024,
    "op=plan failure=withholds word=address layout=token ranks=2": 1024,
    "op=plan failure=withholds word=total layout=expert ranks=3": 1024,
    "op=plan failure=withholds word=total layout=token ranks=2 failing=0": 1024,
    "op=plan failure=withholds word=message layout=expert ranks=2 plan=push timeout_ms=1000": 1024,
    "op=plan failure=withholds word=message layout=token ranks=2 plan=push timeout_ms=1000": 1024,
    "op=plan failure=absent layout=token ranks=3": 1024,
    "op=dispatch failure=gone layout=token ranks=3": 1024,
    "op=combine failure=gone layout=expert ranks=3": 1024,
    "op=dispatch failure=gone phase=close layout=expert ranks=3 failing=0": 1024,
    "op=combine failure=gone phase=close layout=expert ranks=3 items=1000": 1024,
    "op=combine failure=gone phase=close layout=token ranks=2": 1024,
    "op=combine_vjp failure=gone phase=close layout=expert ranks=3": 1024,
    "op=combine failure=gone phase=rows layout=expert ranks=2": 1024,
    "op=combine failure=gone phase=rows layout=expert ranks=3 tokens=100 weighted=1": 2,
    "op=combine failure=gone phase=rows layout=expert ranks=2 routes=first": 1,
    "op=dispatch failure=mismatch layout=expert ranks=3 failing=0 other=combine_vjp": 1024,
    "op=combine failure=mismatch layout=expert ranks=3": 1024,
    "op=plan failure=mismatch layout=expert ranks=2 plan=push timeout_ms=1000": 1024,
    "op=plan failure=mismatch layout=token ranks=3": 1024,
    "op=combine failure=mismatch layout=token ranks=2 other=dispatch": 1024,
    "op=combine_vjp failure=mismatch layout=expert ranks=3 other=combine": 1024,
}
# A rank that finds by itself that it must not go on, and tells its peers. It has two ops at once
# (also with other numbers of blocks, or with other flags), an input that they cannot read, or
# another place in the program's mesh.
_OWN_FAILURES = [
    "op=dispatch failure=concurrent layout=expert ranks=3 other=combine",
    "op=dispatch failure=concurrent layout=token ranks=2",
    "op=combine failure=concurrent layout=expert ranks=2 other=dispatch other_tag=1",
    "op=dispatch failure=concurrent layout=token ranks=2 other=combine other_tag=1",
    "op=combine failure=concurrent layout=token ranks=3 other=dispatch other_blocks=1",
    "op=combine_vjp failure=concurrent layout=expert ranks=3 other=combine blocks=4",
    "op=dispatch failure=unreachable layout=expert ranks=3",
    "op=combine failure=unreachable layout=expert ranks=3",
    "op=combine failure=unreachable layout=token ranks=2 failing=0",
    "op=combine_vjp failure=unreachable layout=expert ranks=2",
    "op=dispatch failure=misplaced layout=expert ranks=3",
    "op=dispatch failure=misplaced layout=expert ranks=3 behind=1",
    "op=dispatch failure=misplaced layout=token ranks=2 coords=instance",
    "op=combine failure=misplaced layout=expert ranks=3 coords=instance failing=1",
    "op=combine failure=misplaced layout=token ranks=3",
    "op=combine_vjp failure=misplaced layout=expert ranks=3",
]


_RACES = [
    "race=close layout=token ranks=2",
    "race=close layout=expert ranks=3",
    "race=reuse layout=token ranks=3 tokens=300 tries=60",
    "race=reuse layout=expert ranks=3 tokens=300 tries=60",
    "race=wrap layout=token ranks=2",
    "race=wrap layout=expert ranks=3",
]
_NUMBER_BY_EPOCH = 7  # test_hooks.cuh


class Binaries:
    """Programs of tests/cuda on the emulator, each built when a test first asks for it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._built: set[str] = set()

    def __truediv__(self, name: str) -> pathlib.Path:
        if name not in self._built:
            script = _ROOT / "cuda" / "emulator" / "build.sh"
            more = ["--more"] if self._built else []
            done = subprocess.run(
                ["bash", script, *more, self._folder, name],
                env=os.environ | {"PYTHON": sys.executable},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            self._built.add(name)
        return self._folder / name


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    missing = [name for name in ("g++", "bash") if shutil.which(name) is None]
    missing += [
        name for name in ("cuda_runtime_api.h", "cuda_fp8.h") if not (_HEADERS / name).exists()
    ]
    if missing and not _cpu.build_info()["with_cuda"]:
        pytest.skip(f"the emulator of kernels needs {', '.join(missing)}")
    return Binaries(tmp_path_factory.mktemp("emulator"))


def _run(
    program: pathlib.Path,
    arguments: str,
    *,
    seed: int = 1,
    mutation: int = 0,
    slots: int = 1024,
    blocks: int = 132,
    proxies: int = 0,
) -> subprocess.CompletedProcess[str]:
    settings = {
        "JAX_EP_EMULATOR_BLOCKS": str(blocks),
        "JAX_EP_EMULATOR_SEED": str(seed),
        "JAX_EP_EMULATOR_MUTATION": str(mutation),
        "JAX_EP_EMULATOR_PROXIES": str(proxies),
        "JAX_EP_EMULATOR_RING_SLOTS": str(slots),
    }
    return subprocess.run(
        [program, *arguments.split()],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _run_well(
    program: pathlib.Path, arguments: str, **settings: int
) -> subprocess.CompletedProcess[str]:
    """The same for a program that finds everything right."""
    done = _run(program, arguments, **settings)
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout + done.stderr
    return done


def _expect_noticed(program: pathlib.Path, arguments: str, mutation: int) -> None:
    """Fail unless the program finds an error under one of the schedules."""
    for seed in range(1, _SEEDS + 1):
        done = _run(program, arguments, seed=seed, mutation=mutation)
        if done.returncode != 0:
            assert "WRONG" in done.stdout or "EMULATOR" in done.stderr, done.stdout + done.stderr
            return
    pytest.fail(f"none of {_SEEDS} schedules showed it")


@pytest.mark.parametrize("arguments", _KERNELS)
def test_kernels_give_what_the_cpu_backend_gives(binaries: Binaries, arguments: str) -> None:
    _run_well(binaries / "kernels_test", f"{_SMALL} {arguments}")


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("arguments", _SHORT_RINGS)
def test_sums_through_a_short_ring(binaries: Binaries, arguments: str, seed: int) -> None:
    given = f"{_SMALL} layout=expert plan=pull {arguments}"
    _run_well(binaries / "kernels_test", given, seed=seed, slots=_SHORT_RINGS[arguments])


@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("arguments", _LITTLE_ROOM)
def test_few_blocks_at_a_time(binaries: Binaries, arguments: str, seed: int) -> None:
    """As if other kernels had most SMs and waited for something themselves."""
    given = f"{_SMALL} plan=pull {arguments} blocks=4"
    _run_well(binaries / "kernels_test", given, seed=seed, blocks=_LITTLE_ROOM[arguments])


@pytest.mark.parametrize("arguments", _STEPS)
def test_steps_in_which_everything_changes(binaries: Binaries, arguments: str) -> None:
    _run_well(binaries / "stress_test", f"{_STRESS} {arguments}")


def test_failed_plans(binaries: Binaries) -> None:
    """Ranks at other ops, absent, failed before or in another place: errors, no endless waits."""
    done = _run_well(binaries / "plan_test", "check=0 time=0 failures=1")
    assert done.stdout.count(": right") == 10, done.stdout


@pytest.mark.parametrize("arguments", _FAILURES)
def test_failures_of_a_rank(binaries: Binaries, arguments: str) -> None:
    """Its peers end in time, with a record and poison; later ops end at once."""
    longer = _LONGER if "behind=1" in arguments else ""
    given = f"{_OF_FAILURES} {longer} {arguments}"
    _run_well(binaries / "failures_test", given, slots=_FAILURES[arguments])


@pytest.mark.parametrize("arguments", _OWN_FAILURES)
def test_failures_that_a_rank_tells(binaries: Binaries, arguments: str) -> None:
    """The same, also of peers that were nearly done when they were told."""
    for seed in range(1, 5):
        longer = _LONGER if "behind=1" in arguments else ""
        given = f"{_OF_FAILURES} {longer} {arguments}"
        _run_well(binaries / "failures_test", given, seed=seed)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("arguments", _RACES)
def test_failures_that_may_come_too_late(binaries: Binaries, arguments: str, seed: int) -> None:
    """Whenever peers notice: right results, or poison with a record, and no writes elsewhere.

    If no rank fails, no kernel uses an old address."""
    _run_well(binaries / "races_test", f"{_SMALL} hidden=264 {arguments}", seed=seed)


@pytest.mark.parametrize("arguments", [race for race in _RACES if "race=wrap" in race])
def test_an_epoch_cannot_number_addresses(binaries: Binaries, arguments: str) -> None:
    """A word has 16 bits of the epoch, which are the same 65536 ops later."""
    given = f"{_SMALL} hidden=264 {arguments}"
    done = _run(binaries / "races_test", given, mutation=_NUMBER_BY_EPOCH)
    assert done.returncode != 0 and "rows of the old buffer" in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("mutation", _MUTATIONS)
def test_a_missing_wait_is_noticed(binaries: Binaries, mutation: int) -> None:
    _expect_noticed(binaries / "stress_test", f"{_STRESS} {_MUTATIONS[mutation]}", mutation)


@pytest.mark.parametrize("arguments", [_CAST, _CAST_DENSE])
def test_a_missing_wait_for_the_cast_is_noticed(binaries: Binaries, arguments: str) -> None:
    _expect_noticed(binaries / "kernels_test", f"{_SMALL} {arguments}", mutation=23)


# No wait for bulk stores that read a stage, and no fence before them (emulator.h).
@pytest.mark.parametrize("mutation", [0, 102, 104])
def test_stages_of_dense_rows(binaries: Binaries, mutation: int) -> None:
    """Stores find what lanes have written, and lanes write no stage that stores still read."""
    given = f"{_SMALL} layout=expert ranks=2 hidden=1152 cast=fp8 dense=1 plan=pull"
    done = _run(binaries / "kernels_test", given, mutation=mutation, proxies=1)
    assert ("WRONG rows of" in done.stdout) == (mutation != 0), done.stdout + done.stderr
    assert (done.returncode == 0) == (mutation == 0)


@pytest.mark.parametrize("arguments", emulated_decode.STEPS)
def test_latency_mode(binaries: Binaries, arguments: str) -> None:
    _run_well(binaries / "decode_test", arguments)


@pytest.mark.parametrize("arguments", emulated_decode.PHASES)
def test_phases_of_latency_mode(binaries: Binaries, arguments: str, tmp_path: pathlib.Path) -> None:
    """Every block stamps every phase, in order, and the figures become records and a table."""
    written = tmp_path / "phases.json"
    _run_well(binaries / "decode_test", f"{arguments} json={written}")
    phases = benchmark("decode_phases")
    case = {"tokens": 40, "layout": "expert", "quantization": "none", "gpus": 1, "blocks": 2}
    shape = {"ranks": 2, "hidden": 2056, "topk": 4, "experts": 12}
    made = phases.records_of(json.loads(written.read_text()), **case, shape=shape, correct=True)
    machine = dict.fromkeys(("device", "versions", "command"), "")
    launches = [(r["kernel"], r["call"]) for r in made]
    assert launches == [
        *(("dispatch", "whole"), ("combine", "whole")),
        *(("dispatch", call) for call in ("start", "done")),
        *(("combine", call) for call in ("start", "done")),
    ]
    for r in made:
        assert (r | machine).keys() == data.DECODE_PHASES_FIELDS
        passed = [phase["last_us"] for phase in r["phases"]]
        assert passed == sorted(passed) and r["phases"][-1]["phase"] == "end"
        assert sum(phase["takes_us"] for phase in r["phases"]) == pytest.approx(passed[-1], abs=0.1)
    table = page.TABLES["decode_phases"](targets, [r | machine for r in made])
    assert "| phase | dispatch, one call | combine, one call | dispatch, start call |" in table
    assert "NO" not in table and table.count("plan known") == 1


@pytest.mark.parametrize("arguments", emulated_decode.FAILURES)
def test_failures_in_latency_mode(binaries: Binaries, arguments: str) -> None:
    _run_well(binaries / "decode_failures_test", arguments)


@pytest.mark.parametrize(("mutation", "arguments"), emulated_decode.MUTATIONS)
def test_a_mutation_of_latency_mode_is_noticed(
    binaries: Binaries, mutation: int, arguments: str
) -> None:
    _expect_noticed(binaries / "decode_test", arguments, mutation)


@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("arguments", emulated_network.STEPS)
def test_hosts_on_a_late_network(binaries: Binaries, arguments: str, seed: int) -> None:
    """Results are right to the bit, and each row crosses once to each host that needs it."""
    # Three steps use words of either parity of the epoch again; the second schedule has two.
    _run_well(binaries / "network_test", f"{arguments} seed={seed} steps={4 - seed}", seed=seed)


def test_times_between_hosts(binaries: Binaries) -> None:
    """What is timed on GPUs runs; a time of the emulator says nothing."""
    run = _run(binaries / "network_test", "layout=expert direct=1 time=2")
    assert run.returncode == 0, run.stdout
    assert re.findall(r"^  (\w+) +[\d.]+ us$", run.stdout, re.M) == [
        "dispatch", "combine", "combine_vjp"
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", emulated_network.PLANS)
def test_plans_between_hosts(binaries: Binaries, arguments: str) -> None:
    _run_well(binaries / "network_plan_test", arguments)


@pytest.mark.parametrize("arguments", emulated_network.FAILURES)
def test_failures_between_hosts(binaries: Binaries, arguments: str) -> None:
    """All ranks of all hosts end in time, with a record and poison; later ops end at once."""
    _run_well(binaries / "network_failures_test", f"hosts=3 ranks=6 {arguments}")


@pytest.mark.parametrize("mutation", emulated_network.MUTATIONS)
def test_a_missing_wait_between_hosts_is_noticed(binaries: Binaries, mutation: int) -> None:
    arguments = "layout=expert tokens=60 blocks=1 steps=4 timeout=1"
    _expect_noticed(binaries / "network_test", arguments, mutation)


def test_a_sum_that_does_not_wait_for_its_rows_is_noticed(binaries: Binaries) -> None:
    arguments = "layout=expert op=combine tokens=60 blocks=1 steps=2 timeout=1"
    _expect_noticed(binaries / "network_test", arguments, mutation=101)
