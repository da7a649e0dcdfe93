"""The decoder: Flax NNX modules of one layer each, and the loop over layers.

Parameters are a nested dict of float32 arrays, the same for any mesh and any way to run the layers::

    embedding               [V, H]
    dense / moe             layers, each leaf with a leading dimension: of the first, dense layers (left
                            out if there are none), and of those with experts
        norm_attention, norm_mlp          scale [H]
        attention           q_a [H, Q], q_norm [Q], q_b [Q, N·(nope + rope)], or q [H, N·(nope + rope)];
                            kv_a [H, C + rope], kv_norm [C], kv_b [C, N·(nope + value)],
                            out [N·value, H]; N heads, Q and C the ranks; each "kernel" or "scale"
        mlp                 dense: gate, up [H, F], down [F, H], each "kernel"
        experts             router_kernel [H, E], gate, up [E, H, F], down [E, F, H],
                            shared_gate, shared_up [H, S], shared_down [S, H]
    mtp                     norm_hidden, norm_embedding, project [2H, H], block (a layer with experts),
                            norm; only with multi-token prediction
    norm                    scale [H]
    head                    kernel [H, V]

The routers' biases are an array of their own, ``[layers with experts, E]``, the module's last.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

import jax_ep
from examples.pretrain import blockwise
from examples.pretrain.attention import NORM_EPSILON, LatentAttention, positions_of
from examples.pretrain.config import ModelConfig
from examples.pretrain.parallel import BATCH_AXES, gather, gather_here, layout, split_batch

Params = dict[str, Any]


class Report(NamedTuple):
    """What the layers with experts report, each with a leading dimension of layers.

    Attributes:
        load: ``[L, E]`` routes to each expert.
        num_dropped: ``[L]`` routes that found no room.
        sequence_loss: ``[L]`` balancing loss within sequences.
        z_loss: ``[L]`` z-loss of the router.
    """

    load: Int32[Array, "layers experts"]
    num_dropped: Int32[Array, " layers"]
    sequence_loss: Float32[Array, " layers"]
    z_loss: Float32[Array, " layers"]


class Hidden(NamedTuple):
    """What the decoder gives, ready for the head.

    Attributes:
        next: ``[B, S, H]`` for the next token.
        after_next: ``[B, S, H]`` for the one after it; None without multi-token prediction.
        report: Of the layers with experts.
    """

    next: Float[Array, "batch seq hidden"]
    after_next: Float[Array, "batch seq hidden"] | None
    report: Report


class DenseMlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Make the projections."""
        dtype, inner = jnp.dtype(config.dtype), config.dense_intermediate
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = linear(config.hidden, inner)
        self.up = linear(config.hidden, inner)
        self.down = linear(inner, config.hidden)

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Run it."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention, then experts or a dense SwiGLU, each with a norm and a residual connection."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        group: jax_ep.Group | None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the layers; without a group the block is a dense one."""
        norm = functools.partial(
            nnx.RMSNorm, epsilon=NORM_EPSILON, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        self.norm_attention = norm(config.hidden)
        self.attention = LatentAttention(config, mesh, rngs=rngs)
        self.norm_mlp = norm(config.hidden)
        self.experts: Any = nnx.data(None)
        if group is None:
            self.mlp = DenseMlp(config, rngs=rngs)
        else:
            self.experts = make_experts(config, group, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        segments: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Any]:
        """Run the layers, and report if there are experts; padding (segment 0) goes to no expert."""
        x = x + self.attention(self.norm_attention(x), segments, positions)
        normed = self.norm_mlp(x)
        if self.experts is None:
            return x + self.mlp(normed), None
        y, aux = self.experts(normed, mask=segments > 0)
        return x + y, Report(aux.load, aux.num_dropped, aux.sequence_loss, aux.z_loss)


class Mtp(nnx.Module):
    """Multi-token prediction of depth one: one more layer, for the token after the next."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, group: jax_ep.Group, *, rngs: nnx.Rngs
    ) -> None:
        """Make the layers."""
        dtype, hidden = jnp.dtype(config.dtype), config.hidden
        norm = functools.partial(nnx.RMSNorm, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.norm_hidden = norm(hidden)
        self.norm_embedding = norm(hidden)
        self.project = nnx.Linear(2 * hidden, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.block = Block(config, mesh, group, rngs=rngs)
        self.norm = norm(hidden)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        embedded: Float[Array, "batch seq hidden"],
        segments: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
    ) -> tuple[Float[Array, "batch seq hidden"], Report]:
        """From the decoder's last states and the embeddings of the next tokens."""
        both = jnp.concatenate([self.norm_hidden(x), self.norm_embedding(embedded)], axis=-1)
        x, report = self.block(self.project(both), segments, positions)
        return self.norm(x), report


def make_experts(config: ModelConfig, group: jax_ep.Group, *, rngs: nnx.Rngs) -> jax_ep.nnx.MoE:
    """The experts of one layer."""
    router = jax_ep.routing.Router("sigmoid", scale=config.routed_scaling)
    if config.num_expert_groups > 1:
        router = jax_ep.routing.Router(
            "group_limited",
            scale=config.routed_scaling,
            num_groups=config.num_expert_groups,
            top_groups=config.top_k_groups,
        )
    return jax_ep.nnx.MoE(
        config.hidden,
        config.moe_intermediate,
        num_experts=config.num_experts,
        top_k=config.top_k,
        group=group,
        router=router,
        router_bias=True,
        shared_intermediate=config.num_shared_experts * config.moe_intermediate or None,
        dtype=jnp.dtype(config.dtype),
        tensor_axis="tensor",
        sequence_loss=True,
        overlap=config.overlap or None,
        rank_capacity_factor=config.rank_capacity_factor or None,
        quantization="fp8" if config.fp8_dispatch else None,
        rngs=rngs,
    )


class _Part(NamedTuple):
    """A module without its values: what ``nnx.merge`` makes it from, with a dict of arrays."""

    graph: Any
    make: Any

    @classmethod
    def of(cls, make: Any) -> _Part:
        return cls(nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))), make)

    def init(self, key: PRNGKeyArray) -> Params:
        return nnx.to_pure_dict(nnx.state(self.make(rngs=nnx.Rngs(key)), nnx.Param))


