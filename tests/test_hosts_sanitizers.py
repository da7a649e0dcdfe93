"""Ops between logical hosts under compute-sanitizer: no tool finds anything, and all rows are right.

Each process has a GPU of its own, or two take turns on one, because the tools do not work with MPS.
"""

from __future__ import annotations

import contextlib
import shutil

import pytest

import host_runs
from conftest import PLATFORM

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # the exit status if a tool finds something

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.one_process("its programs have processes of their own"),
    pytest.mark.skipif(PLATFORM != "cuda", reason="needs a GPU"),
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of CUDA"
    ),
]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_nothing(tool, tmp_path, monkeypatch):
    """In dispatch, combine and plans of changing routing, with chunks that go round their slots."""
    monkeypatch.setattr(host_runs, "service", lambda count: contextlib.nullcontext({}))
    found = host_runs.run(
        "slow_steps",
        2,
        1,
        tmp_path,
        late=False,
        under=["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)],
        JAX_EP_NETWORK_CHUNK_BYTES="8192",
        JAX_EP_NETWORK_LANES="1",
    )
    for process in found:
        assert process.status == 0, process.text
        assert "all right at" in process.text, process.text
        summary = "RACECHECK SUMMARY: 0" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
        assert summary in process.text, process.text
