"""Layers mapped over an axis of the mesh, as pipelines call their stages."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jax_ep
import spmd
from jax_ep import routing

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls layers with arrays of one process"),
]

H, F, E, S, STAGES = 8, 4, 4, 4, 2
SETTINGS = {"num_experts": E, "top_k": 2}


def make_group(backend: str) -> jax_ep.Group:
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((STAGES, 2), names), names, AxisType.Auto)
    if mesh.shape["stage"] != STAGES:
        pytest.skip("needs four devices: two stages of two ranks")
    return jax_ep.create_group(mesh, "expert", backend=backend)


def make_x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (STAGES, 7, H))


def check_stages(make_step, backend, arrays, mapped, rtol=1e-5, atol=1e-4):
    """Values and gradients are those of a plain ``vmap``, where nothing is shared.

    Args:
        make_step: ``(backend, in_axes, **of_vmap)`` to a function of the arrays to gradients and
            values; memoised, since the plain one serves all cases.
        backend: Of the group.
        arrays: Of all stages, by name.
        mapped: Names of those of which each stage has its own. Stages share the first element of the
            others, whose gradients are then sums over the stages.
        rtol: How near they are, relatively ...
        atol: ... and absolutely.
    """
    plain = make_step(backend, (0,) * len(arrays))
    in_axes = tuple(0 if name in mapped else None for name in arrays)

    def for_each_stage(share, array, axis):
        return array if axis == 0 else jax.tree.map(share, array)

    def all_arrays(share):
        return [for_each_stage(share, *pair) for pair in zip(arrays.values(), in_axes, strict=True)]

    repeated = all_arrays(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape))
    gradients, values = plain(*repeated)
    summed = {
        name: for_each_stage(lambda leaf: leaf.sum(0), gradients[name], axis)
        for name, axis in zip(arrays, in_axes, strict=True)
        if name in gradients
    }
    step = make_step(backend, in_axes, spmd_axis_name="stage")
    found = step(*all_arrays(lambda leaf: leaf[0]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((summed, values)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(summed))


def make_params() -> jax_ep.MoEParams:
    def make(key):
        sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": S}
        return jax_ep.init_moe_params(key, **sizes)

    return jax.vmap(make)(jax.random.split(jax.random.key(0), STAGES))


@functools.cache
def layer_step(backend, in_axes, **of_vmap):
    group = make_group(backend)

    def layer(x, params):
        options = {"overlap": "shared_expert", "capacity_factor": 1.0}
        return jax_ep.moe(x, params, group=group, **options, **SETTINGS)

    def loss(arrays):
        y, aux = jax.vmap(layer, in_axes=in_axes, **of_vmap)(arrays["x"], arrays["params"])
        return jnp.sum(y**2) + aux.aux_loss.sum(), (y, aux)

    step = jax.jit(jax.grad(loss, has_aux=True))
    return lambda x, params: step({"x": x, "params": params})


@pytest.mark.parametrize("mapped", [("x", "params"), ("x",), ("params",)], ids=" ".join)
def test_stages_on_an_axis_of_the_mesh(mapped, native_backend):
    """7 tokens, so some ranks have masked ones; with a bound on the rows, some are dropped."""
    check_stages(layer_step, native_backend, {"x": make_x(), "params": make_params()}, mapped)


def scaled_experts(rows, group_sizes, expert_of_row, params):
    up, down, scale = params
    scale = scale.at[expert_of_row].get(mode="fill", fill_value=0)
    inner = jnp.tanh(jax_ep.grouped_dot(rows, up, group_sizes)) * scale[:, None]
    return jax_ep.grouped_dot(inner, down, group_sizes)


@functools.cache
def experts_step(own, backend, in_axes, **of_vmap):
    group = make_group(backend)
    options = {"experts": scaled_experts} if own else {"activation": jax_ep.clamped_swiglu(0.8)}

    def loss(arrays):
        layer = functools.partial(jax_ep.moe, group=group, **options, **SETTINGS)
        y, aux = jax.vmap(layer, in_axes=in_axes, **of_vmap)(arrays["x"], arrays["params"])
        return jnp.sum(y**2) + aux.aux_loss.sum(), (y, aux)

    step = jax.jit(jax.grad(loss, has_aux=True))
    return lambda x, params: step({"x": x, "params": params})


@pytest.mark.parametrize("mapped", [("x", "params"), ("x",), ("params",)], ids=" ".join)
@pytest.mark.parametrize("own", [False, True])
def test_other_experts_on_an_axis_of_the_mesh(own, mapped, native_backend):
    """Experts with biases, and experts of the user's own."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (STAGES, *shape)) / 2  # noqa: E731
    params = make_params()._replace(shared=None)
    if own:
        weights = (draw(3, E, H, F), draw(4, E, F, H), draw(5, E))
        params = jax_ep.MoEParams(params.router_kernel, experts=weights)
    else:
        biases = {"gate_bias": draw(3, E, F), "up_bias": draw(4, E, F), "down_bias": draw(5, E, H)}
        params = params._replace(**biases)
    make_step = functools.partial(experts_step, own)
    check_stages(make_step, native_backend, {"x": make_x(), "params": params}, mapped)


