"""Routers and load statistics, against loops in NumPy and cases worked out by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from jax_ep import routing


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def best(values: np.ndarray, k: int, among: list[int] | None = None) -> list[int]:
    """Indices of the k largest values, the lowest index first among equal ones."""
    candidates = range(len(values)) if among is None else among
    return sorted(candidates, key=lambda i: (-values[i], i))[:k]


def weigh(scores: np.ndarray, chosen: list[int], scale: float) -> np.ndarray:
    return scores[chosen] / scores[chosen].sum() * scale


def group_limited(logits, bias, k, num_groups, top_groups, scale, scoring):
    idx, weights = [], []
    for row in np.asarray(logits):
        scores = sigmoid(row) if scoring == "sigmoid" else softmax(row)
        selection = scores + bias
        groups = np.split(np.arange(len(row)), num_groups)
        counted = 2 if scoring == "sigmoid" else 1
        group_scores = np.array([np.sort(selection[g])[::-1][:counted].sum() for g in groups])
        kept = [int(e) for g in best(group_scores, top_groups) for e in groups[g]]
        idx.append(best(selection, k, sorted(kept)))
        weights.append(weigh(scores, idx[-1], scale))
    return np.array(idx), np.array(weights)


@pytest.fixture
def logits() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=(33, 16)), jnp.float32)


@pytest.fixture
def bias() -> jax.Array:
    return jnp.asarray(np.random.default_rng(4).normal(size=16), jnp.float32)


def test_softmax_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    routes = routing.softmax_top_k(logits, 2)
    np.testing.assert_array_equal(routes.topk_idx, [[1, 2]])
    np.testing.assert_allclose(routes.topk_weights, [[0.625, 0.375]], rtol=1e-6)
    np.testing.assert_allclose(routes.scores, [[0.2, 0.5, 0.3]], rtol=1e-6)
    plain = routing.softmax_top_k(logits, 2, renormalize=False, scale=2.0)
    np.testing.assert_allclose(plain.topk_weights, [[1.0, 0.6]], rtol=1e-6)
    assert plain.topk_idx.dtype == jnp.int32 and plain.topk_weights.dtype == jnp.float32


def test_bias_moves_the_choice_only(logits, bias):
    def weights(logits, bias):
        return routing.sigmoid_top_k(logits, 4, bias=bias, scale=2.5).topk_weights[:, 0].sum()

    routes = routing.sigmoid_top_k(logits, 4, bias=bias, scale=2.5)
    for row, idx, got in zip(*map(np.asarray, (logits, *routes[:2])), strict=True):
        scores = sigmoid(row)
        assert list(idx) == best(scores + bias, 4)
        np.testing.assert_allclose(got, weigh(scores, best(scores + bias, 4), 2.5), rtol=1e-5)
    d_logits, d_bias = jax.grad(weights, argnums=(0, 1))(logits, bias)
    assert np.abs(d_logits).max() > 0 and not np.any(d_bias)


def test_all_sigmoids_zero():
    routes = routing.sigmoid_top_k(jnp.full((1, 4), -1e4), 2)
    np.testing.assert_array_equal(routes.topk_weights, [[0, 0]])


@pytest.mark.parametrize("router", [routing.softmax_top_k, routing.sigmoid_top_k])
def test_ties_go_to_the_lowest_expert(router):
    routes = router(jnp.zeros((2, 6), jnp.bfloat16), 3)
    np.testing.assert_array_equal(routes.topk_idx, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(routes.topk_weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_group_limited(logits, bias, scoring):
    settings = {"num_groups": 4, "top_groups": 2, "scale": 2.5, "scoring": scoring}
    routes = jax.jit(
        lambda logits, bias: routing.group_limited_top_k(logits, 5, bias=bias, **settings)
    )(logits, bias)
    idx, weights = group_limited(logits, bias, 5, **settings)
    np.testing.assert_array_equal(routes.topk_idx, idx)
    np.testing.assert_allclose(routes.topk_weights, weights, rtol=1e-5)
    assert all(len({e // 4 for e in row}) <= 2 for row in idx)


def test_group_limited_by_hand():
    # Groups {0, 1} {2, 3} {4, 5}. The best expert, 4, is in the group with the smallest sum of two.
    scores = np.array([[0.5, 0.5, 0.6, 0.5, 0.7, 0.1]])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)
    one = routing.group_limited_top_k(logits, 2, num_groups=3, top_groups=1)
    np.testing.assert_array_equal(one.topk_idx, [[2, 3]])
    two = routing.group_limited_top_k(logits, 2, num_groups=3, top_groups=2)
    np.testing.assert_array_equal(two.topk_idx, [[2, 0]])  # 0, 1 and 3 tie, so 0 is taken
    np.testing.assert_allclose(two.topk_weights, [[6 / 11, 5 / 11]], rtol=1e-5)
    lowest = routing.group_limited_top_k(jnp.zeros((1, 6)), 3, num_groups=3, top_groups=2)
    np.testing.assert_array_equal(lowest.topk_idx, [[0, 1, 2]])
    # Experts of other groups stay out also with a negative bias.
    bias = jnp.array([-9.0, -9.0, -9.0, -9.0, -20.0, -20.0])
    low = routing.group_limited_top_k(logits, 2, num_groups=3, top_groups=1, bias=bias)
    np.testing.assert_array_equal(low.topk_idx, [[2, 3]])


def test_router_settings(logits, bias):
    settings = routing.Router("group_limited", num_groups=4, top_groups=2, scale=2.5)
    same = routing.Router("group_limited", num_groups=4, top_groups=2, scale=2.5)
    assert settings == same and hash(settings) == hash(same)
    want = routing.group_limited_top_k(logits, 5, num_groups=4, top_groups=2, bias=bias, scale=2.5)
    for got, expected in zip(settings(logits, 5, bias), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    plain = routing.Router("sigmoid", renormalize=False)(logits, 3)
    want = routing.sigmoid_top_k(logits, 3, renormalize=False)
    np.testing.assert_array_equal(plain.topk_weights, want.topk_weights)


def test_load_balancing_loss_by_hand():
    topk_idx = jnp.array([[0, 1], [0, 2], [-1, -1], [3, -1]])
    scores = jnp.array(
        [[4.0, 3.0, 2.0, 1.0], [0.4, 0.3, 0.2, 0.1], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.5]]
    )
    # Shares of the routes 2/5 1/5 1/5 1/5; mean shares of the scores .8/3 .6/3 .4/3 1.2/3.
    expected = 4 * (2 * 0.8 + 0.6 + 0.4 + 1.2) / 15
    loss, gradient = jax.value_and_grad(
        lambda scores: routing.load_balancing_loss(topk_idx, scores)
    )(scores)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not np.any(gradient[2]) and np.any(gradient[0])


def test_load_balancing_loss_of_even_and_no_routes():
    even = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    scores = jnp.full((4, 8), 0.3)
    np.testing.assert_allclose(routing.load_balancing_loss(even, scores), 1.0, rtol=1e-6)
    none = jnp.full((4, 2), -1)
    assert routing.load_balancing_loss(none, scores) == 0
    one = jnp.zeros((4, 1), jnp.int32)
    certain = jax.nn.one_hot(one[:, 0], 8)
    np.testing.assert_allclose(routing.load_balancing_loss(one, certain), 8.0, rtol=1e-6)


@pytest.mark.one_process("calls the loss with arrays of one process")
def test_load_balancing_loss_over_a_mesh(logits):
    """Statistics are summed before the product: unequal shards give the loss of all tokens."""
    routes = routing.softmax_top_k(logits[:32], 3)
    topk_idx = jnp.where(np.arange(32)[:, None] < 11, -1, routes.topk_idx)

    def loss(scores, axis_names=()):
        return routing.load_balancing_loss(topk_idx, scores, axis_names=axis_names)

    def over_mesh(scores):
        def local(topk_idx, scores):
            return routing.load_balancing_loss(topk_idx, scores, axis_names=("a", "b"))

        mesh = spmd.make_mesh(spmd.fit((2, 2), ("a", "b"), "b"), ("a", "b"))
        specs = P(("a", "b"))
        return spmd.shard(local, mesh, in_specs=(specs, specs), out_specs=P())(topk_idx, scores)

    want, d_want = jax.value_and_grad(loss)(routes.scores)
    got, d_got = jax.jit(jax.value_and_grad(over_mesh))(routes.scores)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(d_got, d_want, rtol=1e-5, atol=1e-8)


def test_expert_load():
    topk_idx = jnp.array([[0, 3], [3, -1], [-1, 7], [3, 2]])
    load = routing.expert_load(topk_idx, 4)  # 7 is out of range
    np.testing.assert_array_equal(load, [1, 0, 1, 3])
    assert load.dtype == jnp.int32


def test_update_bias():
    bias = routing.update_bias(jnp.zeros(4), jnp.array([1, 0, 4, 3]), rate=0.5)
    np.testing.assert_array_equal(bias, [0.5, 0.5, -0.5, -0.5])
    even = routing.update_bias(bias, jnp.full(4, 7))
    np.testing.assert_array_equal(even, bias)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: routing.softmax_top_k(x, 17), "argument k: expected 1 to 16"),
        (
            lambda x: routing.group_limited_top_k(x, 2, num_groups=3, top_groups=1),
            "argument num_groups: expected a divisor of the 16 experts, got 3",
        ),
        (
            lambda x: routing.group_limited_top_k(x, 5, num_groups=4, top_groups=1),
            "argument top_groups: .* with 5 experts among them, got 1; raise top_groups",
        ),
        (
            lambda x: routing.Router("group_limited"),
            "argument num_groups: .* pass routing.Router",
        ),
    ],
)
def test_errors(logits, call, text):
    with pytest.raises(ValueError, match=f"jax_ep.routing.*{text}"):
        call(logits)


ROUTERS = {
    "softmax_top_k": routing.softmax_top_k,
    "sigmoid_top_k": routing.sigmoid_top_k,
    "group_limited_top_k": functools.partial(
        routing.group_limited_top_k, num_groups=4, top_groups=2
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("make_logits", "k", "error", "text"),
    [
        (
            lambda: jnp.zeros((16,)),
            2,
            ValueError,
            r"logits: expected two dimensions, \[tokens, experts\], got shape \(16,\); flatten",
        ),
        (
            lambda: jnp.zeros((2, 3, 16)),
            2,
            ValueError,
            r"logits: .* got shape \(2, 3, 16\); flatten",
        ),
        (lambda: [[0.0] * 16], 2, TypeError, "logits: expected an array, got list; convert"),
        (lambda: jnp.zeros((3, 16)), 2.0, TypeError, "k: expected a Python int, got float; "),
        (lambda: jnp.zeros((3, 16)), 0, ValueError, "k: expected 1 to 16, .*, got 0; "),
    ],
)
def test_wrong_logits(name, make_logits, k, error, text):
    with pytest.raises(error, match=f"jax_ep.routing.{name}: argument {text}"):
        ROUTERS[name](make_logits(), k)
