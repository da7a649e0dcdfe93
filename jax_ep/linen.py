"""``jax_ep.linen.MoE``: a mixture-of-experts layer for Flax Linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from jax_ep._core import arguments
from jax_ep._moe.params import Initializer, MoEParams, SharedExpert
from jax_ep._moe.report import MoEAux
from jax_ep._moe.settings import LayerSettings, says_settings
from jax_ep.routing import Router, Routing, update_bias


@says_settings
class MoE(LayerSettings, nn.Module):
    """``jax_ep.moe`` with its weights.

    Example::

        mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        group = jax_ep.create_group(mesh, "expert")
        layer = jax_ep.linen.MoE(512, 1024, num_experts=16, top_k=2, group=group)
        variables = layer.init(key, x)
        y, aux = layer.apply(variables, x)

    On a mesh with Auto axes, as above, the rest of a model needs no change. On Explicit axes Linen's
    ``Embed`` raises ``ShardingTypeError``, as it cannot name the sharding of its result. Weights that
    lie on one device, as some restored ones do, must be put on the mesh before they meet others there:
    ``jax.device_put(weights, NamedSharding(mesh, jax.P()))``.

    Parameters: ``router_kernel``, ``gate``, ``up``, ``down`` and, with a shared expert,
    ``shared_gate``, ``shared_up``, ``shared_down``; with ``expert_bias=True`` also ``gate_bias``,
    ``up_bias``, ``down_bias``; with ``gated=False`` none of a gate. With ``router_bias=True`` the
    collection "router_bias" holds ``bias`` ``[E]``, state that no gradient and no optimizer touches;
    move it once a step::

        _, updated = layer.apply(
            variables, aux.load, method="update_router_bias", mutable=["router_bias"]
        )
        variables = {**variables, **updated}

    For an ``ExpertFunction`` write a module of your own, because only you know its weights: it makes
    them and a router kernel with ``self.param`` and calls ``jax_ep.moe(experts=)``.

    Attributes:
        {settings}
        with_partitioning: How an initializer is given its names: ``nn.with_partitioning`` for mesh
            axes, ``nn.with_logical_partitioning`` for logical names.
    """

    with_partitioning: Callable[..., Any] = dataclasses.field(
        default=nn.with_partitioning, kw_only=True
    )

    def setup(self) -> None:
        """Make the weights."""
        shapes, specs = self._weights("linen.MoE")

        def param(name: str, init: Initializer, shape: Any, names: Any) -> Any:
            if shape is None:
                return None
            named = self.with_partitioning(init, tuple(names))
            boxed = self.param(name, named, shape.shape, shape.dtype, unbox=False)
            if isinstance(boxed, nn.Partitioned):
                # Without a sharding constraint, which Explicit axes would refuse: moe places them.
                return boxed.unbox(apply_constraint=False)
            return nn.unbox(boxed)

        def zeros(name: str) -> Any:
            shape, names = getattr(shapes, name), getattr(specs, name)
            return param(name, lambda _, *like: jnp.zeros(*like), shape, names)

        init = self.kernel_init
        shared = None
        if shapes.shared is not None and specs.shared is not None:
            shared = SharedExpert(
                param("shared_gate", init, shapes.shared.gate, specs.shared.gate),
                param("shared_up", init, shapes.shared.up, specs.shared.up),
                param("shared_down", init, shapes.shared.down, specs.shared.down),
            )
        self.params = MoEParams(
            router_kernel=param(
                "router_kernel", self.router_init, shapes.router_kernel, specs.router_kernel
            ),
            gate=param("gate", init, shapes.gate, specs.gate),
            up=param("up", init, shapes.up, specs.up),
            down=param("down", init, shapes.down, specs.down),
            shared=shared,
            gate_bias=zeros("gate_bias"),
            up_bias=zeros("up_bias"),
            down_bias=zeros("down_bias"),
        )
        if self.router_bias:
            self.bias = self.variable(
                "router_bias", "bias", jnp.zeros, (self.num_experts,), jnp.float32
            )

    def __call__(
        self,
        x: Float[Array, "*batch hidden"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        router_inputs: Any = None,
        router_key: PRNGKeyArray | None = None,
        routing: Routing | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], MoEAux]:
        """Run the layer; see ``jax_ep.moe``.

        Args:
            x: ``[..., H]``.
            mask: Boolean, the shape of ``x`` without H: False keeps a token from the experts.
            router_inputs: Arrays of the tokens for a router function, as in ``jax_ep.moe``.
            router_key: Key for the noise of a router with ``noise_std``. None takes one of the stream
                "router", as in ``layer.apply(variables, x, rngs={"router": key})``, and without that
                stream adds no noise.
            routing: Routes to take in place of the router's, as in ``jax_ep.moe``.

        Returns:
            ``[..., H]`` in the layer's dtype, and the statistics.
        """
        bias = self.bias.value if self.router_bias else None
        noisy = isinstance(self.router, Router) and self.router.noise_std > 0
        if router_key is None and routing is None and noisy and self.has_rng("router"):
            router_key = self.make_rng("router")
        return self._run(
            x,
            self.params._replace(router_bias=bias),
            mask=mask,
            router_inputs=router_inputs,
            router_key=router_key,
            routing=routing,
        )

    def update_router_bias(self, load: Shaped[Array, " experts"], rate: float = 1e-3) -> None:
        """Move the router's bias towards even load (``routing.update_bias``).

        Args:
            load: ``MoEAux.load`` of the step, or a sum of several.
            rate: Size of the step.

        Raises:
            ValueError: if the layer was made without ``router_bias=True``.
        """
        if not self.router_bias:
            raise arguments.value_error(
                "linen.MoE.update_router_bias",
                "self",
                "a layer with a router bias",
                "one without",
                "make it with router_bias=True",
            )
        self.bias.value = update_bias(
            self.bias.value, load, rate, num_used_experts=self.num_used_experts
        )
