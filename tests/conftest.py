"""Devices, warnings and run-time type checks for the whole suite.

``JAX_EP_TEST_PLATFORM`` (default "cpu") is the value of ``JAX_PLATFORMS`` to test on. On "cpu" the
suite forces 16 host devices, has XLA compile quickly rather than well (``XLA_FLAGS`` overrides both),
and runs the reference and the native CPU backend; on another platform it takes the devices that
there are, and skips tests that need more, with that reason.

``run_processes.py`` runs the suite in several processes, which ``support/lockstep.py`` keeps together.
Groups that span processes are "cuda" on GPUs and "reference", on XLA's collectives, on CPU.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator

PLATFORM = os.environ.get("JAX_EP_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
# XLA's CPU client runs everything on max(cores, devices) threads. With many steps in flight, its
# own collectives need more threads than there are devices.
os.environ.setdefault("PJRT_NPROC", "256")
if PLATFORM == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        count = 1 if "JAX_EP_TEST_PROCESSES" in os.environ else 16
        flags += f" --xla_force_host_platform_device_count={count}"
    # Most of the suite's time is XLA's compiler, which takes a third to a quarter of its time without
    # LLVM's optimizations and without emitters that go through MLIR (jaxlib 0.12 knows no others).
    # Name a level in XLA_FLAGS to test with XLA's defaults (its level is 3).
    # It also compiles each program in one piece, which takes a fifth less than up to 32 in parallel.
    if "xla_backend_optimization_level" not in flags:
        flags += " --xla_backend_optimization_level=0"
        flags += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        flags += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = flags.strip()

# Garbage is rarely old here, and looking for old garbage takes a second or more, since JAX keeps
# millions of objects of the programs that a process has compiled.
gc.set_threshold(700, 10, 500)

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import lockstep  # noqa: E402

lockstep.start(PLATFORM)

if PLATFORM != "cpu":
    BACKENDS = ("cuda",)
elif lockstep.ACTIVE:
    BACKENDS = ("reference",)  # the native CPU backend serves groups of one process
else:
    BACKENDS = ("reference", "cpu")

# These answer wrong calls with errors that name the fix, so no type checker may come first.
_CHECKED_BY_HAND = {"_ops.dispatch", "_ops.combine", "_ops.overlap", "_groups.create", "_moe.layer"}
_CHECKED_BY_HAND |= {"_core.quantize", "_core.balancing", "_core.top_k", "routing", "nnx", "linen"}
_CHECKED_BY_HAND |= {"_moe.activations", "_moe.local_experts"}
# JAX rebuilds these pytrees with leaves of any kind (specs, sentinels, batched arrays).
_PYTREES = {"_core.types"}


def _checked_modules() -> list[str]:
    """Every module of the package except its index and those whose own errors are tested."""
    spec = importlib.util.find_spec("jax_ep")
    if spec is None or spec.origin is None:
        return []
    root = pathlib.Path(spec.origin).parent  # of an editable install, the search locations lack it
    paths = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py")]
    names = [".".join(path.parts) for path in paths if path.name not in ("__init__", "__main__")]
    unchecked = _CHECKED_BY_HAND | _PYTREES
    assert unchecked <= set(names), f"no modules: {unchecked - set(names)}"
    return [f"jax_ep.{name}" for name in names if name not in unchecked]


if "jax_ep" not in sys.modules:
    jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")

# Few examples, always the same. To hunt for more: pytest --hypothesis-profile=hunt
# tests/test_hypothesis.py
common = hypothesis.settings(deadline=None, database=None)
hypothesis.settings.register_profile("suite", common, max_examples=25, derandomize=True)
hypothesis.settings.register_profile(
    "few", hypothesis.settings.get_profile("suite"), max_examples=4
)
hypothesis.settings.register_profile("hunt", common, max_examples=300)
hypothesis.settings.register_profile(
    "lockstep",  # all processes must try the same examples, whatever the time that each takes
    hypothesis.settings.get_profile("suite"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("lockstep" if lockstep.ACTIVE else "suite")


def pytest_configure(config: pytest.Config) -> None:
    if lockstep.ACTIVE:
        config.pluginmanager.register(lockstep.Plugin())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := lockstep.why_not(item, PLATFORM):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The backend under test."""
    return request.param


@pytest.fixture(scope="session")
def native_backend() -> str:
    """The native backend of the platform under test."""
    return BACKENDS[-1]


@pytest.fixture
def in_float32() -> Iterator[None]:
    """GPUs would multiply float32 matrices in TF32."""
    import jax

    with jax.default_matmul_precision("float32"):
        yield
