"""Routers of ``jax_ep.moe``: functions, inputs of each token, experts that do not exist."""

from __future__ import annotations

import functools

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
    pytest.mark.one_process("calls the layer with arrays of one process"),
]

H, F, E, K = 8, 4, 8, 2


def make_params(**sizes) -> jax_ep.MoEParams:
    sizes = {"hidden": H, "intermediate": F, "num_experts": E} | sizes
    return jax_ep.init_moe_params(jax.random.key(0), **sizes)


def make_x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*shape, H))


# ---- inputs of each token


def by_table(logits, bias, inputs):
    """Experts by the token's id; a factor of the token for its weights and its scores."""
    idx = (inputs["id"][:, None] * 3 + jnp.arange(K)[None]).astype(jnp.int16) % E
    factor = inputs["factors"].mean((1, 2))[:, None]
    weights = (factor * jnp.ones((1, K))).astype(jnp.bfloat16)
    return routing.Routing(idx, weights, jax.nn.softmax(logits * factor))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inputs_are_split_like_the_tokens(axis_type, native_backend):
    """15 tokens do not split evenly; a NaN in the input of a masked token reaches nothing."""
    names = ("data", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names, axis_type)
    group = jax_ep.create_group(mesh, "expert", backend=native_backend)
    params, x = make_params(), make_x(3, 5)
    mask = jnp.arange(15).reshape(3, 5) != 4
    factors = jnp.linspace(0.5, 1.5, 15 * 6).reshape(3, 5, 2, 3)
    inputs = {"id": jnp.arange(15, dtype=jnp.uint8).reshape(3, 5), "factors": factors}

    def loss(factors, params):
        given = {**inputs, "factors": jnp.where(mask[..., None, None], factors, jnp.nan)}
        y, aux = jax_ep.moe(
            x,
            params,
            group=group,
            num_experts=E,
            top_k=K,
            router=by_table,
            router_inputs=given,
            mask=mask,
        )
        return jnp.sum(y**2) + aux.aux_loss, (y, aux)

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (d_factors, d_params), (y, aux) = step(factors, params)

    def dense(factors, params):
        ids = inputs["id"].reshape(-1).astype(jnp.int32)
        tokens = x.reshape(-1, H)
        idx = (ids[:, None] * 3 + jnp.arange(K)) % E
        gate, up, down = (w[idx] for w in (params.gate, params.up, params.down))
        hidden = jax.nn.silu(jnp.einsum("th,tkhf->tkf", tokens, gate))
        hidden = hidden * jnp.einsum("th,tkhf->tkf", tokens, up)
        factor = factors.mean((2, 3)).reshape(-1, 1)
        used = jnp.where(mask.reshape(-1, 1), idx, -1)
        scores = jax.nn.softmax(tokens @ params.router_kernel * factor)
        aux_loss = routing.load_balancing_loss(used, scores)
        weight = factor.astype(jnp.bfloat16).astype(jnp.float32)
        y = weight * jnp.einsum("tkf,tkfh->th", hidden, down)
        y = jnp.where(mask.reshape(-1, 1), y, 0).reshape(x.shape)
        return jnp.sum(y**2) + aux_loss, (y, idx)

    dense_step = jax.jit(jax.grad(dense, argnums=(0, 1), has_aux=True))
    (want_factors, want_params), (want, idx) = dense_step(factors, params)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_factors, want_factors, rtol=2e-2, atol=1e-5)
    np.testing.assert_allclose(d_params.down, want_params.down, rtol=1e-4, atol=1e-5)
    got, wanted = d_params.router_kernel, want_params.router_kernel
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    used = np.asarray(idx)[np.asarray(mask).reshape(-1)]
    np.testing.assert_array_equal(aux.load, np.bincount(used.reshape(-1), minlength=E))


def test_a_router_has_one_program_whatever_its_inputs():
    """Other inputs need no new program. What a router object holds is read once, as documented."""

    class ByIds:
        offset, traces = 0, 0

        def __call__(self, logits, bias, ids):
            self.traces += 1
            idx = (ids[:, None] + self.offset + jnp.arange(K)) % E
            return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))

    group, params, x = spmd.make_group(2, "reference"), make_params(), make_x(6)

    def load(router, ids):
        options = {"group": group, "num_experts": E, "top_k": K, "router_inputs": jnp.full(6, ids)}
        return np.flatnonzero(jax_ep.moe(x, params, router=router, **options)[1].load).tolist()

    router = ByIds()
    assert load(router, 0) == [0, 1]
    traces = router.traces
    assert load(router, 4) == [4, 5] and router.traces == traces
    router.offset = 2  # comes too late for the program that there is
    assert load(router, 4) == [4, 5] and router.traces == traces
    other = ByIds()
    other.offset = 2
    assert load(other, 4) == [6, 7] and other.traces == traces


