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

from jax_ep._core import arguments
from jax_ep._groups.group import Group
from jax_ep._moe.tensor_checks import check_axis

AxisName = str | tuple[str, ...] | None
Initializer = Callable[..., Array]


class SharedExpert(NamedTuple):
    """The weights of an expert that every token goes to.

    Attributes:
        gate: ``[H, S]``, or None for an expert without a gate.
        up: ``[H, S]``.
        down: ``[S, H]``.
    """

    gate: Float[Array, "hidden shared"] | None
    up: Float[Array, "hidden shared"]
    down: Float[Array, "shared hidden"]


class MoEParams(NamedTuple):
    """The weights of a mixture-of-experts layer, over all experts.

    The experts are those of jax_ep, in ``gate``, ``up``, ``down`` and their biases, or those of an
    ``ExpertFunction``, in ``experts``.

    Attributes:
        router_kernel: ``[H, E]``.
        gate: ``[E, H, F]``, or None for experts without a gate: ``activation(rows @ up) @ down``.
        up: ``[E, H, F]``.
        down: ``[E, F, H]``.
        router_bias: ``[E]`` float32 that changes which experts the router chooses, but not their
            weights; it has no gradient. None for a router without a bias.
        shared: The shared expert, or None.
        gate_bias: ``[E, F]``, added before the activation, or None.
        up_bias: ``[E, F]``, likewise.
        down_bias: ``[E, H]``, added to an expert's output before it is weighted, or None.
        experts: The weights of an ``ExpertFunction``, a pytree of arrays of any dtype; None for the
            experts of jax_ep.
    """

    router_kernel: Float[Array, "hidden experts"]
    gate: Float[Array, "experts hidden intermediate"] | None = None
    up: Float[Array, "experts hidden intermediate"] | None = None
    down: Float[Array, "experts intermediate hidden"] | None = None
    router_bias: Float32[Array, " experts"] | None = None
    shared: SharedExpert | None = None
    gate_bias: Float[Array, "experts intermediate"] | None = None
    up_bias: Float[Array, "experts intermediate"] | None = None
    down_bias: Float[Array, "experts hidden"] | None = None
    experts: Any = None


