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
@pytest.mark.parametrize("source", ["decode/dispatch.cu", "node/dispatch.cu"])
def test_nothing_lies_in_local_memory(source, tmp_path):
    """An object whose address escapes lies in local memory, and all that it refers to is generic.

    So it was with the router of latency mode, whose counts are in shared memory, and with the
    deadlines of waits, which each turn of a wait read and wrote.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("looks at what nvcc makes of a kernel, and there is no nvcc on the path")
    ptx = tmp_path / "kernel.ptx"
    flags = ["-std=c++17", "-arch=compute_90a", f"-I{ROOT / 'csrc'}", "-ptx", "-o", ptx]
    # Whoever only wants to know whether kernels compile may ask for less optimisation there.
    environment = {name: value for name, value in os.environ.items() if "NVCC_" not in name}
    path = ROOT / "csrc" / "cuda" / source
    subprocess.run([nvcc, *flags, path], check=True, capture_output=True, env=environment)
    text = ptx.read_text()
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", text, re.DOTALL)
    assert kernels and "__local_depot" not in text
    for name, body in kernels:
        assert not re.search(r"\batom\.add\.", body), f"{name} adds in generic memory"


def test_kernels_between_hosts_declare_the_alignment_that_a_linker_keeps():
    """Shared memory whose size a launch gives begins at any multiple of 16 bytes there.

    With more declared, the compiler takes that for granted, and the emulator too, which notices bulk
    copies that are slow because of it.
    """
    for path in sorted((ROOT / "csrc" / "cuda" / "network").glob("*.cu")):
        text = path.read_text()
        declared = re.findall(r"extern __shared__ (\S+) ", text)
        assert len(declared) == text.count("extern __shared__"), f"{path.name}: another form"
        assert set(declared) <= {"__align__(16)"}, f"{path.name}: {declared}"
