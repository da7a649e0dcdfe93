"""Values of every backend, bitwise equal to the oracle and so to one another.

One compilation per backend and case of ``shapes.CASES``; the routing patterns are data.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import logical_hosts
import oracle
import problems
import routings
import shapes
from spmd import fields, make_group, stacked_jit


def program(case: shapes.Case, group: jax_ep.Group):
    """Dispatch, dispatch along the handle again, and combine of given rows, as one function."""

    def rows_of(x: dict[str, jax.Array], name: str) -> Any:
        scales = x.get(f"{name}_scales")
        return x[name] if scales is None else jax_ep.Quantized(x[name], scales)

    def named(prefix: str, tokens: Any) -> dict[str, jax.Array]:
        leaves = tokens._asdict() if isinstance(tokens, jax_ep.Quantized) else {"rows": tokens}
        return {f"{prefix}.{name}": leaf for name, leaf in leaves.items()}

    def run(x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        arguments = case.dispatch_arguments
        weights = x["topk_weights"] if case.weighted else None
        out = jax_ep.dispatch(rows_of(x, "x"), x["topk_idx"], weights, group=group, **arguments)
        wire = {
            k: arguments[k] for k in ("quantization", "scale_format", "output") if k in arguments
        }
        again = jax_ep.dispatch(rows_of(x, "x_again"), group=group, handle=out.handle, **wire)
        y = jax_ep.combine(
            x["rows"],
            out.handle,
            group=group,
            weights=x["row_weights"] if case.fused else None,
        )
        found = fields(out.handle) | named("x", out.tokens) | named("x_again", again.tokens)
        found["y"] = y
        if out.weights is not None:
            found["weights"] = out.weights
        assert again.weights is None and (out.weights is None) == (not case.weighted)
        assert (out.expert_idx is None) == (case.layout == "expert")
        return found

    return run


CASES = [case.on(jax.device_count()) for case in shapes.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, backend):
    group = make_group(case.ranks, backend)
    run = stacked_jit(program(case, group), group.mesh)
    for pattern in routings.PATTERNS:
        problem = problems.make(case, pattern)
        found = run(problem.inputs)
        assert found.keys() == problem.expected.keys()
        for name, expected in problem.expected.items():
            oracle.assert_same(found[name], expected, f"{name}, pattern {pattern}, {case}")


def test_every_pair_of_levels_is_covered():
    missing = shapes.level_pairs() - shapes.covered_pairs(shapes.COVERING)
    assert not missing, sorted(map(sorted, missing))
    assert len(shapes.level_pairs()) > 400  # so the check above is not empty


def test_patterns_reach_what_they_are_for():
    """Among all cases there are dropped, padded and unused rows, and invalid pairs."""
    plans = [problems.make(case, "zipf").plan for case in shapes.CASES]
    assert any(plan.num_dropped.any() for plan in plans if plan.layout == "expert")
    assert any(plan.num_dropped.any() for plan in plans if plan.layout == "token")
    assert any((plan.group_sizes > plan.counts).any() for plan in plans)
    assert any((plan.counts == 0).any() for plan in plans)
    assert any((plan.recv_rows >= 0).sum(axis=-1).max() > 1 for plan in plans)


EMPTY = [
    CASES[index]
    for index in (2, 5, 7, 13)  # both layouts, quantized or not, bounded or not
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_no_tokens(case, backend):
    """T = 0: the rows of the capacity are all unused."""
    case = dataclasses.replace(case, tokens=0, bound="capacity", alignment=8)
    group = make_group(case.ranks, backend)
    problem = problems.make(case, "uniform")
    found = stacked_jit(program(case, group), group.mesh)(problem.inputs)
    assert problem.plan.capacity > 0
    for name, expected in problem.expected.items():
        oracle.assert_same(found[name], expected, f"{name}, {case}")


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_no_tokens_and_no_rows(layout, backend):
    """T = 0 and a lossless capacity: nothing at all, in the right shapes; gradients too."""
    group = make_group(2, backend)

    def loss(x, topk_idx, weights):
        out = jax_ep.dispatch(x, topk_idx, weights, group=group, num_experts=4, layout=layout)
        y = jax_ep.combine(out.tokens, out.handle, group=group)
        assert out.tokens.shape == (0, 16) and y.shape == (0, 16)
        return (y.sum() + out.weights.sum())[None], out.counts

    def run(x, topk_idx, weights):
        pulled, vjp, counts = jax.vjp(
            lambda x, weights: loss(x, topk_idx, weights), x, weights, has_aux=True
        )
        return pulled, vjp(jnp.ones_like(pulled)), counts

    x = np.zeros((2, 0, 16), np.float32)
    idx, weights = np.zeros((2, 0, 3), np.int32), np.zeros((2, 0, 3), np.float32)
    value, (dx, dw), counts = stacked_jit(run, group.mesh)(x, idx, weights)
    assert dx.shape == x.shape and dw.shape == weights.shape
    assert not value.any() and counts.shape == (2, 2) and not counts.any()


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", shapes.DTYPES.values(), ids=str)
def test_quantize(dtype, scale_format):
    """``quantize`` and ``dequantize`` alone, on ordinary, tiny, huge and special blocks."""
    if jax.default_backend() != "cpu":
        pytest.skip(
            "bits of plain JAX are those of CPU, where XLA takes subnormal numbers for zero"
        )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 256), np.float32)
    x *= np.exp2(rng.integers(-12, 12, size=(40, 1))).astype(np.float32)
    x[0] = 0
    x[1, :128], x[1, 128:] = 1e-36, 1e4
    x[2, 3], x[3, 200], x[4, 7] = np.nan, np.inf, -np.inf
    x[5] = np.linspace(-448, 448, 256)
    x[6, :128] = 448 * 2.0 ** np.arange(-128, 0).clip(-14)
    with np.errstate(over="ignore"):
        x = x.astype(dtype)

    @jax.jit
    def run(x):
        q = jax_ep.quantize(x, scale_format=scale_format)
        return q.values, q.scales, jax_ep.dequantize(q, x.dtype)

    values, scales = oracle.quantize(x, scale_format)
    expected = (values, scales, oracle.dequantize(values, scales, dtype))
    for found, want, what in zip(run(x), expected, ("values", "scales", "rows"), strict=True):
        oracle.assert_same(found, want, what)


def test_quantize_loses_little():
    """Not only the oracle's bits: rows come back to within the spacing of e4m3."""
    x = np.random.default_rng(1).standard_normal((64, 384), np.float32)
    for scale_format, error in (("f32", 1 / 16), ("ue8m0", 1 / 16)):
        q = jax_ep.quantize(jnp.array(x), scale_format=scale_format)
        back = jax_ep.dequantize(q, jnp.float32)
        floor = np.abs(x).reshape(64, 3, 128).max(-1) * 2**-9 / 224
        assert (np.abs(back - x) <= error * np.abs(x) + floor.repeat(128, -1)).all()