@dataclasses.dataclass(frozen=True)
class PartitionNames:
    """Mesh axes (or logical names) that each dimension of the weights is split over.

    Attributes:
        experts: None stands for the axes of the group, where the layer needs the experts. Other
            names save no memory unless logical rules map them to those axes.
        hidden: For example "data", to store the weights split further (as FSDP does). They are
            gathered while the layer runs.
        intermediate: Likewise for F of the experts and S of the shared expert. None stands for the
            tensor axis, where there is one.
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
    gated: bool = True,
    expert_bias: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> MoEParams:
    """``MoEParams`` with a ``jax.ShapeDtypeStruct`` in place of each weight.

    Args:
        hidden: H.
        intermediate: F.
        num_experts: E over the whole group.
        shared_intermediate: S, or None for no shared expert.
        router_bias: Whether the router has a selection bias.
        gated: Whether the experts have a gate, the shared one too.
        expert_bias: Whether the experts have biases; the shared one has none.
        dtype: Dtype of all weights except the router bias, which is float32.

    Returns:
        The shapes.
    """

    def weight(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    shared = None
    if shared_intermediate is not None:
        shared_up = weight(hidden, shared_intermediate)
        shared_gate = shared_up if gated else None
        shared = SharedExpert(shared_gate, shared_up, weight(shared_intermediate, hidden))
    up = weight(num_experts, hidden, intermediate)
    up_bias = weight(num_experts, intermediate) if expert_bias else None
    bias: Any = jax.ShapeDtypeStruct((num_experts,), jnp.float32)
    return MoEParams(
        router_kernel=weight(hidden, num_experts),
        gate=up if gated else None,
        up=up,
        down=weight(num_experts, intermediate, hidden),
        router_bias=bias if router_bias else None,
        shared=shared,
        gate_bias=up_bias if gated else None,
        up_bias=up_bias,
        down_bias=weight(num_experts, hidden) if expert_bias else None,
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
    gated: bool = True,
    expert_bias: bool = False,
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
        gated: Whether the experts have a gate, the shared one too.
        expert_bias: Whether the experts have biases, which start at zero; the shared one has none.
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
        gated=gated,
        dtype=dtype,
    )
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    inits = [router_init] + [kernel_init] * (len(leaves) - 1)
    weights = [
        init(k, leaf.shape, leaf.dtype) for init, k, leaf in zip(inits, keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(structure, weights)
    biases: dict[str, Any] = {}
    if router_bias:
        biases["router_bias"] = jnp.zeros((num_experts,), jnp.float32)
    if expert_bias:
        biases["up_bias"] = jnp.zeros((num_experts, intermediate), dtype)
        biases["gate_bias"] = jnp.zeros_like(biases["up_bias"]) if gated else None
        biases["down_bias"] = jnp.zeros((num_experts, hidden), dtype)
    return params._replace(**biases)


def moe_partition_specs(
    params: MoEParams,
    *,
    group: Group,
    names: PartitionNames = DEFAULT_NAMES,
    tensor_axis: str | None = None,
    expert_specs: Any = None,
) -> MoEParams:
    """A ``PartitionSpec`` for each weight: experts over the axes of the group.

    Example::

        specs = jax_ep.moe_partition_specs(params, group=group)
        params = jax.device_put(params, jax.tree.map(partial(NamedSharding, mesh), specs))

    Args:
        params: The weights or their shapes; only which of them are None matters, and the structure of
            ``experts``.
        group: The group that the layer runs on.
        names: Axes of the other dimensions, if they are to be split too. Where XLA has to gather
            weights, it does so in their dtype. To gather the experts' weights in the dtype of ``x``,
            cast them before the call of ``moe``; then their gradients are also summed over the token
            axes in that dtype.
        tensor_axis: As in ``moe``: splits F of the experts and S of the shared expert, unless
            ``names.intermediate`` does. None splits neither.
        expert_specs: Specs of ``params.experts``, as in ``moe``: a pytree of them, or one for all
            leaves of a part of the tree. None splits the first dimension of each leaf.

    Returns:
        ``MoEParams`` of specs.

    Raises:
        TypeError: if ``tensor_axis`` is no name.
        ValueError: if ``expert_specs`` has another structure than ``params.experts``, or if
            ``tensor_axis`` is not in the mesh or is an axis of the group.
    """
    check_axis("moe_partition_specs", tensor_axis, group)
    experts = group_axis(group) if names.experts is None else names.experts
    hidden = names.hidden
    intermediate = tensor_axis if names.intermediate is None else names.intermediate

    def split(like: Any, *dimensions: AxisName) -> Any:
        return None if like is None else PartitionSpec(*dimensions)

    shared = None
    if params.shared is not None:
        shared = SharedExpert(
            split(params.shared.gate, hidden, intermediate),
            split(params.shared.up, hidden, intermediate),
            split(params.shared.down, intermediate, hidden),
        )
    of_experts = PartitionSpec(experts) if expert_specs is None else expert_specs
    return MoEParams(
        router_kernel=split(params.router_kernel, hidden, None),
        gate=split(params.gate, experts, hidden, intermediate),
        up=split(params.up, experts, hidden, intermediate),
        down=split(params.down, experts, intermediate, hidden),
        router_bias=split(params.router_bias, None),
        shared=shared,
        gate_bias=split(params.gate_bias, experts, intermediate),
        up_bias=split(params.up_bias, experts, intermediate),
        down_bias=split(params.down_bias, experts, hidden),
        experts=_spec_of_each(of_experts, params.experts),
    )


def _spec_of_each(specs: Any, tree: Any) -> Any:
    """``tree`` with a spec in place of each leaf, from ``specs``, which may end above the leaves."""

    def of_part(spec: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: spec, part)

    try:
        return jax.tree.map(of_part, specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec))
    except ValueError as error:
        raise arguments.value_error(
            "moe_partition_specs",
            "expert_specs",
            "a pytree of PartitionSpecs with the structure of params.experts, or a prefix of it",
            str(error).splitlines()[0],
            "give a spec for each leaf, or one jax.P for all",
        ) from None


def group_axis(group: Group) -> AxisName:
    """The axes of the group as one entry of a ``PartitionSpec``."""
    return group.axis_names[0] if len(group.axis_names) == 1 else group.axis_names
