"""``examples/overlap.py``: ops in flight give the losses of ops in line."""

from __future__ import annotations

import pathlib

import pytest

from conftest import PLATFORM
from spmd import run_python

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "overlap.py"

pytestmark = [
    pytest.mark.one_process("starts a program of its own"),
    pytest.mark.skipif(PLATFORM != "cpu", reason="sets up CPU devices of its own"),
]


def test_losses_are_the_same_bits():
    sizes = ("--tokens", "6", "--hidden", "16", "--width", "8", "--steps", "2")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = run_python(str(EXAMPLE), *sizes, timeout=300, **flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    losses = [line.partition("losses ")[2] for line in lines if "losses [" in line]
    assert len(losses) == 2 and losses[0] == losses[1] and losses[0].count(",") == 1
    assert lines[-1] == "the losses are the same bits"