def test_a_router_closes_over_traced_values(native_backend):
    """A router may close over values that are the same for all tokens; their gradient is right."""
    group = spmd.make_group(2, native_backend)
    params, x = make_params(), make_x(6)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K)

    def loss(scale, table):
        def router(logits, bias):
            return routing.softmax_top_k(logits * scale + table[None], K)

        return jnp.sum(layer(x, params, router=router)[0] ** 2)

    def folded(scale, table):  # the same logits from the weights of the router
        ones = jnp.concatenate([x, jnp.ones((6, H))], axis=1)
        kernel = jnp.concatenate([params.router_kernel * scale, jnp.tile(table / H, (H, 1))])
        wide = {"gate": params.gate, "up": params.up}
        wide = {name: jnp.concatenate([w, jnp.zeros_like(w)], axis=1) for name, w in wide.items()}
        down = jnp.concatenate([params.down, jnp.zeros_like(params.down)], axis=2)
        wider = params._replace(router_kernel=kernel, down=down, **wide)
        return jnp.sum(layer(ones, wider)[0] ** 2)

    at = jnp.float32(1.5), jnp.linspace(-0.5, 0.5, E)
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(*at) for f in (loss, folded))
    for a, b in zip(got, want, strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_layers_pass_the_inputs_on(native_backend):
    group = spmd.make_group(2, native_backend)
    x = make_x(4)
    inputs = {"id": jnp.arange(4), "factors": jnp.ones((4, 1, 1))}
    settings = {"num_experts": E, "top_k": K, "router": by_table, "group": group}
    with_nnx = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
    loads = [with_nnx(x, router_inputs=inputs)[1].load]
    with_linen = jax_ep.linen.MoE(H, F, **settings)
    variables = {"params": nnx.to_pure_dict(nnx.state(with_nnx))}
    loads.append(with_linen.apply(variables, x, router_inputs=inputs)[1].load)
    for load in loads:
        np.testing.assert_array_equal(load, [1, 2, 1, 1, 1, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"router_inputs": jnp.ones(4)},
            ValueError,
            r"router_inputs: expected None with a router of jax_ep.routing, got .*function of \(log",
        ),
        (
            {"router": by_table, "router_inputs": {"id": jnp.ones(5)}},
            ValueError,
            r"router_inputs\['id'\]: expected a shape that begins with .* \(4,\), got \(5,\); give",
        ),
        (
            {"router": by_table, "router_inputs": {"id": [1, 2, 3, 4]}},
            TypeError,
            r"router_inputs\['id'\]\[0\]: expected an array of numbers, got int; let",
        ),
        (
            {"router": by_table, "router_inputs": jax.random.split(jax.random.key(0), 4)},
            TypeError,
            "router_inputs: expected an array of numbers, got key",
        ),
        ({"num_used_experts": 9}, ValueError, "num_used_experts: expected 1 to 8, .*got 9; leave"),
        ({"num_used_experts": 0}, ValueError, "num_used_experts: expected 1 to 8, .*got 0; leave"),
        ({"num_used_experts": 6.0}, TypeError, "num_used_experts: expected a Python int or None"),
        ({"num_used_experts": 1}, ValueError, "top_k: expected 1 to 1 experts a token, got 2"),
        (
            {"router": lambda logits, bias: routing.softmax_top_k(logits[:, :4], K)},
            ValueError,
            r"router: expected .* scores of the shape of the logits, \(2, 8\), got \(2, 4\); give",
        ),
        ({"num_experts": 7}, ValueError, "num_experts: .*add unused ones.*num_used_experts="),
    ],
)
def test_errors(arguments, error, text):
    group = spmd.make_group(2, "reference")
    call = {"num_experts": E, "top_k": K} | arguments
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        jax_ep.moe(make_x(4), make_params(), group=group, **call)


# ---- experts that do not exist

