"""The layer of docs/guides/maxtext.md against dense computations with MaxText's formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dense_routed
from guide_pages import maxtext

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]
SIGMOID = {
    "decoder_block": "deepseek",
    "routed_score_func": "sigmoid",
    "routed_bias": True,
    "routed_bias_update_rate": 1e-3,
    "routed_scaling_factor": 2.5,
    "load_balance_loss_weight": 0.1,
}
OPTIONS = {
    "mixtral": {"load_balance_loss_weight": 0.1, "mlp_activations": ("gelu", "linear")},
    "deepseek2": {
        "decoder_block": "deepseek",
        "routed_score_func": "softmax",
        "routed_scaling_factor": 1.5,
        "load_balance_loss_weight": 0.1,
    },
    "deepseek3": SIGMOID | {"n_routing_groups": 4, "topk_routing_group": 2},
    "deepseek3 without groups": SIGMOID,
    "gpt_oss": {
        "decoder_block": "gpt_oss",
        "mlp_activations": ("sigmoid", "linear"),
        "mlp_activations_limit": 0.5,
        "mlp_bias": True,
        "routed_bias": True,
    },
    "hash": {"routed_scaling_factor": 1.5},
}
TABLE = np.stack([np.arange(10) % 8, (np.arange(10) + 3) % 8], axis=1)


def make(name: str, **changes):
    """A layer on all axes of MaxText's mesh, its tokens and their ids."""
    config = dataclasses.replace(maxtext.Config(), **OPTIONS[name], **changes)
    mesh = maxtext.make_mesh()
    layer = maxtext.RoutedMoE(config, mesh, nnx.Rngs(0))
    batch = 8 * mesh.shape["expert"]
    x = jax.random.normal(jax.random.key(1), (batch, 4, config.emb_dim))
    ids = jax.random.randint(jax.random.key(2), (batch, 4), 0, 10)
    sharding = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp", "expert")))
    return layer, *jax.device_put((x, ids), sharding)


def routes_of(name: str, layer, x, ids):
    if name == "gpt_oss":
        return maxtext.routes_with_bias(layer, x)
    return maxtext.routes_by_hash(layer, x, ids, TABLE) if name == "hash" else None


def dense(name: str, config, weights, x, ids):
    """What MaxText's layer gives, with every expert for every token."""
    top_k, num_experts = config.num_experts_per_tok, config.num_experts
    logits = x @ weights["gate"]["kernel"]
    bias = weights["gate"].get("bias")
    activation = {"gelu": jax.nn.gelu}.get(config.mlp_activations[0], jax.nn.silu)
    combined = lambda gate, up: activation(gate) * up  # noqa: E731
    if name == "hash":
        chosen = jax.nn.one_hot(TABLE[ids], num_experts).sum(-2)
        scores = jax.nn.sigmoid(logits) * chosen
        of_experts = config.routed_scaling_factor * scores / scores.sum(-1, keepdims=True)
        routes = dense_routed.Routes(logits, jax.nn.sigmoid(logits), of_experts, chosen)
    elif name == "gpt_oss":
        routes = dense_routed.route(logits + bias, top_k=top_k)
        limit = config.mlp_activations_limit

        def combined(gate, up):
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)

    elif config.routed_score_func == "sigmoid":
        groups = (4, 2) if config.n_routing_groups == 4 else None
        scale = config.routed_scaling_factor
        how = {"score": jax.nn.sigmoid, "bias": bias, "scale": scale, "groups": groups}
        routes = dense_routed.route(logits, top_k=top_k, **how)
    else:
        scale = config.routed_scaling_factor
        renormalize = config.decoder_block != "deepseek"
        routes = dense_routed.route(logits, top_k=top_k, renormalize=renormalize, scale=scale)
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    params = {ours: weights[theirs] for ours, theirs in names.items()}
    if config.mlp_bias:
        params |= {f"{ours}_bias": weights[f"{theirs}_bias"] for ours, theirs in names.items()}
    y = dense_routed.experts(x, routes.weights, params, combined)
    lb_loss = updates = None
    if config.load_balance_loss_weight > 0:
        if config.routed_score_func:  # DeepSeek's, of the best scores without bias
            lb_loss = dense_routed.report(routes, top_k).sequence_loss * top_k
        else:  # MaxText's: tokens of an expert and its probability, averaged over a sequence
            density, probability = routes.chosen.mean(1), jax.nn.softmax(logits).mean(1)
            lb_loss = jnp.mean(density * probability) * num_experts**2
        lb_loss = lb_loss * config.load_balance_loss_weight
    if config.routed_bias_update_rate > 0:
        counts = routes.chosen.sum((0, 1))
        updates = config.routed_bias_update_rate * jnp.sign(counts.mean() - counts)
    return y, lb_loss, updates


