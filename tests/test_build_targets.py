"""Both builds of the native libraries, CMake's and Bazel's, export what their sources list."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import re

import pytest

from jax_ep import _cpu

pytestmark = pytest.mark.one_process("looks at files, not at devices")

TARGETS_H = pathlib.Path(__file__).parents[1] / "csrc" / "ffi" / "targets.h"


def test_exported_targets_are_those_listed():
    listed = re.findall(r"^  X\((jax_ep_\w+),", TARGETS_H.read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed)) > 0
    assert list(_cpu.targets()) == listed


def test_libraries_are_those_of_the_running_build():
    """Under Bazel, no library of another build is loaded, from the source tree or an install."""
    runfiles = os.environ.get("TEST_SRCDIR", "/")
    found = [importlib.util.find_spec(f"jax_ep.{name}") for name in ("_cpu", "_cuda")]
    for spec in filter(None, found):
        assert spec.origin is not None
        assert pathlib.Path(spec.origin).is_relative_to(runfiles)


def test_gpu_library_exports_the_same_targets():
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    cuda = importlib.import_module("jax_ep._cuda")  # so here a missing library is an error
    assert list(cuda.targets()) == list(_cpu.targets())
