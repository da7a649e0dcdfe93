"""``jax_ep.moe`` against a dense layer on one device that knows nothing of ranks or rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")

H, F, E, K = 8, 12, 8, 2
GROUP_LIMITED = routing.Router("group_limited", num_groups=4, top_groups=2, scale=1.5)


def make_params(seed: int = 0, *, bias: bool = False, shared: bool = False, hidden: int = H):
    params = jax_ep.init_moe_params(
        jax.random.key(seed),
        hidden=hidden,
        intermediate=F,
        num_experts=E,
        shared_intermediate=6 if shared else None,
    )
    if bias:
        params = params._replace(router_bias=jnp.linspace(-0.2, 0.2, E))
    return params


def make_x(*shape: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnames=("router", "top_k"))
def dense_moe(x, params, *, router, top_k=K, mask=None):
    """Every expert for every token, weighted by the router (zero where it is not chosen)."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens.astype(jnp.float32) @ params.router_kernel
    routes = router(logits, top_k, params.router_bias)
    used = routes.topk_idx if mask is None else jnp.where(mask.reshape(-1, 1), routes.topk_idx, -1)
    y = 0.0
    for expert in range(params.gate.shape[0]):
        up = jax.nn.silu(tokens @ params.gate[expert]) * (tokens @ params.up[expert])
        weight = jnp.where(used == expert, routes.topk_weights, 0.0).sum(1)
        y += weight[:, None] * (up @ params.down[expert])
    if params.shared is not None:
        gate, up, down = params.shared
        shared = (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down
        y += shared if mask is None else jnp.where(mask.reshape(-1, 1), shared, 0)
    load = (used.reshape(-1, 1) == jnp.arange(params.gate.shape[0])).sum(0)
    aux_loss = routing.load_balancing_loss(used, routes.scores)
    return y.reshape(x.shape), (aux_loss, load)


def objective(layer, x, params):
    """A loss of output and auxiliary loss that depends on every weight."""
    y, aux = layer(x, params)
    target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * target) + aux[0], (y, aux)


def check_same(layer, dense, x, params, *, mesh, tolerance=1e-5):
    """Outputs, statistics and gradients of ``layer``, on ``mesh``, are those of ``dense``."""

    def step(f):
        return jax.value_and_grad(functools.partial(objective, f), argnums=(0, 1), has_aux=True)

    (_, (y, aux)), gradients = spmd.whole_jit(step(layer), mesh)(x, params)
    (_, (want_y, want_aux)), want_gradients = jax.device_get(jax.jit(step(dense))(x, params))
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(y, want_y)
    close(aux[0], want_aux[0])
    np.testing.assert_array_equal(aux[1], want_aux[1])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(gradients)]
    for name, got, want in zip(
        names, *map(jax.tree.leaves, (gradients, want_gradients)), strict=True
    ):
        assert "router_bias" in name or np.abs(want).max() > 0, name
        close(got, want, err_msg=name)
    return aux


MESHES = {
    "expert": ((4,), ("expert",), "expert", AxisType.Auto),
    "data-expert": ((2, 2), ("data", "expert"), "expert", AxisType.Explicit),
    "expert-data": ((2, 2), ("expert", "data"), "expert", AxisType.Auto),
    "with-model": ((2, 2, 2), ("data", "expert", "model"), "expert", AxisType.Explicit),
    "two-axes": ((2, 2), ("outer", "inner"), ("outer", "inner"), AxisType.Auto),
}


def make_group(mesh: str, backend: str) -> jax_ep.Group:
    sizes, names, axis, axis_type = MESHES[mesh]
    # The experts are a multiple of two ranks and of four, not of three.
    sizes = tuple(2 if size == 3 else size for size in spmd.fit(sizes, names, axis))
    return spmd.create_group(spmd.make_mesh(sizes, names, axis_type), axis, backend=backend)


@pytest.mark.parametrize(
    ("mesh", "router", "bias", "shared", "overlap"),
    [
        ("expert", routing.Router("softmax"), False, False, None),
        ("data-expert", routing.Router("sigmoid", scale=2.0), True, True, "shared_expert"),
        ("expert-data", GROUP_LIMITED, True, True, None),
        ("with-model", routing.Router("softmax", renormalize=False), False, True, None),
        ("two-axes", routing.Router("softmax"), False, False, None),
    ],
)
def test_same_as_dense(mesh, router, bias, shared, overlap, native_backend):
    """15 tokens: on every mesh some rank has a masked one."""
    group = make_group(mesh, native_backend)
    layer = functools.partial(
        jax_ep.moe, group=group, num_experts=E, top_k=K, router=router, overlap=overlap
    )
    dense = functools.partial(dense_moe, router=router)
    params = make_params(bias=bias, shared=shared)
    aux = check_same(layer, dense, make_x(3, 5, H), params, mesh=group.mesh)
    assert aux[1].sum() == 15 * K and aux[2] == 0 and aux[3] == 0


