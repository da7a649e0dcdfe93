"""Forward mode, and derivatives of second order, of the ops and of the layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import oracle
import problems
import shapes
from dense_experts import dense_layer as dense_moe
from jax_ep._moe import biases, logits
from small_layer import RANKS, assert_close, data, dense_layer, layer
from spmd import (
    count_calls,
    flat,
    make_group,
    native_calls,
    need_part,
    put,
    ranks_at_most,
    shard,
    stacked_jit,
)

TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_combine_vjp")
CASES = [case.on(jax.device_count()) for case in shapes.CASES if case.output == "dense"]


@functools.cache
def case_of(layout: str, fused: bool) -> shapes.Case:
    """A case of the suite in float32 with weights, as small as there is."""
    fits = [c for c in CASES if (c.layout, c.fused, c.weighted) == (layout, fused, True)]
    return min(fits, key=lambda c: (c.dtype != "float32", c.ranks * c.tokens * c.hidden))


@pytest.mark.parametrize(("layout", "fused"), [("expert", True), ("token", False)])
def test_tangents_are_the_maps_themselves(layout, fused, backend):
    """To the bit, against the oracle; and both modes are each other's transposes."""
    case = case_of(layout, fused)
    group = make_group(case.ranks, backend)

    def run(a, v):
        def there(x, weights):
            out = jax_ep.dispatch(x, a["topk_idx"], weights, group=group, **case.dispatch_arguments)
            return (out.tokens, out.weights), out.handle

        def home(rows):
            return jax_ep.combine(rows, handle, group=group)

        primals, tangents = (a["x"], a["topk_weights"]), (v["x"], v["topk_weights"])
        _, (rows, row_weights), handle = jax.jvp(there, primals, tangents, has_aux=True)
        _, y = jax.jvp(home, (a["rows"],), (v["rows"],))
        pulled = jax.vjp(lambda *p: there(*p)[0], *primals)[1]((a["d_rows"], a["d_row_weights"]))
        return {"rows": rows, "row_weights": row_weights, "y": y, "pulled": pulled}

    problem = problems.make(case, "masked")
    a, plan = problem.inputs, problem.plan
    rng = np.random.default_rng(1)
    v = {
        n: rng.standard_normal(a[n].shape).astype(a[n].dtype) for n in ("x", "topk_weights", "rows")
    }
    found = stacked_jit(run, group.mesh)(a, v)
    rows, row_weights = oracle.move(v["x"], plan), oracle.move_weights(v["topk_weights"], plan)
    oracle.assert_same(found["rows"], rows, "rows")
    oracle.assert_same(found["row_weights"], row_weights, "row_weights")
    oracle.assert_same(found["y"], oracle.combine(v["rows"], plan), "y")
    # Cotangents of unused rows are NaN, which nobody reads.
    as_floats = lambda x: np.nan_to_num(np.asarray(x).astype(np.float64))  # noqa: E731
    forward = sum(
        (as_floats(a[n]) * as_floats(t)).sum()
        for n, t in (("d_rows", rows), ("d_row_weights", row_weights))
    )
    reverse = sum(
        (as_floats(t) * as_floats(v[n])).sum()
        for n, t in zip(("x", "topk_weights"), found["pulled"], strict=True)
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-4 if case.dtype == "float32" else 0.05)


def second_orders(f, primals, tangents):
    """A loss's derivative, and that of its gradient, in the four ways of composing two modes."""
    loss = lambda *p: jnp.sin(f(*p)).sum()  # noqa: E731
    numbers = tuple(range(len(primals)))
    first = lambda *p: jax.jvp(loss, p, tangents)[1]  # noqa: E731
    gradients = jax.grad(loss, numbers)
    return {
        "linearize": jax.linearize(f, *primals)[1](*tangents),
        "forward over forward": jax.jvp(first, primals, tangents)[1][None],
        "reverse over forward": jax.grad(first, numbers)(*primals),
        "forward over reverse": jax.jvp(gradients, primals, tangents)[1],
        "reverse over reverse": jax.vjp(gradients, *primals)[1](tangents),
    }


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "sum"])
def test_second_order(fused, backend):
    group = make_group(RANKS, backend)
    x, weights, idx = data()
    tangents = tuple(a[..., ::-1].copy() for a in (x, weights))

    def run(x, weights, idx, *tangents):
        each = lambda x, w: layer(group, x, w, idx, fused=fused)  # noqa: E731
        return second_orders(each, (x, weights), tangents)

    def dense(x, weights, idx, *tangents):
        return second_orders(dense_layer, (x, weights), tangents)

    found = stacked_jit(run, group.mesh)(x, weights, idx, *tangents)
    wanted = jax.jit(jax.vmap(dense))(x, weights, idx, *tangents)
    for way, want in wanted.items():
        assert_close(found[way], want, way, tolerance=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "sum"])
