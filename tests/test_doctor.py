"""What the doctor says of machines that are not this one."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import types

import jax
import pytest

from jax_ep import _compat
from jax_ep._groups import gpu_side, memory
from jax_ep.doctor import installation as doctor


@pytest.fixture
def gpu(monkeypatch):
    """A process with one GPU, as the doctor sees it; gives its library."""
    library = types.SimpleNamespace(exports=(-1, 0, 0, "not supported"))
    library.export_allocation = lambda ordinal, address: library.exports
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(_compat, "local_ordinal", lambda device: 3)
    monkeypatch.setattr(gpu_side, "library", lambda: library)
    monkeypatch.setattr(memory, "_address_of_an_array", lambda ordinal: 4096)
    for name in ("PREALLOCATE", "ALLOCATOR"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}", raising=False)
    return library


def test_arena_that_can_be_exported(gpu, tmp_path):
    with open(tmp_path / "memory", "wb") as file:
        gpu.exports = (_duplicate(file), 0, 1 << 30, None)
        [finding] = doctor._reach()
    assert finding.status == "ok" and finding.name == "arrays of GPU 3"
    assert "in place" in finding.detail


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({}, "XLA's memory cannot be exported (not supported)"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "False"}, "PREALLOCATE=false lets XLA's memory grow"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"}, "ALLOCATOR=cuda_async gives no one arena"),
    ],
)  # fmt: skip
def test_staged(gpu, monkeypatch, env, text):
    """The doctor says why, how much is set aside, and what to change."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_EP_STAGING_BYTES", "12345")
    [finding] = doctor._reach()
    assert finding.status == "note"
    assert text in finding.detail
    assert "12345 bytes (JAX_EP_STAGING_BYTES)" in finding.detail
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in finding.mend


def test_small_allocations_are_staged(gpu, tmp_path):
    """An allocator with one allocation for each buffer has exportable ones too."""
    with open(tmp_path / "memory", "wb") as file:
        gpu.exports = (_duplicate(file), 0, 2 << 20, None)
        [finding] = doctor._reach()
    assert "comes in parts of 2097152 bytes" in finding.detail


def test_nothing_is_said_without_gpus():
    if jax.default_backend() == "cpu":
        assert list(doctor._reach()) == []


