"""``jax_ep.moe`` and the Flax layers inside a ``shard_map`` over other axes, as in a pipeline."""

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
from jax_ep._moe import nested
from test_moe import dense_moe

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K, TOKENS = 8, 4, 4, 2, 10
STAGES = ("stage", "expert")


def make_group(backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    mesh = spmd.make_mesh(spmd.fit((2, 2), STAGES), STAGES, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_params(stages: int) -> jax_ep.MoEParams:
    """Weights with a leading dimension of stages."""
    up, shared_up = (E, H, F), (H, 4)
    shapes = jax_ep.MoEParams(
        router_kernel=(H, E),
        gate=up,
        up=up,
        down=(E, F, H),
        shared=jax_ep.SharedExpert(shared_up, shared_up, (4, H)),
    )
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: leaf and isinstance(leaf[0], int))
    weights = [draw(seed, stages, *shape) / shape[-2] ** 0.5 for seed, shape in enumerate(leaves)]
    return jax.tree.unflatten(tree, weights)


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


def make_arguments(stages):
    """Tokens of each stage, a router that they share, their experts, and a mask for all."""
    params, mask = make_params(stages), np.arange(TOKENS) % 3 != 1
    experts = params._replace(router_kernel=np.zeros((stages, 1), np.float32))
    return draw(9, stages, TOKENS, H), params.router_kernel[0], experts, mask


@functools.cache
def gradients_of_dense(stages):
    *arguments, mask = make_arguments(stages)

    def dense(x, router_kernel, experts):
        def stage(x, experts):
            params = experts._replace(router_kernel=router_kernel)
            y, aux = dense_moe(x, params, router=routing.Router(), mask=mask)
            return y, *aux

        return jax.vmap(stage)(x, experts)

    return jax.device_get(gradients(dense)(*arguments))


@pytest.mark.parametrize(
    ("axis_type", "check_vma"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, True)],
    ids=str,
)
def test_gradients_are_those_of_dense_layers(axis_type, check_vma, native_backend):
    """Tokens and experts of each stage; a router that the stages share, whose gradients are summed.

    The backward pass plans nothing again and runs no expert twice.
    """
    group = make_group(native_backend, axis_type)
    stages = group.mesh.shape["stage"]
    x, kernel, experts, mask = make_arguments(stages)

    def layer(x, params, router_kernel):
        params = params._replace(router_kernel=router_kernel)
        return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, mask=mask)

    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
    arguments = (put(x, P("stage")), put(kernel, P()), put(experts, P("stage")))
    step = gradients(on_stages(group, layer, check_vma=check_vma))
    compiled = step.lower(*arguments).compile()
    (_, (y, load)), found = compiled(*arguments)
    if native_backend != "reference":
        targets = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine")
        counts = spmd.count_calls(compiled.as_text(), targets)
        assert counts == {"jax_ep_plan": 1, "jax_ep_dispatch": 2, "jax_ep_combine": 2}
    (_, (want_y, want_load)), want = gradients_of_dense(stages)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(load, want_load)
    assert np.abs(want[1]).max() > 0 and np.abs(want[2].gate).max() > 0
    for got, expected in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_pipeline_of_layers(native_backend):
    """Two stages of NNX layers, a scan over the steps of a pipeline, rematerialised blocks."""
    group = make_group(native_backend)
    stages, steps = group.mesh.shape["stage"], 3
    make = functools.partial(jax_ep.nnx.MoE, H, F, num_experts=E, top_k=K, group=group)
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    params = make_params(stages)._replace(shared=None)
    weights = {name: w for name, w in params._asdict().items() if w is not None}
    names = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def pipeline(weights, batches):
        own = jax.tree.map(lambda w: w[0], weights)

        @functools.partial(jax.checkpoint, policy=policy)
        def block(x, own):
            merged = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, own)))
            return x + merged(x)[0]

        def step(x, batch):
            x = jnp.where(jax.lax.axis_index("stage") == 0, batch, x)
            y = block(x, own)
            ring = [(i, (i + 1) % stages) for i in range(stages)]
            return jax.lax.ppermute(y, "stage", ring), y

        start = jax.lax.pcast(jnp.zeros_like(batches[0]), "stage", to="varying")
        return jax.lax.scan(step, start, batches)[1][None]

    run = jax.shard_map(
        pipeline,
        mesh=group.mesh,
        in_specs=(P("stage"), P()),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def dense(weights, batches):
        x = batches
        for stage in range(stages):
            own = jax_ep.MoEParams(**{name: w[stage] for name, w in weights.items()})
            y, _ = dense_moe(x.reshape(-1, H), own, router=routing.Router())
            x = x + y.reshape(x.shape)
        return x

    batches = draw(7, steps, 4, H)
    lag = stages - 1

    def loss(weights, batches):
        return jnp.sum(jnp.sin(run(weights, batches)[-1, lag:]))

    def dense_loss(weights, batches):
        return jnp.sum(jnp.sin(dense(weights, batches)[: steps - lag]))

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, batches)
    want = jax.jit(jax.grad(dense_loss, argnums=(0, 1)))(weights, batches)
    for got, expected in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_refused():
    """Of the layer, and of whatever runs inside."""
    group = make_group("reference")
    params = jax.tree.map(lambda w: w[0], make_params(1))

    def stage(x):
        return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K)[0]

    def smooth(x):
        specs = {"in_specs": (P("expert"),), "out_specs": P("expert")}
        return nested.nested_shard_map(jnp.sin, axes=("expert",), **specs)(x)

    specs = {"in_specs": P("stage"), "out_specs": P("stage")}
    x = draw(0, 8, H)
    for each in (stage, smooth):
        run = jax.shard_map(each, mesh=group.mesh, axis_names={"stage"}, **specs)
        with pytest.raises(
            TypeError, match=r"jax_ep.moe: inside a .*no forward mode .*reverse mode"
        ):
            jax.jit(lambda x, run=run: jax.jvp(run, (x,), (x,))).lower(x)


