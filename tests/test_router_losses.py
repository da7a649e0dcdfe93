"""The router z-loss and the sequence-wise balancing loss, alone and as the layer reports them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import spmd
from jax_ep import routing

by_itself = pytest.mark.one_process("calls the losses with arrays of one process")
of_layer = [pytest.mark.needs_collectives, pytest.mark.usefixtures("in_float32")]

E, K = 8, 2
IDX = jnp.zeros((4, K), jnp.int32)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def z_loss(logits, mask) -> float:
    """By its definition, in float64."""
    rows = np.float64(logits)[np.asarray(mask)]
    return float(np.mean(np.log(np.exp(rows).sum(axis=1)) ** 2)) if len(rows) else 0.0


def sequence_loss(topk_idx, scores, sequence_idx) -> float:
    """By its definition, a loop over sequences, tokens and experts."""
    losses = []
    for s in np.unique(sequence_idx):
        mine = [t for t in np.flatnonzero(sequence_idx == s) if np.any(topk_idx[t] >= 0)]
        if not mine:
            continue
        experts = scores.shape[1]
        chosen = [e for t in mine for e in topk_idx[t] if e >= 0]
        share = np.float64(scores[mine]) / np.float64(scores[mine]).sum(axis=1, keepdims=True)
        losses.append(
            sum(
                experts * chosen.count(e) / len(chosen) * share[:, e].mean() for e in range(experts)
            )
        )
    return float(np.mean(losses)) if losses else 0.0


# ---- z-loss


@by_itself
def test_z_loss_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 1.0], [0.5, 0.25, 0.25], [np.e, np.e, 0.0]]))
    want = (np.log(4) ** 2 + 0 + (1 + np.log(2)) ** 2) / 3
    np.testing.assert_allclose(routing.router_z_loss(logits), want, rtol=1e-6)
    of_two = routing.router_z_loss(logits, num_used_experts=2)
    want = (np.log(3) ** 2 + np.log(0.75) ** 2 + (1 + np.log(2)) ** 2) / 3
    np.testing.assert_allclose(of_two, want, rtol=1e-6)
    masked = routing.router_z_loss(logits, mask=jnp.array([True, True, False]))
    np.testing.assert_allclose(masked, np.log(4) ** 2 / 2, rtol=1e-6)
    assert routing.router_z_loss(logits, mask=jnp.zeros(3, bool)) == 0
    assert routing.router_z_loss(logits[:0]) == 0


@by_itself
def test_z_loss_of_masked_tokens_reaches_no_gradient():
    logits = jnp.asarray(draw(0, 6, E))
    mask = jnp.arange(6) != 2

    def loss(logits):
        return routing.router_z_loss(logits, mask=mask)

    want, d_want = jax.value_and_grad(loss)(logits)
    found, d_found = jax.value_and_grad(loss)(logits.at[2].set(jnp.nan))
    np.testing.assert_allclose(want, z_loss(logits, mask), rtol=1e-5)
    assert found == want and not np.any(d_found[2])
    np.testing.assert_array_equal(d_found, d_want)
    # d = 2 logsumexp softmax / tokens
    lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    by_hand = jnp.where(mask[:, None], 2 * lse * jax.nn.softmax(logits) / 5, 0)
    np.testing.assert_allclose(d_want, by_hand, rtol=1e-5, atol=1e-7)


@by_itself
@pytest.mark.parametrize("masked", [False, True])
def test_losses_over_a_mesh(masked):
    """Ranks have parts of sequences, and different numbers of tokens that count."""
    mesh = spmd.make_mesh(spmd.fit((2, 2), ("a", "b"), "b"), ("a", "b"))
    tokens = 6 * mesh.size
    logits = jnp.asarray(draw(1, tokens, E))
    mask = np.arange(tokens) % 11 > 3 if masked else np.ones(tokens, bool)
    mask[10:15] = not masked  # with a mask, one sequence has no token
    sequence_idx = np.arange(tokens) // 5
    num_sequences = int(sequence_idx[-1]) + 1
    topk_idx = np.where(mask[:, None], jax.lax.top_k(logits, K)[1], -1)

    def losses(logits, mask, topk_idx, sequence_idx, axis_names=()):
        z = routing.router_z_loss(logits, mask=mask if masked else None, axis_names=axis_names)
        scores = jax.nn.sigmoid(logits)
        balance = routing.sequence_balancing_loss(
            topk_idx, scores, sequence_idx, num_sequences, axis_names=axis_names
        )
        return jnp.stack([z, balance])

    local = functools.partial(losses, axis_names=("a", "b"))
    over_mesh = spmd.shard(local, mesh, out_specs=P())
    arguments = tuple(map(jnp.asarray, (mask, topk_idx, sequence_idx)))
    for part in (0, 1):
        step = lambda f, part=part: jax.jit(  # noqa: E731
            jax.value_and_grad(lambda logits, *rest: f(logits, *rest)[part])
        )
        want, d_want = step(losses)(logits, *arguments)
        got, d_got = step(over_mesh)(logits, *arguments)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert np.abs(d_want).max() > 0
        np.testing.assert_allclose(d_got, d_want, rtol=1e-5, atol=1e-8)
    z, balance = losses(logits, *arguments)
    np.testing.assert_allclose(z, z_loss(logits, mask), rtol=1e-5)
    scores = np.asarray(jax.nn.sigmoid(logits))
    np.testing.assert_allclose(balance, sequence_loss(topk_idx, scores, sequence_idx), rtol=1e-5)


# ---- sequence-wise balancing loss


@by_itself
def test_sequence_loss_by_hand():
    """Each of two sequences uses one expert of two; together they use both evenly."""
    topk_idx = jnp.array([[0], [0], [1], [1]], jnp.int32)
    scores = jnp.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.6], [0.1, 0.9]])
    found = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(found, (2 * 0.8 + 2 * (0.75 + 0.9) / 2) / 2, rtol=1e-6)
    whole = routing.sequence_balancing_loss(topk_idx, scores, jnp.zeros(4, jnp.int8), 1)
    np.testing.assert_allclose(whole, routing.load_balancing_loss(topk_idx, scores), rtol=1e-6)
    # A third sequence without tokens changes nothing, nor do tokens of no sequence.
    with_empty = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, 2, 2]), 3)
    assert with_empty == found
    outside = routing.sequence_balancing_loss(topk_idx, scores, jnp.array([0, 0, -1, 7]), 2)
    np.testing.assert_allclose(outside, 2 * 0.8, rtol=1e-6)
    nothing = routing.sequence_balancing_loss(jnp.full((4, 1), -1), scores, jnp.zeros(4, int), 2)
    assert nothing == 0


@by_itself
def test_sequence_loss_of_the_experts_that_exist():
    scores, idx = np.abs(draw(2, 12, E)), np.random.default_rng(3).integers(0, 6, (12, K))
    sequences = np.arange(12) // 4

    def loss(idx):
        arrays = map(jnp.asarray, (idx, scores, sequences))
        return routing.sequence_balancing_loss(*arrays, 3, num_used_experts=6)

    found = loss(idx)
    np.testing.assert_allclose(found, sequence_loss(idx, scores[:, :6], sequences), rtol=1e-5)
    padded = np.where(idx == 5, 7, idx)  # a route to an expert that does not exist is none
    want = sequence_loss(np.where(idx == 5, -1, idx), scores[:, :6], sequences)
    np.testing.assert_allclose(loss(padded), want, rtol=1e-5)


@by_itself
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: routing.router_z_loss(x, num_used_experts=9),
            ValueError,
            "router_z_loss: argument num_used_experts: expected 1 to 8, the number of logits, got 9",
        ),
        (
            lambda x: routing.router_z_loss(x, mask=jnp.ones(5, bool)),
            ValueError,
            r"router_z_loss: argument mask: expected shape \(4,\), one .*, got \(5,\); reshape",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(3, int), 1),
            ValueError,
            r"sequence_idx: expected shape \(4,\), .*got \(3,\); give each token the index",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4, int), 1.0),
            TypeError,
            "num_sequences: expected a Python int, got float; pass how many",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4), 1),
            TypeError,
            "sequence_idx: expected an array of an integer dtype, got float32; cast",
        ),
        (
            lambda x: routing.sequence_balancing_loss(IDX, x, jnp.zeros(4, int), -1),
            ValueError,
            "num_sequences: expected 0 or more, got -1; pass",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=rf"jax_ep\.routing\..*{text}"):
        call(jnp.zeros((4, E)))
