"""Shares of a step's time, and when there is a profile; ``test_pretrain_model.py`` reads a real one."""

from __future__ import annotations

import pretrain_texts  # noqa: F401  # isort: skip  (first: it puts the repository on the path)

import gzip
import json
import pathlib
import re
from typing import Any

import pytest

from examples.pretrain import shares
from examples.pretrain.profiles import Profiler

pytestmark = pytest.mark.one_process("reads files of its own")

ROOT = pathlib.Path(__file__).parents[1]


def write_trace(folder: pathlib.Path, *kernels: tuple[str, int, str, float, float]) -> pathlib.Path:
    """A profile of GPUs as JAX writes it: plane, stream, name, start and duration of each kernel."""
    events: list[dict[str, Any]] = []
    for plane, stream, name, start, duration in kernels:
        pid = sum(plane.encode())
        events += [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": plane}},
            {
                "ph": "M",
                "pid": pid,
                "tid": stream,
                "name": "thread_name",
                "args": {"name": f"Stream #{stream}(Compute)"},
            },
            {"ph": "X", "pid": pid, "tid": stream, "name": name, "ts": start, "dur": duration},
        ]
    (folder / "vm.trace.json.gz").write_bytes(
        gzip.compress(json.dumps({"traceEvents": events}).encode())
    )
    return folder


def test_kernels_of_gpus(tmp_path):
    """A span of 100: ops in 45 of it, 10 of those beside another kernel."""
    gpu = "/device:GPU:0"
    folder = write_trace(
        tmp_path,
        (gpu, 1, "MemcpyH2D", -50, 10),  # the next batch
        (gpu, 1, "fusion_3", 0, 20),
        (gpu, 1, "void jax_ep::(anonymous namespace)::PushPlanKernel<(jax_ep::Layout)1>", 20, 5),
        (gpu, 1, "void jax_ep::(anonymous namespace)::DispatchKernel<__nv_bfloat16>", 30, 20),
        (gpu, 2, "nvjet_hsh_128x256", 40, 20),
        (gpu, 1, "_ZN6jax_ep12_GLOBAL__N_116CombineVjpKernelIfEEvNS_16CombineVjpParamsE", 60, 20),
        (gpu, 1, "loop_add_fusion", 90, 10),
        ("/host:CPU", 1, "ThunkExecutor::Execute", 0, 1000),
    )
    found = shares.read(folder, None)
    expected = {"plan": 0.05, "dispatch": 0.2, "combine": 0.2, "exchange": 0.45, "exposed": 0.35}
    assert found == pytest.approx({f"{name}_share": share for name, share in expected.items()})
    two = write_trace(
        tmp_path,
        (gpu, 1, "void jax_ep::DispatchKernel<float>(jax_ep::DispatchParams)", 0, 10),
        ("/device:GPU:1", 1, "void jax_ep::DispatchKernel<float>", 0, 10),
        ("/device:GPU:1", 1, "loop_add_fusion", 10, 10),
    )
    assert shares.read(two, None)["dispatch_share"] == 0.75  # the mean of both GPUs


def test_a_profile_without_ops(tmp_path):
    folder = write_trace(tmp_path, ("/device:GPU:0", 1, "my_DispatchKernel", 0, 10))
    assert shares.read(folder, None) == {}


def test_every_kernel_that_a_step_can_launch_has_a_kind():
    found = []
    for path in (ROOT / "csrc" / "cuda").rglob("*.cu"):
        if path.parent.name == "measure":  # of benchmarks alone
            continue
        of_folder = {"plan": "plan", "rows": "dispatch"}.get(path.parent.name)
        for name in re.findall(r"__global__[^;{]*?\b(\w+Kernel)\(", path.read_text()):
            kind = shares.kind_of_kernel(f"void jax_ep::(anonymous namespace)::{name}<float>")
            of_file = "dispatch" if path.stem == "cast" else path.stem.removesuffix("_vjp")
            assert kind == (of_folder or of_file), (path, name)
            found.append(kind)
    assert len(found) >= 16 and set(found) == {"plan", "dispatch", "combine"}


def test_which_steps_have_a_profile(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(
        "jax.profiler.start_trace", lambda folder, profiler_options: calls.append(folder)
    )
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))

    def steps_with(
        *, chosen: tuple[int, int] | None, every: int, here: bool = True, steps_before: int = 0
    ) -> list[int]:
        profiler = Profiler(
            tmp_path, chosen=chosen, every=every, here=here, steps_before=steps_before
        )
        found = []
        for step in range(steps_before + 1, 13):
            if profiler.begins(step):
                profiler.start(step)
            if profiler._until is not None:
                found.append(step)
            if profiler.ends(step):
                with pytest.raises(ValueError, match="empty"):  # nothing was written
                    profiler.stop(None)
        profiler.close()
        return found

    assert steps_with(chosen=None, every=5) == [5, 10]
    assert calls[1] == "stop" and tmp_path not in calls and not calls[0].exists()
    calls.clear()
    assert steps_with(chosen=(4, 6), every=5) == [4, 5, 6, 10]
    assert calls[:2] == [tmp_path, "stop"]
    assert steps_with(chosen=(11, 20), every=0) == [11, 12]
    assert calls[-1] == "stop"  # of the end
    assert steps_with(chosen=(4, 6), every=5, here=False) == []
    assert steps_with(chosen=None, every=5, steps_before=4) == [10]  # the fifth compiles
