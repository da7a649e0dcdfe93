"""Noise on the logits of a router: what it is, and that ranks, meshes and chunks do not change it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep import routing
from jax_ep._core import noise
from test_moe import dense_moe

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K, STD = 8, 4, 8, 2, 0.5
NOISY = routing.Router("sigmoid", noise_std=STD)


def make_params() -> jax_ep.MoEParams:
    params = jax_ep.init_moe_params(
        jax.random.key(0), hidden=H, intermediate=F, num_experts=E, shared_intermediate=4
    )
    return params._replace(router_bias=jnp.linspace(-0.1, 0.1, E))


def make_x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*shape, H))


def make_group(
    backend: str, sizes: tuple[int, int] = (2, 2), axis_type: AxisType = AxisType.Auto
) -> jax_ep.Group:
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit(sizes, names), names, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def layer_of(group: jax_ep.Group, **options):
    settings = {"num_experts": E, "top_k": K, "router": NOISY} | options
    return functools.partial(jax_ep.moe, group=group, **settings)


# ---- alone


def noise_of(seed, token_idx, experts=64):
    zeros = jnp.zeros((len(token_idx), experts))
    return np.asarray(noise.add_noise(zeros, seed, jnp.asarray(token_idx), 1.0, experts))


def test_numbers_are_normal_and_differ():
    found = noise_of(noise.seed_of(jax.random.key(0)), np.arange(1000))
    assert abs(found.mean()) < 0.02 and abs(found.std() - 1) < 0.02
    assert abs(np.mean(found**3)) < 0.1 and abs(np.mean(found**4) - 3) < 0.2
    assert len(np.unique(found)) > 0.99 * found.size  # float32 has few numbers near zero
    close = np.corrcoef(found[:-1].reshape(-1), found[1:].reshape(-1))[0, 1]
    assert abs(close) < 0.02
    other = noise_of(noise.seed_of(jax.random.key(1)), np.arange(1000))
    assert abs(np.corrcoef(found.reshape(-1), other.reshape(-1))[0, 1]) < 0.02


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg", "raw"])
def test_a_token_has_its_noise_wherever_it_is(impl):
    """It follows from key, token and expert alone, also with keys whose numbers depend on a batch."""
    key = jax.random.PRNGKey(3) if impl == "raw" else jax.random.key(3, impl=impl)
    seed = noise.seed_of(key)
    whole = noise_of(seed, np.arange(24))
    np.testing.assert_array_equal(noise_of(seed, np.array([17, 5])), whole[[17, 5]])
    padded = noise.add_noise(jnp.zeros((24, E)), seed, jnp.arange(24), 2.0, 6)
    np.testing.assert_array_equal(padded[:, :6], 2 * noise_of(seed, np.arange(24), 6))
    assert not np.any(padded[:, 6:])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "group_limited"])
def test_a_router_scores_noisy_logits(kind):
    """Choice, weights and scores are those of the logits with noise; without a key there is none."""
    grouped = {"num_groups": 3, "top_groups": 2} if kind == "group_limited" else {}
    logits, bias = make_x(16)[:, :E], jnp.linspace(-0.1, 0.1, E)
    router = routing.Router(kind, noise_std=STD, **grouped)
    plain = routing.Router(kind, **grouped)
    key, token_idx = jax.random.key(7), jnp.arange(100, 116)
    for used in (E, 6):
        call = {"num_used_experts": used}
        seen = noise.add_noise(logits, noise.seed_of(key), token_idx, STD, used)
        if used == E and grouped:
            continue  # 8 experts make no 3 groups
        got = router(logits, K, bias, key=key, token_idx=token_idx, **call)
        want = plain(seen, K, bias, **call)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        without = router(logits, K, bias, **call)
        for a, b in zip(without, plain(logits, K, bias, **call), strict=True):
            np.testing.assert_array_equal(a, b)
        assert np.any(without.topk_idx != got.topk_idx)
        counted = router(logits, K, bias, key=key, **call)
        from_zero = router(logits, K, bias, key=key, token_idx=jnp.arange(16), **call)
        np.testing.assert_array_equal(counted.scores, from_zero.scores)


# ---- in the layer


@pytest.mark.parametrize(
    ("sizes", "axis_type", "options"),
    [
        ((1, 2), AxisType.Auto, {}),
        ((2, 4), AxisType.Auto, {}),
        ((2, 2), AxisType.Explicit, {"overlap": "chunks"}),
        ((2, 2), AxisType.Auto, {"token_axes": ("expert", "data")}),
    ],
)
def test_routes_are_those_of_one_device(sizes, axis_type, options, native_backend):
    """Values, routes and gradients, whatever the mesh: those of a dense layer with this noise."""
    group = make_group(native_backend, sizes, axis_type)
    params, x, key = make_params(), make_x(3, 5), jax.random.key(5)
    layer = layer_of(group, return_routing=True, **options)

    def objective(run, x, params):
        y, aux_loss, rest = run(x, params)
        target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * target) + aux_loss, (y, rest)

    def sharded(x, params):
        y, aux = layer(x, params, router_key=key)
        return y, aux.aux_loss, aux

    def dense(x, params):
        y, (aux_loss, load) = dense_moe(x, params, router=functools.partial(NOISY, key=key))
        return y, aux_loss, load

    gradients, (y, aux) = jax.jit(
        jax.grad(functools.partial(objective, sharded), argnums=(0, 1), has_aux=True)
    )(x, params)
    want_gradients, (want, load) = jax.grad(
        functools.partial(objective, dense), argnums=(0, 1), has_aux=True
    )(x, params)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux.load, load)
    logits = x.reshape(-1, H) @ params.router_kernel
    routes = NOISY(logits, K, params.router_bias, key=key)
    np.testing.assert_array_equal(aux.routing.topk_idx.reshape(-1, K), routes.topk_idx)
    np.testing.assert_allclose(aux.routing.scores.reshape(-1, E), routes.scores, rtol=1e-5)
    # Logits and the z-loss are those before noise.
    np.testing.assert_allclose(aux.logits.reshape(-1, E), logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux.z_loss, routing.router_z_loss(logits), rtol=1e-5)
    for got, expected in zip(*map(jax.tree.leaves, (gradients, want_gradients)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    quiet = NOISY(logits, K, params.router_bias)
    assert np.any(quiet.topk_idx != routes.topk_idx)


def test_no_key_is_evaluation(native_backend):
    """The same bits as those of a router without noise."""
    group, params, x = make_group(native_backend), make_params(), make_x(4, 4)
    found = layer_of(group)(x, params)
    want = layer_of(group, router=routing.Router("sigmoid"))(x, params)
    noisy = layer_of(group)(x, params, router_key=jax.random.key(0))
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(noisy[0] != want[0])


def test_mask_and_experts_that_do_not_exist(native_backend):
    """A mask moves no noise to another token; six of eight experts get that of six."""
    params, x, key = make_params(), make_x(3, 5), jax.random.key(2)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    layer = layer_of(make_group(native_backend), return_routing=True)
    whole = layer(x, params, router_key=key)[1].routing
    masked = layer(jnp.where(mask[..., None], x, jnp.nan), params, router_key=key, mask=mask)[1]
    idx = jnp.where(mask[..., None], whole.topk_idx, -1)
    np.testing.assert_array_equal(masked.routing.topk_idx, idx)
    six = layer(x, params, router_key=key, num_used_experts=6)[1].routing
    logits = (x.reshape(-1, H) @ params.router_kernel)[:, :6]
    want = NOISY(logits, K, params.router_bias[:6], key=key)
    np.testing.assert_array_equal(six.topk_idx.reshape(-1, K), want.topk_idx)
    np.testing.assert_allclose(six.scores.reshape(-1, E)[:, :6], want.scores, rtol=1e-5)
    assert not np.any(six.scores[..., 6:])


def test_scan_and_remat(native_backend):
    """Each step has a key of its own, and the pass that is computed again has the same noise."""
    layer = layer_of(make_group(native_backend))
    params, x, keys = make_params(), make_x(3, 5), jax.random.split(jax.random.key(1), 3)

    def network(run, x, params):
        def body(x, key):
            y, load = run(x, params, key)
            return x + y, load

        return jax.lax.scan(body, x, keys)

    def sharded(x, params, key):
        @jax.checkpoint
        def block(x, params, key):
            y, aux = layer(x, params, router_key=key)
            return y, aux.load

        return block(x, params, key)

    def dense(x, params, key):
        y, (_, load) = dense_moe(x, params, router=functools.partial(NOISY, key=key))
        return y, load

    def step(run):
        def loss(x, params):
            y, loads = network(run, x, params)
            return jnp.sum(jnp.sin(y)), loads

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params)

    found, loads = step(sharded)
    want, want_loads = step(dense)
    np.testing.assert_array_equal(loads, want_loads)
    assert np.any(want_loads[0] != want_loads[1])
    for got, expected in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        atol = 1e-5 * max(np.abs(expected).max(), 1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol)


def test_inside_an_outer_shard_map(native_backend):
    """The key of a stage is its own if the caller folds the stage into it; gradients are right."""
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names)
    group = jax_ep.create_group(mesh, "expert", backend=native_backend)
    stages, params, key = mesh.shape["stage"], make_params(), jax.random.key(4)
    x = make_x(stages, 6)

    def stage(x, kernel):
        own = jax.random.fold_in(key, jax.lax.axis_index("stage"))
        given = params._replace(router_kernel=kernel)
        y, aux = layer_of(group)(x[0], given, router_key=own)
        return y[None], aux.load[None]

    run = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(P("stage"), P()),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def dense(x, kernel):
        given = params._replace(router_kernel=kernel)
        found = []
        for index, part in enumerate(x):
            router = functools.partial(NOISY, key=jax.random.fold_in(key, index))
            y, (_, load) = dense_moe(part, given, router=router)
            found.append((y, load))
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def step(f):
        def loss(x, kernel):
            y, load = f(x, kernel)
            return jnp.sum(jnp.sin(y)), load

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, params.router_kernel)

    (found, load), (want, want_load) = step(run), step(dense)
    np.testing.assert_array_equal(load, want_load)
    for got, expected in zip(found, want, strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_flax_layers(native_backend):
    """nnx takes a key; linen takes one too, or makes one from its stream "router"."""
    group, x, key = make_group(native_backend), make_x(4, 4), jax.random.key(9)
    settings = {"num_experts": E, "top_k": K, "group": group, "router": NOISY}
    layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
    variables = {"params": nnx.to_pure_dict(nnx.state(layer))}
    of_linen = jax_ep.linen.MoE(H, F, **settings)
    quiet = jax_ep.moe(x, layer.params(), **settings)[0]
    noisy = jax_ep.moe(x, layer.params(), router_key=key, **settings)[0]
    assert np.any(quiet != noisy)
    same = np.testing.assert_array_equal
    same(layer(x)[0], quiet)
    same(layer(x, router_key=key)[0], noisy)
    same(of_linen.apply(variables, x)[0], quiet)
    same(of_linen.apply(variables, x, router_key=key)[0], noisy)
    streamed = of_linen.apply(variables, x, rngs={"router": key})[0]
    assert np.any(streamed != quiet)
    same(streamed, of_linen.apply(variables, x, rngs={"router": key})[0])
    other = of_linen.apply(variables, x, rngs={"router": jax.random.key(10)})[0]
    assert np.any(other != streamed)
    # A stream is no error where there is nothing to do with it.
    plain = jax_ep.linen.MoE(H, F, **settings | {"router": "sigmoid"})
    same(plain.apply(variables, x, rngs={"router": key})[0], quiet)


def by_logits(logits, bias):
    return routing.softmax_top_k(logits, K)


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"router": "softmax", "router_key": KEY}, ValueError, "None with a router without noise,"),
        ({"router": by_logits, "router_key": KEY}, ValueError, "None with a router without noise,"),
        ({"router_key": 3}, TypeError, r"a key of jax.random, got int; make one with jax.random.k"),
        ({"router_key": jnp.ones(2)}, TypeError, "a key of jax.random, got float32; make"),
        ({"router_key": jax.random.split(KEY)}, ValueError, r"one key, got shape \(2,\); choose"),
    ],
)
def test_wrong_keys(arguments, error, text):
    layer = layer_of(make_group("reference"))
    with pytest.raises(error, match=f"jax_ep.moe: argument router_key: expected {text}"):
        layer(make_x(4), make_params(), **arguments)


def test_a_key_on_other_devices():
    layer = layer_of(make_group("reference"))
    with pytest.raises(ValueError, match=r"argument router_key: expected an array on the mesh of"):
        layer(make_x(4), make_params(), router_key=jax.device_put(KEY, jax.devices()[1]))


@pytest.mark.parametrize(
    ("std", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), ("0.1", TypeError), (True, TypeError)],
)
def test_wrong_deviations(std, error):
    with pytest.raises(error, match=r"routing.Router: argument noise_std: expected a finite num"):
        routing.Router(noise_std=std)


def test_a_key_for_a_router_without_noise():
    with pytest.raises(ValueError, match=r"routing.Router: argument key: expected None without no"):
        routing.Router()(jnp.zeros((4, E)), K, key=KEY)