def test_calls(fused, native_backend):
    """A tangent costs a dispatch, and a combine for each factor; what has none costs nothing."""
    if native_backend == "reference":
        pytest.skip("counts the calls of native targets")
    group = make_group(RANKS, native_backend)
    need_part(group.mesh)
    x, weights, idx = (put(flat(a), group.mesh) for a in data())

    def program(x, weights, idx, *, of, reverse):
        f = lambda x, w: layer(group, x, w, idx, fused=fused)  # noqa: E731
        f = (lambda w, f=f: f(x, w)) if of == "weights" else f
        primals = (weights,) if of == "weights" else (x, weights)
        if reverse:
            return jax.vjp(f, *primals)[1](x)
        return jax.jvp(f, primals, primals)[1]

    def lowered(**how):
        mapped = shard(functools.partial(program, **how), group.mesh)
        text = jax.jit(mapped).lower(x, weights, idx).compile().as_text()
        return tuple(count_calls(text, TARGETS).values())

    # Forward mode computes no output here, only its tangent.
    assert lowered(of="both", reverse=False) == ((1, 2, 2, 0) if fused else (1, 2, 1, 0))
    assert lowered(of="both", reverse=True) == ((1, 1, 1, 1) if fused else (1, 2, 1, 0))
    calls = native_calls(
        jax.make_jaxpr(shard(functools.partial(program, of="weights", reverse=False), group.mesh))(
            x, weights, idx
        ).jaxpr
    )
    channels = [c["results"][0].shape[1] for c in calls if c["target"].endswith("dispatch")]
    assert channels == [x.shape[1], 0]  # no row travels with the tangents of weights alone


def test_under_transformations(backend):
    """Forward mode of vmap, scan and jax.checkpoint, and vmap of forward mode."""
    group = make_group(RANKS, backend)
    many = [data(seed) for seed in range(2)]
    x, weights, idx = (np.stack(a, axis=1) for a in zip(*many, strict=True))  # [R, n, T, ...]

    def each(x, weights, idx):
        return layer(group, x, weights, idx)

    def jvp(f, *arguments):
        x, weights, idx = arguments
        g = lambda x, w: f(x, w, idx)  # noqa: E731
        return jax.jvp(g, (x, weights), (jnp.cos(x), jnp.sin(weights)))

    def scanned(x, weights, idx):
        body = lambda _, xs: (None, jax.checkpoint(each)(*xs))  # noqa: E731
        return jax.lax.scan(body, None, (x, weights, idx))[1]

    def run(*arguments):
        loop = [jvp(each, *(a[i] for a in arguments)) for i in range(2)]
        return {
            "jvp of vmap": jvp(jax.vmap(each), *arguments),
            "vmap of jvp": jax.vmap(functools.partial(jvp, each))(*arguments),
            "jvp of scan": jvp(scanned, *arguments),
            "loop": jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop),
        }

    found = stacked_jit(run, group.mesh)(x, weights, idx)
    for how in ("jvp of vmap", "vmap of jvp", "jvp of scan"):
        assert_close(found[how], found["loop"], how)


def test_in_flight(backend):
    """Start and done halves have the derivatives of the ops."""
    group = make_group(RANKS, backend)

    def halves(x, w, idx):
        ticket = jax_ep.dispatch_start(x, idx, w, group=group, num_experts=8)
        out = jax_ep.dispatch_done(ticket)
        rows = jnp.tanh(out.tokens)
        ticket = jax_ep.combine_start(rows, out.handle, group=group, weights=out.weights)
        return x + jax_ep.combine_done(ticket)

    def run(x, weights, idx):
        f = lambda x, w: halves(x, w, idx)  # noqa: E731
        return jax.jvp(f, (x, weights), (jnp.cos(x), weights))

    x, weights, idx = data()
    wanted = jax.jit(lambda x, w: jax.jvp(dense_layer, (x, w), (jnp.cos(x), w)))(x, weights)
    assert_close(stacked_jit(run, group.mesh)(x, weights, idx), wanted)


