"""The weights of a mixture-of-experts layer: their shapes, initial values and partitioning.

Symbols: H hidden, E experts, F intermediate size of an expert, S that of the shared expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from jax_ep._groups.group import Group

AxisName = str | tuple[str, ...] | None
Initializer = Callable[..., Array]


class SharedExpert(NamedTuple):
    """The weights of an expert that every token goes to.

    Attributes:
        gate: ``[H, S]``.
        up: ``[H, S]``.
        down: ``[S, H]``.
    """

    gate: Float[Array, "hidden shared"]
    up: Float[Array, "hidden shared"]
    down: Float[Array, "shared hidden"]


class MoEParams(NamedTuple):
    """The weights of a mixture-of-experts layer, over all experts.

    Attributes:
        router_kernel: ``[H, E]``.
        gate: ``[E, H, F]``.
        up: ``[E, H, F]``.
        down: ``[E, F, H]``.
        router_bias: ``[E]`` float32 that changes which experts the router chooses, but not their
            weights; it has no gradient. None for a router without a bias.
        shared: The shared expert, or None.
    """

    router_kernel: Float[Array, "hidden experts"]
    gate: Float[Array, "experts hidden intermediate"]
    up: Float[Array, "experts hidden intermediate"]
    down: Float[Array, "experts intermediate hidden"]
    router_bias: Float32[Array, " experts"] | None = None
    shared: SharedExpert | None = None


@dataclasses.dataclass(frozen=True)
class PartitionNames:
    """Mesh axes (or logical names) that each dimension of the weights is split over.

    Attributes:
        experts: None stands for the axes of the group, where the layer needs the experts. Other
            names save no memory unless logical rules map them to those axes.
        hidden: For example "data", to store the weights split further (as FSDP does). They are
            gathered while the layer runs.
        intermediate: Likewise for F of the experts and S of the shared expert.
    """

    experts: AxisName = None
    hidden: AxisName = None
    intermediate: AxisName = None


DEFAULT_NAMES = PartitionNames()


def moe_param_shapes(
    *,
    hidden: int,
    intermediate: int,
    num_experts: int,
    shared_intermediate: int | None = None,
    router_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> MoEParams:
    """``MoEParams`` with a ``jax.ShapeDtypeStruct`` in place of each weight.

    Args:
        hidden: H.
        intermediate: F.
        num_experts: E over the whole group.
        shared_intermediate: S, or None for no shared expert.
        router_bias: Whether the router has a selection bias.
        dtype: Dtype of all weights except the router bias, which is float32.

    Returns:
        The shapes.
    """

    def weight(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    shared = None
    if shared_intermediate is not None:
        shared_up = weight(hidden, shared_intermediate)
        shared = SharedExpert(shared_up, shared_up, weight(shared_intermediate, hidden))
    up = weight(num_experts, hidden, intermediate)
    bias: Any = jax.ShapeDtypeStruct((num_experts,), jnp.float32)
    return MoEParams(
        router_kernel=weight(hidden, num_experts),
        gate=up,
        up=up,
        down=weight(num_experts, intermediate, hidden),
        router_bias=bias if router_bias else None,
        shared=shared,
    )


def default_init(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "..."]:
    """Truncated normal of variance 1 / fan-in, where the fan-in is that of one expert."""
    batch = tuple(range(len(shape) - 2))
    return jax.nn.initializers.lecun_normal(batch_axis=batch)(key, shape, dtype)


def init_moe_params(
    key: PRNGKeyArray,
    *,
    hidden: int,
    intermediate: int,
    num_experts: int,
    shared_intermediate: int | None = None,
    router_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
    kernel_init: Initializer = default_init,
    router_init: Initializer = default_init,
) -> MoEParams:
    """Initial weights of ``jax_ep.moe``.

    To make them where they belong, jit it with the shardings of ``moe_partition_specs`` as
    ``out_shardings``.

    Args:
        key: A random key.
        hidden: H.
        intermediate: F.
        num_experts: E over the whole group.
        shared_intermediate: S, or None for no shared expert.
        router_bias: Whether the router has a selection bias; it starts at zero.
        dtype: Dtype of all weights except the router bias, which is float32.
        kernel_init: Function ``(key, shape, dtype)`` that gives the weights of the experts.
        router_init: Likewise for the router.

    Returns:
        The weights.
    """
    shapes = moe_param_shapes(
        hidden=hidden,
        intermediate=intermediate,
        num_experts=num_experts,
        shared_intermediate=shared_intermediate,
        dtype=dtype,
    )
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    inits = [router_init] + [kernel_init] * (len(leaves) - 1)
    weights = [
        init(k, leaf.shape, leaf.dtype) for init, k, leaf in zip(inits, keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(structure, weights)
    bias = jnp.zeros((num_experts,), jnp.float32) if router_bias else None
    return params._replace(router_bias=bias)


def moe_partition_specs(
    params: MoEParams, *, group: Group, names: PartitionNames = DEFAULT_NAMES
) -> MoEParams:
    """A ``PartitionSpec`` for each weight: experts over the axes of the group.

    Example::

        specs = jax_ep.moe_partition_specs(params, group=group)
        params = jax.device_put(params, jax.tree.map(partial(NamedSharding, mesh), specs))

    Args:
        params: The weights or their shapes; only which of them are None matters.
        group: The group that the layer runs on.
        names: Axes of the other dimensions, if they are to be split too.

    Returns:
        ``MoEParams`` of specs.
    """
    experts = group_axis(group) if names.experts is None else names.experts
    hidden, intermediate = names.hidden, names.intermediate

    def split(*dimensions: AxisName) -> Any:
        return PartitionSpec(*dimensions)

    shared = None
    if params.shared is not None:
        shared_up = split(hidden, intermediate)
        shared = SharedExpert(shared_up, shared_up, split(intermediate, hidden))
    up = split(experts, hidden, intermediate)
    return MoEParams(
        router_kernel=split(hidden, None),
        gate=up,
        up=up,
        down=split(experts, intermediate, hidden),
        router_bias=None if params.router_bias is None else split(None),
        shared=shared,
    )


def group_axis(group: Group) -> AxisName:
    """The axes of the group as one entry of a ``PartitionSpec``."""
    return group.axis_names[0] if len(group.axis_names) == 1 else group.axis_names
