"""Splitting global arrays of tokens over a mesh, whatever the types of its axes.

On Auto axes the compiler places arrays, and ``shard_map`` moves them to where it needs them. On
Explicit axes the placement is part of an array's type: each step must name it, and ``shard_map``
takes only arrays that already have the placement that it asks for.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def why_not_usable(x: Any, mesh: Mesh | AbstractMesh) -> str | None:
    """Why ``jax.jit`` cannot use ``x`` in a program over ``mesh``, or None.

    Only arrays that were put on devices are checked, because JAX does not say where tracers lie.

    XLA's partitioner (Shardy, jaxlib 0.11.2 and 0.12.0.1) ends the process where a program sums over
    several axes of one mesh and its inputs lie on another mesh whose axes cut the devices elsewhere.
    """
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or not x.committed:
        return None
    sharding = x.sharding
    if isinstance(mesh, AbstractMesh):
        if isinstance(sharding, NamedSharding) and sharding.mesh.abstract_mesh == mesh:
            return None
        return (
            f"one on {len(sharding.device_set)} device(s), while the mesh of the group is abstract"
        )
    if not isinstance(sharding, NamedSharding):
        if sharding.device_set == set(mesh.devices.flat):
            return None
        return f"one on {len(sharding.device_set)} device(s), {_ids(sharding.device_set)}"
    other = sharding.mesh
    if other == mesh:
        return None
    assert isinstance(other, Mesh)  # not an abstract one, because the array lies on it
    if list(other.devices.flat) != list(mesh.devices.flat):
        return f"one on a mesh {dict(other.shape)} of devices {_ids(other.devices.flat)}"
    cuts, other_cuts = _cuts(mesh), _cuts(other)
    if cuts <= other_cuts or other_cuts <= cuts:
        return None
    return f"one on a mesh {dict(other.shape)} of the same devices"


def _cuts(mesh: Mesh) -> set[int]:
    """The numbers of parts into which the first axis, the first two, … divide the devices."""
    return set(itertools.accumulate(mesh.devices.shape, operator.mul, initial=1))


def _ids(devices: Iterable[jax.Device]) -> str:
    ids = [str(device.id) for device in devices]
    return ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")


def place(x: Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Array:
    """``x`` laid out as ``spec`` says, as far as the axes of ``mesh`` are Explicit."""
    explicit = _explicit_axes(mesh)
    if not explicit:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, _only(spec, explicit)))


def split_tokens(
    x: Shaped[Array, "..."],
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    num_batch: int | None = None,
) -> Shaped[Array, "tokens ..."]:
    """Flatten to tokens, add zeros until they split evenly over ``axes``, and split them so.

    The first ``num_batch`` dimensions are those of the tokens; None stands for all but the last.
    """
    num_batch = x.ndim - 1 if num_batch is None else num_batch
    num_tokens = math.prod(x.shape[:num_batch])
    missing = -num_tokens % math.prod(mesh.shape[name] for name in axes)
    spec = _leading_spec(x, mesh, num_batch)
    flat = _reshape(x, (num_tokens, *x.shape[num_batch:]), mesh, spec)
    if missing:
        flat = place(flat, mesh, PartitionSpec())
        flat = jnp.pad(flat, ((0, missing), *[(0, 0)] * (flat.ndim - 1)))
    return place(flat, mesh, PartitionSpec(axes))


def join_tokens(
    tokens: Shaped[Array, "tokens entries"],
    like: Shaped[Array, "*batch channels"],
    mesh: Mesh | AbstractMesh,
    *,
    channels: bool = True,
) -> Shaped[Array, "*batch entries"]:
    """The inverse of ``split_tokens``, for tokens that came from ``like``.

    The batch is placed as that of ``like``, and so are the entries if they are its ``channels``.
    """
    batch, entries = like.shape[:-1], tokens.shape[1]
    num_tokens = math.prod(batch)
    if num_tokens != tokens.shape[0]:
        tokens = place(tokens, mesh, PartitionSpec())[:num_tokens]
    y = _reshape(tokens, (*batch, entries), mesh, _leading_spec(like, mesh, like.ndim - 1))
    if not _explicit_axes(mesh):
        return y
    spec = _spec(like)
    return place(y, mesh, spec if channels else PartitionSpec(*spec[: len(batch)]))


def _reshape(
    x: Array, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> Array:
    """Reshape; only the first dimension is split, before and after, as ``spec`` says."""
    if not _explicit_axes(mesh):
        return x.reshape(shape)
    x = place(x, mesh, spec)
    return lax.reshape(x, shape, out_sharding=NamedSharding(mesh, spec))


def _leading_spec(x: Array, mesh: Mesh | AbstractMesh, num_batch: int) -> PartitionSpec:
    """How the first dimension of ``x`` is split over Explicit axes, if it is one of tokens."""
    explicit = _explicit_axes(mesh)
    if not explicit or num_batch == 0:
        return PartitionSpec()
    return PartitionSpec(*_only(_spec(x), explicit)[:1])


def _spec(x: Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == AxisType.Explicit)


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """``spec`` without the mesh axes that are not in ``axes``."""

    def entry(names: Any) -> Any:
        names = (names,) if isinstance(names, str) else names or ()
        kept = tuple(name for name in names if name in axes)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*(entry(names) for names in spec))
