"""The doctor and the training example in two processes that are two logical hosts."""

from __future__ import annotations

import train_moe_cli  # isort: skip  (first: it puts examples/ on the path)

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import gpu_processes
import host_runs
import machine
import run_hosts
from conftest import PLATFORM

TIMEOUT_S = 150
STEPS = 12
# The tests' own process and the other rank hold memory too.
ON_GPU = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.one_process("its programs have processes of their own"),
    pytest.mark.skipif(PLATFORM != "cuda", reason="needs a GPU"),
]
NETWORKS = pytest.mark.parametrize("late", [True, False], ids=["late", "reached"])


def network(late: bool) -> run_hosts.Late | None:
    return run_hosts.Late(run_hosts.build(), host_runs.LATE_US) if late else None


def of_process(index: int, late: bool) -> dict[str, str]:
    """Variables of one of two processes that have a host and a GPU each, or share one."""
    gpu = {"CUDA_VISIBLE_DEVICES": str(index % machine.count_gpus())}
    return host_runs.environment(index, 1, network(late)) | gpu | ON_GPU


@NETWORKS
def test_doctor(late):
    """The test of the network between all ranks finds nothing wrong, and has a line for each way."""
    arguments = ["-m", "jax_ep.doctor", "--network", "--ranks-per-host", "1", "--seconds", "10"]
    arguments += ["--coordinator", f"127.0.0.1:{machine.free_port()}", "--num-processes", "2"]
    path = machine.python_path(run_hosts.ROOT)
    with host_runs.service(2) as service:
        running = [
            subprocess.Popen(
                [sys.executable, *arguments, "--process-id", str(index)],
                env=os.environ | of_process(index, late) | service | {"PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(2)
        ]
        found = gpu_processes.finish(running, TIMEOUT_S)
    (status, text), (other_status, other_text) = found
    assert status == 0 and other_status == 0, f"{text}\n{other_text}"
    assert "The network works." in text
    assert "takes 'nvshmem': it spans 2 hosts of 1 rank(s)" in text
    assert "reach             of 2 pairs of ranks" in text
    for what in ("latency", "bandwidth"):
        assert re.search(rf"ok  {what} +2 of 2 pairs of ranks, all rows right", text), text
    assert "order under load" in text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five"], size=4000)
    path.write_text(" ".join(words))
    return path


def train(text: pathlib.Path, out: pathlib.Path, ranks_per_host: int, *, late: bool) -> list[float]:
    """The losses of two processes that train together."""
    address = f"127.0.0.1:{machine.free_port()}"
    arguments = (
        f"{train_moe_cli.TINY} --steps {STEPS} --dtype bf16 --data-parallel 1 --devices 1 "
        f"--ranks-per-host {ranks_per_host} --coordinator {address} --num-processes 2"
    )
    with host_runs.service(2) as service:
        processes = [
            train_moe_cli.start(
                f"{arguments} --process-id {index}",
                data=text,
                out=out,
                **of_process(index, late),
                **service,
            )
            for index in range(2)
        ]
        outputs = train_moe_cli.finish(processes, timeout=TIMEOUT_S)
    assert not any("reference backend" in output for output in outputs), outputs
    return train_moe_cli.losses(out)


@pytest.mark.slow
@NETWORKS
def test_losses_on_two_hosts_are_those_on_one(text, tmp_path, late):
    """One rank a host rounds as often as two on one host do, so only XLA's own sums may differ."""
    gpu_processes.need_two_ranks(2)
    one = train(text, tmp_path / "one", 2, late=False)
    two = train(text, tmp_path / "two", 1, late=late)
    assert len(one) == len(two) == STEPS
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, rtol=0.01)
