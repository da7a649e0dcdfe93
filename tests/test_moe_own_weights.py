"""The weights of ``jax_ep.moe(experts=)``: how they are split, quantised ones, those of modules."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from dense_experts import check_same, dense_layer
from expert_layers import E, F, H, K, draw, make_group, make_x, own_params

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")


def gathering_experts(rows, group_sizes, expert_of_row, params):
    """Matrices whose columns the "data" ranks share among them until they are used."""
    up = lax.all_gather(params["up"], "data", axis=2, tiled=True)
    down = lax.all_gather(params["down"], "data", axis=1, tiled=True)
    inner = jnp.tanh(jax_ep.grouped_dot(rows, up, group_sizes))
    return jax_ep.grouped_dot(inner, down, group_sizes)


def test_weights_split_over_further_axes(native_backend):
    """The function gathers them itself, and the gradient is split as they are."""
    group = make_group("2x2", native_backend)
    weights = {"up": draw(3, E, H, F), "down": draw(4, E, F, H)}
    layer = functools.partial(
        jax_ep.moe,
        group=group,
        num_experts=E,
        top_k=K,
        experts=gathering_experts,
        expert_specs={"up": P("expert", None, "data"), "down": P("expert", "data")},
    )

    def dense(x, params):
        weights = params.experts
        expert = lambda tokens, i: jnp.tanh(tokens @ weights["up"][i]) @ weights["down"][i]  # noqa: E731
        return dense_layer(x, params, top_k=K, expert=expert)

    check_same(layer, dense, make_x(3, 5), own_params(weights), mesh=group.mesh)


def int8_experts(rows, group_sizes, expert_of_row, params):
    """That of the docstring of ``ExpertFunction``."""
    up, down = (w.astype(rows.dtype) for w in (params["up"], params["down"]))
    scale = params["scale"].at[expert_of_row].get(mode="fill", fill_value=0)
    inner = jax.nn.gelu(jax_ep.grouped_dot(rows, up, group_sizes) * scale)
    return jax_ep.grouped_dot(inner.astype(rows.dtype), down, group_sizes)


@pytest.mark.parametrize("ranks", [2, "2x2"])
def test_quantised_weights(ranks, native_backend):
    """Integers have no gradient; the first dimension of all leaves is that of the experts."""
    group = make_group(ranks, native_backend)
    whole = lambda seed, *shape: jnp.round(8 * draw(seed, *shape)).astype(jnp.int8)  # noqa: E731
    weights = {"up": whole(3, E, H, F), "down": whole(4, E, F, H), "scale": draw(5, E, F) / 4}

    def dense(x, params):
        up, down, scale = (params.experts[name] for name in ("up", "down", "scale"))

        def expert(tokens, i):
            inner = jax.nn.gelu(tokens @ up[i].astype(tokens.dtype) * scale[i])
            return inner @ down[i].astype(tokens.dtype)

        return dense_layer(x, params, top_k=K, expert=expert)

    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, experts=int8_experts)
    check_same(layer, dense, make_x(3, 5), own_params(weights), mesh=group.mesh)


def plain_experts(rows, group_sizes, expert_of_row, params):
    """The experts of jax_ep, weighted afterwards."""
    gate, up, down = (w.astype(rows.dtype) for w in params)
    gate, up = (jax_ep.grouped_dot(rows, w, group_sizes) for w in (gate, up))
    inner = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return jax_ep.grouped_dot(inner.astype(rows.dtype), down, group_sizes)


@by_itself
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (jnp.float32, {"quantization": "fp8"}, 1e-4),
        (jnp.float32, {"quantization": "fp8", "overlap": "chunks", "capacity_factor": 0.7}, 1e-4),
        (jnp.bfloat16, {}, 0.02),
    ],
    ids=["fp8", "fp8 in chunks that drop", "bfloat16"],
)
def test_same_as_the_experts_of_jax_ep(dtype, options, tolerance, native_backend):
    """Rows in 8 bits come in the dtype of x, and outputs have it."""
    group = make_group(2, native_backend)
    sizes = {"hidden": 128, "intermediate": F, "num_experts": E}
    params = jax_ep.init_moe_params(jax.random.key(0), **sizes)
    own = jax_ep.MoEParams(params.router_kernel, experts=(params.gate, params.up, params.down))
    x = draw(9, 24, 128).astype(dtype)

    def run(params, experts):
        def loss(x, params):
            y, aux = jax_ep.moe(
                x, params, group=group, num_experts=E, top_k=K, experts=experts, **options
            )
            assert y.dtype == dtype
            return (y.astype(jnp.float32) ** 2).sum(), (y, aux)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)

    (_, (y, aux)), (d_x, d_own) = run(own, plain_experts)
    (_, (want_y, want_aux)), (want_x, want) = run(params, None)
    np.testing.assert_array_equal(aux.load, want_aux.load)
    assert aux.num_dropped == want_aux.num_dropped
    assert (aux.num_dropped > 0) == ("capacity_factor" in options)
    pairs = [(y, want_y), (d_x, want_x), (d_own.router_kernel, want.router_kernel)]
    pairs += zip(d_own.experts, (want.gate, want.up, want.down), strict=True)
    for got, expected in pairs:
        got, expected = (np.asarray(a, np.float32) for a in (got, expected))
        most = np.abs(expected).max()
        assert most > 0
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * most)


def without_weights(rows, group_sizes, expert_of_row, params):
    assert params == ()
    return rows * (1 + expert_of_row[:, None] + len(group_sizes) * lax.axis_index("expert"))


def test_function_without_weights(backend):
    """It knows its rank from the axis of the group."""
    group = make_group(2, backend)

    def dense(x, params):
        return dense_layer(x, params, top_k=K, expert=lambda tokens, i: tokens * (1.0 + i))

    layer = functools.partial(
        jax_ep.moe, group=group, num_experts=E, top_k=K, experts=without_weights
    )
    check_same(layer, dense, make_x(3, 5), own_params(()), mesh=group.mesh)


def test_partition_specs():
    """One spec for a part of the tree; by default the first dimension of all leaves is split."""
    group = make_group(2, "reference")
    down = (jnp.ones((E, F, H)), jnp.ones(E))
    weights = {"up": jnp.ones((E, H, F)), "down": down, "mixed": jnp.ones((H, H))}
    params = own_params(weights, shared=True)
    specs = jax_ep.moe_partition_specs(params, group=group)
    assert set(jax.tree.leaves(specs.experts)) == {P("expert")} and specs.up is None
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    assert specs.shared.down == P(None, None)
    prefix = {"up": P("expert"), "down": P("expert"), "mixed": P()}
    specs = jax_ep.moe_partition_specs(params, group=group, expert_specs=prefix)
    down = (P("expert"), P("expert"))
    assert specs.experts == {"up": P("expert"), "down": down, "mixed": P()}
    specs = jax_ep.moe_partition_specs(params, group=group, expert_specs=P())
    assert set(jax.tree.leaves(specs.experts)) == {P()}
    text = (
        "moe_partition_specs: argument expert_specs: expected a pytree of PartitionSpecs with the"
    )
    with pytest.raises(ValueError, match=text):
        jax_ep.moe_partition_specs(params, group=group, expert_specs={"up": P()})


# ---- modules of one's own


def relu_experts(rows, group_sizes, expert_of_row, params):
    inner = jax.nn.relu(jax_ep.grouped_dot(rows, params["up"], group_sizes))
    return jax_ep.grouped_dot(inner, params["down"], group_sizes)


class NnxExperts(nnx.Module):
    """As the docstring of ``nnx.MoE`` says."""

    def __init__(self, group, rngs):
        self.group = group
        init = jax_ep.nnx.default_init

        def param(*shape):
            names = (("expert",) if len(shape) == 3 else ()) + (None,) * 2
            value = init(rngs.params(), shape, jnp.float32)
            return nnx.Param(value, out_sharding=names, mesh=group.mesh)

        self.router_kernel = param(H, E)
        self.up, self.down = param(E, H, F), param(E, F, H)

    def __call__(self, x):
        weights = {"up": self.up[...], "down": self.down[...]}
        params = jax_ep.MoEParams(router_kernel=self.router_kernel[...], experts=weights)
        return jax_ep.moe(x, params, experts=relu_experts, group=self.group, num_experts=E, top_k=K)


class LinenExperts(nn.Module):
    group: jax_ep.Group

    @nn.compact
    def __call__(self, x):
        init = jax_ep.nnx.default_init
        shapes = {"up": (E, H, F), "down": (E, F, H)}
        weights = {name: self.param(name, init, s, jnp.float32) for name, s in shapes.items()}
        router_kernel = self.param("router_kernel", init, (H, E), jnp.float32)
        params = jax_ep.MoEParams(router_kernel=router_kernel, experts=weights)
        return jax_ep.moe(x, params, experts=relu_experts, group=self.group, num_experts=E, top_k=K)


@by_itself
def test_modules_of_ones_own(native_backend):
    """Written by hand, they are the layers of jax_ep without a gate."""
    group = make_group(2, native_backend)
    mine = NnxExperts(group, nnx.Rngs(0))
    assert mine.up[...].sharding.spec[0] == "expert"
    weights = {"up": mine.up[...], "down": mine.down[...]}
    kernel = mine.router_kernel[...]
    layer = jax_ep.nnx.MoE(
        H,
        F,
        num_experts=E,
        top_k=K,
        group=group,
        gated=False,
        activation=jax.nn.relu,
        rngs=nnx.Rngs(1),
    )
    assert layer.gate is None
    layer.router_kernel[...], layer.up[...], layer.down[...] = kernel, *weights.values()
    x = make_x(12)

    def gradients(module):
        return nnx.jit(nnx.grad(lambda module, x: jnp.sum(module(x)[0] ** 2)))(module, x)

    want, want_gradients = layer(x), gradients(layer)
    np.testing.assert_allclose(mine(x)[0], want[0], rtol=1e-5, atol=1e-6)
    got = gradients(mine)
    for name in ("router_kernel", "up", "down"):
        assert np.abs(got[name][...]).max() > 0
        np.testing.assert_allclose(
            got[name][...], want_gradients[name][...], rtol=1e-4, atol=1e-5, err_msg=name
        )
    variables = {"params": {"router_kernel": kernel, **weights}}
    y, _ = jax.jit(LinenExperts(group).apply)(variables, x)
    np.testing.assert_allclose(y, want[0], rtol=1e-5, atol=1e-6)
