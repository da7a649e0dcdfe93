"""All-reduces of NCCL beside dispatch and combine: no deadlock, and neither starves the other."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import collective_steps
import gpu_processes
import jax_ep
from spmd import make_group, need_part, stacked_jit

SIZES = collective_steps.SMALL
# Seconds for processes to start, compile and run; on CPU they may have to share few cores.
TIMEOUT = {"cuda": 120, "cpu": 300}

has_own_processes = pytest.mark.one_process("its programs have processes of their own")

VARIANTS = {
    "command buffers": {},
    "no command buffers": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
    # NCCL takes all the SMs that our ops leave free.
    "32 channels": {"NCCL_MIN_NCHANNELS": "32"},
}
# Ranks that share a GPU: one rank's ops and all-reduces must leave enough room for those of the
# other. Otherwise each may wait for a kernel that cannot start.
SHARED_GPU = {"NCCL_MAX_NCHANNELS": "8"}


def run(platform: str, processes: int, **env: str) -> list[str]:
    """What the processes print; all must end well and in time."""
    running = collective_steps.start(platform, processes, **env)
    results = gpu_processes.finish(running, TIMEOUT[platform])
    for index, (status, output) in enumerate(results):
        print(f"process {index}, exit status {status}:\n{output}")
    assert all(status == 0 for status, _ in results), [output for _, output in results]
    return [output for _, output in results]


@pytest.mark.gpu
@pytest.mark.gpu2
@pytest.mark.slow
@has_own_processes
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"])
def test_all_reduces_beside_the_ops(processes, variant):
    """Every step is right, XLA has put ops beside all-reduces, and both end soon."""
    gpu_processes.need_two_ranks(processes)
    env = dict(VARIANTS[variant])
    if jax.local_device_count() < 2:
        if variant == "32 channels":
            pytest.skip("needs two GPUs: one has no room for so many channels of two ranks")
        env |= SHARED_GPU
    for output in run("cuda", processes, **env):
        assert "backend='cuda'" in output
        assert "bound " in output


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tests the test, without GPUs")
@has_own_processes
@pytest.mark.parametrize(("processes", "backend"), [(1, "cpu"), (2, "reference")])
def test_the_same_on_cpu(processes, backend):
    """Small versions of the programs above give right values on CPU too."""
    for output in run("cpu", processes):
        assert f"backend={backend!r}" in output
        assert output.endswith("fine\n")


@pytest.mark.needs_collectives
def test_wrong_steps_are_counted(backend, monkeypatch):
    """The tests above can fail: with changed results, exactly y and the sums are wrong."""
    group = make_group(collective_steps.RANKS, backend)
    need_part(group.mesh)
    combine, add = jax_ep.combine, jax.lax.psum
    monkeypatch.setattr(jax_ep, "combine", lambda rows, *a, **kw: 2 * combine(rows, *a, **kw))
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: add(x, axis).at[0].add(1))
    count = stacked_jit(lambda i: collective_steps.one_step(group, SIZES, "both", i[0]), group.mesh)
    found = count(np.zeros((collective_steps.RANKS, 1), np.int32))
    for y, rows, sums in found.reshape(collective_steps.RANKS, -1).tolist():
        assert y > SIZES.tokens * SIZES.hidden  # all of the first layer, and more of the next
        assert rows == 0
        assert sums == len(SIZES.gradients)


MODULE = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}

%body (p: f32[8]) -> f32[8] {
  %a = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%p), backend_config={"is_sync":false}
  %c.1 = (s32[2]{0}) custom-call(%x), custom_call_target="jax_ep_plan"
  %a.done = f32[8]{0} all-reduce-done(%a), metadata={op_name="psum"}
  %c.2 = (s32[2]{0}) custom-call(%x), custom_call_target="jax_ep_dispatch"
  %b-2.1 = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%p), backend_config={"is_sync":true}
  %c.3 = (s32[2]{0}) custom-call(%x), custom_call_target="jax_ep_combine"
  %c.4 = (s32[2]{0}) custom-call(%x), custom_call_target="other"
  %b.done = f32[8]{0} all-reduce-done(((f32[8]{0}), f32[8]{0}) %b-2.1)
}
"""


def test_ops_beside_all_reduces_are_found():
    assert collective_steps.beside(MODULE) == {"a": ["plan"], "b-2.1": []}
    asynchronous = MODULE.replace('"is_sync":true', '"is_sync":false')
    assert collective_steps.beside(asynchronous) == {"a": ["plan"], "b-2.1": ["combine"]}


def test_times_beyond_the_bound():
    """Outliers of single runs do not count."""
    apart = {"layers": [0.1, 0.1, 9.0], "all-reduces": [0.2, 0.2, 0.2]}
    collective_steps.check_times({**apart, "both": [0.49, 0.49, 9.0]})
    with pytest.raises(AssertionError, match="one keeps the other waiting"):
        collective_steps.check_times({**apart, "both": [0.51, 0.51, 0.3]})