@by_itself
def test_sharded_over_explicit_axes(backend):
    """x split over two axes and weights over a third dimension; results keep the type of x."""
    group = make_group("data-expert", backend)
    params, x = make_params(shared=True), make_x(4, 6, H)
    names = jax_ep.PartitionNames(hidden="data")
    specs = jax_ep.moe_partition_specs(params, group=group, names=names)
    router = routing.Router()
    want = dense_moe(x, params, router=router)
    with jax.set_mesh(group.mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
        x, params = put(x, P("data", "expert")), jax.tree.map(put, params, specs)

        def loss(x, params):
            y, aux = jax_ep.moe(x, params, group=group, num_experts=E, top_k=K)
            return jnp.sum(y * y), (y, aux)

        (_, (y, aux)), (d_x, d_params) = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        )(x, params)
    assert jax.typeof(y) == jax.typeof(x) == jax.typeof(d_x)
    assert jax.tree.map(jax.typeof, d_params) == jax.tree.map(jax.typeof, params)
    np.testing.assert_allclose(y, want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux.aux_loss, want[1][0], rtol=1e-5)


@by_itself
def test_outside_jit_and_one_token(native_backend):
    group = make_group("expert", native_backend)
    params, x = make_params(), make_x(H)
    y, aux = jax_ep.moe(x, params, group=group, num_experts=E, top_k=K)
    want, _ = dense_moe(x, params, router=routing.Router())
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert aux.load.sum() == K
    none, aux = jax_ep.moe(make_x(0, 3, H), params, group=group, num_experts=E, top_k=K)
    assert none.shape == (0, 3, H) and aux.load.sum() == 0 and aux.aux_loss == 0


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_scan_over_checkpointed_layers(axis_type, native_backend):
    axes = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), axes), axes, axis_type)
    group = spmd.create_group(mesh, backend=native_backend)
    router = routing.Router()
    names = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def network(layer, x, params):
        def block(x, params):
            y, aux = layer(x, params)
            return x + y, tuple(aux[:2])

        x, (losses, loads) = jax.lax.scan(jax.checkpoint(block, policy=policy), x, params)
        return x, (losses.sum(), loads.sum(0))

    stacked = jax.tree.map(lambda *a: jnp.stack(a), make_params(0), make_params(1), make_params(2))
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K)
    check_same(
        functools.partial(network, layer),
        functools.partial(network, functools.partial(dense_moe, router=router)),
        make_x(2, 3, H),
        stacked,
        mesh=mesh,
        tolerance=1e-4,
    )


@by_itself
def test_checkpoint_saves_the_routes(native_backend):
    """With the names saved, the backward pass plans nothing again."""
    if native_backend == "reference":
        pytest.skip("counts the calls of native kernels")
    group = make_group("data-expert", native_backend)
    names = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(x, params):
        layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K)
        return jnp.sum(jax.checkpoint(layer, policy=policy)(x, params)[0] ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(make_x(8, H), make_params()).compile()
    targets = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine")
    counts = spmd.count_calls(compiled.as_text(), targets)
    assert counts == {"jax_ep_plan": 1, "jax_ep_dispatch": 2, "jax_ep_combine": 2}


def test_bfloat16_compute(native_backend):
    """Weights stay float32, the router sees float32, outputs and d(x) are bfloat16.

    Values and gradients are those of a layer in float32, as far as bfloat16 goes.
    """
    group = make_group("data-expert", native_backend)
    params, x = make_params(shared=True), make_x(24, H).astype(jnp.bfloat16)
    router = routing.Router()

    def step(x, params):
        def loss(x, params):
            y, aux = jax_ep.moe(x, params, group=group, num_experts=E, top_k=K)
            return jnp.sum(y.astype(jnp.float32) ** 2), (y, aux)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)

    (_, (y, aux)), (d_x, d_params) = spmd.whole_jit(step, group.mesh)(x, params)
    assert y.dtype == d_x.dtype == jnp.bfloat16 and d_params.gate.dtype == jnp.float32

    def dense_loss(x, params):
        y, aux = dense_moe(x, params, router=router)
        return jnp.sum(y**2), (y, aux)

    dense = jax.jit(jax.grad(dense_loss, argnums=(0, 1), has_aux=True))
    want_gradients, (want, (aux_loss, load)) = dense(x.astype(jnp.float32), params)
    np.testing.assert_array_equal(aux.load, load)
    np.testing.assert_allclose(aux.aux_loss, aux_loss, rtol=1e-5)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0.05, atol=0.02)
    pairs = zip(*map(jax.tree.leaves, ((d_x, d_params), want_gradients)), strict=True)
    for got, want in pairs:
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(np.float32(got), want, rtol=0.05, atol=0.02 * scale)