ROUTERS = {
    "softmax": routing.Router(),
    "sigmoid": routing.Router("sigmoid"),
    "groups": routing.Router("group_limited", num_groups=3, top_groups=2),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_routes_of_the_experts_that_exist(router):
    """Routes are those of a router without the others, whatever their logits and bias."""
    logits = jax.random.normal(jax.random.key(0), (16, E)).at[:, 6:].set(100.0)
    bias = jnp.linspace(-0.1, 0.1, E).at[6:].set(100.0)
    got = ROUTERS[router](logits, K, bias, num_used_experts=6)
    want = ROUTERS[router](logits[:, :6], K, bias[:6])
    np.testing.assert_array_equal(got.topk_idx, want.topk_idx)
    np.testing.assert_array_equal(got.topk_weights, want.topk_weights)
    np.testing.assert_array_equal(got.scores, jnp.pad(want.scores, ((0, 0), (0, 2))))


def test_balance_of_the_experts_that_exist():
    """Six that are used evenly and two that do not exist: the loss is 1."""
    idx = jnp.arange(12).reshape(6, 2) % 6
    scores = jnp.full((6, E), 1 / 6).at[:, 6:].set(0.0)
    loss = functools.partial(routing.load_balancing_loss, idx)
    assert loss(scores, num_used_experts=6) == pytest.approx(1.0)
    assert loss(scores) == pytest.approx(8 / 6)
    assert loss(scores.at[:, 6:].set(0.5), num_used_experts=6) == pytest.approx(1.0)
    assert loss(scores[:, :6]) == pytest.approx(1.0)
    load = jnp.array([5, 3, 4, 4, 4, 4, 0, 0])
    moved = routing.update_bias(jnp.ones(E), load, 0.5, num_used_experts=6)
    np.testing.assert_array_equal(moved, [0.5, 1.5, 1, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"routing.load_balancing_loss: argument num_used_experts"):
        loss(scores, num_used_experts=9)
    with pytest.raises(TypeError, match=r"routing.update_bias: argument num_used_experts"):
        routing.update_bias(jnp.ones(E), load, num_used_experts=6.0)


def test_layer_of_six_experts_on_four_ranks(native_backend):
    """Results are those of six experts on two ranks; the others have no routes and no gradient."""
    padded, exact = (spmd.make_group(n, native_backend) for n in (spmd.ranks_at_most(4), 2))
    params, x = make_params(), make_x(10)
    params = params._replace(router_kernel=params.router_kernel.at[:, 6:].set(100.0))
    six = params._replace(
        router_kernel=params.router_kernel[:, :6],
        **{name: getattr(params, name)[:6] for name in ("gate", "up", "down")},
    )

    def step(params, group, **experts):
        def loss(params):
            y, aux = jax_ep.moe(x, params, group=group, top_k=K, **experts)
            return jnp.sum(y**2) + aux.aux_loss, (y, aux)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, (y, aux) = step(params, padded, num_experts=E, num_used_experts=6)
    want_gradient, (want, want_aux) = step(six, exact, num_experts=6)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux.aux_loss, want_aux.aux_loss, rtol=1e-5)
    np.testing.assert_array_equal(aux.load, [*want_aux.load, 0, 0])
    got = gradient._replace(router_kernel=gradient.router_kernel.T)
    wanted = want_gradient._replace(router_kernel=want_gradient.router_kernel.T)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a[:6], b, rtol=1e-4, atol=1e-4)
        assert not np.any(a[6:])


def test_layers_move_the_bias_of_the_experts_that_exist():
    """Towards the mean load of these; that of the others stays."""
    settings = {"num_experts": E, "num_used_experts": 6, "top_k": K, "router_bias": True}
    settings["group"] = spmd.make_group(2, "reference")
    load = jnp.array([5, 3, 4, 4, 4, 4, 0, 0])
    want = [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    with_nnx = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
    with_nnx.update_router_bias(load, 0.5)
    np.testing.assert_array_equal(with_nnx.router_bias[...], want)
    weights = nnx.to_pure_dict(nnx.state(with_nnx, nnx.Param))
    of_linen = {"params": weights, "router_bias": {"bias": jnp.zeros(E)}}
    update = {"method": "update_router_bias", "mutable": ["router_bias"]}
    _, moved = jax_ep.linen.MoE(H, F, **settings).apply(of_linen, load, 0.5, **update)
    np.testing.assert_array_equal(moved["router_bias"]["bias"], want)


def test_own_router_sees_the_experts_that_exist(native_backend):
    """Its logits are theirs, and a route to another expert is invalid, also where uint8 names it."""
    experts, used = 256, 254  # a number that uint8 cannot hold

    def router(logits, bias):
        assert logits.shape[1] == used and bias.shape == (used,)
        idx = jnp.broadcast_to(jnp.array([5, 255], jnp.uint8)[None], (logits.shape[0], K))
        return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))

    group = spmd.make_group(2, native_backend)
    params = make_params(num_experts=experts, router_bias=True)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=experts, top_k=K, router=router)
    _, aux = layer(make_x(4), params, num_used_experts=used)
    assert aux.num_invalid == 4 and aux.load[5] == 4 and aux.load.sum() == 4