class Decoder:
    """The model on one mesh. It holds no arrays."""

    def __init__(self, config: ModelConfig, mesh: Mesh, group: jax_ep.Group) -> None:
        """Make the modules' structure."""
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(config.dtype)
        norm = functools.partial(nnx.RMSNorm, config.hidden, epsilon=NORM_EPSILON, dtype=self.dtype)
        self._norm = _Part.of(norm)
        self._dense = _Part.of(functools.partial(Block, config, mesh, None))
        self._moe = _Part.of(functools.partial(Block, config, mesh, group))
        self._mtp = _Part.of(functools.partial(Mtp, config, mesh, group))

    def init(self, key: PRNGKeyArray) -> Params:
        """Initial parameters."""
        config = self.config
        of_embedding, of_dense, of_moe, of_mtp, of_head = jax.random.split(key, 5)
        head = jax.nn.initializers.lecun_normal()(of_head, (config.hidden, config.vocab_size))
        params = {
            "embedding": jax.random.normal(of_embedding, head.shape[::-1]) * 0.02,
            "moe": jax.vmap(self._moe.init)(jax.random.split(of_moe, config.num_moe_layers)),
            "norm": {"scale": jnp.ones(config.hidden)},
            "head": {"kernel": head},
        }
        if config.num_dense_layers:
            keys = jax.random.split(of_dense, config.num_dense_layers)
            params["dense"] = jax.vmap(self._dense.init)(keys)
        if config.mtp:
            params["mtp"] = self._mtp.init(of_mtp)
        return params

    def init_router_bias(self) -> Float32[Array, "layers experts"]:
        """Initial biases of the routers."""
        layers = self.config.num_moe_layers + self.config.mtp
        return jnp.zeros((layers, self.config.num_experts), jnp.float32)

    def __call__(
        self,
        params: Params,
        router_bias: Float32[Array, "layers experts"],
        tokens: Int32[Array, "batch seq_plus_one"],
        segments: Int32[Array, "batch seq_plus_one"],
    ) -> Hidden:
        """Run the layers on all tokens but the last, which only multi-token prediction reads."""
        embedded = self._embed(params["embedding"], tokens)
        x, inner = split_batch(embedded[:, :-1], self.mesh), segments[:, :-1]
        where = inner, positions_of(inner)
        if self.config.num_dense_layers:
            x, _ = self._layers(self._dense, params["dense"], None, x, where)
        num_layers = self.config.num_moe_layers
        x, report = self._layers(self._moe, params["moe"], router_bias[:num_layers], x, where)
        after_next = None
        if self.config.mtp:
            run = self._remat(functools.partial(self._run_mtp, where=where))
            ahead = split_batch(embedded[:, 1:], self.mesh)
            after_next, last = run(params["mtp"], router_bias[num_layers], x, ahead)
            report = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), report, last)
        x = nnx.merge(self._norm.graph, gather(params["norm"], self.mesh, self.dtype))(x)
        return Hidden(x, after_next, report)

    def _embed(
        self, table: Float[Array, "vocab hidden"], tokens: Int32[Array, "batch seq"]
    ) -> Float[Array, "batch seq hidden"]:
        """The embeddings. The gradients of a token's occurrences are added in float32."""

        def look_up(part: Array, ids: Array) -> Array:
            return gather_here(part, axis=1, dtype=self.dtype)[ids].astype(self.dtype)

        stored = layout(("embedding",), 2).stored
        return jax.shard_map(
            look_up,
            mesh=self.mesh,
            in_specs=(stored, P(BATCH_AXES, None)),
            out_specs=P(BATCH_AXES, None, None),
        )(table, tokens)

    def _layers(
        self, part: _Part, params: Params, bias: Array | None, x: Array, where: tuple[Array, Array]
    ) -> tuple[Array, Report]:
        """Equal layers, one after the other."""

        def layer(x: Array, of_layer: Any) -> tuple[Array, Any]:
            params, bias = of_layer
            params = gather(params, self.mesh, self.dtype)
            x, report = nnx.merge(part.graph, _with_bias(params, bias))(x, *where)
            return split_batch(x, self.mesh), report

        layer = self._remat(layer)
        if self.config.scan_layers:
            return jax.lax.scan(layer, x, (params, bias))
        reports = []
        for index in range(jax.tree.leaves(params)[0].shape[0]):
            x, report = layer(x, jax.tree.map(lambda leaf: leaf[index], (params, bias)))  # noqa: B023
            reports.append(report)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)

    def _run_mtp(
        self,
        params: Params,
        bias: Array,
        x: Array,
        embedded: Array,
        where: tuple[Array, Array],
    ) -> tuple[Array, Report]:
        params = gather(params, self.mesh, self.dtype)
        params = params | {"block": _with_bias(params["block"], bias)}
        x, report = nnx.merge(self._mtp.graph, params)(x, embedded, *where)
        return split_batch(x, self.mesh), report

    def _remat(self, layer: Any) -> Any:
        """``layer`` with the configured policy of what its backward pass computes again."""
        keep = jax.checkpoint_policies.save_only_these_names
        policies = {
            "none": _all_but_gathered_weights,
            "attention": keep("jax_ep.handle", blockwise.RESULTS),
            "handle": keep("jax_ep.handle"),
            "full": None,
        }
        in_a_loop = self.config.scan_layers  # where XLA merges nothing with the forward pass
        policy = policies[self.config.remat]
        return jax.checkpoint(layer, policy=policy, prevent_cse=not in_a_loop)


def _all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of ``jax.checkpoint``: the weights are gathered again, and all that is dear is kept.

    ``gather`` is a function with its own gradient that places arrays; besides it only casts and
    constraints of the activations are repeated.
    """
    cheap = ("convert_element_type", "sharding_constraint")
    if primitive.name == "custom_vjp_call":
        return not any(e.primitive.name in cheap[1:] for e in params["call_jaxpr"].jaxpr.eqns)
    return primitive.name not in cheap


def _with_bias(params: Params, bias: Array | None) -> Params:
    """Parameters of a block with the bias of its router, if it has one."""
    if bias is None:
        return params
    return params | {"experts": params["experts"] | {"router_bias": bias}}


def segments_mask(segments: Int32[Array, "batch seq_plus_one"], ahead: int) -> Bool[Array, "..."]:
    """Whether the token ``ahead`` of each position but the last is in the same segment, no padding."""
    here, there = segments[:, :-1], segments[:, ahead:]
    there = jnp.pad(there, ((0, 0), (0, here.shape[1] - there.shape[1])))
    return (here == there) & (here > 0)
