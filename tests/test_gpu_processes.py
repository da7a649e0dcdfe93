"""Groups of GPUs that span processes: one process for each rank, with any number of ranks."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import time

import jax
import pytest

import gpu_processes
import mps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


def run(
    program: str,
    processes: int,
    timeout: float = 240,
    *,
    programs: pathlib.Path = gpu_processes.PROGRAMS,
    killed: int | None = None,
    **env: str,
) -> list[str]:
    """The outputs of processes that all end well, under MPS where ranks share a GPU.

    One of them may kill itself.
    """
    gpus = jax.device_count()
    # A client that is killed may take others of its service with it.
    shares = (
        processes > gpus and killed is None and shutil.which("nvidia-cuda-mps-control") is not None
    )
    service = mps.multi_process_service() if shares else contextlib.nullcontext({})
    with service as variables:
        running = gpu_processes.start(
            program, processes, gpus, programs=programs, **variables, **env
        )
        results = gpu_processes.finish(running, timeout)
    for rank, (status, output) in enumerate(results):
        assert status == (-signal.SIGKILL if rank == killed else 0), (
            f"rank {rank} ended with {status}:\n{output}"
        )
    return [output for _, output in results]


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_values(processes):
    """Results and 600 replayed steps of two interleaved groups, rank by rank."""
    for output in run("values", processes):
        assert "staged: None" in output


def test_values_without_command_buffers():
    """The same with every kernel launched by itself."""
    run("values", 2, XLA_FLAGS="--xla_gpu_enable_command_buffer=")


def test_staged():
    """Memory that peers cannot map is copied first; results stay right, and a warning says so."""
    for output in run("values", 2, XLA_PYTHON_CLIENT_PREALLOCATE="false"):
        assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in output


def test_new_group_after_a_failure():
    """A rank that stays away fails the others; all of them can go on with a new group."""
    run("again", 2)


def test_new_groups_after_a_failure_beside():
    """One of two groups side by side fails; the processes of the other know nothing of it."""
    outputs = run("side_by_side", 4)
    assert "second: fine" not in outputs[0]
    assert all("second: fine" in output for output in outputs[2:])


def test_process_that_ends():
    """An op that was under way ends well; the next one raises."""
    run("ending", 2)


def test_equal_op_at_another_place():
    """Ranks at equal ops in different places of their programs raise and do not mix their data."""
    outputs = run("out_of_step", 2)
    assert any("is at another op" in output for output in outputs)


def test_mesh_of_the_program_in_another_order():
    """An error says what to do, and no rows come from the wrong experts."""
    run("misplaced", 2)


def test_killed_process():
    """The others raise within two seconds, and can end."""
    running = gpu_processes.start("endless", 2, jax.device_count())
    lines = [process.stdout for process in running]
    assert all("running" in line for stdout in lines for line in [_line_with(stdout, "running")])
    running[1].send_signal(signal.SIGKILL)
    killed_at = time.time()
    (status, output), _ = gpu_processes.finish(running, 60)
    assert status == 7, output
    reported = next(line for line in output.splitlines() if line.startswith("CommunicationError"))
    assert "rank 1" in reported
    assert "is gone" in reported
    assert float(reported.split()[2].rstrip(":")) - killed_at < 2, reported


ABSENT = gpu_processes.PROGRAMS.with_name("absent_programs.py")
COMPILES_ALONE = "--xla_gpu_shard_autotuning=false"


def test_ranks_go_on_without_a_slow_one():
    """They have right results, also after the slow one has come to the old group and got an error.

    Then all make a group together again.
    """
    run("slow", 3, programs=ABSENT, XLA_FLAGS=COMPILES_ALONE)


def test_ranks_go_on_without_a_dead_one():
    """Also once JAX has noticed that its process is gone, which its users have to ask for."""
    run("dead", 3, programs=ABSENT, killed=1, XLA_FLAGS=COMPILES_ALONE)


def _line_with(stream, text: str) -> str:
    for line in stream:
        if text in line:
            return line
    return "(ended)"
