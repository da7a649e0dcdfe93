"""What ``import jax_ep`` loads, and what it leaves alone, each in a process of its own."""

from __future__ import annotations

import os
import pathlib

import pytest

import jax_ep
import machine
from spmd import run_python

pytestmark = pytest.mark.one_process("its programs have processes of their own")


def run(code: str, **env: str) -> str:
    """Output of ``code`` in a fresh interpreter, where warnings are errors."""
    done = run_python("-c", code, timeout=120, PYTHONWARNINGS="error", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = """
import sys
import jax_ep
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print(*sorted({name for name in sys.modules if name.startswith("jax_ep.")}))
print(open("/proc/self/maps").read().lower())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc/self/maps")
def test_import_loads_neither_flax_nor_cuda():
    packages, modules, maps = run(LOADED).split("\n", 2)
    assert {"jax", "jax_ep", "jaxtyping"} <= set(packages.split())  # the list is of what is loaded
    unwanted = {"flax", "optax", "orbax", "hypothesis", "pytest", "beartype", "matplotlib"}
    unwanted |= {"rich", "typer"}
    assert not unwanted & set(packages.split())
    assert not {"jax_ep.nnx", "jax_ep.linen"} & set(modules.split())
    libraries = {line.rpartition("/")[2] for line in maps.splitlines() if "/" in line}
    assert any("jax" in name for name in libraries)
    for name in libraries:
        for word in ("libcuda", "libcudart", "libnccl", "nvshmem", "cublas", "jax_ep/_cuda"):
            assert word not in name, f"{name} is mapped"


def test_import_starts_no_backend():
    """A program may still set up ``jax.distributed`` after the import."""
    code = "import jax_ep, jax._src.xla_bridge as b; print(b.backends_are_initialized())"
    assert run(code) == "False"


def test_import_prepares_the_cpu_client():
    code = "import os; {}; import jax_ep; print(os.environ['PJRT_NPROC'])"
    assert int(run(code.format("del os.environ['PJRT_NPROC']"))) >= 64
    assert run(code.format("os.environ['PJRT_NPROC'] = '7'")) == "7"  # what the user has set stays


LATE = """
import os
{before}
import jax
jax.devices()
import jax_ep
print(os.environ.get("PJRT_NPROC"))
"""


@pytest.mark.parametrize(
    ("before", "num_devices", "warns"),
    [
        ("os.environ.pop('PJRT_NPROC', None)", 3, True),
        ("os.environ.pop('PJRT_NPROC', None)", 1, False),  # no other rank to wait for
        ("os.environ['PJRT_NPROC'] = '7'", 3, False),
    ],
)
def test_import_after_jax_has_started(before, num_devices, warns):
    done = run_python(
        "-c",
        LATE.format(before=before),
        timeout=120,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=machine.compiler_flags(devices=num_devices),
    )
    assert done.returncode == 0, done.stderr
    assert ("Import jax_ep before" in done.stderr) == warns, done.stderr
    if warns:
        assert "started its 3 CPU devices" in done.stderr and "set PJRT_NPROC=256" in done.stderr
        assert done.stdout.strip() == "None"  # it has no effect any more


@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_layers_are_lazy(flax):
    code = f"""
import sys, jax_ep
assert "flax" not in sys.modules
layer = jax_ep.{flax}.MoE
assert "flax" in sys.modules and "jax_ep.{flax}" in sys.modules
print(layer.__module__, layer.__name__)
"""
    assert run(code) == f"jax_ep.{flax} MoE"


def test_layers_without_flax():
    """Without flax the rest works, and the layers say what is missing."""
    code = """
import sys
sys.modules["flax"] = None
import jax_ep
print(jax_ep.dispatch.__name__)
try:
    jax_ep.nnx
except ImportError as error:
    print(error)
"""
    first, _, text = run(code).partition("\n")
    assert first == "dispatch" and "flax" in text


def test_index_is_complete():
    """Every public name exists, is listed and has a docstring, and the list lacks none."""
    assert sorted(jax_ep.__all__, key=str.lower) == sorted(set(jax_ep.__all__), key=str.lower)
    assert set(jax_ep.__all__) <= set(dir(jax_ep))
    for name in jax_ep.__all__:
        value = getattr(jax_ep, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"{name} has no docstring"
    public = {name for name in vars(jax_ep) if not name.startswith("_")}
    public -= {"annotations", "importlib", "Any", "TYPE_CHECKING"}  # what the file itself imports
    # Modules that have no underscore are public too, but for those that are run with python -m.
    folder = pathlib.Path(jax_ep.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    public |= {name for name in modules if not name.startswith("_")}
    assert public - set(jax_ep.__all__) == {"bench", "doctor", "scale", "tune"} & public
    with pytest.raises(AttributeError, match="module 'jax_ep' has no attribute 'dispach'"):
        jax_ep.dispach  # noqa: B018


def test_versions_agree():
    from jax_ep._core import libraries

    if libraries.why_unavailable() is not None:
        pytest.skip(f"no native library: {libraries.why_unavailable()}")
    from jax_ep import _cpu

    assert _cpu.build_info()["version"] == jax_ep.__version__
