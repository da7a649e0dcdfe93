"""Routes that ``jax_ep.moe`` gives back, and routes that it is given in place of its router's."""

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

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K = 8, 4, 8, 2


def make_params() -> jax_ep.MoEParams:
    params = jax_ep.init_moe_params(
        jax.random.key(0), hidden=H, intermediate=F, num_experts=E, shared_intermediate=4
    )
    return params._replace(router_bias=jnp.linspace(-0.1, 0.1, E))


def make_x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*shape, H))


def make_group(backend: str, axis_type: AxisType = AxisType.Auto) -> jax_ep.Group:
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names, axis_type)
    return jax_ep.create_group(mesh, "expert", backend=backend)


def layer_of(group: jax_ep.Group, **options):
    return functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, **options)


def same(found, want) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def make_routing(*batch: int, dtype: str = "float32") -> routing.Routing:
    """Routes that no router would give: some tokens have one expert, one token none."""
    rng = np.random.default_rng(3)
    idx = np.argsort(rng.random((*batch, E)), axis=-1)[..., :K].astype(np.int8)
    idx.reshape(-1, K)[::3, 1] = -1
    idx.reshape(-1, K)[1] = -1
    weights = rng.uniform(0.5, 1, idx.shape).astype(np.float32)
    scores = rng.random((*batch, E)).astype(np.float32)
    return routing.Routing(*map(jnp.asarray, (idx, weights, scores)))


def dense(x, params, routes, mask=None):
    """Output and load-balancing loss of given routes, on one device."""
    tokens, (idx, weights, scores) = x.reshape(-1, H), (a.reshape(-1, a.shape[-1]) for a in routes)
    idx = idx.astype(jnp.int32)
    idx = idx if mask is None else jnp.where(mask.reshape(-1, 1), idx, -1)
    y = 0.0
    for expert in range(E):
        up = jax.nn.silu(tokens @ params.gate[expert]) * (tokens @ params.up[expert])
        weight = jnp.where(idx == expert, weights, 0.0).sum(axis=1)
        y += weight[:, None] * (up @ params.down[expert])
    gate, up, down = params.shared
    y += (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down
    if mask is not None:
        y = jnp.where(mask.reshape(-1, 1), y, 0)
    return y.reshape(x.shape), routing.load_balancing_loss(idx, scores)


# ---- given back


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 4), (7,), ()])
def test_routes_given_back(shape, axis_type, native_backend):
    """They have the shape of the batch, also where the mesh pads it, and are the router's."""
    group, params, x = make_group(native_backend, axis_type), make_params(), make_x(*shape)
    router = routing.Router("sigmoid", scale=1.5)
    layer = layer_of(group, router=router)
    y, aux = layer(x, params, return_routing=True)
    assert aux.routing.topk_idx.shape == aux.routing.topk_weights.shape == (*shape, K)
    assert aux.routing.scores.shape == aux.logits.shape == (*shape, E)
    logits = x.reshape(-1, H) @ params.router_kernel
    want = router(logits, K, params.router_bias)
    np.testing.assert_array_equal(aux.routing.topk_idx.reshape(-1, K), want.topk_idx)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(aux.routing.topk_weights.reshape(-1, K), want.topk_weights)
    close(aux.routing.scores.reshape(-1, E), want.scores)
    close(aux.logits.reshape(-1, E), logits)
    plain, without = layer(x, params)
    np.testing.assert_array_equal(plain, y)
    assert without.routing is None and without.logits is None


def test_they_keep_the_sharding_of_x(native_backend):
    """On Explicit axes, of the batch; the channels of x may be split, experts and logits are not."""
    group = make_group(native_backend, AxisType.Explicit)
    with jax.set_mesh(group.mesh):
        put = lambda spec: jax.device_put(make_x(4, 6), NamedSharding(group.mesh, spec))  # noqa: E731
        layer = layer_of(group, return_routing=True)
        for spec in (P("data", "expert"), P("data", None, "expert"), P(None, "expert"), P()):
            y, aux = jax.jit(layer)(put(spec), make_params())
            batch = jax.typeof(y).sharding.spec[:2]
            for array in (*aux.routing, aux.logits):
                assert jax.typeof(array).sharding.spec == P(*batch, None)


