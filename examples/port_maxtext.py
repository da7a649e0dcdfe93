"""MaxText's routed layer on ``jax_ep.moe``: the program of docs/guides/maxtext.md.

MaxText is not needed: ``RoutedMoE`` here is a stand-in with the names and shapes of the parameters, the
names of the options and the three results of MaxText's layer. Runs on eight CPU devices if there are
no others::

    python examples/port_maxtext.py

The parts between ``# [name]`` and ``# [end]`` are shown in the guide, by docs/render_guides.py.
"""

import dataclasses
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

import jax_ep
from jax_ep import routing

MESH_AXES = ("data", "fsdp", "tensor", "expert")  # some of MaxText's; the others have size 1
LOGICAL_AXIS_RULES = (("exp", "expert"), ("embed_moe", "fsdp"), ("mlp_moe", "tensor"))


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of MaxText that concern the layer, with MaxText's names and defaults."""

    emb_dim: int = 16
    moe_mlp_dim: int = 12
    num_experts: int = 8
    num_experts_per_tok: int = 2
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    mlp_bias: bool = False
    dtype: str = "float32"
    weight_dtype: str = "float32"
    decoder_block: str = "mixtral"
    mlp_activations_limit: float = -1.0
    routed_score_func: str = ""
    routed_bias: bool = False
    routed_bias_update_rate: float = 0.0
    routed_scaling_factor: float = 1.0
    n_routing_groups: int = -1
    topk_routing_group: int = -1
    load_balance_loss_weight: float = 0.0
    ragged_buffer_factor: float = -1.0


# [router]
def router_of(config) -> routing.Router:
    """The router that MaxText's options describe."""
    kind, scale = (config.decoder_block, config.routed_score_func), config.routed_scaling_factor
    if kind in (("mixtral", ""), ("qwen3_moe", "")) and not config.routed_bias:
        return routing.Router("softmax")  # over the chosen experts
    if kind == ("deepseek", "softmax") and not config.routed_bias:  # DeepSeek-V2
        return routing.Router("softmax", renormalize=False, scale=scale)
    if kind == ("deepseek", "sigmoid") and config.n_routing_groups == -1:
        return routing.Router("sigmoid", scale=scale)
    if kind == ("deepseek", "sigmoid"):  # DeepSeek-V3
        groups = {"num_groups": config.n_routing_groups, "top_groups": config.topk_routing_group}
        return routing.Router("group_limited", scale=scale, **groups)
    raise ValueError(f"router_of: no Router is that of {config}; pass routes to the layer.")


def activation_of(config):
    """The activation of the experts."""
    if config.decoder_block == "gpt_oss":
        return jax_ep.clamped_swiglu(config.mlp_activations_limit)
    return getattr(jax.nn, config.mlp_activations[0])


# [end]


class GateLogit(nnx.Module):
    """The parameters of the router."""

    def __init__(self, config: Config, param) -> None:
        self.kernel = param((config.emb_dim, config.num_experts), ("embed_moe", None))
        self.bias = param((config.num_experts,), (None,)) if config.routed_bias else nnx.data(None)


class RoutedMoE(nnx.Module):
    """A stand-in for MaxText's layer of this name."""

    def __init__(self, config: Config, mesh: Mesh, rngs: nnx.Rngs) -> None:
        self.config = config
        rules = dict(LOGICAL_AXIS_RULES)

        def param(shape, axes):
            value = jax.random.normal(rngs.params(), shape, config.weight_dtype) / shape[-1] ** 0.5
            spec = jax.P(*(rules.get(axis) for axis in axes))
            return nnx.Param(jax.device_put(value, NamedSharding(mesh, spec)))

        experts, hidden, inner = config.num_experts, config.emb_dim, config.moe_mlp_dim
        self.gate = GateLogit(config, param)
        self.wi_0 = param((experts, hidden, inner), ("exp", "embed_moe", "mlp_moe"))
        self.wi_1 = param((experts, hidden, inner), ("exp", "embed_moe", "mlp_moe"))
        self.wo = param((experts, inner, hidden), ("exp", "mlp_moe", "embed_moe"))
        self.wi_0_bias = self.wi_1_bias = self.wo_bias = nnx.data(None)
        if config.mlp_bias:
            self.wi_0_bias = param((experts, inner), ("exp", None))
            self.wi_1_bias = param((experts, inner), ("exp", None))
            self.wo_bias = param((experts, hidden), ("exp", None))
        # [group]
        self.group = jax_ep.create_group(mesh, "expert")  # in __init__; every process calls it
        # [end]

    # [call]
    def __call__(self, inputs, routes=None):
        """Output, load-balancing loss and update of the bias, as MaxText's layer gives them."""
        config, factor = self.config, self.config.ragged_buffer_factor
        biases = {"gate_bias": self.wi_0_bias, "up_bias": self.wi_1_bias, "down_bias": self.wo_bias}
        params = jax_ep.MoEParams(
            router_kernel=self.gate.kernel[...],
            router_bias=self.gate.bias[...].astype("float32") if config.routed_bias else None,
            gate=self.wi_0[...],
            up=self.wi_1[...],
            down=self.wo[...],
            **{name: bias[...] for name, bias in biases.items() if bias is not None},
        )
        how = {"router": router_of(config)} if routes is None else {"routing": routes}
        y, aux = jax_ep.moe(
            inputs.astype(config.dtype),
            params,
            group=self.group,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            **how,
            activation=activation_of(config),
            token_axes=("data", "fsdp", "expert"),
            tensor_axis="tensor",
            rank_capacity_factor=factor if factor > 0 else None,
            sequence_loss=True,
        )
        weight = config.load_balance_loss_weight * config.num_experts_per_tok
        lb_loss = weight * aux.sequence_loss if weight > 0 else None
        bias_updates, rate = None, config.routed_bias_update_rate
        if config.routed_bias and rate > 0:
            bias_updates = routing.update_bias(jnp.zeros(config.num_experts), aux.load, rate)
        return y, lb_loss, bias_updates

    # [end]


