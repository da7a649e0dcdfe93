"""NVIDIA's multi-process service: kernels of several processes run side by side on a GPU."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """Run a daemon of our own; gives the environment variables of processes that use it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {
            "CUDA_MPS_PIPE_DIRECTORY": str(pathlib.Path(folder, "pipe")),
            "CUDA_MPS_LOG_DIRECTORY": str(pathlib.Path(folder, "log")),
        }
        control = "nvidia-cuda-mps-control"
        subprocess.run([control, "-d"], env={**os.environ, **env}, check=True)
        try:
            yield env
        finally:
            # The daemon waits for its clients, and one that was killed may be left.
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [control],
                    input="quit\n",
                    text=True,
                    env={**os.environ, **env},
                    check=False,
                    timeout=15,
                )