def test_gradients_flow_through_them(native_backend):
    """A loss of one's own of scores, weights and logits; with padding and a masked NaN."""
    group, params, x = make_group(native_backend), make_params(), make_x(3, 5)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1
    router = routing.Router("softmax")

    def own(routes, logits):
        kept = mask.reshape(-1, 1)
        routes, logits = (
            jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), t) for t in (routes, logits)
        )
        parts = (routes.topk_weights, routes.scores, logits)
        return sum(
            jnp.where(kept, jnp.sin(part * (3 + i)), 0).sum() for i, part in enumerate(parts)
        )

    def sharded(x, kernel):
        given = jnp.where(mask[..., None], x, jnp.nan)
        weights = params._replace(router_kernel=kernel)
        call = {"mask": mask, "router": router, "return_routing": True}
        aux = layer_of(group, **call)(given, weights)[1]
        return own(aux.routing, aux.logits)

    def on_one_device(x, kernel):
        logits = x.reshape(-1, H) @ kernel
        return own(router(logits, K, params.router_bias), logits)

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, params.router_kernel)
        for f in (sharded, on_one_device)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_masked_and_invalid_routes_are_none(native_backend):
    """−1 with weight 0, whatever a router gave; scores are of all experts, also of those it lacks."""

    def router(logits, bias):
        idx = jnp.broadcast_to(jnp.array([7, 2], jnp.int32)[None], (len(logits), K))
        return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))

    x, mask = make_x(3, 5), jnp.arange(15).reshape(3, 5) != 4
    layer = layer_of(make_group(native_backend), router=router, num_used_experts=6)
    aux = layer(x, make_params(), mask=mask, return_routing=True)[1]
    assert aux.num_invalid == 14
    want = np.where(np.asarray(mask)[..., None], [-1, 2], -1)
    np.testing.assert_array_equal(aux.routing.topk_idx, want)
    np.testing.assert_array_equal(aux.routing.topk_weights, np.where(want >= 0, 0.5, 0))
    np.testing.assert_allclose(aux.routing.scores.sum(axis=-1), mask, rtol=1e-5)
    assert not np.any(aux.routing.scores[..., 6:])


# ---- given


REPLAYS = {
    "plain": {},
    "chunks": {"overlap": "chunks"},
    "shared": {"overlap": "shared_expert"},
    "capacity": {"capacity_factor": 0.75},
    "used": {"num_used_experts": 6},
    "noise": {"router": routing.Router("sigmoid", noise_std=0.5)},
}


@pytest.mark.parametrize("options", REPLAYS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_replay_gives_the_same_bits(options, axis_type, native_backend):
    """Whatever the router's weights are by then; drops are the same too."""
    options = REPLAYS[options]
    group, params, x = make_group(native_backend, axis_type), make_params(), make_x(3, 5)
    mask = jnp.arange(15).reshape(3, 5) != 4
    layer = layer_of(group, **options)
    key = {"router_key": jax.random.key(2)} if "router" in options else {}
    asked = {"return_routing": True, "sequence_loss": True, "mask": mask}
    y, aux = layer(x, params, **asked, **key)
    moved = params._replace(router_kernel=jnp.full_like(params.router_kernel, jnp.nan))
    again, replayed = layer(x, moved, routing=aux.routing, **asked)
    np.testing.assert_array_equal(again, y)
    assert replayed.z_loss is None and replayed.logits is None
    for name in ("load", "num_dropped", "num_invalid", "routing"):
        same(getattr(replayed, name), getattr(aux, name))
    for name in ("aux_loss", "sequence_loss"):  # sums whose bits depend on what XLA fuses
        np.testing.assert_allclose(getattr(replayed, name), getattr(aux, name), rtol=1e-6)
    if "capacity_factor" in options:
        assert aux.num_dropped > 0
    bare = aux.routing._replace(scores=None)
    again, without = layer(x, moved, routing=bare, mask=mask, return_routing=True)
    np.testing.assert_array_equal(again, y)
    assert without.aux_loss is None and without.routing.scores is None
    np.testing.assert_array_equal(without.load, aux.load)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("axis_type", "options"),
    [(AxisType.Auto, {}), (AxisType.Explicit, {"overlap": "chunks"})],
)
def test_given_routes_are_taken(masked, axis_type, options, native_backend):
    """Values and all gradients are dense ones: weights and scores get theirs, the router none."""
    group, params, x = make_group(native_backend, axis_type), make_params(), make_x(3, 5)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 2 if masked else None
    routes = make_routing(3, 5)

    def step(run):
        def objective(x, params, weights, scores):
            y, aux_loss = run(x, params, routes._replace(topk_weights=weights, scores=scores))
            target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y * target) + aux_loss, y

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3), has_aux=True))

    def sharded(x, params, routes):
        if masked:  # not even NaN of a masked token does harm
            x, *floats = (
                jnp.where(mask[..., None], a, jnp.nan)
                for a in (x, routes.topk_weights, routes.scores)
            )
            routes = routing.Routing(routes.topk_idx, *floats)
        y, aux = layer_of(group, **options)(x, params, routing=routes, mask=mask)
        return y, aux.aux_loss

    arguments = (x, params, routes.topk_weights, routes.scores)
    found, y = step(sharded)(*arguments)
    want, want_y = step(functools.partial(dense, mask=mask))(*arguments)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    for got, expected in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[2]).max() > 0 and np.abs(found[3]).max() > 0
    assert not np.any(found[1].router_kernel)


