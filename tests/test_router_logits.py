"""Logits of ``jax_ep.moe``: how exact the product of bfloat16 tokens is, and of what it is made."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep._moe import logits

T, H, E = 64, 512, 32

by_itself = pytest.mark.one_process("calls functions with arrays of one process")


def draw(seed: int, *shape: int) -> jax.Array:
    """Numbers of very different sizes, all of whose bits count."""
    one, two = jax.random.split(jax.random.key(seed))
    return jax.random.normal(one, shape) * jnp.exp(jax.random.normal(two, shape))


def highest(x, kernel):
    """What XLA makes of the product in float32."""
    wide = kernel.astype(jnp.float32)
    return jnp.dot(x.astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST)


def with_gradients(product, x, kernel, d_logits):
    def run(x, kernel, d_logits):
        out, pull = jax.vjp(product, x, kernel)
        return out, *pull(d_logits)

    return jax.jit(run)(x, kernel, d_logits)


def exact(x, kernel, d_logits):
    x, kernel, d_logits = (np.asarray(a).astype(np.float64) for a in (x, kernel, d_logits))
    return x @ kernel, d_logits @ kernel.T, x.T @ d_logits


def root_mean_square(a) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(a).astype(np.float64)))))


@by_itself
@pytest.mark.parametrize("kernel_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_exact_as_float32(kernel_dtype, seed):
    """Of bfloat16 tokens; what the product and both gradients miss of those in float64."""
    x = draw(seed, T, H).astype(jnp.bfloat16)
    kernel = (draw(seed + 10, H, E) / H**0.5).astype(kernel_dtype)
    d_logits = draw(seed + 20, T, E)
    wanted = exact(x, kernel, d_logits)
    found = with_gradients(logits.router_logits, x, kernel, d_logits)
    plain = with_gradients(highest, x, kernel, d_logits)
    assert [a.dtype for a in found] == [jnp.float32, jnp.bfloat16, kernel.dtype]
    for name, got, usual, want in zip(
        ("logits", "d_x", "d_kernel"), found, plain, wanted, strict=True
    ):
        error, bound = (root_mean_square(np.float64(a) - want) for a in (got, usual))
        assert 0 < error <= 1.001 * bound, name  # d_x is rounded to bfloat16, so both are equal
        assert error < 4e-3 * root_mean_square(want), name
    # Two parts would miss 2⁻¹⁶ of the kernel, as would a gradient of two parts.
    assert root_mean_square(np.float64(found[0]) - wanted[0]) < 2e-7 * root_mean_square(wanted[0])


@by_itself
def test_three_parts_are_all_of_a_float32():
    x = jnp.concatenate([draw(0, 50, 8), draw(1, 50, 8) * 1e-25, draw(2, 50, 8) * 1e30])
    parts = jax.jit(lambda x: logits._split(x, 3))(x)
    assert all(part.dtype == jnp.bfloat16 and np.any(part) for part in parts)
    np.testing.assert_array_equal(sum(np.float64(part) for part in parts), np.float64(x))
    two = np.float64(parts[0]) + np.float64(parts[1])
    assert np.any(two != np.float64(x))


def products(jaxpr) -> list:
    """All dot_generals of a program, with those of inner ones."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


@by_itself
@pytest.mark.parametrize(
    ("x_dtype", "kernel_dtype", "columns", "inner"),
    [
        ("bfloat16", "float32", 3 * E, "bfloat16"),
        ("bfloat16", "bfloat16", E, "bfloat16"),
        ("float32", "float32", E, "float32"),
        ("float16", "float32", E, "float32"),
        ("float32", "bfloat16", E, "float32"),
    ],
)
def test_one_product(x_dtype, kernel_dtype, columns, inner):
    x, kernel = jnp.ones((T, H), x_dtype), jnp.ones((H, E), kernel_dtype)
    (product,) = products(jax.make_jaxpr(logits.router_logits)(x, kernel).jaxpr)
    assert [v.aval.shape for v in product.invars] == [(T, H), (H, columns)]
    assert all(v.aval.dtype == inner for v in product.invars)
    assert product.outvars[0].aval.dtype == jnp.float32


@by_itself
def test_gradients_are_two_products_of_bfloat16():
    def pull(x, kernel, d_logits):
        return jax.vjp(logits.router_logits, x, kernel)[1](d_logits)

    x, kernel = jnp.ones((T, H), jnp.bfloat16), jnp.ones((H, E))
    traced = jax.make_jaxpr(pull)(x, kernel, jnp.ones((T, E))).jaxpr
    backward = products(traced)[1:]
    assert all(v.aval.dtype == jnp.bfloat16 for p in backward for v in p.invars)
    shapes = [[v.aval.shape for v in p.invars] for p in backward]
    assert shapes == [[(T, 6 * E), (H, 6 * E)], [(1, T, H), (1, T, 3 * E)]]


