"""The Flax layers: their weights, what an optimizer moves, their sharding; both against ``moe``."""

from __future__ import annotations

import copy
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing

pytestmark = pytest.mark.one_process("calls layers with arrays of one process")

H, F, E = 8, 12, 4
SETTINGS = {
    "num_experts": E,
    "top_k": 2,
    "router": routing.Router("sigmoid", scale=1.5),
    "router_bias": True,
}
LOGICAL = jax_ep.PartitionNames(experts="exp", hidden="embed", intermediate="mlp")
RULES = (("exp", "expert"), ("embed", "data"), ("mlp", None))


def make_group(backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def make_x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (4, 3, H))


def make_nnx(group: jax_ep.Group, **settings) -> jax_ep.nnx.MoE:
    return jax_ep.nnx.MoE(H, F, group=group, rngs=nnx.Rngs(0), **(SETTINGS | settings))


def make_linen(group: jax_ep.Group, **settings) -> jax_ep.linen.MoE:
    return jax_ep.linen.MoE(H, F, group=group, **(SETTINGS | settings))


def same(a, b) -> bool:
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


# ---- nnx


def test_nnx_training_step(native_backend):
    """The optimizer moves the parameters alone, ``update_router_bias`` the bias alone."""
    group = make_group(native_backend, AxisType.Explicit)
    names = jax_ep.PartitionNames(hidden="data")
    with jax.set_mesh(group.mesh):
        layer = make_nnx(group, shared_intermediate=6, partition_names=names)
        optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)
        assert layer.gate[...].sharding.spec == P("expert", "data", None)
        before = nnx.to_pure_dict(nnx.state(layer))

        @nnx.jit
        def step(layer, optimizer, x):
            def loss_fn(layer):
                y, aux = layer(x)
                return jnp.mean(y**2) + 0.01 * aux.aux_loss, aux

            (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(layer)
            optimizer.update(layer, grads)
            return loss, aux

        losses = []
        for _ in range(3):
            loss, aux = step(layer, optimizer, make_x())
            losses.append(float(loss))
        after = nnx.to_pure_dict(nnx.state(layer))
        assert losses[0] > losses[1] > losses[2]
        moved = {name: not np.array_equal(before[name], after[name]) for name in before}
        assert moved == {name: name != "router_bias" for name in before}
        assert len(moved) == 8
        layer.update_router_bias(aux.load, 0.5)
    want = 0.5 * np.sign(np.mean(aux.load) - np.asarray(aux.load))
    np.testing.assert_array_equal(layer.router_bias[...], want)


def test_nnx_split_merge_clone_copy(native_backend):
    group = make_group(native_backend)
    layer = make_nnx(group)
    want = layer(make_x())
    params = layer.params()
    assert params.shared is None and isinstance(layer.router_bias, jax_ep.nnx.RouterBias)
    assert same(want, jax_ep.moe(make_x(), params, group=group, **_of_moe()))
    graph, weights, bias = nnx.split(layer, nnx.Param, jax_ep.nnx.RouterBias)
    assert len(jax.tree.leaves(weights)) == 4 and len(jax.tree.leaves(bias)) == 1
    hash(graph)
    assert same(nnx.merge(graph, weights, bias)(make_x()), want)
    for other in (nnx.clone(layer), copy.deepcopy(layer)):
        assert other.group is group
        assert same(other(make_x()), want)
        other.update_router_bias(jnp.arange(E))
        assert not np.any(layer.router_bias[...]) and np.any(other.router_bias[...])


def test_nnx_stack_of_layers(native_backend):
    """Layers made by vmap and run by scan, differentiated."""
    group = make_group(native_backend)
    no_name = {nnx.PARTITION_NAME: None}

    @nnx.split_rngs(splits=2)
    @nnx.vmap(transform_metadata=no_name)
    def make(rngs):
        return jax_ep.nnx.MoE(H, F, group=group, rngs=rngs, **SETTINGS)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), transform_metadata=no_name)
    def run(x, layer):
        y, aux = layer(x)
        return x + y, aux.load

    layers = make(nnx.Rngs(0))
    assert layers.gate.shape == (2, E, H, F)
    assert layers.gate[...].sharding.spec[:2] == (None, "expert")
    loss = nnx.jit(nnx.grad(lambda layers, x: jnp.sum(run(x, layers)[0] ** 2)))
    grads = loss(layers, make_x())
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_nnx_logical_names(native_backend):
    group = make_group(native_backend)
    with nnx.logical_axis_rules(RULES):
        layer = make_nnx(group, partition_names=LOGICAL, dtype=jnp.bfloat16)
        assert layer.down[...].sharding.spec == P("expert", None, "data")
        specs = nnx.get_partition_spec(nnx.state(layer))
        assert specs["gate"].get_value() == P("expert", "data", None)
    y, _ = layer(make_x())
    assert y.dtype == jnp.bfloat16 and layer.down[...].dtype == jnp.float32


