"""``jax_ep.nnx.MoE``: a mixture-of-experts layer for Flax NNX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from jax_ep._core import arguments
from jax_ep._groups.group import Group
from jax_ep._moe import checks
from jax_ep._moe.layer import MoEAux, RouterLike, moe
from jax_ep._moe.params import (
    DEFAULT_NAMES,
    Initializer,
    MoEParams,
    PartitionNames,
    SharedExpert,
    default_init,
    moe_param_shapes,
    moe_partition_specs,
)
from jax_ep.routing import update_bias


class RouterBias(nnx.Variable):
    """A router's selection bias ``[E]``: state that no gradient and no optimizer touches."""


class MoE(nnx.Module):
    """``jax_ep.moe`` with its weights.

    Example::

        mesh = jax.make_mesh((2, 4), ("data", "expert"))
        group = jax_ep.create_group(mesh, "expert")
        layer = jax_ep.nnx.MoE(512, 1024, num_experts=16, top_k=2, group=group, rngs=nnx.Rngs(0))
        y, aux = layer(x)

    The weights are ``nnx.Param``s, made on the mesh of the group with the experts split over its axes.
    With ``router_bias=True`` the layer has a ``RouterBias`` besides; move it once a step, outside the
    gradient::

        (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(layer, x)
        optimizer.update(layer, grads)
        layer.update_router_bias(aux.load)

    Modules can be split, merged, cloned and copied; the group is static. A checkpoint of
    ``nnx.state(layer)`` has weights and bias; one of ``nnx.state(layer, nnx.Param)`` would forget the
    bias.

    Attributes:
        router_kernel: ``[H, E]``.
        gate: ``[E, H, F]``.
        up: ``[E, H, F]``.
        down: ``[E, F, H]``.
        router_bias: ``RouterBias`` ``[E]``, or None.
        shared_gate: ``[H, S]``, or None, as the next two.
        shared_up: ``[H, S]``.
        shared_down: ``[S, H]``.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        num_experts: int,
        top_k: int,
        group: Group,
        router: RouterLike = "softmax",
        router_bias: bool = False,
        shared_intermediate: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_init,
        router_init: Initializer = default_init,
        partition_names: PartitionNames = DEFAULT_NAMES,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Make the weights.

        Args:
            hidden: H, channels of the tokens.
            intermediate: F of each expert.
            num_experts: E over the whole group; a multiple of its size.
            top_k: Experts of each token.
            group: The group, from ``create_group``.
            router: As in ``jax_ep.moe``.
            router_bias: Whether the router has a selection bias.
            shared_intermediate: S of the shared expert, or None for none.
            dtype: Of the computation; None takes that of the input.
            param_dtype: Of the weights.
            kernel_init: ``(key, shape, dtype)`` to the weights of the experts.
            router_init: Likewise, of the router.
            partition_names: Mesh axes, or logical names under ``nnx.logical_axis_rules``, of the
                weights' dimensions; they become the ``out_sharding`` of each ``nnx.Param``.
            rngs: Source of the "params" keys.
            **options: Keyword arguments of ``jax_ep.moe``: ``token_axes``, ``grouped_dot``,
                ``overlap``, ``capacity_factor`` and so on.

        Raises:
            TypeError: for a group, ``num_experts`` or ``top_k`` of the wrong type.
            ValueError: for sizes that do not fit each other; the text says what would.
        """
        checks.check_layer("nnx.MoE", group=group, num_experts=num_experts, top_k=top_k)
        self.num_experts = num_experts
        self.top_k = top_k
        self.group = group
        self.router = router
        self.dtype = dtype
        self.options = tuple(sorted(options.items()))
        shapes = moe_param_shapes(
            hidden=hidden,
            intermediate=intermediate,
            num_experts=num_experts,
            shared_intermediate=shared_intermediate,
            dtype=param_dtype,
        )
        specs = moe_partition_specs(shapes, group=group, names=partition_names)

        def param(init: Initializer, shape: Any, names: Any) -> nnx.Param:
            value = init(rngs.params(), shape.shape, shape.dtype)
            return nnx.Param(value, out_sharding=tuple(names), mesh=group.mesh)

        self.router_kernel = param(router_init, shapes.router_kernel, specs.router_kernel)
        self.gate = param(kernel_init, shapes.gate, specs.gate)
        self.up = param(kernel_init, shapes.up, specs.up)
        self.down = param(kernel_init, shapes.down, specs.down)
        self.router_bias: Any = nnx.data(None)
        if router_bias:
            zeros = jnp.zeros((num_experts,), jnp.float32)
            self.router_bias = RouterBias(zeros, out_sharding=(None,), mesh=group.mesh)
        self.shared_gate: Any
        self.shared_up: Any
        self.shared_down: Any
        if shapes.shared is None or specs.shared is None:
            self.shared_gate = self.shared_up = self.shared_down = nnx.data(None)
        else:
            self.shared_gate = param(kernel_init, shapes.shared.gate, specs.shared.gate)
            self.shared_up = param(kernel_init, shapes.shared.up, specs.shared.up)
            self.shared_down = param(kernel_init, shapes.shared.down, specs.shared.down)

    def __call__(
        self, x: Float[Array, "*batch hidden"], *, mask: Bool[Array, "*batch"] | None = None
    ) -> tuple[Float[Array, "*batch hidden"], MoEAux]:
        """Run the layer; see ``jax_ep.moe``.

        Args:
            x: ``[..., H]``.
            mask: Boolean, the shape of ``x`` without H: False keeps a token from the router.

        Returns:
            ``[..., H]`` in the layer's dtype, and the statistics.
        """
        return moe(
            x if self.dtype is None else x.astype(self.dtype),
            self.params(),
            group=self.group,
            num_experts=self.num_experts,
            top_k=self.top_k,
            router=self.router,
            mask=mask,
            **dict(self.options),
        )

    def params(self) -> MoEParams:
        """The weights as ``jax_ep.moe`` takes them."""
        shared = None
        if self.shared_gate is not None:
            shared = SharedExpert(self.shared_gate[...], self.shared_up[...], self.shared_down[...])
        return MoEParams(
            router_kernel=self.router_kernel[...],
            gate=self.gate[...],
            up=self.up[...],
            down=self.down[...],
            router_bias=None if self.router_bias is None else self.router_bias[...],
            shared=shared,
        )

    def update_router_bias(self, load: Shaped[Array, " experts"], rate: float = 1e-3) -> None:
        """Move the router's bias towards even load (``routing.update_bias``).

        Args:
            load: ``MoEAux.load`` of the step, or a sum of several.
            rate: Size of the step.

        Raises:
            ValueError: if the layer was made without ``router_bias=True``.
        """
        if self.router_bias is None:
            raise arguments.value_error(
                "nnx.MoE.update_router_bias",
                "self",
                "a layer with a router bias",
                "one without",
                "make it with router_bias=True",
            )
        self.router_bias[...] = update_bias(self.router_bias[...], load, rate)