# [routes]
def routes_with_bias(layer, inputs):
    """Routes of gpt-oss: the bias is a part of the logits, so it has a gradient."""
    logits = inputs.astype("float32") @ layer.gate.kernel[...] + layer.gate.bias[...]
    chosen, selected_experts = jax.lax.top_k(logits, layer.config.num_experts_per_tok)
    return routing.Routing(selected_experts, jax.nn.softmax(chosen), jax.nn.softmax(logits))


def routes_by_hash(layer, inputs, input_ids, tid2eid):
    """Routes that a table ``[vocabulary, K]`` gives for the id of each token."""
    scores = jax.nn.sigmoid(inputs.astype("float32") @ layer.gate.kernel[...])
    selected_experts = tid2eid[input_ids]
    weights = jnp.take_along_axis(scores, selected_experts, axis=-1)
    weights = weights / weights.sum(-1, keepdims=True) * layer.config.routed_scaling_factor
    return routing.Routing(selected_experts, weights, scores)


# [end]


def make_mesh() -> Mesh:
    """A mesh with MaxText's names, of all devices or of the power of two below their number."""
    devices = 1 << (jax.device_count().bit_length() - 1)
    data, fsdp, tensor = (2 if devices >= least else 1 for least in (16, 8, 4))
    sizes = (data, fsdp, tensor, devices // (data * fsdp * tensor))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=jax.devices()[:devices])


def main() -> None:
    """Run DeepSeek-V3's routing, and routes by hash, forward and backward."""
    config = Config(
        decoder_block="deepseek",
        routed_score_func="sigmoid",
        routed_bias=True,
        routed_bias_update_rate=1e-3,
        routed_scaling_factor=2.5,
        n_routing_groups=4,
        topk_routing_group=2,
        load_balance_loss_weight=1e-2,
    )
    mesh = make_mesh()
    layer = RoutedMoE(config, mesh, nnx.Rngs(0))
    batch = NamedSharding(mesh, jax.P(("data", "fsdp", "expert")))
    shape = (8 * mesh.shape["expert"], 4)
    x = jax.random.normal(jax.random.key(1), (*shape, config.emb_dim))
    ids = jax.random.randint(jax.random.key(2), shape, 0, 10)
    x, ids = jax.device_put((x, ids), batch)
    table = jnp.stack([jnp.arange(10) % 8, (jnp.arange(10) + 3) % 8], axis=1)

    @nnx.jit
    def step(layer, x, ids):
        def loss_fn(layer):
            y, lb_loss, bias_updates = layer(x)
            # [call routes]
            y, _, _ = layer(y, routes_by_hash(layer, y, ids, table))
            # [end]
            return jnp.mean(y**2) + lb_loss, bias_updates

        return nnx.value_and_grad(loss_fn, has_aux=True)(layer)

    (loss, bias_updates), grads = step(layer, x, ids)
    layer.group.check()
    print(f"loss {loss:.4f}, updates of the bias {bias_updates}")
    for name in ("wi_0", "wi_1", "wo"):
        print(f"gradient of {name}: {grads[name][...].shape}, {layer.group}")


if __name__ == "__main__":
    main()
