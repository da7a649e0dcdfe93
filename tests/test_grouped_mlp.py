"""``grouped_mlp`` against an MLP in NumPy for each group, values and gradients."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
from jax_ep._grouped_dot import products

pytestmark = pytest.mark.usefixtures("in_float32")

ROWS, HIDDEN, INNER = 60, 8, 12
SIZES = (5, 0, 30, 7)


def make(*, gated: bool = True):
    """Rows, weights of rows, matrices (gate or None, up, down) and a cotangent."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 2  # noqa: E731
    rows, weights = draw(ROWS, HIDDEN), rng.random(ROWS).astype(np.float32)
    up, down = draw(len(SIZES), HIDDEN, INNER), draw(len(SIZES), INNER, HIDDEN)
    gate = draw(len(SIZES), HIDDEN, INNER) if gated else None
    return jax.tree.map(jnp.asarray, (rows, weights, (gate, up, down), draw(ROWS, HIDDEN)))


@functools.partial(jax.jit, static_argnames="activation")
def dense(rows, weights, matrices, activation):
    """The same in plain JAX, one group after the other; unused rows are left out."""
    gate, up, down = matrices
    bounds = np.concatenate([[0], np.cumsum(SIZES)])
    outs = []
    for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
        mine = rows[begin:end]
        inner = mine @ up[group]
        inner = activation(inner) if gate is None else activation(mine @ gate[group]) * inner
        outs.append((inner * weights[begin:end, None]) @ down[group])
    return jnp.concatenate(outs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("unused_rows", ["zero", "undefined"])
def test_values_and_gradients(gated, unused_rows):
    """NaN in unused rows, in their weights and cotangents reaches no result of used rows."""
    rows, weights, matrices, d_out = make(gated=gated)
    used = sum(SIZES)

    def mlp(rows, weights, matrices):
        options = {"row_weights": weights, "unused_rows": unused_rows}
        return jax_ep.grouped_mlp(rows, *matrices, jnp.array(SIZES), **options)

    poisoned = [a.at[used:].set(np.nan) for a in (rows, d_out)]
    of_rows = weights.at[used:].set(np.nan)
    want, pull = jax.vjp(lambda *a: dense(*a, jax.nn.silu), rows[:used], weights[:used], matrices)
    wants = (want, *pull(d_out[:used]))
    got, pull = jax.vjp(mlp, poisoned[0], of_rows, matrices)
    d_rows, d_weights, d_matrices = pull(poisoned[1])
    gots = (got[:used], d_rows[:used], d_weights[:used], d_matrices)
    for a, b in zip(jax.tree.leaves(gots), jax.tree.leaves(wants), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for array in (got, d_rows):
        rest = np.asarray(array[used:])
        assert np.isnan(rest).all() if unused_rows == "undefined" else not rest.any()


def test_options():
    """Without weights of rows; and an activation of gate and up together."""
    rows, _, matrices, _ = make()
    used, both = sum(SIZES), jax_ep.GatedActivation(lambda gate, up: jnp.sin(gate) * up)
    got = jax_ep.grouped_mlp(rows, *matrices, jnp.array(SIZES), activation=both)
    want = dense(rows[:used], jnp.ones(used), matrices, jnp.sin)
    np.testing.assert_allclose(got[:used], want, rtol=1e-5, atol=1e-5)


def test_under_transformations():
    """jit, scan, remat and vmap give what it gives alone."""
    rows, weights, matrices, _ = make()

    def step(x):
        mlp = jax_ep.grouped_mlp(x, *matrices, jnp.array(SIZES), row_weights=weights)
        return jnp.tanh(mlp)

    def loss(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(step)(x), None), x, length=2)[0].sum()

    want = jax.jit(jax.grad(lambda x: step(step(x)).sum()))(rows)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(rows), want, rtol=1e-5, atol=1e-6)
    twice = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([rows, 2 * rows]))
    np.testing.assert_allclose(twice[0], want, rtol=1e-5, atol=1e-6)


WRONG = [
    ({"gate": jnp.zeros((4, HIDDEN, INNER + 1), jnp.float32)}, ValueError, "shape of up"),
    ({"up": jnp.zeros((3, HIDDEN, INNER), jnp.float32)}, ValueError, "one matrix for each group"),
    ({"down": jnp.zeros((4, HIDDEN, INNER), jnp.float32)}, ValueError, "inner, hidden"),
    ({"up": jnp.zeros((4, HIDDEN, INNER), jnp.float16)}, TypeError, "cast one of them"),
    ({"num_sms": 0}, ValueError, "num_sms"),
    ({"num_sms": "8"}, TypeError, "num_sms"),
    ({"gate": None, "activation": jax_ep.clamped_swiglu()}, TypeError, "activation"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments(change, error, text):
    rows, _, (gate, up, down), _ = make()
    given = {"gate": gate, "up": up, "down": down, **change}
    with pytest.raises(error, match=text):
        jax_ep.grouped_mlp(rows, group_sizes=jnp.array(SIZES), **given)


def test_gate_and_up_are_one_product(monkeypatch):
    """Forward and backward have one product of the pair each, and none of gate or up alone."""
    rows, weights, matrices, _ = make()
    calls = []
    for name in ("rows_by_matrices", "rows_by_pair", "sum_of_pair", "rows_by_rows", "pair_by_rows"):
        function = getattr(products, name)

        def counted(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(products, name, counted)
    sizes = jnp.array(SIZES)

    def total(x, matrices):
        return jax_ep.grouped_mlp(x, *matrices, sizes, row_weights=weights).sum()

    jax.grad(total, (0, 1))(rows, matrices)
    assert calls == [
        *("rows_by_pair", "rows_by_matrices"),
        *("rows_by_matrices", "rows_by_rows", "sum_of_pair", "pair_by_rows"),
    ]
    calls.clear()
    jax.grad(total)(rows, matrices)  # without gradients of the matrices
    assert calls == ["rows_by_pair", *["rows_by_matrices"] * 2, "sum_of_pair"]
