"""Layers mapped over an axis of the mesh, as pipelines call their stages."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jax_ep
import spmd

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


def check_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want[0]))


def test_stages_on_an_axis_of_the_mesh(native_backend):
    """Values and gradients are those of a plain ``vmap``; 7 tokens, so some ranks have masked ones."""
    group = make_group(native_backend)

    def make(key):
        sizes = {"hidden": H, "intermediate": F, "num_experts": E, "shared_intermediate": S}
        return jax_ep.init_moe_params(key, **sizes)

    params = jax.vmap(make)(jax.random.split(jax.random.key(0), STAGES))

    def run(**of_vmap):
        def layer(x, params):
            return jax_ep.moe(x, params, group=group, overlap="shared_expert", **SETTINGS)

        def loss(x, params):
            y, aux = jax.vmap(layer, **of_vmap)(x, params)
            return jnp.sum(y**2) + aux.aux_loss.sum(), (y, aux)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(make_x(), params)

    check_close(run(spmd_axis_name="stage"), run())


def test_ops_on_an_axis_of_the_mesh(backend):
    """The same for dispatch and combine with weights, which have custom gradients."""
    group = make_group(backend)
    x, idx = make_x(), jnp.arange(STAGES * 8 * 2).reshape(STAGES, 8, 2) % E
    x = jnp.concatenate([x, x[:, :1]], axis=1)
    weights = jnp.linspace(0.5, 1.5, idx.size).reshape(idx.shape)
    split = jax.P("expert")

    def ops(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=E)
        return jax_ep.combine(jnp.sin(out.tokens), out.handle, group=group, weights=out.weights)

    def run(**of_vmap):
        def loss(x, weights):
            each = jax.shard_map(ops, mesh=group.mesh, in_specs=split, out_specs=split)
            y = jax.vmap(each, **of_vmap)(x, idx, weights)
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, weights)

    check_close(run(spmd_axis_name="stage"), run())


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
