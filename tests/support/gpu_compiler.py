"""Where XLA's compiler for GPUs is, for tests that compile without a GPU, in processes of their own."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jaxlib
import pytest

PLUGIN = "jax-cuda13-plugin"
_ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments: str) -> str:
    """What a Python program prints that finds jax_ep, the examples and the compiler.

    The test is skipped where there is no compiler, or one of another version than jaxlib.
    """
    folder = os.environ.get("JAX_EP_CUDA_PLUGIN")
    places = [folder, *sys.path] if folder else sys.path
    versions = [d.version for d in importlib.metadata.distributions(name=PLUGIN, path=places)]
    if not versions:
        pytest.skip(
            f"{PLUGIN} is not installed, which has XLA's compiler for GPUs, nor in JAX_EP_CUDA_PLUGIN"
        )
    if versions[0] != jaxlib.__version__:
        pytest.skip(f"{PLUGIN} is of version {versions[0]}, and jaxlib of {jaxlib.__version__}")
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            "PYTHONPATH": ":".join([str(_ROOT), *places]),
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