@pytest.mark.parametrize("dtype", shapes.DTYPES.values(), ids=str)
def test_surroundings_do_not_change_bits(dtype, backend):
    """Operands and results are rounded to their dtype, whatever XLA fuses around the ops.

    XLA may contract a product that feeds a sum into a fused multiply-add, and may remove a rounding
    to bf16 between two f32 operations.
    """
    ranks, tokens, top_k, experts, hidden = 2, 6, 3, 6, 128
    group = make_group(ranks, backend)
    common = {"num_experts": experts, "layout": "expert", "alignment": 1}
    bounds = oracle.limits(num_ranks=ranks, num_tokens=tokens, top_k=top_k, **common)

    def run(a, b, c, idx):
        x, dy = a[:, 0] * b[:, 0], a[:, 1] * b[:, 1]
        out = jax_ep.dispatch(x, idx, group=group, **common)
        fp8 = jax_ep.dispatch(x, idx, group=group, quantization="fp8", **common).tokens
        found = {"rows": out.tokens, "fp8": fp8}
        outputs = c * jnp.flip(c)
        factors = c[:, 0].astype(jnp.float32) * c[:, 1].astype(jnp.float32)
        found["sum"], pull = jax.vjp(
            lambda rows: jax_ep.combine(rows, out.handle, group=group), outputs
        )
        (found["d_rows"],) = pull(dy)
        found["fused"], pull = jax.vjp(
            lambda rows, w: jax_ep.combine(rows, out.handle, group=group, weights=w),
            outputs,
            factors,
        )
        found["d_rows fused"], found["d_weights"] = pull(dy)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, ranks, tokens, 2, hidden), np.float32).astype(dtype)
    c = rng.standard_normal((ranks, bounds.capacity, hidden), np.float32).astype(dtype)
    idx = routings.make("uniform", ranks=ranks, tokens=tokens, top_k=top_k, experts=experts)
    found = stacked_jit(run, group.mesh)(a, b, c, idx)

    plan = oracle.plan(idx, num_experts=experts, layout="expert", alignment=1, bounds=bounds)
    x, dy = (a[:, :, i] * b[:, :, i] for i in (0, 1))
    outputs = c * c[:, ::-1, ::-1]
    factors = c[..., 0].astype(np.float32) * c[..., 1].astype(np.float32)
    d_rows, d_weights = oracle.combine_vjp(dy, outputs, factors, plan)
    per_host = logical_hosts.of_first(ranks)
    expected = {
        "rows": oracle.move(x, plan),
        "fp8": oracle.move(oracle.dequantize(*oracle.quantize(x), dtype), plan),
        "sum": oracle.combine(outputs, plan, ranks_per_host=per_host),
        "d_rows": oracle.move(dy, plan),
        "fused": oracle.combine(outputs, plan, factors, per_host),
        "d_rows fused": d_rows,
        "d_weights": d_weights,
    }
    for name, want in expected.items():
        oracle.assert_same(found[name], want.astype(np.float32), name)
