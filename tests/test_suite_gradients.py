"""Gradients of every backend: bitwise against the oracle where the order of sums is fixed, and
within tolerance against JAX's own differentiation of the reference and against finite differences.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import logical_hosts
import oracle
import problems
import routings
import shapes
from jax_ep import reference
from spmd import (
    OPTIMIZED,
    create_group,
    fetch,
    fit,
    here,
    make_group,
    make_mesh,
    one_device_jit,
    put,
    ranks_at_most,
    shard,
    stacked_jit,
)

DIFFERENTIABLE = [case.on(jax.device_count()) for case in shapes.CASES if case.output == "dense"]


def pullbacks(case: shapes.Case, group: jax_ep.Group):
    """The cotangents that dispatch and combine pull back from given cotangents of their results."""

    def run(a: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def forward(x, weights):
            out = jax_ep.dispatch(x, a["topk_idx"], weights, group=group, **case.dispatch_arguments)
            return (out.tokens, out.weights), out.handle

        def home(rows, weights):
            return jax_ep.combine(rows, handle, group=group, weights=weights)

        weights = a["topk_weights"] if case.weighted else None
        d_row_weights = a["d_row_weights"] if case.weighted else None
        _, pull, handle = jax.vjp(forward, a["x"], weights, has_aux=True)
        found = {}
        found["dx"], found["d_topk_weights"] = pull((a["d_rows"], d_row_weights))
        _, pull = jax.vjp(home, a["rows"], a["row_weights"] if case.fused else None)
        found["d_rows"], found["d_row_weights"] = pull(a["dy"])
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    return run


def expected_pullbacks(case: shapes.Case, problem: problems.Problem) -> dict[str, np.ndarray]:
    a, plan = problem.inputs, problem.plan
    per_host = logical_hosts.of_first(case.ranks)
    expected = {"dx": oracle.combine(a["d_rows"], plan, ranks_per_host=per_host)}
    if case.weighted:
        expected["d_topk_weights"] = oracle.send_home(a["d_row_weights"], plan)
    if case.fused:
        expected["d_rows"], expected["d_row_weights"] = oracle.combine_vjp(
            a["dy"], a["rows"], a["row_weights"], plan
        )
    else:
        expected["d_rows"] = oracle.move(a["dy"], plan)
    return expected


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_pullbacks(case, backend):
    """Bitwise, on every pattern; for fp8 rows the pullback is that of plain rows."""
    group = make_group(case.ranks, backend)
    run = stacked_jit(pullbacks(case, group), group.mesh)
    for pattern in routings.PATTERNS:
        problem = problems.make(case, pattern)
        found, expected = run(problem.inputs), expected_pullbacks(case, problem)
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            oracle.assert_same(found[name], want, f"{name}, pattern {pattern}, {case}")


SMOOTH = {  # layout, fused, bound: of the program below
    "expert": ("expert", False, {}),
    "expert-fused": ("expert", True, {}),
    "expert-capacity": ("expert", True, {"capacity": 24}),
    "expert-factor": ("expert", False, {"capacity_factor": 0.75}),
    "token": ("token", False, {}),
    "token-capacity": ("token", False, {"capacity": 9}),
}
RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 13, 3, 24
EXPERTS = 3 * RANKS


def model(dispatch, combine, layout: str, fused: bool):
    """A small MoE-like function of (x, topk_weights), smooth in both."""

    def expert(rows):
        return (jnp.tanh(rows.astype(jnp.float32)) * 2 + 0.5).astype(rows.dtype)

    def run(x, topk_idx, weights):
        tokens, row_weights, handle = dispatch(jnp.sin(x), topk_idx, weights**2)
        hidden = expert(tokens)
        if layout == "token":
            hidden = hidden * row_weights.sum(axis=1, keepdims=True).astype(hidden.dtype)
            return combine(hidden, None, handle)
        if fused:
            return combine(hidden, row_weights, handle)
        return combine(hidden * row_weights[:, None].astype(hidden.dtype), None, handle)

    return run


def public(group, layout, bound):
    """The ops as users call them, with their custom gradients."""

    def dispatch(x, topk_idx, weights):
        out = jax_ep.dispatch(
            x,
            topk_idx,
            weights,
            group=group,
            num_experts=EXPERTS,
            layout=layout,
            alignment=8,
            **bound,
        )
        return out.tokens, out.weights, out.handle

    def combine(rows, weights, handle):
        return jax_ep.combine(rows, handle, group=group, weights=weights)

    return dispatch, combine


def plain(group, layout, bound):
    """The reference called directly, so that JAX differentiates its collectives."""
    bounds = oracle.limits(
        num_ranks=RANKS,
        num_tokens=TOKENS,
        top_k=TOP_K,
        num_experts=EXPERTS,
        layout=layout,
        alignment=8,
        **bound,
    )

    def dispatch(x, topk_idx, weights):
        handle = reference.plan(
            topk_idx,
            group=group,
            num_experts=EXPERTS,
            layout=layout,
            capacity=bounds.capacity,
            alignment=8,
            expert_capacity=bounds.per_expert,
        )
        return *reference.dispatch(x, weights, handle, group=group), handle

    def combine(rows, weights, handle):
        return reference.combine(rows, weights, None, handle, group=group)[0]

    return dispatch, combine


def value_and_pullback(run):
    def both(x, topk_idx, weights, dy):
        y, pull = jax.vjp(lambda x, weights: run(x, topk_idx, weights), x, weights)
        return y, *pull(dy)

    return both


@functools.cache
def ours(name: str, backend: str):
    layout, fused, bound = SMOOTH[name]
    group = make_group(RANKS, backend)
    run = value_and_pullback(model(*public(group, layout, bound), layout, fused))
    return stacked_jit(run, group.mesh, **OPTIMIZED)


@functools.cache
def theirs(name: str, dtype: str) -> dict[str, tuple[np.ndarray, ...]]:
    """Value and gradients by pattern, differentiated by JAX; all ranks on one device."""
    layout, fused, bound = SMOOTH[name]
    group = make_group(RANKS, "reference")
    both = value_and_pullback(model(*plain(group, layout, bound), layout, fused))
    run = one_device_jit(both, **OPTIMIZED)
    return {pattern: run(*inputs(dtype, pattern)) for pattern in ("masked", "one_rank", "invalid")}


@functools.cache
def inputs(dtype: str, pattern: str = "masked"):
    rng = np.random.default_rng(7)
    x, dy = rng.standard_normal((2, RANKS, TOKENS, HIDDEN)).astype(shapes.DTYPES[dtype])
    weights = rng.uniform(0.5, 1.5, (RANKS, TOKENS, TOP_K)).astype(np.float32)
    sizes = {"ranks": RANKS, "tokens": TOKENS, "top_k": TOP_K, "experts": EXPERTS}
    return x, routings.make(pattern, **sizes), weights, dy


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in SMOOTH]
    + [(name, "bfloat16") for name in ("expert-fused", "expert-factor", "token-capacity")],
)
def test_against_autodiff_of_the_reference(name, dtype, backend):
    tolerance = 1e-5 if dtype == "float32" else 0.04
    for pattern, expected in theirs(name, dtype).items():
        found = ours(name, backend)(*inputs(dtype, pattern))
        if jax.default_backend() == "cpu":  # elsewhere XLA may fuse the reference otherwise
            oracle.assert_same(found[0], expected[0], f"y, {pattern}")
        for what, got, want in zip(("y", "dx", "dw"), found, expected, strict=True):
            got, want = got.astype(np.float32), want.astype(np.float32)
            scale = np.abs(want).max()
            assert scale > 0.1
            np.testing.assert_allclose(
                got, want, rtol=tolerance, atol=tolerance * scale, err_msg=f"{what}, {pattern}"
            )


@pytest.mark.parametrize("name", SMOOTH)
def test_against_finite_differences(name, backend):
    """The derivative along a direction. It exists because the routing alone decides about drops."""
    run = ours(name, backend)
    x, idx, weights, dy = inputs("float32")
    rng = np.random.default_rng(8)
    step = np.float32(2**-7)
    _, dx, dw = run(x, idx, weights, dy)
    for towards in ("x", "weights", "both"):
        # Random, but leaning to where the value grows, because changes might nearly cancel
        # otherwise.
        v = (rng.standard_normal(x.shape) + np.sign(dx)).astype(np.float32) * (towards != "weights")
        u = (rng.standard_normal(weights.shape) + np.sign(dw)).astype(np.float32)
        u *= towards != "x"
        y_more = run(x + step * v, idx, weights + step * u, dy)[0].astype(np.float64)
        y_less = run(x - step * v, idx, weights - step * u, dy)[0].astype(np.float64)
        numeric = ((y_more - y_less) * dy).sum() / (2 * step)
        analytic = (dx.astype(np.float64) * v).sum() + (dw.astype(np.float64) * u).sum()
        assert abs(numeric) > 1, "a direction in which nothing changes tests nothing"
        np.testing.assert_allclose(analytic, numeric, rtol=5e-3, err_msg=towards)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
def test_fp8_is_straight_through(scale_format, backend):
    """The gradient with quantized rows is that of the same rows sent as they are, to the bit."""
    group = make_group(2, backend)

    def gradient(x, topk_idx, d_rows, **wire):
        def rows(x):
            return jax_ep.dispatch(x, topk_idx, group=group, num_experts=4, **wire).tokens

        y, pull = jax.vjp(rows, x)
        return pull(d_rows)[0], (y != 0).any()[None]

    def run(x, topk_idx, d_rows):
        fp8 = {"quantization": "fp8", "scale_format": scale_format}
        return gradient(x, topk_idx, d_rows, **fp8), gradient(x, topk_idx, d_rows)

    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 4, 128)).astype(shapes.DTYPES["bfloat16"])
    idx = routings.make("uniform", ranks=2, tokens=4, top_k=2, experts=4)
    rows = rng.standard_normal((2, 2 * 4 * 2, 128)).astype(x.dtype)
    (with_fp8, seen), (without, _) = stacked_jit(run, group.mesh)(x, idx, rows)
    assert seen.all() and np.abs(without.astype(np.float32)).sum() > 1
    oracle.assert_same(with_fp8, without, "dx")


def quantized_loss(case: str, group, x, idx, weights):
    """Losses that would need the gradient of float8 rows, and one that would not."""
    common = {"group": group, "num_experts": 4}
    if case == "input":
        q = jax_ep.quantize(x)
        q = jax_ep.Quantized(jax.lax.stop_gradient(q.values), q.scales)
        out = jax_ep.dispatch(q, idx, weights, **common)
        return out.tokens.scales.sum()
    out = jax_ep.dispatch(x, idx, weights, quantization="fp8", output="quantized", **common)
    rows = jax_ep.dequantize(out.tokens, jnp.float32)
    if case == "output":
        return rows.sum()
    return (jax.lax.stop_gradient(rows) * out.weights[:, None]).sum()


@pytest.mark.parametrize("case", ["input", "output"])
def test_quantized_has_no_gradient(case, backend):
    group = make_group(2, backend)

    def run(x, idx, weights):
        return jax.grad(lambda x: quantized_loss(case, group, x, idx, weights))(x)

    shape = jax.ShapeDtypeStruct
    arguments = shape((8, 128), jnp.bfloat16), shape((8, 2), jnp.int32), shape((8, 2), jnp.float32)
    with pytest.raises(TypeError) as error:
        jax.eval_shape(shard(run, group.mesh), *arguments)
    for words in ("jax_ep.dispatch", "Quantized", "quantization='fp8'", "output='dense'"):
        assert words in str(error.value)


def test_weights_of_quantized_rows_have_a_gradient(backend):
    group = make_group(2, backend)

    def run(x, idx, weights):
        loss = lambda weights: quantized_loss("weights", group, x, idx, weights)  # noqa: E731
        return jax.grad(loss)(weights)

    x = np.ones((2, 4, 128), np.float32) * np.arange(1, 5, dtype=np.float32)[:, None]
    idx = np.array([[[0, 2], [1, -1], [3, 3], [2, 1]]] * 2, np.int32)
    found = stacked_jit(run, group.mesh)(x, idx, np.ones((2, 4, 2), np.float32))
    kept = np.array([[1, 1], [1, 0], [1, 0], [1, 1]])
    np.testing.assert_allclose(found, [128 * kept * np.arange(1, 5)[:, None]] * 2, rtol=1e-2)


@pytest.mark.needs_collectives
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad-inside", "grad-outside"])
def test_operands_replicated_over_another_axis(inside, check_vma, backend):
    """The gradient of an operand that two groups share is the sum of both groups' gradients."""
    if inside and not check_vma:
        pytest.skip("without varying axes, JAX does not sum gradients taken inside shard_map")
    names = ("data", "expert")
    mesh = make_mesh(fit((2, 2), names), names)
    copies, ranks = mesh.devices.shape
    group = create_group(mesh, backend=backend)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((ranks, 5, 16)).astype(np.float32)  # of each rank, all groups alike
    weights = rng.standard_normal((ranks, 5, 2)).astype(np.float32)
    sizes = {"ranks": ranks, "tokens": 5, "top_k": 2, "experts": 2 * ranks}
    idx = np.stack([routings.make("uniform", **sizes, seed=copy) for copy in range(copies)])
    bounds = oracle.Limits(capacity=24, per_expert=oracle.INT32_MAX)
    plans = [
        oracle.plan(i, num_experts=2 * ranks, layout="expert", alignment=1, bounds=bounds)
        for i in idx
    ]
    c_rows = rng.standard_normal((copies, ranks, 24, 16)).astype(np.float32)
    c_weights = rng.standard_normal((copies, ranks, 24)).astype(np.float32)

    def loss(x, weights, idx, c_rows, c_weights):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=2 * ranks, alignment=1, capacity=24
        )
        return (out.tokens * c_rows).sum() + (out.weights * c_weights).sum()

    shared, everywhere = P("expert"), P(("data", "expert"))
    specs = (shared, shared, everywhere, everywhere, everywhere)
    if inside:
        run = shard(jax.grad(loss, (0, 1)), mesh, in_specs=specs, out_specs=(shared, shared))
    else:
        total = shard(
            lambda *a: loss(*a)[None],
            mesh,
            in_specs=specs,
            out_specs=everywhere,
            check_vma=check_vma,
        )
        run = jax.grad(lambda *a: total(*a).sum(), (0, 1))
    arrays = [a.reshape(-1, *a.shape[2:]) for a in (x, weights)]
    arrays += [a.reshape(-1, *a.shape[3:]) for a in (idx, c_rows, c_weights)]
    given = [put(a, mesh, spec) for a, spec in zip(arrays, specs, strict=True)]
    dx, dw = fetch(jax.jit(run)(*given) if here(mesh) else None, mesh)
    want_x = sum(oracle.combine(c, plan) for c, plan in zip(c_rows, plans, strict=True))
    want_w = sum(oracle.send_home(c, plan) for c, plan in zip(c_weights, plans, strict=True))
    np.testing.assert_allclose(dx, want_x.reshape(dx.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, want_w.reshape(dw.shape), rtol=1e-5, atol=1e-6)
