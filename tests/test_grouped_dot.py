"""``grouped_dot`` against one NumPy matmul for each group."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from jax_ep._grouped_dot import api

pytestmark = pytest.mark.usefixtures("in_float32")

# Rows and sizes of the groups: less than a tile, several tiles with ends inside tiles, empty groups
# at both ends, nothing at all, one group.
SIZES = {
    "few": (7, (3, 0, 2)),
    "tiles": (700, (0, 1, 300, 128, 0, 200, 0)),
    "full": (260, (130, 130)),
    "none": (40, (0, 0)),
    "one": (140, (135,)),
}


def numpy_grouped_dot(lhs, rhs, sizes):
    """The result and, for a cotangent of the result, the gradients; in float64."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for part, matrix in zip(parts, rhs, strict=True):
        out[part] = lhs[part] @ matrix

    def gradients(d_out):
        d_lhs, d_rhs = np.zeros_like(lhs), np.zeros_like(rhs)
        for group, part in enumerate(parts):
            d_lhs[part] = d_out[part] @ rhs[group].T
            d_rhs[group] = lhs[part].T @ d_out[part]
        return d_lhs, d_rhs

    return out, gradients


def problem(rows: int, sizes: tuple[int, ...], inner: int = 8, outer: int = 6):
    rng = np.random.default_rng(rows)
    lhs, d_out = rng.normal(size=(rows, inner)), rng.normal(size=(rows, outer))
    rhs = rng.normal(size=(len(sizes), inner, outer))
    unused = slice(sum(sizes), None)
    return lhs, rhs, d_out, unused


def with_gradients(lhs, rhs, group_sizes, d_out):
    out, pull = jax.vjp(lambda a, b: jax_ep.grouped_dot(a, b, group_sizes), lhs, rhs)
    return out, *pull(d_out)


@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(case):
    rows, sizes = SIZES[case]
    lhs, rhs, d_out, unused = problem(rows, sizes)
    want, gradients = numpy_grouped_dot(lhs, rhs, sizes)
    wants = [want, *gradients(d_out)]
    lhs[unused] = np.nan  # not read
    d_out[unused] = np.nan
    gots = jax.jit(with_gradients)(
        *(jnp.asarray(a, jnp.float32) for a in (lhs, rhs)),
        jnp.array(sizes, jnp.int32),
        jnp.asarray(d_out, jnp.float32),
    )
    for got, want in zip(gots, wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert not np.any(gots[0][unused]) and not np.any(gots[1][unused])


def test_num_sms_means_nothing_without_kernels():
    rows, sizes = SIZES["tiles"]
    lhs, rhs, d_out, _ = problem(rows, sizes)
    given = [jnp.asarray(a, jnp.float32) for a in (lhs, rhs)]

    def run(num_sms, lhs, rhs, d_out):
        on_some = functools.partial(jax_ep.grouped_dot, num_sms=num_sms)
        out, pull = jax.vjp(lambda a, b: on_some(a, b, jnp.array(sizes, jnp.int32)), lhs, rhs)
        return out, *pull(d_out)

    step = jax.jit(run, static_argnums=0)
    wants, gots = (step(n, *given, jnp.asarray(d_out, jnp.float32)) for n in (None, 3))
    for got, want in zip(gots, wants, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("sms", "in_order"), [({"d_lhs": 3}, True), ({"d_lhs": 3, "d_rhs": 3}, False), ({}, False)]
)
def test_the_gradient_that_leaves_sms_comes_first(sms, in_order):
    """XLA is told so where only that of the rows leaves them."""
    bounds, sizes = api.ProductSms(**sms), jnp.zeros(2, jnp.int32)

    def step(lhs, rhs):
        out, pull = jax.vjp(lambda a, b: api.grouped_dot_on(bounds, "zero", a, b, sizes), lhs, rhs)
        return pull(out)

    found = str(jax.make_jaxpr(step)(jnp.zeros((4, 8)), jnp.zeros((2, 8, 4))))
    assert ("optimization_barrier" in found) == in_order


def test_bfloat16_sums_in_float32():
    rows, sizes = 600, (600,)
    lhs = jnp.ones((rows, 512), jnp.bfloat16)
    rhs = jnp.ones((1, 512, 4), jnp.bfloat16)
    d_out = jnp.ones((rows, 4), jnp.bfloat16)
    out, d_lhs, d_rhs = jax.jit(with_gradients)(lhs, rhs, jnp.array(sizes, jnp.int32), d_out)
    assert {a.dtype for a in (out, d_lhs, d_rhs)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.float32(out), 512)
    np.testing.assert_array_equal(np.float32(d_rhs), 600)


def test_same_as_ragged_dot():
    rows, sizes = SIZES["tiles"]
    lhs, rhs, _, _ = problem(rows, sizes)
    arguments = (jnp.float32(lhs), jnp.float32(rhs), jnp.array(sizes, jnp.int32))
    want = jax.jit(jax.lax.ragged_dot)(*arguments)
    np.testing.assert_allclose(jax_ep.grouped_dot(*arguments), want, rtol=1e-5, atol=1e-5)


@pytest.mark.one_process("calls grouped_dot with arrays of one process")
def test_in_shard_map_with_weights_that_do_not_vary():
    """Rows vary over an axis, weights do not: their gradient is summed over it."""
    mesh = spmd.make_mesh((2,), ("data",))
    lhs, rhs, d_out, _ = problem(*SIZES["full"])
    lhs, rhs, d_out = (jnp.asarray(a, jnp.float32) for a in (lhs, rhs, d_out))
    sizes = jnp.array([[100, 30], [2, 50]], jnp.int32)

    def local(d_out, lhs, rhs, sizes):
        return jnp.sum(jax_ep.grouped_dot(lhs, rhs, sizes[0]) * d_out)[None]

    total = functools.partial(
        spmd.shard(
            local, mesh, in_specs=(P("data"), P("data"), P(), P("data")), out_specs=P("data")
        ),
        d_out,
    )
    gots = jax.jit(jax.grad(lambda *a: total(*a, sizes).sum(), argnums=(0, 1)))(lhs, rhs)
    halves = [
        numpy_grouped_dot(np.float64(lhs[part]), np.float64(rhs), size)[1](np.float64(d_out[part]))
        for part, size in ((slice(0, 130), sizes[0]), (slice(130, 260), sizes[1]))
    ]
    wants = np.concatenate([h[0] for h in halves]), sum(h[1] for h in halves)
    for got, want in zip(gots, wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_no_rows():
    sizes = jnp.zeros(2, jnp.int32)
    out, d_lhs, d_rhs = with_gradients(
        jnp.zeros((0, 4)), jnp.ones((2, 4, 3)), sizes, jnp.zeros((0, 3))
    )
    assert out.shape == (0, 3) and d_lhs.shape == (0, 4) and not np.any(d_rhs)


def test_errors():
    sizes = jnp.zeros(2, jnp.int32)
    lhs = jnp.zeros((4, 8))
    with pytest.raises(
        TypeError, match="argument rhs: expected dtype float32 as lhs, got dtype bf"
    ):
        jax_ep.grouped_dot(lhs, jnp.zeros((2, 8, 4), jnp.bfloat16), sizes)
    rhs = jnp.zeros((2, 8, 4))
    text = "jax_ep.grouped_dot: argument num_sms: expected a positive int or None, got "
    for wrong, error, got in ((0, ValueError, "0"), (True, TypeError, "bool")):
        with pytest.raises(error, match=text + got):
            jax_ep.grouped_dot(lhs, rhs, sizes, num_sms=wrong)
