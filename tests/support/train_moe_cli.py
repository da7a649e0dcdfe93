"""Runs ``examples/train_moe.py`` in processes of its own, and lets tests import its parts."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import jax_ep
import machine

_EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(_EXAMPLES))

from byte_lm.config import ModelConfig, TrainConfig  # noqa: E402

TINY_MODEL = ModelConfig(num_layers=1, hidden=16, num_heads=1, num_experts=4, expert_hidden=16)
TINY_TRAIN = TrainConfig(batch_size=4, seq_len=16, learning_rate=0.01, warmup_steps=2)
TINY = (
    "--num-layers 1 --hidden 16 --num-heads 1 --num-experts 4 --expert-hidden 16 "
    "--batch-size 4 --seq-len 16 --learning-rate 0.01 --warmup-steps 2"
)


def start(
    arguments: str, *, data: pathlib.Path, out: pathlib.Path, **env: str
) -> subprocess.Popen[str]:
    """Start the example with warnings as errors; ``finish`` must follow."""
    command = [sys.executable, "-W", "error", str(_EXAMPLES / "train_moe.py"), *arguments.split()]
    environment = {**os.environ, "XLA_FLAGS": machine.compiler_flags()}
    environment["PYTHONPATH"] = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
    return subprocess.Popen(
        [*command, "--data", str(data), "--out", str(out)],
        env=environment | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: Sequence[subprocess.Popen[str]], *, timeout: float) -> list[str]:
    """What the processes print. All must succeed within ``timeout`` seconds; none stays behind."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [
            process.communicate(timeout=deadline - time.monotonic())[0] for process in processes
        ]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def losses(out: pathlib.Path) -> list[float]:
    """The loss of every step of the run in ``out``."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    by_step = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(by_step) == list(range(1, len(by_step) + 1))
    return list(by_step.values())