def test_in_scan_remat_and_an_outer_shard_map(native_backend):
    """Stages replay routes of their own, in each step of a scan others."""
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names)
    group = jax_ep.create_group(mesh, "expert", backend=native_backend)
    stages, params = mesh.shape["stage"], make_params()
    x, routes = make_x(stages, 5), make_routing(stages, 3, 5)
    layer = layer_of(group, return_routing=True)

    def network(run, x, routes):
        def body(x, routes):
            y, idx = jax.checkpoint(run)(x, routes)
            return x + y, idx

        return jax.lax.scan(body, x, routes)

    def sharded(x, routes):
        def stage(x, routes):
            def run(x, routes):
                y, aux = layer(x, params, routing=routes)
                return y, aux.routing.topk_idx

            found = network(run, x[0], jax.tree.map(lambda a: a[0], routes))
            return jax.tree.map(lambda a: a[None], found)

        specs = {"in_specs": P("stage"), "out_specs": P("stage")}
        return jax.shard_map(stage, mesh=mesh, axis_names={"stage"}, **specs)(x, routes)

    def on_one_device(x, routes):
        def run(x, routes):
            return dense(x, params, routes)[0], routes.topk_idx

        parts = [
            network(run, x[s], routing.Routing(*(a[s] for a in routes))) for s in range(stages)
        ]
        return jax.tree.map(lambda *a: jnp.stack(a), *parts)

    def step(run):
        def loss(x, weights):
            y, idx = run(x, routes._replace(topk_weights=weights))
            return jnp.sum(jnp.sin(y)), idx

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, routes.topk_weights)

    (found, idx), (want, want_idx) = step(sharded), step(on_one_device)
    np.testing.assert_array_equal(idx, want_idx)
    for got, expected in zip(found, want, strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_ids_out_of_range_are_counted(native_backend):
    """As those of a router of the user's own: invalid, and no route."""
    routes = make_routing(4)
    idx = jnp.array([[0, 200], [6, 1], [-1, 3], [5, 5]]).astype(jnp.int16)
    layer = layer_of(make_group(native_backend), num_used_experts=6, return_routing=True)
    aux = layer(make_x(4), make_params(), routing=routes._replace(topk_idx=idx))[1]
    assert aux.num_invalid == 3  # 200, 6 and the second 5
    np.testing.assert_array_equal(aux.routing.topk_idx, [[0, -1], [-1, 1], [-1, 3], [5, -1]])
    np.testing.assert_array_equal(aux.load, [1, 1, 0, 1, 0, 1, 0, 0])


def test_a_router_function_replays_the_choice_alone(native_backend):
    """As the docstring says: old ids, weights from the logits of today, which get their gradient."""
    group, params, x = make_group(native_backend), make_params(), make_x(3, 5)
    old = layer_of(group)(x, params, return_routing=True)[1].routing

    def router(logits, bias, topk_idx):
        scores = jax.nn.softmax(logits)
        weights = jnp.take_along_axis(scores, jnp.maximum(topk_idx, 0), axis=1)
        return routing.Routing(topk_idx, weights, scores)

    def loss(kernel):
        call = {"router": router, "router_inputs": old.topk_idx, "return_routing": True}
        y, aux = layer_of(group, **call)(x, params._replace(router_kernel=kernel))
        return jnp.sum(y**2), aux.routing.topk_idx

    gradient, idx = jax.grad(loss, has_aux=True)(-params.router_kernel)
    np.testing.assert_array_equal(idx, old.topk_idx)
    assert np.abs(gradient).max() > 1e-3


def test_no_token(native_backend):
    layer = layer_of(make_group(native_backend), return_routing=True)
    for batch in ((0, 3), (0,)):
        y, aux = layer(jnp.zeros((*batch, H)), make_params())
        assert y.shape == (*batch, H) and aux.logits.shape == (*batch, E)
        assert [a.shape for a in aux.routing] == [(*batch, K), (*batch, K), (*batch, E)]
        _, again = layer(y, make_params(), routing=aux.routing._replace(scores=None))
        assert again.aux_loss is again.z_loss is again.logits is again.routing.scores is None


def test_flax_layers(native_backend):
    group, x = make_group(native_backend), make_x(4, 3)
    noisy = routing.Router("softmax", noise_std=0.5)
    settings = {"num_experts": E, "top_k": K, "group": group, "router": noisy}
    settings["return_routing"] = True
    layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
    variables = {"params": nnx.to_pure_dict(nnx.state(layer))}
    of_linen = jax_ep.linen.MoE(H, F, **settings)
    y, aux = layer(x, router_key=jax.random.key(3))
    same(layer(x, routing=aux.routing)[0], y)
    replayed = of_linen.apply(variables, x, routing=aux.routing, rngs={"router": jax.random.key(4)})
    same(replayed[0], y)
    same(replayed[1].routing, aux.routing)


def test_the_default_program_has_no_routes(native_backend):
    """Tracing alone: results of the default are the scalars and the load."""
    layer = layer_of(make_group(native_backend))
    _, aux = jax.eval_shape(layer, make_x(4, 4), make_params())
    assert [leaf.shape for leaf in jax.tree.leaves(aux)] == [(), (E,), (), (), ()]


R = make_routing(4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"routing": (1, 2, 3)},
            TypeError,
            "routing: expected a jax_ep.routing.Routing or None, go",
        ),
        (
            {"routing": R._replace(topk_idx=R.topk_weights)},
            TypeError,
            r"routing.topk_idx: expected an array of integers, got float32; cast it .*int32\)",
        ),
        (
            {"routing": R._replace(topk_weights=None)},
            TypeError,
            "routing.topk_weights: expected an array of float32, bfloat16 or float16, got NoneType",
        ),
        (
            {"routing": R._replace(topk_weights=np.ones((4, K)))},
            TypeError,
            r"routing.topk_weights: .* got float64; cast it with astype\(jnp.float32\)",
        ),
        (
            {"routing": R._replace(topk_idx=R.topk_idx[:3])},
            ValueError,
            r"routing.topk_idx: expected shape \(4, 2\), the batch of x and 2 .*, got \(3, 2\); give",
        ),
        (
            {"routing": R._replace(scores=R.scores[:, :6])},
            ValueError,
            r"routing.scores: expected shape \(4, 8\), .*, got \(4, 6\); give",
        ),
        (
            {"routing": R._replace(scores=None), "sequence_loss": True},
            ValueError,
            "sequence_loss: expected False with a routing that has no scores, got True; give",
        ),
        (
            {"routing": R, "router_key": jax.random.key(0)},
            ValueError,
            "router_key: expected None with routing=, because no router runs, got a key; leave",
        ),
        (
            {"routing": R, "router_inputs": jnp.ones(4)},
            ValueError,
            "router_inputs: expected None with routing=, because no router runs, got .*; leave",
        ),
        (
            {"router": lambda logits, bias: R._replace(scores=None)},
            TypeError,
            "router: expected a function that gives scores, got one that gives None; give the score",
        ),
        ({"return_routing": "yes"}, TypeError, "return_routing: expected True or False, got str"),
    ],
)
def test_errors(arguments, error, text):
    layer = layer_of(spmd.make_group(2, "reference"))
    x = make_x(2, 4)[0]
    if "router" in arguments:  # which sees the tokens of one rank
        arguments = {"router": lambda logits, bias: routing.Routing(*(a[:2] for a in R[:2]))}
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        layer(x, make_params(), **arguments)


def test_routes_on_other_devices():
    layer = layer_of(spmd.make_group(2, "reference"))
    alone = jax.device_put(R, jax.devices()[1])
    with pytest.raises(
        ValueError, match=r"argument routing.topk_idx: expected an array on the mesh"
    ):
        layer(make_x(4), make_params(), routing=alone)
