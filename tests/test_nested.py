"""``jax_ep.moe`` and the Flax layers inside a ``shard_map`` over other axes, as of a pipeline."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing
from test_moe import dense_moe

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K, TOKENS = 8, 12, 8, 2, 10
STAGES = ("stage", "expert")


def make_group(backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    mesh = spmd.make_mesh(spmd.fit((2, 2), STAGES), STAGES, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def make_params(stages: int) -> jax_ep.MoEParams:
    """Weights with a leading dimension of stages."""
    init = functools.partial(
        jax_ep.init_moe_params, hidden=H, intermediate=F, num_experts=E, shared_intermediate=4
    )
    return jax.vmap(init)(jax.random.split(jax.random.key(0), stages))


def make_x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*shape, H))


def on_stages(group, layer, *, check_vma=True):
    """``layer`` of what each stage has; all arguments but the second are split over the stages."""

    def stage(x, router_kernel, experts):
        y, aux = layer(x[0], jax.tree.map(lambda w: w[0], experts), router_kernel)
        return y[None], aux.aux_loss[None], aux.load[None]

    return jax.shard_map(
        stage,
        mesh=group.mesh,
        in_specs=(P("stage"), P(), P("stage")),
        out_specs=P("stage"),
        axis_names={"stage"},
        check_vma=check_vma,
    )


def objective(run, x, router_kernel, experts):
    y, aux_loss, load = run(x, router_kernel, experts)
    target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * target) + jnp.sum(aux_loss * jnp.arange(1, 1 + len(x))), (y, load)


def gradients(run):
    step = functools.partial(objective, run)
    return jax.jit(jax.value_and_grad(step, argnums=(0, 1, 2), has_aux=True))


def moe_of(group, x, params, router_kernel):
    params = params._replace(router_kernel=router_kernel)
    return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K)


@pytest.mark.parametrize(
    ("axis_type", "check_vma"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, True)],
    ids=str,
)
def test_gradients_are_those_of_dense_layers(axis_type, check_vma, native_backend):
    """Tokens and experts of each stage; a router that the stages share, whose gradients are summed.

    10 tokens and a mask: some are added, and some ranks have none.
    """
    group = make_group(native_backend, axis_type)
    stages = group.mesh.shape["stage"]
    x, params = make_x(stages, TOKENS), make_params(stages)
    kernel, mask = params.router_kernel[0], jnp.arange(TOKENS) % 3 != 1
    experts = params._replace(router_kernel=jnp.zeros((stages, 0)))

    def layer(x, params, router_kernel):
        params = params._replace(router_kernel=router_kernel)
        return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, mask=mask)

    def dense(x, router_kernel, experts):
        ys, losses, loads = [], [], []
        for stage in range(stages):
            one = jax.tree.map(lambda w, stage=stage: w[stage], experts)
            one = one._replace(router_kernel=router_kernel)
            y, (loss, load) = dense_moe(x[stage], one, router=routing.Router(), mask=mask)
            ys, losses, loads = [*ys, y], [*losses, loss], [*loads, load]
        return jnp.stack(ys), jnp.stack(losses), jnp.stack(loads)

    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
    arguments = (put(x, P("stage")), put(kernel, P()), put(experts, P("stage")))
    (_, (y, load)), found = gradients(on_stages(group, layer, check_vma=check_vma))(*arguments)
    (_, (want_y, want_load)), want = gradients(dense)(x, kernel, experts)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(load, want_load)
    assert np.abs(want[1]).max() > 0 and np.abs(want[2].gate).max() > 0
    for got, expected in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
