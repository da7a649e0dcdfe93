"""Both builds of the native libraries, CMake's and Bazel's, export what their sources list."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import re
from typing import Any

import pytest

from jax_ep import _cpu
from jax_ep._core import libraries

pytestmark = pytest.mark.one_process("looks at files, not at devices")

ROOT = pathlib.Path(__file__).parents[1]
FFI = ROOT / "csrc" / "ffi"


def listed(targets_h: str) -> list[str]:
    """The FFI targets that a header under csrc/ffi states."""
    names = re.findall(r"^  X\((jax_ep_\w+)[,)]", (FFI / targets_h).read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 0
    return names


def test_exported_targets_are_those_listed():
    assert list(_cpu.targets()) == listed("targets.h")


def test_libraries_are_those_of_the_running_build():
    """Under Bazel, no library of another build is loaded, from the source tree or an install."""
    runfiles = os.environ.get("TEST_SRCDIR", "/")
    found = [importlib.util.find_spec(f"jax_ep.{name}") for name in ("_cpu", "_cuda", "_nvshmem")]
    for spec in filter(None, found):
        assert spec.origin is not None
        assert pathlib.Path(spec.origin).is_relative_to(runfiles)


@pytest.fixture(scope="module")
def cuda() -> Any:
    """The GPU library. It loads without a GPU."""
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    return importlib.import_module("jax_ep._cuda")  # so here a missing library is an error


def test_gpu_library_exports_the_same_targets_and_others(cuda):
    beside, latency = listed("cuda/async_targets.h"), listed("cuda/gpu_targets.h")
    assert list(cuda.targets()) == list(_cpu.targets()) + beside + latency
    assert {name.removesuffix("_async") for name in beside} < set(_cpu.targets())


def test_only_asynchronous_targets_stay_out_of_command_buffers(cuda):
    """In a command buffer, XLA would make a chain of them and of what should run beside them."""
    beside = listed("cuda/async_targets.h")
    assert cuda.captured_targets() == {name: name not in beside for name in cuda.targets()}


def test_one_statement_of_the_oldest_nvcc_for_nvshmem():
    """That of both builds, and of the notes for contributors."""
    cmake = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    (oldest,) = re.findall(r"set\(oldest_cuda_nvshmem ([\d.]+)\)", cmake)
    bazel = (ROOT / "bazel" / "nvshmem_env.bzl").read_text()
    assert f"_OLDEST_CUDA = ({oldest.replace('.', ', ')})" in bazel
    notes = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"nvcc is {oldest} or later" in notes


@pytest.fixture(scope="module")
def nvshmem() -> Any:
    """The library of groups that span hosts. It loads without a GPU."""
    if not _cpu.build_info()["with_nvshmem"]:
        pytest.skip("this build has no groups that span hosts: no NVSHMEM, or JAX_EP_NVSHMEM=OFF")
    not_loaded = libraries._load_nvshmem()
    try:
        return importlib.import_module("jax_ep._nvshmem")
    except ModuleNotFoundError:
        raise  # the build has left it out
    except ImportError:
        if not_loaded is None:
            raise
        pytest.skip(not_loaded)


def test_network_library_exports_the_targets_listed(nvshmem):
    assert list(nvshmem.targets()) == listed("network/targets.h")
    assert nvshmem.build_info()["version"] == _cpu.build_info()["version"]


BUILD_THERE = "or build jax_ep where NVSHMEM {} is installed"


@pytest.mark.parametrize(
    ("built", "loaded", "install"),
    [
        ((3, 4, 5), (3, 4, 5), None),
        ((3, 4, 5), (3, 5, 2), None),
        ((3, 8, 0), (3, 8, 0), None),
        ((3, 5, 19), (3, 8, 0), None),
        ((3, 4, 5), (3, 4, 4), ">=3.4.5,<3.5.19"),  # older than built
        ((3, 4, 5), (3, 5, 19), ">=3.4.5,<3.5.19"),  # the first with another layout for IBGDA
        ((3, 4, 5), (3, 8, 0), ">=3.4.5,<3.5.19"),
        ((3, 8, 0), (3, 4, 5), ">=3.8.0,<4.0.0"),
        ((3, 8, 0), (3, 7, 9), ">=3.8.0,<4.0.0"),
        ((3, 8, 0), (4, 0, 0), ">=3.8.0,<4.0.0"),
    ],
)
def test_which_nvshmem_fits_the_one_of_the_build(nvshmem, built, loaded, install):
    found = nvshmem.version_obstacle(built, loaded)
    if install is None:
        assert found is None
        return
    text = [".".join(map(str, version)) for version in (built, loaded)]
    assert found.startswith(f"NVSHMEM {text[1]} is installed, and jax_ep was built with {text[0]}")
    assert f"pip install 'nvidia-nvshmem-cu13{install}'" in found
    assert found.endswith(BUILD_THERE.format(text[1]))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 12 slots: words, 4 pieces of 12 chunks, words of plans, 8 messages
        ((2, 2, 3, 2048, 128), 2048 + 4 * 12 * 2048 + 1024 + 8 * 128),
        # 6 slots; the sum is half a KiB short of a multiple of 1024
        ((3, 1, 1, 1024, 128), 1024 + 3 * 6 * 1024 + 1024 + 12 * 128 + 512),
        # 1024 slots: more than 32 bits can tell
        ((64, 32, 8, 2**17, 2**18), 1305 * 1024 + 34 * 1024 * 2**17 + 34 * 1024 + 256 * 2**18),
    ],
)
def test_bytes_that_a_group_takes_of_the_network_memory(nvshmem, shape, expected):
    assert nvshmem.network_bytes(*shape) == expected
