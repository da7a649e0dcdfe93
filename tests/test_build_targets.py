"""Both builds of the native library, CMake's and Bazel's, export what its sources list."""

from __future__ import annotations

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


def test_library_is_that_of_the_running_build():
    """Under Bazel, not one that another build has left in the source tree."""
    runfiles = os.environ.get("TEST_SRCDIR", "/")
    assert pathlib.Path(_cpu.__file__).is_relative_to(runfiles)


def test_gpu_library_exports_the_same_targets():
    cuda = pytest.importorskip("jax_ep._cuda", reason="the GPU backend was not built (no nvcc)")
    assert list(cuda.targets()) == list(_cpu.targets())
