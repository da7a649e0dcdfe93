"""The settings of a layer that holds its weights, stated once for all of Flax's modules."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_ep._core.types import DispatchConfig, DropPolicy, ScaleFormat
from jax_ep._groups.group import Group
from jax_ep._moe import checks
from jax_ep._moe.activations import Activation
from jax_ep._moe.experts import GroupedDot
from jax_ep._moe.layer import Overlap, moe
from jax_ep._moe.param_checks import check_widths
from jax_ep._moe.params import (
    DEFAULT_NAMES,
    Initializer,
    MoEParams,
    PartitionNames,
    default_init,
    moe_param_shapes,
    moe_partition_specs,
)
from jax_ep._moe.report import MoEAux
from jax_ep._moe.router import RouterLike
from jax_ep._moe.tensor_checks import check_axis

_SETTINGS = "{settings}"
Class = TypeVar("Class", bound=type)


@dataclasses.dataclass
class LayerSettings:
    """The settings of a layer, as fields that its class inherits.

    Attributes:
        hidden: H, channels of the tokens.
        intermediate: F of each expert.
        num_experts: E over the whole group; a multiple of its size.
        top_k: Experts of each token.
        group: The group, from ``create_group``.
        router: As in ``jax_ep.moe``, as are all settings from ``token_axes`` on.
        num_used_experts: Only this many experts exist, those with the lowest ids. None: all.
        router_bias: Whether the router has a selection bias.
        shared_intermediate: S of the shared expert, or None for none.
        gated: Whether the experts have a gate, the shared one too.
        expert_bias: Whether the experts have biases, which start at zero; the shared one has none.
        dtype: Dtype of the computation; None takes that of the input.
        param_dtype: Dtype of the weights.
        kernel_init: Function ``(key, shape, dtype)`` that gives the weights of the experts.
        router_init: Likewise for the router.
        partition_names: Mesh axes, or logical names, of the weights' dimensions.
        token_axes: Mesh axes that tokens are split over; None for all but tensor and pipeline axes.
        tensor_axis: Mesh axis that F and S are split over, in the layer and in its weights.
        sequence_loss: Whether the statistics have the loss within each sequence.
        return_routing: Whether the statistics have routes and logits of the tokens.
        grouped_dot: Replaces ``jax_ep.grouped_dot``, which alone leaves SMs to ops in flight.
        overlap: What may run while rows are in flight: "shared_expert", or "chunks" of other tokens.
        num_chunks: For "chunks": into how many chunks the tokens of a rank are split.
        activation: Activation function of the gate, or a ``GatedActivation`` of gate and up.
        alignment: Rows of each expert are padded to a multiple of it.
        capacity: Rows of each rank.
        capacity_factor: Bounds the rows of each expert.
        rank_capacity_factor: Bounds the rows of each rank.
        drop_policy: Which rows are dropped for ``capacity_factor``: by "position" or by "score".
        quantization: "fp8" sends rows in 8 bits.
        scale_format: Format of their scales.
        config: How to use the machine.
    """

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    group: Group
    _: dataclasses.KW_ONLY
    router: RouterLike = "softmax"
    num_used_experts: int | None = None
    router_bias: Any = False
    shared_intermediate: int | None = None
    gated: bool = True
    expert_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_init
    router_init: Initializer = default_init
    partition_names: PartitionNames = DEFAULT_NAMES
    token_axes: tuple[str, ...] | None = None
    tensor_axis: str | None = None
    sequence_loss: bool = False
    return_routing: bool = False
    grouped_dot: GroupedDot | None = None
    overlap: Overlap | None = None
    num_chunks: int = 2
    activation: Activation = jax.nn.silu
    alignment: int = 1
    capacity: int | None = None
    capacity_factor: float | None = None
    rank_capacity_factor: float | None = None
    drop_policy: DropPolicy = "position"
    quantization: Literal["fp8"] | None = None
    scale_format: ScaleFormat = "f32"
    config: DispatchConfig | None = None

    def _weights(self, op: str) -> tuple[MoEParams, MoEParams]:
        """Check the settings, and give the shapes and partitioning of the weights."""
        checks.check_layer(
            op,
            group=self.group,
            num_experts=self.num_experts,
            num_used_experts=self.num_used_experts,
            top_k=self.top_k,
        )
        check_axis(op, self.tensor_axis, self.group)
        shapes = moe_param_shapes(
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.num_experts,
            shared_intermediate=self.shared_intermediate,
            gated=self.gated,
            expert_bias=self.expert_bias,
            dtype=self.param_dtype,
        )
        check_widths(op, shapes, self.tensor_axis, self.group)
        how: dict[str, Any] = {"names": self.partition_names, "tensor_axis": self.tensor_axis}
        return shapes, moe_partition_specs(shapes, group=self.group, **how)

    def _run(
        self,
        x: Float[Array, "*batch hidden"],
        params: MoEParams,
        **of_call: Any,
    ) -> tuple[Float[Array, "*batch hidden"], MoEAux]:
        """``jax_ep.moe`` with these settings and the arguments of a call."""
        x = x if self.dtype is None else x.astype(self.dtype)
        settings = {name: getattr(self, name) for name in _OF_MOE}
        return moe(x, params, **of_call, **settings)


_OF_MOE = [
    name
    for name in inspect.signature(moe).parameters
    if name in {field.name for field in dataclasses.fields(LayerSettings)}
]


def says_settings(layer: Class) -> Class:
    """Put the settings' descriptions where a layer's docstring has ``{settings}``."""
    doc = inspect.cleandoc(LayerSettings.__doc__ or "")
    lines = doc.partition("Attributes:\n")[2].splitlines()
    text = inspect.cleandoc(layer.__doc__ or "")
    assert _SETTINGS in text
    layer.__doc__ = text.replace(_SETTINGS, "\n".join(lines).strip())
    return layer