def test_nnx_restored(native_backend, tmp_path):
    """Orbax puts each array where the new layer has it, which must be on the common mesh."""
    group = make_group(native_backend)
    layer = make_nnx(group)
    layer.update_router_bias(jnp.arange(E))
    want, _ = layer(make_x())
    other = make_nnx(group)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(layer))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "layer", nnx.state(other)))
    np.testing.assert_array_equal(other(make_x())[0], want)


# ---- linen


def test_linen_training_step(native_backend):
    group = make_group(native_backend, AxisType.Explicit)
    names = jax_ep.PartitionNames(hidden="data")
    layer = make_linen(
        group,
        shared_intermediate=6,
        partition_names=names,
        overlap="shared_expert",
        capacity_factor=4.0,
    )
    x = make_x()
    with jax.set_mesh(group.mesh):
        shardings = nn.get_sharding(jax.eval_shape(layer.init, jax.random.key(0), x), group.mesh)
        state = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
        params = state.pop("params")
        assert params["gate"].value.sharding.spec[:2] == ("expert", "data")
        assert len(params) == 7 and state["router_bias"]["bias"].shape == (E,)
        optimizer = optax.adamw(1e-2)

        @jax.jit
        def step(params, optimizer_state, state):
            def loss_fn(params):
                y, aux = layer.apply({"params": params, **state}, x)
                return jnp.mean(y**2) + 0.01 * aux.aux_loss, aux

            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            _, state = layer.apply(
                {"params": params, **state},
                aux.load,
                0.5,
                method="update_router_bias",
                mutable=["router_bias"],
            )
            return optax.apply_updates(params, updates), optimizer_state, state, loss, aux

        before, losses = params, []
        optimizer_state = optimizer.init(params)
        for _ in range(3):
            bias = np.asarray(state["router_bias"]["bias"])
            params, optimizer_state, state, loss, aux = step(params, optimizer_state, state)
            losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
    assert not any(same(before[name], params[name]) for name in before)
    want = bias + 0.5 * np.sign(np.mean(aux.load) - np.asarray(aux.load))
    np.testing.assert_array_equal(state["router_bias"]["bias"], want)


def test_linen_logical_names(native_backend):
    group = make_group(native_backend)
    layer = make_linen(
        group, partition_names=LOGICAL, with_partitioning=nn.with_logical_partitioning
    )
    shapes = jax.eval_shape(layer.init, jax.random.key(0), make_x())
    specs = nn.get_partition_spec(shapes)
    assert specs["params"]["up"] == P("exp", "embed", "mlp")
    shardings = nn.logical_to_mesh_sharding(specs, group.mesh, RULES)
    assert shardings["params"]["up"].spec == P("expert", "data", None)


# ---- both


def _of_moe(settings: dict | None = None) -> dict:
    of_moe = inspect.signature(jax_ep.moe).parameters
    return {n: value for n, value in (SETTINGS | (settings or {})).items() if n in of_moe}


def test_linen_with_the_weights_of_nnx(native_backend):
    group = make_group(native_backend)
    layer = make_nnx(group, shared_intermediate=6)
    layer.update_router_bias(jnp.arange(E), 0.1)
    weights = nnx.to_pure_dict(nnx.state(layer))
    bias = weights.pop("router_bias")
    variables = {"params": weights, "router_bias": {"bias": bias}}
    mask = jnp.arange(12).reshape(4, 3) < 9
    want = layer(make_x(), mask=mask)
    got = make_linen(group, shared_intermediate=6).apply(variables, make_x(), mask=mask)
    assert same(got, want) and want[1].load.sum() == 18