def test_axes_that_the_shard_map_has_entered():
    """They cannot be token axes or axes of the group."""
    group = make_group("reference")
    params = jax.tree.map(lambda w: w[0], make_params(1))
    x = draw(0, 8, H)

    def run(axis, **options):
        layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, **options)
        shard = functools.partial(jax.shard_map, mesh=group.mesh, axis_names={axis})
        spec = {"in_specs": P(axis), "out_specs": P(axis)}
        jax.eval_shape(shard(lambda x: layer(x, params)[0], **spec), x)

    run("stage")
    with pytest.raises(
        ValueError, match=r"token_axes: expected no axis that .*'stage'.*leave thes"
    ):
        run("stage", token_axes=STAGES)
    with pytest.raises(ValueError, match=r"group: .*outside shard_map over the axes of the group"):
        run("expert")


def test_second_derivatives():
    """A gradient of a gradient, with an integer argument and arrays without elements."""
    mesh = make_group("reference").mesh

    def inner(x, w, n):
        y = jnp.sin(x @ w) * n + jnp.sum(x[:0])
        return y, jax.lax.psum(jnp.sum(y * y), "expert"), n + 1

    specs = {"in_specs": (P("expert"), P(), P()), "out_specs": (P("expert"), P(), P())}

    def outer(x, w, n):
        y, total, _ = nested.nested_shard_map(inner, axes=("expert",), **specs)(x, w, n)
        return y, total[None]

    run = jax.shard_map(
        outer,
        mesh=mesh,
        in_specs=(P("stage"), P(), P()),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def plain(x, w, n):
        y = jnp.sin(x @ w) * n
        return y, jnp.sum((y * y).reshape(mesh.shape["stage"], -1), axis=1)

    def second(f):
        def first(x, w, n):
            y, totals = f(x, w, n)
            return jnp.sum(y**3) + 0.01 * jnp.sum(totals**2)

        gradient = jax.grad(first, argnums=(0, 1))
        return jax.grad(
            lambda *a: sum(jnp.sum(jnp.sin(0.1 * g)) for g in gradient(*a)), argnums=(0, 1)
        )

    arguments = (draw(1, 8, 4) / 2, draw(2, 4, 4) / 2, jnp.int32(2))
    found, want = (jax.jit(second(f))(*arguments) for f in (run, plain))
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
