"""Runs an op on every rank of a mesh, and moves arrays between stacked and sharded form.

Tests keep arrays stacked, ``[R, n, ...]`` with the rank first; the mesh sees ``[R * n, ...]``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep


def need_devices(count: int) -> None:
    """Skip the test where the platform has fewer devices."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, this machine has {jax.device_count()}")


@functools.cache
def make_mesh(
    sizes: tuple[int, ...] | int,
    names: tuple[str, ...] = ("expert",),
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh over the first devices."""
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    count = int(np.prod(sizes))
    need_devices(count)
    devices = np.array(jax.devices()[:count]).reshape(sizes)
    return Mesh(devices, names, axis_types=(axis_type,) * len(sizes))


def make_group(ranks: int, backend: str, **kwargs: Any) -> jax_ep.Group:
    """The group of a mesh with nothing but the axis "expert"."""
    return jax_ep.create_group(make_mesh(ranks), "expert", backend=backend, **kwargs)


def flat(x: Any) -> np.ndarray:
    """``[R, n, ...]`` as ``[R * n, ...]``."""
    x = np.asarray(x)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def stacked(x: Any, ranks: int) -> np.ndarray:
    """``[R * n, ...]`` as ``[R, n, ...]``."""
    x = np.asarray(x)
    return x.reshape(ranks, x.shape[0] // ranks, *x.shape[1:])


def fields(value: Any) -> dict[str, jax.Array]:
    """The arrays of a ``Dispatched``, a ``Handle`` or a ``Quantized`` by name, Nones left out."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    pairs = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: leaf for name, leaf in pairs.items() if isinstance(leaf, jax.Array)}


def shard(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any = None,
    out_specs: Any = None,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """``fn`` on every device of ``mesh``; arrays are split on axis 0 unless the specs say else."""
    everywhere = P(mesh.axis_names)
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=everywhere if in_specs is None else in_specs,
        out_specs=everywhere if out_specs is None else out_specs,
        check_vma=check_vma,
    )


def stacked_jit(
    fn: Callable[..., Any], mesh: Mesh, *, check_vma: bool = True, **jit_kwargs: Any
) -> Callable[..., Any]:
    """A jitted function of stacked arrays: each rank calls ``fn`` with its slices."""
    jitted = jax.jit(shard(fn, mesh, check_vma=check_vma), **jit_kwargs)
    ranks = mesh.size

    def call(*args: Any) -> Any:
        out = jax.device_get(jitted(*jax.tree.map(flat, args)))
        return jax.tree.map(lambda x: stacked(x, ranks), out)

    call.jitted = jitted  # type: ignore[attr-defined]
    return call


def count_calls(compiled_text: str, targets: Sequence[str]) -> dict[str, int]:
    """How often each custom call target stands in the text of a compiled module."""
    return {t: compiled_text.count(f'custom_call_target="{t}"') for t in targets}


def run_python(*arguments: str, timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same jax_ep; it fails the test when it hangs."""
    root = pathlib.Path(jax_ep.__file__).parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