def test_float8_rows(backend):
    """Tangents are straight-through with dense output, and an error with quantized output."""
    group = make_group(2, backend)

    def rows(x, idx, weights, **wire):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=4, **wire)
        return out.tokens, out.weights

    def run(x, idx, weights, **wire):
        f = lambda x, w: rows(x, idx, w, **wire)  # noqa: E731
        return jax.jvp(f, (x, weights), (jnp.cos(x), jnp.cos(weights)))[1]

    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 4, 128)).astype(np.float32)
    weights = rng.standard_normal((2, 4, 2)).astype(np.float32)
    idx = rng.integers(0, 4, (2, 4, 2)).astype(np.int32)
    fp8 = functools.partial(run, quantization="fp8")
    found = stacked_jit(lambda *a: (fp8(*a), run(*a)), group.mesh)(x, idx, weights)
    for got, want in zip(*found, strict=True):
        oracle.assert_same(got, want, "tangents")
    need_part(group.mesh)
    arguments = [put(flat(a), group.mesh) for a in (x, idx, weights)]
    quantized = functools.partial(fp8, output="quantized")
    with pytest.raises(TypeError, match=r"jax_ep.dispatch: Quantized rows have no .*stop_gradient"):
        jax.jit(shard(quantized, group.mesh)).lower(*arguments)


@pytest.mark.needs_collectives
@pytest.mark.usefixtures("in_float32")
@pytest.mark.one_process("calls the layer with arrays of one process")
def test_hessian_of_the_layer(backend):
    """Products with the Hessian of a loss, against a dense layer and finite differences."""
    group = make_group(ranks_at_most(2), backend)
    sizes = {"hidden": 8, "intermediate": 12, "num_experts": 4}
    params = jax_ep.init_moe_params(
        jax.random.key(0), **sizes, shared_intermediate=6, expert_bias=True
    )
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def ours(x, params):
        y, aux = jax_ep.moe(x, params, group=group, num_experts=4, top_k=2)
        return jnp.sin(y).sum() + aux.aux_loss

    def dense(x, params):
        y, (aux_loss, _) = dense_moe(x, params, top_k=2)
        return jnp.sin(y).sum() + aux_loss

    at = (x, params)
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(at))))
    towards = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), at)

    def gradient(loss, x, params):
        return jax.grad(loss, (0, 1))(x, params)

    def product(loss):
        return jax.jit(lambda at, v: jax.jvp(functools.partial(gradient, loss), at, v))

    ours, dense = product(ours), product(dense)
    first, found = ours(at, towards)
    wanted_first, wanted = dense(at, towards)
    assert_close(first, wanted_first, "gradient", tolerance=1e-4)
    assert_close(found, wanted, "Hessian", tolerance=1e-3)
    step = 2.0**-11  # no token changes its experts
    moved = lambda sign: jax.tree.map(lambda p, v: p + sign * step * v, at, towards)  # noqa: E731
    more, less = (ours(moved(sign), towards)[0] for sign in (1, -1))
    for got, up, down in zip(*map(jax.tree.leaves, (found, more, less)), strict=True):
        numeric = (np.asarray(up, np.float64) - np.asarray(down, np.float64)) / (2 * step)
        np.testing.assert_allclose(got, numeric, rtol=0.1, atol=0.02 * np.abs(numeric).max())


def test_router_products_of_bfloat16():
    """Tangents of logits are products in float32 too, and so are those of their gradients."""
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.standard_normal((6, 16)), jnp.bfloat16) for _ in range(2))
    kernel, d_kernel = (jnp.asarray(rng.standard_normal((16, 4)), jnp.float32) for _ in range(2))
    ct = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)

    def gradient(x, kernel):
        return jax.vjp(lambda k: logits.router_logits(x, k), kernel)[1](ct)[0]

    @jax.jit
    def run(x, kernel, dx, d_kernel):
        given = (x, kernel), (dx, d_kernel)
        return jax.jvp(logits.router_logits, *given)[1], jax.jvp(gradient, *given)[1]

    tangent, of_gradient = run(x, kernel, dx, d_kernel)
    x, dx, kernel, d_kernel, ct = (np.asarray(a, np.float64) for a in (x, dx, kernel, d_kernel, ct))
    np.testing.assert_allclose(tangent, dx @ kernel + x @ d_kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_gradient, dx.T @ ct, rtol=1e-5, atol=1e-5)


def test_biases():
    """Of rows past the last group, tangents of biases are zero too."""
    rng = np.random.default_rng(0)
    rows, bias, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 3), (2, 3), (5,))
    )
    expert_of_row = jnp.array([0, 0, 1, 2, 2])
    add = lambda rows, bias, weights: biases.add_bias(rows, bias, expert_of_row, weights)  # noqa: E731

    def plain(rows, bias, weights):
        matrix = (expert_of_row[:, None] == jnp.arange(2)).astype(jnp.float32)
        return rows + weights[:, None] * (matrix @ bias)

    given = (rows, bias, weights)
    tangents = jax.tree.map(jnp.cos, given)
    found, wanted = (
        jax.jit(functools.partial(second_orders, f))(given, tangents) for f in (add, plain)
    )
    assert_close(found, wanted)