def objective(y, lb_loss):
    target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * target) + (0 if lb_loss is None else 10 * lb_loss)


@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_the_dense_layer(name):
    layer, x, ids = make(name)
    if layer.config.routed_bias:
        layer.gate.bias[...] = jnp.linspace(-0.2, 0.2, 8)
    graph, state = nnx.split(layer)
    weights = nnx.to_pure_dict(state)

    def ours(weights, x):
        own = nnx.State(jax.tree.map(lambda leaf: leaf, state))
        nnx.replace_by_pure_dict(own, weights)
        layer = nnx.merge(graph, own)
        y, lb_loss, updates = layer(x, routes_of(name, layer, x, ids))
        return objective(y, lb_loss), (y, lb_loss, updates)

    def theirs(weights, x):
        y, lb_loss, updates = dense(name, layer.config, weights, x, jax.device_get(ids))
        return objective(y, lb_loss), (y, lb_loss, updates)

    step = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))  # noqa: E731
    (_, found), gradients = jax.device_get(step(ours)(weights, x))
    on_one = jax.device_get((weights, x))
    (_, want), want_gradients = jax.device_get(step(theirs)(*on_one))
    layer.group.check()
    for part, got, expected in zip(("y", "lb_loss", "updates"), found, want, strict=True):
        assert (got is None) == (expected is None), part
        if got is not None:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=part)
    assert (found[1] is not None) == (layer.config.load_balance_loss_weight > 0)
    for (path, got), expected in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True
    ):
        key = jax.tree_util.keystr(path)
        # Of sigmoid scores the bias only changes the choice; hash routing needs no gradient of it.
        assert np.any(expected) == ("bias" not in key or name == "gpt_oss"), key
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=key)


def test_parameters_are_those_of_maxtext():
    layer, *_ = make("gpt_oss")
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(layer)))
    E, H, F = 8, 16, 12
    assert shapes == {
        "gate": {"kernel": (H, E), "bias": (E,)},
        "wi_0": (E, H, F),
        "wi_1": (E, H, F),
        "wo": (E, F, H),
        "wi_0_bias": (E, F),
        "wi_1_bias": (E, F),
        "wo_bias": (E, H),
    }
    assert layer.wo[...].sharding.spec == jax.P("expert", "tensor", "fsdp")


def test_buffer_factor_bounds_the_rows():
    layer, x, _ = make("mixtral")
    want, lb_loss, _ = layer(x)
    roomy, small = (
        make("mixtral", ragged_buffer_factor=8.0),
        make("mixtral", ragged_buffer_factor=0.5),
    )
    np.testing.assert_allclose(roomy[0](x)[0], want, rtol=1e-5, atol=1e-5)
    y, small_loss, _ = small[0](x)
    changed = np.any(np.abs(y - want) > 1e-3, axis=-1)
    assert 0 < changed.sum() < changed.size and small_loss == lb_loss


@pytest.mark.parametrize(
    "options",
    [{"decoder_block": "llama4"}, {"decoder_block": "gpt_oss"}, {"routed_bias": True}],
    ids=str,
)
def test_routers_that_jax_ep_has_not_are_errors(options):
    with pytest.raises(
        ValueError, match=r"router_of: no Router is that of .*pass routes to the layer"
    ):
        maxtext.router_of(dataclasses.replace(maxtext.Config(), **options))


def test_program_runs(monkeypatch, capsys):
    devices = min(jax.device_count(), 8)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    maxtext.main()
    assert "gradient of wo: (8, 12, 16)" in capsys.readouterr().out
