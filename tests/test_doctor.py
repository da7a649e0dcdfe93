"""What the doctor says of machines that are not this one."""

from __future__ import annotations

import importlib.util
import types

import jax
import pytest

from jax_ep import _compat, _device_group, doctor


@pytest.fixture
def gpu(monkeypatch):
    """A process with one GPU, as far as the doctor looks; gives its library."""
    library = types.SimpleNamespace(exports=(-1, 0, 0, "not supported"))
    library.export_allocation = lambda ordinal, address: library.exports
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(_compat, "local_ordinal", lambda device: 3)
    monkeypatch.setattr(_device_group, "library", lambda: library)
    monkeypatch.setattr(_device_group, "_address_of_an_array", lambda ordinal: 4096)
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
    """Why, how much is set aside, and what to change."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_EP_STAGING_BYTES", "12345")
    [finding] = doctor._reach()
    assert finding.status == "note"
    assert text in finding.detail
    assert "12345 bytes (JAX_EP_STAGING_BYTES)" in finding.detail
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in finding.mend


def test_small_allocations_are_staged(gpu, tmp_path):
    """An allocator that makes an allocation for each buffer gives exportable ones too."""
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


def _duplicate(file) -> int:
    """A descriptor for others to close."""
    return doctor.os.dup(file.fileno())
