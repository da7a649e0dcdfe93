"""The mesh, and how every array lies on it.

The mesh has four axes. A batch is split over "data", "fsdp" and "expert". Weights, their gradients and
the optimizer's state are stored in parts: experts over "expert" by their number and over "fsdp" by
their channels, all other matrices over both by their channels, and "data" holds copies. A layer
gathers its weights just before it uses them, in the dtype of the computation, and its gradients are
scattered as they come, in the same dtype (ZeRO stage 3). Only experts stay split over "expert", since
their tokens travel. "tensor" splits heads, vocabulary and inner channels, also while layers compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from examples.pretrain.config import Config, ConfigError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
WEIGHT_AXES = ("fsdp", "expert")
# Parameters of many equal layers have a leading dimension of layers.
STACKS = ("dense", "moe")

# Matrices by the name of their module: those whose outputs, or whose inputs, "tensor" splits.
_SPLIT_OUTPUTS = {"q", "q_b", "kv_b", "gate", "up", "shared_gate", "shared_up", "head"}
_SPLIT_INPUTS = {"out", "down", "shared_down"}


class Layout(NamedTuple):
    """How a parameter lies on the mesh, without a dimension of layers.

    Attributes:
        stored: Between steps, as are its gradient and the optimizer's state.
        used: While a layer computes with it.
        exact: It is used in float32, whatever the dtype of the computation.
    """

    stored: P
    used: P
    exact: bool


def layout(path: Sequence[str], ndim: int) -> Layout:
    """The layout of the parameter at ``path``, names from the outside in, of ``ndim`` dimensions."""
    name = path[-2] if path[-1] == "kernel" else path[-1]
    if ndim == 1:
        return Layout(P(None), P(None), exact=True)
    if ndim == 3:  # experts
        if name == "down":
            return Layout(P("expert", "tensor", "fsdp"), P("expert", "tensor", None), exact=False)
        return Layout(P("expert", "fsdp", "tensor"), P("expert", None, "tensor"), exact=False)
    if name in _SPLIT_OUTPUTS:
        return Layout(P(WEIGHT_AXES, "tensor"), P(None, "tensor"), exact=False)
    if name in _SPLIT_INPUTS:
        return Layout(P("tensor", WEIGHT_AXES), P("tensor", None), exact=False)
    if name == "embedding":
        return Layout(P(None, WEIGHT_AXES), P(None, None), exact=False)
    return Layout(P(WEIGHT_AXES, None), P(None, None), exact=name == "router_kernel")


def shardings(params: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter between steps, for the whole tree of the model."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        if names[0] in STACKS:
            return NamedSharding(mesh, P(None, *layout(names, leaf.ndim - 1).stored))
        return NamedSharding(mesh, layout(names, leaf.ndim).stored)

    return jax.tree_util.tree_map_with_path(one, params)


def gather(params: Any, mesh: Mesh, dtype: DTypeLike) -> Any:
    """Parameters of one layer, ready for use: gathered, matrices in ``dtype``.

    Their gradients come back in parts, and in the dtype of ``params``.
    """

    def one(path: Any, leaf: Array) -> Array:
        how = layout(_names(path), leaf.ndim)
        to = leaf.dtype if how.exact else jnp.dtype(dtype)
        return _gather(leaf, to, NamedSharding(mesh, how.stored), NamedSharding(mesh, how.used))

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
    x: Float[Array, "..."], dtype: Any, stored: NamedSharding, used: NamedSharding
) -> Float[Array, "..."]:
    # Without the first constraint XLA might gather the float32 values, and cast them after that.
    x = jax.lax.with_sharding_constraint(x.astype(dtype), stored)
    return jax.lax.with_sharding_constraint(x, used)


def _gather_forward(
    x: Float[Array, "..."], dtype: Any, stored: NamedSharding, used: NamedSharding
) -> tuple[Float[Array, "..."], Float[Array, "0"]]:
    return _gather(x, dtype, stored, used), jnp.zeros((0,), x.dtype)


def _gather_backward(
    dtype: Any,
    stored: NamedSharding,
    used: NamedSharding,
    like: Float[Array, "0"],
    cotangent: Float[Array, "..."],
) -> tuple[Float[Array, "..."]]:
    # The transpose of the second constraint would have every device keep the whole gradient.
    return (jax.lax.with_sharding_constraint(cotangent, stored).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_here(x: Float32[Array, "..."], *, axis: int, dtype: DTypeLike) -> Float32[Array, "..."]:
    """Inside ``shard_map``: a matrix whose part ``x`` is, split along ``axis``, rounded to ``dtype``.

    The result is float32 again, so that its gradient is added in float32 here. After that it is rounded
    to ``dtype`` and scattered, as those of ``gather`` are.
    """
    x = jax.lax.all_gather(x.astype(dtype), WEIGHT_AXES, axis=axis, tiled=True)
    return jax.lax.pcast(x, "data", to="varying").astype(jnp.float32)


def split_batch(x: Array, mesh: Mesh) -> Array:
    """``x`` with its first dimension split as a batch, and no other one."""
    spec = P(BATCH_AXES, *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that ``config.parallel`` describes, over ``devices`` in their order; None for all.

    Ranks along "expert" are neighbours, so that groups fill hosts before they span several.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or the model's sizes or the
            batch cannot be divided over them.
    """
    devices = jax.devices() if devices is None else devices
    parallel = config.parallel
    sizes = {name: getattr(parallel, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = " × ".join(f"{name}={size}" for name, size in sizes.items())
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise ConfigError(
            f"parallel: expected sizes that multiply to the {len(devices)} devices, got {text}; set "
            "one of them to −1 for the rest of the devices."
        )
    sizes = {n: len(devices) // fixed if size == -1 else size for n, size in sizes.items()}
    _check_sizes(config, sizes)
    grid = np.array(devices).reshape([sizes[name] for name in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_sizes(config: Config, sizes: dict[str, int]) -> None:
    model, data = config.model, config.data
    tensor, expert, fsdp = sizes["tensor"], sizes["expert"], sizes["fsdp"]
    ranks, parts = math.prod(sizes[axis] for axis in BATCH_AXES), fsdp * expert
    of_step = ranks * data.accumulate
    why = "data × fsdp × expert ranks times data.accumulate"
    wanted = [("data.batch_size", data.batch_size, of_step, why)]
    wanted += [("model.num_experts", model.num_experts, expert, "parallel.expert")]
    for name in ("hidden", "q_lora_rank", "kv_lora_rank"):
        wanted.append((f"model.{name}", getattr(model, name), parts, "parallel.fsdp × expert"))
    for name in ("num_heads", "vocab_size", "moe_intermediate", "dense_intermediate"):
        wanted.append((f"model.{name}", getattr(model, name), tensor, "parallel.tensor"))
    for name, value, unit, why in wanted:
        if value % unit:
            raise ConfigError(f"{name}: expected a multiple of {unit}, {why}; got {value}.")


def _names(path: Any) -> list[str]:
    return [str(entry.key) for entry in path]
