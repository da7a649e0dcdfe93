"""What the compiler makes of kernels, where a slip costs time and nothing else would show it."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def ptx_of(source: str, folder: pathlib.Path, *flags: str) -> str:
    """What nvcc makes of a file of kernels."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("looks at what nvcc makes of a kernel, and there is no nvcc on the path")
    ptx = folder / "kernel.ptx"
    command = [
        nvcc,
        "-std=c++17",
        "-arch=compute_90a",
        f"-I{ROOT / 'csrc'}",
        *flags,
        "-ptx",
        "-o",
        ptx,
    ]
    # Whoever only wants to know whether kernels compile may ask for less optimisation there.
    environment = {name: value for name, value in os.environ.items() if "NVCC_" not in name}
    path = ROOT / "csrc" / "cuda" / source
    subprocess.run([*command, path], check=True, capture_output=True, env=environment)
    return ptx.read_text()


@pytest.mark.one_process("compiles")
@pytest.mark.parametrize("source", ["decode/dispatch.cu", "node/dispatch.cu"])
def test_nothing_lies_in_local_memory(source, tmp_path):
    """An object whose address escapes lies in local memory, and all that it refers to is generic.

    So it was with the router of latency mode, whose counts are in shared memory, and with the
    deadlines of waits, which each turn of a wait read and wrote.
    """
    text = ptx_of(source, tmp_path)
    kernels = re.findall(r"\.entry (\w+)\((.*?)\n}", text, re.DOTALL)
    assert kernels and "__local_depot" not in text
    for name, body in kernels:
        assert not re.search(r"\batom\.add\.", body), f"{name} adds in generic memory"


@pytest.mark.one_process("compiles")
def test_streamed_sums_know_that_their_memory_is_shared(tmp_path):
    """Where device code is linked, as with NVSHMEM, the compiler knows nothing of the callers of a
    function that other files might call: it would read its ring by generic loads, which take longer,
    with more registers than a kernel has.
    """
    stand_in = ROOT / "tests" / "cuda" / "without_nvshmem"
    text = ptx_of("network/combine.cu", tmp_path, "-rdc=true", f"-I{stand_in}")
    sums = re.findall(r"\.func\s+\w*StoreStreamedSum\w*\((.*?)\n}", text, re.DOTALL)
    sums = [body for body in sums if "cp.async" in body]
    assert len(sums) == 6  # three types of rows, with factors or without
    for body in sums:
        assert "ld.shared.v4" in body
        assert not re.search(r"\bld\.(v\d\.)?[bufs]\d", body), "a generic load"


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
