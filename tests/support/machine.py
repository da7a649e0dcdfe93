"""What processes that the tests start find on a machine: ports, GPUs, and what NCCL allows."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess

_DEVICE_COUNT = "--xla_force_host_platform_device_count"
# NCCL from 2.30 on lets ranks share a GPU where this is asked for; older ones refuse.
NCCL_SHARES_GPUS = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def python_path(*folders: pathlib.Path) -> str:
    """``PYTHONPATH`` with these folders before those that it has now."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def compiler_flags(*, devices: int | None = None) -> str:
    """``XLA_FLAGS`` for a program that a test starts, which compiles as the tests do (``conftest.py``).

    Args:
        devices: The number of CPU devices that XLA makes; None if the program decides.
    """
    flags = re.sub(rf"{_DEVICE_COUNT}=\d+", "", os.environ.get("XLA_FLAGS", "")).split()
    return " ".join([*flags, *([] if devices is None else [f"{_DEVICE_COUNT}={devices}"])])


def count_gpus() -> int:
    """GPUs that processes started from here see."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