@by_itself
def test_bfloat16_kernel_of_several_ranks():
    """Its gradient is summed over the ranks in float32, and rounded once."""
    mesh = spmd.make_mesh(spmd.ranks_at_most(4))
    ranks = mesh.size
    x, d_logits = draw(3, 8 * ranks, H).astype(jnp.bfloat16), draw(4, 8 * ranks, E)
    kernel = draw(5, H, E).astype(jnp.bfloat16)
    product = spmd.shard(logits.router_logits, mesh, in_specs=(P("expert"), P()))
    found = with_gradients(product, x, kernel, d_logits)
    wanted = with_gradients(highest, x, kernel, d_logits)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        scale = root_mean_square(want)
        # One unit in the last place of bfloat16 where two sums round to different sides.
        bits = 2**-7 if got.dtype == jnp.bfloat16 else 2**-20
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=bits, atol=1e-5 * scale)
        assert np.mean(np.asarray(got) == np.asarray(want)) > 0.99 or got.dtype == jnp.float32


@by_itself
def test_second_derivatives_and_vmap():
    """A gradient of a gradient is that of the plain product; so is a batch of products."""
    x = (draw(6, 2, 8, 16) / 8).astype(jnp.bfloat16)
    kernel = draw(7, 2, 16, 4) / 8

    def second(product):
        def first(x, kernel):
            return jnp.sum(jnp.sin(product(x, kernel)))

        def of_gradient(x, kernel):
            d_x, d_kernel = jax.grad(first, argnums=(0, 1))(x, kernel)
            return jnp.sum(jnp.sin(d_kernel)) + jnp.sum(jnp.sin(d_x.astype(jnp.float32)))

        return jax.jit(jax.vmap(jax.grad(of_gradient, argnums=(0, 1))))

    found, wanted = (second(f)(x, kernel) for f in (logits.router_logits, highest))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype and np.abs(want).max() > 0
        bits = 2e-2 if got.dtype == jnp.bfloat16 else 1e-3
        got, want = np.float32(got), np.float32(want)
        np.testing.assert_allclose(got, want, rtol=bits, atol=bits / 10 * np.abs(want).max())


@by_itself
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("curved", [True, False])
def test_either_factor_may_be_mapped(in_axes, curved):
    """Products of which ``vmap`` batches one factor run, also where the cotangent is a constant."""
    factors = draw(8, 3, 8, 16).astype(jnp.bfloat16), draw(9, 3, 16, 4)
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip(factors, in_axes, strict=True))

    def run(product):
        def loss(x, kernel):
            out = product(x, kernel)
            return jnp.sum(jnp.sin(out) if curved else out)

        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes))(x, kernel)

    for got, want in zip(run(logits.router_logits), run(highest), strict=True):
        assert got.dtype == want.dtype and np.abs(want).max() > 0
        bits = 1e-2 if got.dtype == jnp.bfloat16 else 1e-3
        got, want = np.float32(got), np.float32(want)
        np.testing.assert_allclose(got, want, rtol=bits, atol=bits / 10 * np.abs(want).max())


@pytest.mark.needs_collectives
@pytest.mark.usefixtures("in_float32")
@by_itself
def test_layer_takes_the_routes_of_float32(native_backend):
    """Routes of a bfloat16 layer are those of logits in float32; its router gets its gradient."""
    group = spmd.make_group(2, native_backend)
    params = jax_ep.init_moe_params(jax.random.key(0), hidden=64, intermediate=8, num_experts=8)
    x = jax.random.normal(jax.random.key(1), (96, 64)).astype(jnp.bfloat16)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=8, top_k=2)

    def objective(params, x):
        aux = layer(x, params)[1]
        return aux.aux_loss, aux.load

    wide = x.astype(jnp.float32)
    gradient, load = jax.jit(jax.grad(objective, has_aux=True))(params, x)
    want_gradient, want = jax.jit(jax.grad(objective, has_aux=True))(params, wide)
    np.testing.assert_array_equal(load, want)
    scale = np.abs(want_gradient.router_kernel).max()
    np.testing.assert_allclose(
        gradient.router_kernel, want_gradient.router_kernel, rtol=1e-5, atol=1e-6 * scale
    )
