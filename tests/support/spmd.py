"""Runs an op on every rank of a mesh, and moves arrays between stacked and sharded form.

Tests keep arrays stacked, ``[R, n, ...]`` with the rank first, and the mesh sees ``[R * n, ...]``.
Tests have whole arrays, also where a mesh spans several processes (see ``lockstep.py``): every
process has all of each input and gets all of each output.
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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import lockstep
import logical_hosts
import machine

# Several processes place arrays on the mesh before they call a program, and their groups give up
# earlier. With this variable one process does so too, so both make the same programs and can share
# a compilation cache.
AS_SEVERAL = lockstep.ACTIVE or os.environ.get("JAX_EP_TEST_SAME_PROGRAMS") == "1"


def need_devices(count: int) -> None:
    """Skip the test where the platform has fewer devices."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, this machine has {jax.device_count()}")


def ranks_at_most(count: int) -> int:
    """``count``, or the number of devices if that is less, but at least two (or the test skips)."""
    return max(2, min(count, jax.device_count()))


def fit(
    sizes: Sequence[int], names: Sequence[str], axes: str | Sequence[str] = "expert"
) -> tuple[int, ...]:
    """``sizes`` of a mesh, made smaller until there are enough devices.

    All axes keep two devices as long as possible. Of the group's ``axes``, the last one keeps them
    longest.
    """
    group = (axes,) if isinstance(axes, str) else tuple(axes)
    order = sorted(range(len(sizes)), key=lambda i: (names[i] in group, i))
    fitted = list(sizes)
    while np.prod(fitted) > ranks_at_most(int(np.prod(sizes))):
        largest = max(range(len(sizes)), key=lambda i: fitted[i])
        if fitted[largest] <= 2:
            largest = next(i for i in order if fitted[i] > 1)
        fitted[largest] -= 1
    return tuple(fitted)


# Arguments of ``jax.jit`` for programs in which a test does arithmetic whose bits are compared.
# ``conftest`` turns LLVM's optimizations off, and without them such bits depend on what XLA fuses.
OPTIMIZED: dict[str, Any] = (
    {"compiler_options": {"xla_backend_optimization_level": 3}}
    if os.environ.get("JAX_PLATFORMS") == "cpu"
    else {}
)


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


def create_group(
    mesh: Mesh, axes: str | tuple[str, ...] = "expert", *, backend: str, **kwargs: Any
) -> jax_ep.Group:
    """``jax_ep.create_group``; in a process that has no device of ``mesh``, a group that is not run.

    A group that spans logical hosts (``logical_hosts.py``) is told so, unless the test does it.
    """
    if AS_SEVERAL:  # ops must give up before the processes stop waiting for each other
        kwargs.setdefault("timeout", lockstep.TIMEOUT_S / 2)
    if "ranks_per_host" not in kwargs:  # before processes differ, so that all skip or none
        kwargs |= logical_hosts.arguments(mesh, axes, backend)
    if not here(mesh):
        backend = "reference"
        kwargs.pop("transport", None)
    return jax_ep.create_group(mesh, axes, backend=backend, **kwargs)


def make_group(ranks: int, backend: str, **kwargs: Any) -> jax_ep.Group:
    """The group of a mesh with only the axis "expert"."""
    return create_group(make_mesh(ranks), backend=backend, **kwargs)


def here(mesh: Mesh) -> bool:
    """Whether this process has a device of ``mesh``."""
    return jax.process_index() in _processes(mesh)


def need_part(mesh: Mesh) -> None:
    """Skip the test in a process that has no part in it."""
    if not here(mesh):
        pytest.skip(f"process {jax.process_index()} has no device of the mesh of this test")


def _processes(mesh: Mesh) -> list[int]:
    return sorted({device.process_index for device in mesh.devices.flat})


