"""What processes that the tests start find on a machine: ports, GPUs, and what NCCL allows."""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess

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


def count_gpus() -> int:
    """GPUs that processes started from here see."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))
