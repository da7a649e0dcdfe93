"""What the compiler makes of kernels, where a slip costs time and nothing else would show it."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.one_process("compiles")
def test_latency_mode_routes_in_shared_memory(tmp_path):
    """A router whose address escapes lies in local memory, and all that it refers to is generic.

    The compiler then no longer knows that counts of experts are in shared memory.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    ptx = tmp_path / "kernel.ptx"
    flags = ["-std=c++17", "-O1", "-arch=compute_90a", f"-I{ROOT / 'csrc'}", "-ptx", "-o", ptx]
    source = ROOT / "csrc" / "cuda" / "decode" / "dispatch.cu"
    # Whoever only wants to know whether kernels compile may ask for less optimisation there.
    environment = {name: value for name, value in os.environ.items() if "NVCC_" not in name}
    subprocess.run([nvcc, *flags, source], check=True, capture_output=True, env=environment)
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.DOTALL)
    assert kernels
    counted = 0
    for name, body in kernels:
        assert not re.search(r"\batom\.add\.", body), f"{name} adds in generic memory"
        counted += len(re.findall(r"\batom\.shared\.add\.", body))
    assert counted > 0
