"""``examples/pretrain`` in several processes, as a Slurm job, and resumed on other devices."""

from __future__ import annotations

import pretrain_texts  # isort: skip  (first: it puts the repository on the path)

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jax_ep
import machine
import pretrain_sizes
import slurm_stand_in
from conftest import PLATFORM
from examples.pretrain import config, step
from examples.pretrain.data import Rows
from examples.pretrain.loop import Loop, Options
from pretrain_sizes import CHANGES
from spmd import ranks_at_most

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_process("its program has processes of its own"),
    pytest.mark.skipif(PLATFORM != "cpu", reason="the number of devices is set on CPU only"),
]

TIMEOUT = 600  # seconds, far more than a busy machine needs
MORE = 3  # steps after the job's last one
DEVICES = ranks_at_most(4)


def losses(out: pathlib.Path) -> dict[int, float]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in whole if "loss" in line}


def slurm_job_id() -> int:
    """The number of a job whose port is free."""
    for number in range(4096):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", 61440 + number))
            except OSError:
                continue
            return number
    raise AssertionError("no free port for a job")


def wait_until(done, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not done():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_job(rows: pathlib.Path, out: pathlib.Path, slurm: pathlib.Path, *, tasks: int) -> str:
    """Tasks with eight devices in all, whose experts span them; SIGTERM reaches only the last one."""
    root = pathlib.Path(jax_ep.__file__).parents[1]
    options = ["--data", str(rows), "--out", str(out), "--devices", str(8 // tasks)]
    options += ["--profile-steps", "2:2"]
    for change in (*CHANGES, "parallel.expert=8"):
        options += ["--set", change]
    env = os.environ | slurm_stand_in.install(slurm)
    env |= {
        "PYTHONPATH": machine.python_path(root),
        "PYTHON": os.sys.executable,
        "SLURM_SUBMIT_DIR": str(pathlib.Path(__file__).parents[1]),
        "SLURM_JOB_ID": str(slurm_job_id()),
        "SLURM_NTASKS": str(tasks),
        "XLA_FLAGS": machine.compiler_flags(devices=8 // tasks),
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
    }
    script = env["SLURM_SUBMIT_DIR"] + "/examples/pretrain/launch/slurm/plain.sbatch"
    job = subprocess.Popen(
        ["bash", script, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = slurm / "tasks.json"
    try:
        wait_until(started.exists, job)
        wait_until(lambda: len(losses(out)) >= 2, job)
        os.kill(json.loads(started.read_text())[-1], signal.SIGTERM)
        text, _ = job.communicate(timeout=TIMEOUT)
    finally:
        if job.poll() is None:
            for task in json.loads(started.read_text()) if started.exists() else []:
                os.kill(task, signal.SIGKILL)
            job.kill()
            job.communicate()
    assert job.returncode == 143, text
    assert slurm_stand_in.calls(slurm)[1:] == [["scontrol", "requeue", env["SLURM_JOB_ID"]]]
    return text


@functools.cache
def setup_of(expert: int) -> step.Setup:
    settings = config.load("tiny", [*CHANGES, f"parallel.expert={expert}"])
    return step.setup(settings, jax.devices()[:expert])


# .ci/run runs one of them with each version of Python and JAX.
@pytest.mark.parametrize("tasks", [4, 2])
def test_a_job_that_is_stopped_goes_on_elsewhere_with_the_same_losses(tmp_path, tasks):
    """EP8 in several processes, then EP4 in one; the reference ran EP4 from the start."""
    rows = pretrain_texts.make_rows(tmp_path / "rows")
    out, alone = tmp_path / "job", tmp_path / "alone"
    text = run_job(rows, out, tmp_path / "slurm", tasks=tasks)
    first = losses(out)
    stopped = max(first)
    assert f"SIGTERM: stopped after step {stopped} and saved it in {out}" in text
    assert text.count("SIGTERM: stopped") == 1  # process 0 alone says it
    assert text.count("the profile has no op of jax_ep") == 1  # several processes: the reference
    setup = setup_of(DEVICES)
    opened = Rows(rows, seq_len=16, vocab_size=304)

    def train(folder: pathlib.Path, *, begin: int) -> Loop:
        options = Options(out=folder, resume=True, profile=(2, 2))
        with Loop(setup.config, setup, opened, options) as loop:
            assert loop.step == begin
            loop._total_steps = stopped + MORE
            assert loop.train() == 0
        return loop

    profiled = train(alone, begin=0).log.last("exchange_share")
    assert profiled["step"] == 2 and 0 < profiled["exchange_share"] < 1
    train(out, begin=stopped)
    expected, got = losses(alone), losses(out)
    assert list(got) == list(expected) == list(range(1, stopped + MORE + 1))
    assert {step: got[step] for step in first} == first
    np.testing.assert_allclose(list(got.values()), list(expected.values()), atol=1e-4)
    assert expected[stopped + MORE] < expected[1]


def test_a_run_goes_on_with_half_and_with_twice_the_ranks(tmp_path):
    """EP8, EP4, EP16 on sixteen devices; on as many ranks as before the bits are the same too."""
    rows = pretrain_texts.make_rows(tmp_path / "rows")
    root = pathlib.Path(jax_ep.__file__).parents[1]
    program = pathlib.Path(pretrain_sizes.__file__)
    env = os.environ | {
        "PYTHONPATH": machine.python_path(root),
        "XLA_FLAGS": machine.compiler_flags(devices=16),
    }
    command = [sys.executable, str(program), str(rows), str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=TIMEOUT)
    whole, same, others = (losses(tmp_path / name) for name in ("whole", "same", "others"))
    assert list(whole) == list(range(1, 21)) and whole[20] < whole[1] - 0.1
    assert same == whole
    assert list(others) == list(whole)
    np.testing.assert_allclose(list(others.values()), list(whole.values()), atol=1e-4)
    assert others != whole  # EP4 and EP16 did run: their sums have another order
