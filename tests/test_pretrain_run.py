"""``examples/pretrain`` in two processes, as a Slurm job, and resumed on other devices."""

from __future__ import annotations

import pretrain_texts  # isort: skip  (first: it puts the repository on the path)

import json
import os
import pathlib
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

import jax_ep
import machine
import slurm_stand_in
from conftest import PLATFORM
from examples.pretrain import config
from examples.pretrain.data import Rows
from examples.pretrain.loop import Loop, Options
from examples.pretrain.step import setup
from spmd import ranks_at_most

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_process("its program has processes of its own"),
    pytest.mark.skipif(PLATFORM != "cpu", reason="the number of devices is set on CPU only"),
]

TIMEOUT = 600  # seconds, far more than a busy machine needs
MORE = 3  # steps after the job's last one
DEVICES = ranks_at_most(4)
CHANGES = (
    "model.vocab_size=304",
    "model.hidden=32",
    "model.num_layers=1",
    "model.num_dense_layers=0",
    "model.num_heads=2",
    "model.q_lora_rank=0",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=8",
    "model.dense_intermediate=32",
    "model.moe_intermediate=16",
    "model.num_experts=8",
    "model.top_k=2",
    "data.seq_len=16",
    "data.batch_size=8",
    "optimizer.total_steps=100000",
    "run.log_every=1",
    "run.save_every=100000",
    "run.eval_every=100000",
)


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


def run_job(rows: pathlib.Path, out: pathlib.Path, slurm: pathlib.Path) -> str:
    """Two tasks of four devices each, whose experts span both; SIGTERM reaches only the second."""
    root = pathlib.Path(jax_ep.__file__).parents[1]
    options = ["--data", str(rows), "--out", str(out), "--devices", "4"]
    for change in (*CHANGES, "parallel.expert=8"):
        options += ["--set", change]
    env = os.environ | slurm_stand_in.install(slurm)
    env |= {
        "PYTHONPATH": machine.python_path(root),
        "PYTHON": os.sys.executable,
        "SLURM_SUBMIT_DIR": str(pathlib.Path(__file__).parents[1]),
        "SLURM_JOB_ID": str(slurm_job_id()),
        "SLURM_NTASKS": "2",
        "XLA_FLAGS": machine.compiler_flags(devices=4),
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
    tasks = slurm / "tasks.json"
    try:
        wait_until(tasks.exists, job)
        wait_until(lambda: len(losses(out)) >= 2, job)
        os.kill(json.loads(tasks.read_text())[1], signal.SIGTERM)
        text, _ = job.communicate(timeout=TIMEOUT)
    finally:
        if job.poll() is None:
            for task in json.loads(tasks.read_text()) if tasks.exists() else []:
                os.kill(task, signal.SIGKILL)
            job.kill()
            job.communicate()
    assert job.returncode == 143, text
    assert slurm_stand_in.calls(slurm)[1:] == [["scontrol", "requeue", env["SLURM_JOB_ID"]]]
    return text


def test_a_job_that_is_stopped_goes_on_elsewhere_with_the_same_losses(tmp_path):
    """EP8 in two processes, then EP4 in one; the reference ran EP4 from the start."""
    rows = pretrain_texts.make_rows(tmp_path / "rows")
    out, alone = tmp_path / "job", tmp_path / "alone"
    text = run_job(rows, out, tmp_path / "slurm")
    first = losses(out)
    stopped = max(first)
    assert f"SIGTERM: stopped after step {stopped} and saved it in {out}" in text
    assert text.count("SIGTERM: stopped") == 1  # process 0 alone says it

    settings = config.load("tiny", [*CHANGES, f"parallel.expert={DEVICES}"])
    made = setup(settings, jax.devices()[:DEVICES])
    opened = Rows(rows, seq_len=16, vocab_size=304)

    def train(folder: pathlib.Path, *, begin: int) -> Loop:
        options = Options(out=folder, resume=True, profile=(2, 2))
        with Loop(settings, made, opened, options) as loop:
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
