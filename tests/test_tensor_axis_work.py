"""How much ``jax_ep.moe(tensor_axis=)`` computes, sends and does again."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from dense_experts import dense_layer
from jax_ep import routing
from test_tensor_axis import LAYER, E, F, H, K, S, make_group, make_params, make_x

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("calls the layer with arrays of one process"),
]


def even_dot(rows, weights, group_sizes):
    """A product of rows of which each local expert has as many."""
    of_each = rows.reshape(len(weights), -1, rows.shape[1])
    return jnp.einsum("lch,lhf->lcf", of_each, weights).reshape(len(rows), -1)


def flops(jaxpr) -> int:
    """Multiplications and additions of all matrix products of one device, as JAX traces them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            total += flops(inner) if hasattr(inner, "eqns") else 0
    return total


def training_step(group, tensor_axis):
    """A step on routes that are given, so that there are no products of a router, and its arguments."""
    params, x = make_params(), make_x(16)
    axes = group.axis_names
    idx = jnp.arange(16 * K, dtype=jnp.int32).reshape(16, K) % E
    routes = routing.Routing(idx, jnp.full(idx.shape, 0.5), None)

    def loss(x, params):
        options = {"num_experts": E, "top_k": K, "routing": routes, "grouped_dot": even_dot}
        options |= {"group": group, "tensor_axis": tensor_axis, "token_axes": axes}
        return jax_ep.moe(x, params, capacity=16 * K // group.size, **options)[0].sum()

    specs = jax_ep.moe_partition_specs(params, group=group, tensor_axis=tensor_axis)
    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
    arguments = put(x, P(axes)), jax.tree.map(put, params, specs)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), arguments


def test_no_product_is_repeated(native_backend):
    """Two ranks with two positions each compute as much as four ranks, and gather no weights."""
    work = {}
    for sizes, names, axis in [
        ((4,), ("expert",), None),
        ((2, 2), ("expert", "tensor"), "tensor"),
        ((2, 2), ("expert", "tensor"), None),
    ]:
        run, arguments = training_step(make_group(native_backend, sizes, names), axis)
        lowered = run.trace(*arguments)
        compiled = lowered.lower().compile()
        work[sizes, axis] = flops(lowered.jaxpr), compiled.cost_analysis()["flops"]
        if axis is not None and native_backend != "reference":
            text = compiled.as_text()
            assert "all-reduce" in text and "all-gather" not in text
    wanted, counted = work[(4,), None]
    rows, tokens = 16 * K // 4, 16 // 4
    assert wanted == 3 * 3 * 2 * H * (
        rows * F + tokens * S
    )  # of gate, up and down; and backward twice
    assert work[(2, 2), "tensor"][0] == wanted
    assert work[(2, 2), None][0] == 2 * wanted
    assert work[(2, 2), "tensor"][1] < 1.2 * counted < 0.8 * work[(2, 2), None][1]


def sums_over_tensor(jaxpr) -> list[tuple[int, ...]]:
    """The shapes of all arrays but scalars that collectives add or gather over "tensor"."""
    found = []
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name.startswith(
            ("psum", "all_gather", "all_to_all", "reduce_scatter")
        ) and "tensor" in params.get("axes", params.get("axis_name")):
            found += [v.aval.shape for v in equation.invars if v.aval.ndim]
        for inner in jax.tree.leaves(list(params.values())):
            inner = getattr(inner, "jaxpr", inner)
            found += sums_over_tensor(inner) if hasattr(inner, "eqns") else []
    return found


def test_what_crosses_the_axis(native_backend):
    """One sum of [T, H] forward and one backward; neither rows nor weights."""
    group = make_group(native_backend, (2, 2), ("expert", "tensor"))
    run, arguments = training_step(group, "tensor")
    # The given routes need no gradient, so their weights have none here.
    assert sums_over_tensor(run.trace(*arguments).jaxpr) == [(8, H), (8, H)]


def test_rematerialised(native_backend):
    """In a scan over blocks that save what the ops give, nothing is sent or added twice."""
    group = make_group(native_backend)
    params, x = make_params(bias=True), make_x(16)
    stacked = jax.tree.map(lambda w: jnp.stack([w, w * 0.75]), params)
    names = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(layer, wrap, x, stacked):
        def block(x, params):
            y, aux = layer(x, params)
            return x + jnp.tanh(y), aux[0]

        y, losses = jax.lax.scan(wrap(block), x, stacked)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) + losses.sum()

    layer = functools.partial(jax_ep.moe, group=group, **LAYER)
    found = functools.partial(loss, layer, functools.partial(jax.checkpoint, policy=policy))
    dense = functools.partial(loss, functools.partial(dense_layer, top_k=K), lambda block: block)
    traced = jax.jit(jax.grad(found, argnums=(0, 1))).trace(x, stacked)
    # Outputs, and backward the gradients of tokens, of top-k weights and of the bias that all have.
    tokens, bias = 16 // 4, (E // 2, H)
    sums = [(tokens, H), (tokens, H), (tokens, K), bias]
    assert sorted(sums_over_tensor(traced.jaxpr)) == sorted(sums)
    compiled = traced.lower().compile()
    got = compiled(x, stacked)
    if native_backend != "reference":
        targets = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine")
        counts = spmd.count_calls(compiled.as_text(), targets)
        assert counts == {"jax_ep_plan": 1, "jax_ep_dispatch": 2, "jax_ep_combine": 2}
    want = jax.jit(jax.grad(dense, argnums=(0, 1)))(x, stacked)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