def put(tree: Any, mesh: Mesh, spec: P | None = None) -> Any:
    """Whole arrays, placed on ``mesh``: split on axis 0 unless ``spec`` says otherwise."""
    sharding = NamedSharding(mesh, P(mesh.axis_names) if spec is None else spec)

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        if not lockstep.ACTIVE:
            return jax.device_put(x, sharding)
        # device_put would compare the processes' data, by a collective of XLA.
        # A process without a device of the mesh could not know the dtype.
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i], dtype=x.dtype)

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The shards that one process has of an array: ``(where, values)`` for each."""

    shape: tuple[int, ...]
    dtype: np.dtype
    shards: list[tuple[tuple[slice, ...], np.ndarray]]


def fetch(tree: Any, mesh: Mesh) -> Any:
    """The arrays of ``tree``, which lie on ``mesh``, as whole NumPy arrays in every process.

    A process without a device of the mesh may pass anything, and gets what the others have.
    """
    if not lockstep.ACTIVE:
        return jax.device_get(tree)

    def part(x: jax.Array) -> Any:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        shards = [(s.index, np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0]
        return _Parts(x.shape, x.dtype, shards)

    def whole(*parts: Any) -> np.ndarray:
        if not isinstance(parts[0], _Parts):
            return parts[0]
        out = np.empty(parts[0].shape, parts[0].dtype)
        for index, values in (shard for part in parts for shard in part.shards):
            out[index] = values
        return out

    mine = jax.tree.map(part, tree) if here(mesh) else None
    parts = lockstep.exchange.swap(mine, _processes(mesh))
    return jax.tree.map(whole, *parts, is_leaf=lambda leaf: isinstance(leaf, _Parts))


def flat(x: Any) -> np.ndarray:
    """``[R, n, ...]`` as ``[R * n, ...]``."""
    x = np.asarray(x)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def stacked(x: Any, ranks: int) -> np.ndarray:
    """``[R * n, ...]`` as ``[R, n, ...]``."""
    x = np.asarray(x)
    return x.reshape(ranks, x.shape[0] // ranks, *x.shape[1:])


def fields(value: Any) -> dict[str, jax.Array]:
    """The arrays of a ``Handle`` or a ``Quantized`` by name, Nones left out."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    names = [f.name for f in dataclasses.fields(value)]
    names += [name for name, part in vars(type(value)).items() if isinstance(part, property)]
    pairs = {name: getattr(value, name) for name in names}
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


def mesh_jit(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any = None,
    out_specs: Any = None,
    check_vma: bool = True,
    **jit_kwargs: Any,
) -> Callable[..., Any]:
    """A jitted function of whole arrays: ``fn`` runs on every device of ``mesh``.

    The attribute ``jitted`` is the function of arrays on the mesh.
    """
    specs = {"in_specs": in_specs, "out_specs": out_specs, "check_vma": check_vma}
    jitted = jax.jit(shard(fn, mesh, **specs), **jit_kwargs)

    def call(*args: Any) -> Any:
        if AS_SEVERAL and here(mesh):
            each = in_specs if isinstance(in_specs, tuple) else (in_specs,) * len(args)
            args = tuple(put(arg, mesh, spec) for arg, spec in zip(args, each, strict=True))
        return fetch(jitted(*args) if here(mesh) else None, mesh)

    call.jitted = jitted  # type: ignore[attr-defined]
    return call


def stacked_jit(fn: Callable[..., Any], mesh: Mesh, **kwargs: Any) -> Callable[..., Any]:
    """A jitted function of stacked arrays: each rank calls ``fn`` with its slices."""
    run = mesh_jit(fn, mesh, **kwargs)

    def call(*args: Any) -> Any:
        return jax.tree.map(lambda x: stacked(x, mesh.size), run(*jax.tree.map(flat, args)))

    call.jitted = run.jitted  # type: ignore[attr-defined]
    return call


def whole_jit(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A jitted function of whole arrays; ``fn`` decides what runs on which devices of ``mesh``."""
    jitted = jax.jit(fn)

    def call(*args: Any) -> Any:
        if AS_SEVERAL and here(mesh):
            args = put(args, mesh, P())
        return fetch(jitted(*args) if here(mesh) else None, mesh)

    return call


def one_device_jit(
    fn: Callable[..., Any], axis: str = "expert", **jit_kwargs: Any
) -> Callable[..., Any]:
    """As ``stacked_jit``, but with all ranks on one device, so that XLA needs no collectives.

    ``fn`` may use JAX's collectives and so ``jax_ep.reference``, but no native backend.
    """
    jitted = jax.jit(jax.vmap(fn, axis_name=axis), **jit_kwargs)
    return lambda *args: jax.device_get(jitted(*args))


def count_calls(compiled_text: str, targets: Sequence[str]) -> dict[str, int]:
    """How often each custom call target stands in the text of a compiled module.

    That of a group that spans hosts counts as the one for one host, and that of a dispatch with its
    plan as both.
    """
    text = compiled_text.replace("jax_ep_network_", "jax_ep_")
    both = text.count('custom_call_target="jax_ep_plan_dispatch"')
    counts = {t: text.count(f'custom_call_target="{t}"') for t in targets}
    return {
        t: n + (both if t in ("jax_ep_plan", "jax_ep_dispatch") else 0) for t, n in counts.items()
    }


def native_calls(jaxpr: Any) -> list[dict[str, Any]]:
    """The parameters of all our native calls in a program, as JAX traces it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jax_ep_call":
            found.append(equation.params)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += native_calls(inner)
    return found


def run_python(*arguments: str, timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that finds the same jax_ep; the test fails if it hangs."""
    path = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