@functools.cache
def router_step(backend, in_axes, **of_vmap):
    """Noise, both losses of the router, the logits of bfloat16 tokens, and routes taken again."""
    group, noisy = make_group(backend), routing.Router("sigmoid", noise_std=0.5)
    ask = {"sequence_loss": True, "return_routing": True}

    def layer(x, params):
        x = x.astype(jnp.bfloat16)
        noise = {"router": noisy, "router_key": jax.random.key(3)}
        _, aux = jax_ep.moe(x, params, group=group, **noise, **ask, **SETTINGS)
        routes = aux.routing._replace(topk_weights=aux.routing.topk_weights**2)
        y, again = jax_ep.moe(x, params, group=group, routing=routes, **ask, **SETTINGS)
        # The backward pass of the experts is in bfloat16, and tests of layers have seen it.
        weights = aux.routing.topk_weights.sum() + aux.z_loss + again.sequence_loss
        return jax.lax.stop_gradient(y.astype(jnp.float32)), weights

    def loss(kernel, arrays):
        params = arrays["params"]._replace(router_kernel=kernel)
        y, weights = jax.vmap(layer, in_axes=in_axes, **of_vmap)(arrays["x"], params)
        return weights.sum(), (y, weights)

    step = jax.jit(jax.grad(loss, has_aux=True))

    def run(x, params):
        d_kernel, values = step(params.router_kernel, {"x": x, "params": params})
        return {"params": d_kernel}, values

    return run


@pytest.mark.parametrize("mapped", [("x", "params"), ("x",), ("params",)], ids=" ".join)
def test_routers_on_an_axis_of_the_mesh(mapped, native_backend):
    """The gradient is that of the router's weights."""
    arrays = {"x": make_x(), "params": make_params()}
    # In bfloat16, whose last bit XLA may round in another way in another program (jaxlib 0.10.2 does).
    check_stages(router_step, native_backend, arrays, mapped, rtol=2**-6, atol=2**-5)


@functools.cache
def ops_step(backend, in_axes, **of_vmap):
    group, split = make_group(backend), jax.P("expert")

    def ops(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=E)
        return jax_ep.combine(jnp.sin(out.tokens), out.handle, group=group, weights=out.weights)

    def loss(arrays, idx):
        each = jax.shard_map(ops, mesh=group.mesh, in_specs=split, out_specs=split)
        y = jax.vmap(each, in_axes=in_axes, **of_vmap)(arrays["x"], idx, arrays["weights"])
        return jnp.sum(y**2), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    return lambda x, idx, weights: step({"x": x, "weights": weights}, idx)


@pytest.mark.parametrize("mapped", [("x", "idx", "weights"), ("x",), ("weights",)], ids=" ".join)
def test_ops_on_an_axis_of_the_mesh(mapped, backend):
    """Dispatch and combine with weights, whose gradients are rules of their own."""
    x, idx = make_x(), jnp.arange(STAGES * 8 * 2).reshape(STAGES, 8, 2) % E
    x = jnp.concatenate([x, x[:, :1]], axis=1)
    weights = jnp.linspace(0.5, 1.5, idx.size).reshape(idx.shape)
    check_stages(ops_step, backend, {"x": x, "idx": idx, "weights": weights}, mapped)


def test_flax_stages_on_an_axis_of_the_mesh():
    """``nnx.vmap`` and ``nn.vmap`` with an axis of the mesh can be traced."""
    group = make_group("reference")
    x = make_x()
    unnamed = {nnx.PARTITION_NAME: None}

    def run_nnx(x):
        @nnx.split_rngs(splits=STAGES)
        @nnx.vmap(transform_metadata=unnamed)
        def make(rngs):
            return jax_ep.nnx.MoE(H, F, group=group, rngs=rngs, **SETTINGS)

        settings = {"transform_metadata": unnamed, "spmd_axis_name": "stage"}
        run = nnx.vmap(lambda layer, x: layer(x)[0], **settings)
        return run(make(nnx.Rngs(0)), x)

    def run_linen(x):
        stages = nn.vmap(
            jax_ep.linen.MoE,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: None},
            spmd_axis_name="stage",
        )(H, F, group=group, **SETTINGS)
        return stages.init_with_output(jax.random.key(0), x)[0][0]

    for run in (run_nnx, run_linen):
        assert jax.eval_shape(run, x).shape == x.shape
