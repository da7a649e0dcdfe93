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


def test_kernels_between_hosts_align_shared_memory_themselves():
    """The linker of device code keeps 16 bytes of the alignment that they declare.

    With more declared, the compiler takes it for granted, and leaves out what would align it. Bulk
    copies were half as fast then.
    """
    declared = re.compile(r"extern __shared__ (.*?) char (\w+)\[\];")
    for path in sorted((ROOT / "csrc" / "cuda" / "network").glob("*.cu")):
        text = path.read_text()
        found = declared.findall(text)
        assert len(found) == text.count("extern __shared__"), f"{path.name}: another form"
        for alignment, name in found:
            assert alignment == "__align__(16)", f"{path.name}: {name} has {alignment}"
        if "rows/pipe.cuh" in text:  # whose stages are for bulk copies
            assert found and all(f"AlignForBulk({name})" in text for _, name in found), path.name
            assert "kAlignmentRoom" in text, f"{path.name}: no room to align it"
