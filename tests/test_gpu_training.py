"""``examples/train_moe.py`` on GPUs, in one process and in two: the loss curve is that of the CPU."""

from __future__ import annotations

import train_moe_cli  # isort: skip  (first: it puts examples/ on the path)

import functools
import pathlib

import numpy as np
import pytest

import gpu_processes
import machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.slow,
    pytest.mark.one_process("its programs have processes of their own"),
]

STEPS = 20
TIMEOUT = 240  # seconds
# The tests' own process holds most of the GPUs' memory.
ON_GPU = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}
OPTIONS = f"{train_moe_cli.TINY} --steps {STEPS} --dtype bf16"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five"], size=4000)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def cpu_losses(text, tmp_path_factory):
    """The losses on two CPU devices by the size of the axis "data"; both runs begin at once."""
    outs = {size: tmp_path_factory.mktemp("cpu") for size in (1, 2)}
    processes = [
        train_moe_cli.start(
            f"{OPTIONS} --devices 2 --data-parallel {size}", data=text, out=out, JAX_PLATFORMS="cpu"
        )
        for size, out in outs.items()
    ]
    finish = functools.cache(lambda: train_moe_cli.finish(processes, timeout=TIMEOUT))

    def losses(data_parallel: int) -> list[float]:
        finish()
        return train_moe_cli.losses(outs[data_parallel])

    yield losses
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


# One group spans both GPUs. Two groups are connected only by NCCL.
@pytest.mark.parametrize("data_parallel", [1, 2])
@pytest.mark.parametrize("count", [1, 2], ids=["one process", "two processes"])
def test_loss_curve_is_that_of_the_cpu(text, cpu_losses, tmp_path, count, data_parallel):
    gpu_processes.need_two_ranks(count)
    gpus = machine.count_gpus()
    out = tmp_path / "out"
    arguments = f"{OPTIONS} --data-parallel {data_parallel}"
    if count == 1:
        processes = [train_moe_cli.start(f"{arguments} --devices 2", data=text, out=out, **ON_GPU)]
    else:
        address = f"127.0.0.1:{machine.free_port()}"
        together = f"{arguments} --devices 1 --coordinator {address} --num-processes 2"
        processes = [
            train_moe_cli.start(
                f"{together} --process-id {index}",
                data=text,
                out=out,
                CUDA_VISIBLE_DEVICES=str(index % gpus),  # each sees its own GPU alone
                **ON_GPU,
            )
            for index in range(2)
        ]
    outputs = train_moe_cli.finish(processes, timeout=TIMEOUT)
    assert not any("reference backend" in output for output in outputs), outputs
    losses, expected = train_moe_cli.losses(out), cpu_losses(data_parallel)
    assert len(losses) == len(expected) == STEPS
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected, rtol=0.05)