def test_multi_process_service(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert list(doctor._sharing()) == []
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    [finding] = doctor._sharing()
    assert finding.status == "note" and "nvidia-cuda-mps-control -d" in finding.mend
    (tmp_path / "control").touch()
    [finding] = doctor._sharing()
    assert finding.status == "ok" and str(tmp_path) in finding.detail


@pytest.mark.parametrize(("mode", "count"), [("CONCURRENT", 1), ("concurrent", 1), ("LHS", 0)])
def test_concurrent_command_buffers_must_go(monkeypatch, mode, count):
    flag = f"--xla_gpu_command_buffer_scheduling_mode={mode}"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_foo=1 {flag}")
    findings = list(doctor._xla_flags())
    assert [(finding.status, flag in finding.detail) for finding in findings] == [
        ("fail", True)
    ] * count


LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""  # noqa: E501
ACCESS_LEGEND = """
Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
  TNS  = Topology not supported
  NS   = Not supported
  U    = Unknown
"""
ONE_SWITCH = f"""\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\t0-47,96-143\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tSYS\t48-95,144-191\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t
{LEGEND}"""
TWO_BRIDGES = f"""\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity
GPU0     X      NV12    SYS     SYS     0-31    0
GPU1    NV12     X      SYS     SYS     0-31    0
GPU2    SYS     SYS      X      NV12    32-63   1
GPU3    SYS     SYS     NV12     X      32-63   1
{LEGEND}"""
PCIE_ONLY = f"""\
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tPHB\t0-15\t\t\tN/A
GPU1\tPHB\t X \t0-15\t\t\tN/A
{LEGEND}"""
ALL_ACCESS = f"""\
 \t\x1b[4mGPU0\tGPU1\x1b[0m\t
 GPU0\tX\tOK\t
 GPU1\tOK\tX\t
{ACCESS_LEGEND}"""
NO_ACCESS = ALL_ACCESS.replace("OK\t", "CNS\t")


@pytest.fixture
def nvidia_smi(monkeypatch):
    """Install an nvidia-smi that prints given texts, by its arguments."""

    def put(*, gpus=2, links="", access="", exit_status=0):
        names = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n" for i in range(gpus))
        prints = {"-L": names, "topo -m": links, "topo -p2p r": access}

        def run(command, **_):
            text = prints[" ".join(command[1:])]
            returncode = exit_status if command[1] == "topo" else 0
            return types.SimpleNamespace(stdout=text, stderr="", returncode=returncode)

        monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(doctor.subprocess, "run", run)

    return put


def test_gpus_on_one_nvlink_switch(nvidia_smi):
    nvidia_smi(gpus=3, links=ONE_SWITCH, access=ALL_ACCESS)
    links, access = doctor._links()
    assert links.status == access.status == "ok"
    assert links.detail == "NV18 (NVLink) joins all 3 pair(s): GPU0-GPU1, GPU0-GPU2, GPU1-GPU2"
    assert access.detail == "every GPU reads the memory of all others"
    assert not links.mend and not access.mend


def test_gpus_in_pairs(nvidia_smi):
    nvidia_smi(gpus=4, links=TWO_BRIDGES, access=ALL_ACCESS)
    bridges, far, _ = doctor._links()
    assert bridges.status == "ok"
    assert bridges.detail == "NV12 (NVLink) joins 2 pair(s): GPU0-GPU1, GPU2-GPU3"
    assert far.status == "note"
    assert far.detail.startswith("SYS (PCIe and the link between CPUs) joins 4 pair(s): GPU0-GPU2,")
    assert "groups of GPUs that NVLink joins" in far.mend


def test_gpus_without_nvlink(nvidia_smi):
    nvidia_smi(links=PCIE_ONLY, access=NO_ACCESS)
    links, access = doctor._links()
    assert links.status == access.status == "note"
    assert links.detail == "PHB (PCIe through the CPU) joins all 1 pair(s): GPU0-GPU1"
    assert "nvidia-smi nvlink --status" in links.mend
    assert "GPU0-GPU1 do not read each other's memory (CNS in" in access.detail
    assert "IOMMU" in access.mend


@pytest.mark.parametrize(
    "links",
    [
        "",
        "Failed to get topology",
        ONE_SWITCH.replace("NV18\t X ", "?\t X "),
        ONE_SWITCH.replace("GPU2\tNV18", "GPU9\tNV18"),  # a row is missing
        PCIE_ONLY.replace("GPU1\tPHB", "GPU1"),
    ],
)
def test_links_that_cannot_be_told(nvidia_smi, links):
    nvidia_smi(links=links)
    findings = list(doctor._links())
    assert [finding.name for finding in findings] == ["GPU links", "GPU peer access"]
    for finding in findings:
        assert finding.status == "note" and finding.mend
        assert "cannot be told: nvidia-smi topo" in finding.detail


def test_nvidia_smi_that_fails(nvidia_smi):
    nvidia_smi(links=PCIE_ONLY, access=ALL_ACCESS, exit_status=1)
    assert ["cannot be told" in finding.detail for finding in doctor._links()] == [True, True]


def test_links_of_one_gpu_or_none(nvidia_smi, monkeypatch):
    nvidia_smi(gpus=1, links="\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n")
    assert list(doctor._links()) == []
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert list(doctor._links()) == []


def test_nvidia_smi_that_hangs(monkeypatch, nvidia_smi):
    nvidia_smi()

    def hang(command, **_):
        raise doctor.subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert list(doctor._links()) == []


def _duplicate(file) -> int:
    """A descriptor for others to close."""
    return doctor.os.dup(file.fileno())


def test_one_statement_of_the_cuda_versions(nvidia_smi, monkeypatch):
    """The builds, README, the notes for contributors and the doctor itself agree."""
    root = pathlib.Path(__file__).parents[1]
    assert doctor.CUDA_NEEDED in (root / "README.md").read_text()
    oldest = re.escape(doctor.OLDEST_NVCC)
    for page in ("README.md", "CONTRIBUTING.md"):
        text = " ".join((root / page).read_text().split())
        assert set(re.findall(r"nvcc of CUDA ([\d.]+\d)", text)) == {doctor.OLDEST_NVCC}, page
    assert re.search(rf"set\(oldest_cuda {oldest}\)", (root / "csrc/CMakeLists.txt").read_text())
    pair = doctor.OLDEST_NVCC.replace(".", ", ")
    assert f"_OLDEST = ({pair})" in (root / "bazel/cuda_env.bzl").read_text()

    nvidia_smi()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    listing = types.SimpleNamespace(stdout="0, NVIDIA H200\n", stderr="", returncode=0)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: listing)
    *_, missing = doctor._gpus()
    assert missing.status == "fail" and doctor.CUDA_NEEDED in missing.mend
