"""``jax_ep.nnx.MoE``: a mixture-of-experts layer for Flax NNX."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from jax_ep._core import arguments
from jax_ep._moe.params import Initializer, MoEParams, SharedExpert
from jax_ep._moe.params import default_init as default_init
from jax_ep._moe.report import MoEAux
from jax_ep._moe.settings import LayerSettings, says_settings
from jax_ep.routing import Routing, update_bias


class RouterBias(nnx.Variable):
    """A router's selection bias ``[E]``: state that no gradient and no optimizer touches."""


@says_settings
@dataclasses.dataclass(eq=False, repr=False)
class MoE(LayerSettings, nnx.Module):
    """``jax_ep.moe`` with its weights.

    Example::

        mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        group = jax_ep.create_group(mesh, "expert")
        layer = jax_ep.nnx.MoE(512, 1024, num_experts=16, top_k=2, group=group, rngs=nnx.Rngs(0))
        y, aux = layer(x)

    The weights are ``nnx.Param``s, made on the mesh of the group with the experts split over its axes.
    With ``router_bias=True`` the layer has a ``RouterBias`` besides; move it once a step, outside the
    gradient::

        (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(layer, x)
        optimizer.update(layer, grads)
        layer.update_router_bias(aux.load)

    On a mesh with Auto axes, as above, the rest of a model needs no change. On Explicit axes call
    ``nnx.Embed`` as ``embed(ids, out_sharding=jax.P("data"))``, under ``jax.set_mesh(mesh)``. Weights
    of other layers that lie on one device, as some restored ones do, must be put on the mesh before
    they meet these: ``jax.device_put(weights, NamedSharding(mesh, jax.P()))``.

    Modules can be split, merged, cloned and copied; the group is static. A checkpoint of
    ``nnx.state(layer)`` has weights and bias; one of ``nnx.state(layer, nnx.Param)`` would forget the
    bias.

    For an ``ExpertFunction`` write a module of your own, because only you know its weights: it holds
    them and a router kernel as ``nnx.Param``s and calls ``jax_ep.moe(experts=)``::

        def __call__(self, x):
            weights = {"up": self.up[...], "down": self.down[...]}
            params = jax_ep.MoEParams(router_kernel=self.router_kernel[...], experts=weights)
            return jax_ep.moe(x, params, experts=relu_experts, ...)

    Args:
        {settings}
        rngs: Source of the "params" keys.

    Attributes:
        router_kernel: ``[H, E]``.
        gate: ``[E, H, F]``, or None.
        up: ``[E, H, F]``.
        down: ``[E, F, H]``.
        router_bias: ``RouterBias`` ``[E]``, or None.
        shared_gate: ``[H, S]``, or None, as the next two.
        shared_up: ``[H, S]``.
        shared_down: ``[S, H]``.
        gate_bias: ``[E, F]``, or None, as the next two.
        up_bias: ``[E, F]``.
        down_bias: ``[E, H]``.

    Raises:
        TypeError: for a group, ``num_experts`` or ``top_k`` of the wrong type.
        ValueError: for sizes that do not fit each other; the text says what would.
    """

    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        shapes, specs = self._weights("nnx.MoE")
        wants_bias = self.router_bias

        def param(init: Initializer, shape: Any, names: Any) -> Any:
            if shape is None:
                return nnx.data(None)
            value = init(rngs.params(), shape.shape, shape.dtype)
            return nnx.Param(value, out_sharding=tuple(names), mesh=self.group.mesh)

        def zeros(shape: Any, names: Any) -> Any:
            return param(lambda _, *like: jnp.zeros(*like), shape, names)

        self.router_kernel = param(self.router_init, shapes.router_kernel, specs.router_kernel)
        self.gate = param(self.kernel_init, shapes.gate, specs.gate)
        self.up = param(self.kernel_init, shapes.up, specs.up)
        self.down = param(self.kernel_init, shapes.down, specs.down)
        self.router_bias = nnx.data(None)
        if wants_bias:
            even = jnp.zeros((self.num_experts,), jnp.float32)
            self.router_bias = RouterBias(even, out_sharding=(None,), mesh=self.group.mesh)
        self.shared_gate: Any
        self.shared_up: Any
        self.shared_down: Any
        if shapes.shared is None or specs.shared is None:
            self.shared_gate = self.shared_up = self.shared_down = nnx.data(None)
        else:
            self.shared_gate = param(self.kernel_init, shapes.shared.gate, specs.shared.gate)
            self.shared_up = param(self.kernel_init, shapes.shared.up, specs.shared.up)
            self.shared_down = param(self.kernel_init, shapes.shared.down, specs.shared.down)
        self.gate_bias = zeros(shapes.gate_bias, specs.gate_bias)
        self.up_bias = zeros(shapes.up_bias, specs.up_bias)
        self.down_bias = zeros(shapes.down_bias, specs.down_bias)

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
            router_key: Key for the noise of a router with ``noise_std``, such as ``rngs.router()`` of
                the ``nnx.Rngs`` of a training step. None adds none.
            routing: Routes to take in place of the router's, as in ``jax_ep.moe``.

        Returns:
            ``[..., H]`` in the layer's dtype, and the statistics.
        """
        return self._run(
            x,
            self.params(),
            mask=mask,
            router_inputs=router_inputs,
            router_key=router_key,
            routing=routing,
        )

    def params(self) -> MoEParams:
        """The weights as ``jax_ep.moe`` takes them."""

        def value(variable: nnx.Variable | None) -> Any:
            return None if variable is None else variable[...]

        shared = None
        if self.shared_up is not None:
            shared = SharedExpert(
                value(self.shared_gate), value(self.shared_up), value(self.shared_down)
            )
        return MoEParams(
            router_kernel=self.router_kernel[...],
            gate=value(self.gate),
            up=value(self.up),
            down=value(self.down),
            router_bias=value(self.router_bias),
            shared=shared,
            gate_bias=value(self.gate_bias),
            up_bias=value(self.up_bias),
            down_bias=value(self.down_bias),
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
        self.router_bias[...] = update_bias(
            self.router_bias[...], load, rate, num_used_experts=self.num_used_experts
        )
