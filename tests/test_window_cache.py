"""The compilation cache for another machine: its parts, and hits on programs of other processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import gpu_suite
import window_cache

pytestmark = pytest.mark.one_process("starts programs of its own")


def test_parts(tmp_path, monkeypatch):
    folder, parts = tmp_path / "cache", tmp_path / "parts"
    (folder / "inner").mkdir(parents=True)
    contents = {f"jit_f-{i:064x}-cache": os.urandom(3000) for i in range(20)}
    contents["inner/fusion"] = b"tuned"
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / ".1.part").write_bytes(b"half")
    text = window_cache.pack(folder, parts, part_bytes=40000)
    assert text.startswith("21 entries in ") and "left out" not in text
    files = sorted(parts.iterdir())
    assert 1 < len(files) <= window_cache.MOST_PARTS
    assert all(path.stat().st_size <= 40000 for path in files)
    assert window_cache.unpack(parts, tmp_path / "again") == 21
    for name, content in contents.items():
        assert (tmp_path / "again" / name).read_bytes() == content
    # A smaller cache leaves no old part; a message says what does not fit.
    monkeypatch.setattr(window_cache, "MOST_PARTS", 1)
    assert "left out" in window_cache.pack(folder, parts, part_bytes=40000)
    assert len(list(parts.iterdir())) == 1
    # Programs that a window looked for stay, even if they would come last.
    wanted = f"jit_f-{19:064x}-cache"
    (tmp_path / "process.1").write_text(f"missed {wanted.removesuffix('-cache')}\n")
    for first, stays in (((), False), (window_cache.used([tmp_path]), True)):
        window_cache.pack(folder, parts, part_bytes=40000, first=first)
        window_cache.unpack(parts, tmp_path / f"with {first}")
        assert (tmp_path / f"with {first}" / wanted).exists() == stays
    assert window_cache.unpack(tmp_path / "nothing", tmp_path / "empty") == 0


SPREAD = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jax_plugins import jax_ep_window
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
x = jax.ShapeDtypeStruct((4, 4), np.float32, sharding=jax.NamedSharding(mesh, P("expert")))
sizes = np.ones(2, np.int32)

def ragged(x):
    return lax.ragged_all_to_all(x, x, sizes, sizes, sizes, sizes, axis_name="expert")

for function in (
    lambda x: x + lax.axis_index("expert"),
    lambda x: lax.psum(x, "expert"),
    lambda x: lax.fori_loop(0, 3, lambda _, x: lax.ppermute(x, "expert", [(0, 1)]), x),
    ragged,
):
    specs = {"in_specs": P("expert"), "out_specs": P("expert"), "check_vma": False}
    inner = jax.shard_map(function, mesh=mesh, **specs)
    for outer in (inner, lambda x, inner=inner: inner(x).sum()):
        module = jax.jit(outer).lower(x).compiler_ir()
        print(int(jax_ep_window.has_collectives(module)), end=" ")
"""


def test_programs_that_depend_on_how_devices_are_spread():
    """Programs with collectives, in loops too, and all programs that the partitioner may change."""
    environment = {**os.environ, "PYTHONPATH": window_cache.python_path(gpu_suite.ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SPREAD],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "1", "1", "1", "1", "1", "1"]


PROGRAM = """
import jax, jax.numpy as jnp
from jax._src import cache_key
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0])
print("our keys" if "jax_ep_window" in cache_key._hash_accelerator_config.__module__ else "plain keys")
"""


def test_processes_use_the_cache(tmp_path):
    """The second process finds what the first compiled. With JAX_PLATFORMS=cpu none caches."""
    cache = tmp_path / "cache"

    def run(name, **env):
        lookups = tmp_path / name
        environment = {
            k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")
        }
        environment |= window_cache.environment(cache, lookups)
        environment |= {"PYTHONPATH": window_cache.python_path(gpu_suite.ROOT), **env}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, window_cache.found_and_missed(lookups)

    text, (found, missed, names) = run("cpu", JAX_PLATFORMS="cpu")
    assert "plain keys" in text and (found, missed) == (0, 0) and not cache.exists()
    text, (found, missed, names) = run("first")
    assert "our keys" in text and found == 0 and missed > 0 and "jit__lambda" in "".join(names)
    _, (again, missed_again, _) = run("second")
    assert (again, missed_again) == (missed, 0)
    assert not list(cache.glob(".*.part"))
