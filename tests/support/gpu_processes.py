"""Starts processes of one rank each that share GPUs.

``gpu_programs.py`` has what they run, and ``host_programs.py`` what those of several hosts run.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import pytest

import jax_ep
import machine

PROGRAMS = pathlib.Path(__file__).with_name("gpu_programs.py")
HOST_PROGRAMS = pathlib.Path(__file__).with_name("host_programs.py")


def need_two_ranks(processes: int) -> None:
    """Skip a test if two ranks in that many processes cannot use XLA's collectives here."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs GPUs")
    if jax.local_device_count() < 2:
        if processes == 1:
            pytest.skip("needs two GPUs: a process has one rank on each")
        if not machine.NCCL_SHARES_GPUS:
            pytest.skip("needs two GPUs, or NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30")


def start(
    program: str,
    processes: int,
    num_gpus: int,
    *,
    programs: pathlib.Path = PROGRAMS,
    of_process: Callable[[int], Mapping[str, str]] = lambda rank: {},
    under: Sequence[str] = (),
    **env: str,
) -> list[subprocess.Popen[str]]:
    """Start ``program`` in that many processes, with rank i on GPU i modulo ``num_gpus``.

    Args:
        program: The name of a function in ``programs``.
        processes: How many.
        num_gpus: GPUs of this machine.
        programs: The script that the processes run.
        of_process: More variables, by rank.
        under: The command of a tool that runs each process.
        **env: Variables of all processes.
    """
    port = machine.free_port()
    fraction = 0.7 / -(-processes // num_gpus)
    path = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
    base = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}"}
    return [
        subprocess.Popen(
            [*under, sys.executable, str(programs), program, str(processes), str(rank), str(port)],
            env={**base, "JAX_EP_TEST_GPU": str(rank % num_gpus), **env, **of_process(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(running: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Give the status and output of each process; those that do not end in time are killed."""
    deadline = time.monotonic() + timeout
    results = []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + "\n(killed: it did not end in time)"
        results.append((process.returncode, output))
    return results
