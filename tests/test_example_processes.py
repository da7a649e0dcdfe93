"""``examples/train_moe.py`` in two processes gives the loss curve of one."""

from __future__ import annotations

import train_moe_cli  # isort: skip  (first: it puts examples/ on the path)

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

import machine
from byte_lm import cluster, data
from byte_lm.config import RunConfig
from byte_lm.run import Run
from byte_lm.training import Trainer
from conftest import PLATFORM
from spmd import make_mesh, ranks_at_most

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_process("its programs have processes of their own"),
    pytest.mark.skipif(PLATFORM != "cpu", reason="the number of devices is set on CPU only"),
]

STEPS = 10
TIMEOUT = 600  # seconds, far more than a busy machine needs


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    random = np.random.default_rng(0)
    words = random.choice(["one", "two", "three", "four", "five"], size=4000)
    path.write_text(" ".join(words))
    return path


def test_two_logical_hosts_train_as_one(text, tmp_path):
    """Combine rounds once more for each host, so in bfloat16 losses differ a little."""
    ranks = ranks_at_most(4)
    corpus = data.load(text, min_bytes=train_moe_cli.TINY_TRAIN.seq_len + 1)
    curves = []
    for per_host in (None, ranks // 2):
        trainer = Trainer(
            cluster.make_mesh(devices=ranks, data_parallel=1),
            dataclasses.replace(train_moe_cli.TINY_MODEL, dtype="bf16"),
            train_moe_cli.TINY_TRAIN,
            ranks_per_host=per_host,
        )
        assert len(trainer._group.topology.hosts) == (1 if per_host is None else 2)
        out = tmp_path / str(per_host)
        with Run(trainer, corpus, RunConfig(out=out, steps=STEPS)) as run:
            run.train()
        curves.append(train_moe_cli.losses(out))
    one, two = curves
    assert len(one) == len(two) == STEPS
    np.testing.assert_allclose(two, one, rtol=0.02)


# With two groups, each lies in one process; with one, it spans both.
@pytest.mark.parametrize("data_parallel", [2, 1])
def test_two_processes_train_as_one(text, tmp_path, data_parallel):
    each = ranks_at_most(4) // 2
    make_mesh(2 * each)  # or the test is skipped
    alone, together = tmp_path / "alone", tmp_path / "together"
    address = f"127.0.0.1:{machine.free_port()}"
    arguments = (
        f"{train_moe_cli.TINY} --steps {STEPS} --checkpoint-every 5 --data-parallel {data_parallel} "
        f"--devices {each} --coordinator {address} --num-processes 2"
    )
    processes = [
        train_moe_cli.start(f"{arguments} --process-id {index}", data=text, out=together)
        for index in range(2)
    ]
    first, second = train_moe_cli.finish(processes, timeout=TIMEOUT)

    mesh = cluster.make_mesh(devices=2 * each, data_parallel=data_parallel)
    trainer = Trainer(mesh, train_moe_cli.TINY_MODEL, train_moe_cli.TINY_TRAIN)
    corpus = data.load(text, min_bytes=train_moe_cli.TINY_TRAIN.seq_len + 1)
    with Run(trainer, corpus, RunConfig(out=alone, steps=STEPS)) as run:
        run.train()
        summary = run.finish()
    expected = train_moe_cli.losses(alone)
    assert len(expected) == STEPS
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(train_moe_cli.losses(together), expected, rtol=1e-4)
    assert "held-out loss" in first
    assert "loss" not in second
    assert (together / "sample.txt").read_text() == summary.sample
    # One process can read the checkpoint of two.
    config = RunConfig(out=together, steps=STEPS, resume=True)
    with Run(trainer, corpus, config) as restored:
        assert restored.step == STEPS
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4), restored.state, run.state
        )