def test_mask(native_backend):
    """A masked token gives zero, also from the shared expert, and has no part in the statistics."""
    group = make_group("data-expert", native_backend)
    params, x = make_params(shared=True), make_x(3, 5, H)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    router = routing.Router()
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, mask=mask)
    dense = functools.partial(dense_moe, router=router, mask=mask)
    aux = check_same(layer, dense, x, params, mesh=group.mesh)
    assert aux[1].sum() == K * mask.sum()


def to_experts(*experts: int):
    """A router that sends every token to the same experts."""

    def router(logits, bias):
        idx = jnp.broadcast_to(jnp.array(experts, jnp.int32), (logits.shape[0], len(experts)))
        weights = jnp.full(idx.shape, 0.5)
        return routing.Routing(idx, weights, jax.nn.softmax(logits))

    return router


def test_drops_and_invalid_entries_are_counted_once(native_backend):
    """12 tokens on a data x expert x model mesh; ranks along "model" hold copies, not more tokens."""
    group = make_group("with-model", native_backend)
    layer = functools.partial(
        jax_ep.moe,
        group=group,
        num_experts=E,
        top_k=3,
        router=to_experts(1, 6, 6),
        capacity_factor=1.0,
    )
    y, aux = spmd.whole_jit(layer, group.mesh)(make_x(12, H), make_params())
    # In each group of the mesh, each expert keeps R T K / E rows; every token wants two experts.
    groups = group.mesh.shape["data"]
    room = -(-12 * 3 // (E * groups))
    assert room < 12 // groups
    np.testing.assert_array_equal(aux.load, [0, 12, 0, 0, 0, 0, 12, 0])
    assert aux.num_dropped == 2 * (12 - groups * room) and aux.num_invalid == 12
    kept = np.abs(np.asarray(y)).max(axis=1) > 0
    assert kept.sum() == groups * room


def test_fp8_is_close(native_backend):
    group = make_group("expert", native_backend)
    params, x = make_params(hidden=128), make_x(16, 128)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K)
    exact, _ = spmd.whole_jit(layer, group.mesh)(x, params)

    def loss(x, params):
        y, _ = layer(x, params, quantization="fp8", scale_format="ue8m0")
        return jnp.sum(y * y), y

    d_x, y = spmd.whole_jit(jax.grad(loss, has_aux=True), group.mesh)(x, params)
    assert 0 < np.abs(y - exact).max() < 0.1 * np.abs(exact).max()
    assert np.isfinite(d_x).all() and np.abs(d_x).max() > 0


@by_itself
def test_replaceable_parts(native_backend):
    """Another grouped matmul with an alignment, another activation."""
    group = make_group("expert", native_backend)
    params, x = make_params(), make_x(12, H)
    sizes = []

    def dot(lhs, rhs, group_sizes):
        sizes.append(lhs.shape[0])
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    layer = functools.partial(
        jax_ep.moe, x, group=group, num_experts=E, top_k=K, activation=jnp.tanh
    )
    want, _ = layer(params)
    got, _ = layer(params, grouped_dot=dot, alignment=16)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    silu, _ = layer(params, activation=jax.nn.silu)
    assert len(sizes) == 3 and sizes[0] % 16 == 0 and np.abs(silu - want).max() > 1e-3


@by_itself
def test_partition_specs():
    group = make_group("two-axes", "reference")
    params = make_params(bias=True, shared=True)
    specs = jax_ep.moe_partition_specs(params, group=group)
    assert specs.gate == specs.up == specs.down == P(("outer", "inner"), None, None)
    assert specs.router_bias == P(None) and specs.shared.down == P(None, None)
    names = jax_ep.PartitionNames("x", "y", "z")
    specs = jax_ep.moe_partition_specs(make_params(), group=group, names=names)
    assert specs.up == P("x", "y", "z") and specs.down == P("x", "z", "y")
    assert specs.router_kernel == P("y", None) and specs.shared is specs.router_bias is None
    put = jax.device_put(params, NamedSharding(group.mesh, P()))
    assert jax.tree.structure(put) == jax.tree.structure(params)