@pytest.mark.parametrize("flax", [jax_ep.nnx.MoE, jax_ep.linen.MoE])
def test_settings_are_those_of_moe(flax):
    """Layers have all options of ``moe``, with its names and defaults, and describe them."""
    of_moe = inspect.signature(jax_ep.moe).parameters
    of_layer = inspect.signature(flax.__init__).parameters
    for name, parameter in of_moe.items():
        of_call = ("x", "params", "mask", "router_inputs", "router_key", "routing")
        if name in of_call:  # not of the layer
            assert name == "params" or name in inspect.signature(flax.__call__).parameters
            continue
        if name in ("experts", "expert_specs"):  # a module of one's own makes their weights
            assert name not in of_layer and "experts=" in flax.__doc__
            continue
        assert of_layer[name].default == parameter.default, name
        assert f"    {name}: " in flax.__doc__, name
    assert "{settings}" not in flax.__doc__


@pytest.mark.parametrize("gated", [True, False])
def test_experts_with_biases_and_without_a_gate(gated, native_backend):
    """Biases start at zero and are trained; both modules have the same weights."""
    group = make_group(native_backend, AxisType.Explicit)
    settings = {"gated": gated, "expert_bias": True, "shared_intermediate": 6}
    settings["activation"] = jax_ep.clamped_swiglu() if gated else jax.nn.gelu
    x = make_x()
    with jax.set_mesh(group.mesh):
        layer, linen = make_nnx(group, **settings), make_linen(group, **settings)
        biases = ["gate_bias", "up_bias", "down_bias"][not gated :]
        assert all(not np.any(getattr(layer, name)[...]) for name in biases)
        assert (layer.gate is None) == (layer.gate_bias is None) == (not gated)
        assert (layer.shared_gate is None) == (not gated)
        assert layer.up_bias[...].sharding.spec == P("expert", None)
        optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
        grads = nnx.jit(nnx.grad(lambda layer, x: jnp.mean(layer(x)[0] ** 2)))(layer, x)
        optimizer.update(layer, grads)
        assert all(np.any(getattr(layer, name)[...]) for name in biases)
        weights = nnx.to_pure_dict(nnx.state(layer))
        bias = weights.pop("router_bias")
        shapes = jax.eval_shape(linen.init, jax.random.key(0), x)
        assert {name: boxed.value.shape for name, boxed in shapes["params"].items()} == {
            name: w.shape for name, w in weights.items()
        }
        specs = nn.get_partition_spec(shapes)["params"]
        assert specs["down_bias"] == P("expert", None)
        got = linen.apply({"params": weights, "router_bias": {"bias": bias}}, x)
        assert same(got, layer(x))
        assert same(got, jax_ep.moe(x, layer.params(), group=group, **_of_moe(settings)))


def test_no_bias_to_update():
    group = make_group("reference")
    with pytest.raises(
        ValueError, match=r"nnx.MoE.update_router_bias.*make it with router_bias=True"
    ):
        make_nnx(group, router_bias=False).update_router_bias(jnp.zeros(E))
    layer = make_linen(group, router_bias=False)
    with pytest.raises(ValueError, match=r"linen.MoE.update_router_bias.*router_bias=True"):
        layer.init(jax.random.key(0), jnp.zeros(E), method="update_router_bias")


def test_initial_weights():
    """Each expert has a fan-in of its own; the key decides."""
    layer = make_nnx(make_group("reference"), kernel_init=jax_ep.nnx.default_init)
    params = jax_ep.init_moe_params(
        jax.random.key(0), hidden=256, intermediate=64, num_experts=16, router_bias=True
    )
    for kernel, fan_in in ((params.gate, 256), (params.down, 64), (params.router_kernel, 256)):
        np.testing.assert_allclose(np.var(kernel) * fan_in, 1, rtol=0.05)
    assert not np.any(params.router_bias) and not np.array_equal(params.gate, params.up)
    assert not np.array_equal(layer.gate[...], layer.up[...])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"group": "expert"}, TypeError, "group: expected a Group, got str; .*create_group"),
        (
            {"num_experts": 5},
            ValueError,
            "num_experts: expected a positive multiple of the group's",
        ),
        ({"num_experts": 4.0}, TypeError, "num_experts: expected a Python int"),
        ({"top_k": 5}, ValueError, "top_k: expected 1 to 4 experts a token, got 5"),
    ],
)
def test_wrong_settings(settings, error, text):
    """The error comes before weights are made, where Flax would raise one of its own."""
    arguments = SETTINGS | {"group": make_group("reference")} | settings
    with pytest.raises(error, match=f"jax_ep.nnx.MoE: argument {text}"):
        jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **arguments)
    with pytest.raises(error, match=f"jax_ep.linen.MoE: argument {text}"):
        jax_ep.linen.MoE(H, F, **arguments).init(jax.random.key(0), make_x())
