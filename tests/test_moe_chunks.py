"""``moe(overlap="chunks")``: the same outputs as without, in chunks that overlap."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import chunks_in_line
import jax_ep
import oracle
import spmd
from jax_ep import routing
from jax_ep._grouped_dot.api import ProductSms
from jax_ep._moe import exchange
from jax_ep._moe.experts import Beside, Products, products

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
    pytest.mark.one_process("compares with programs on arrays of one process"),
]

RANKS, TOKENS, H, F, E, K = 2, 7, 16, 24, 4, 2  # chunks of 3, 2 and 2 tokens of each rank
RNG = np.random.default_rng(5)
X, DY = RNG.standard_normal((2, RANKS * TOKENS, H)).astype(np.float32)
PARAMS = jax_ep.init_moe_params(
    jax.random.key(3), hidden=H, intermediate=F, num_experts=E, shared_intermediate=8
)


def run_layer(backend: str, *, x=X, params=PARAMS, **options):
    """Output, statistics, and the gradients of x and the weights."""
    group = spmd.make_group(RANKS, backend)

    def loss(x, params):
        y, aux = jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, **options)
        return (y * DY).sum() + 0.1 * aux.aux_loss, (y, aux)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), **spmd.OPTIMIZED)
    (_, (y, aux)), (dx, d_params) = jax.device_get(step(x, params))
    return y, aux, dx, d_params


@functools.cache
def whole(backend: str):
    return run_layer(backend)


@functools.cache
def chunked(backend: str, num_chunks: int):
    return run_layer(backend, overlap="chunks", num_chunks=num_chunks)


def test_chunks_change_no_output(backend):
    """The gradients of the experts' weights are sums in another order."""
    num_chunks = 2 if backend == "reference" else 3
    y, aux, dx, d_params = whole(backend)
    got_y, got_aux, got_dx, got_params = chunked(backend, num_chunks)
    oracle.assert_same(got_y, y, "y")
    oracle.assert_same(got_dx, dx, "dx")
    reported = [name for name, value in aux._asdict().items() if value is not None]
    for name in reported:
        oracle.assert_same(getattr(got_aux, name), getattr(aux, name), name)
    assert reported == ["aux_loss", "load", "num_dropped", "num_invalid", "z_loss"]
    assert np.abs(dx).max() > 0 and aux.load.sum() == RANKS * TOKENS * K
    for got, want in zip(jax.tree.leaves(got_params), jax.tree.leaves(d_params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_shared_expert_alone_beside_the_rows(native_backend):
    for got, want in zip(
        jax.tree.leaves(run_layer(native_backend, overlap="shared_expert")),
        jax.tree.leaves(whole(native_backend)),
        strict=True,
    ):
        oracle.assert_same(got, want, "result")


def test_weight_gradients_are_those_of_the_same_chunks_in_sequence(native_backend, monkeypatch):
    """With no op in flight."""
    overlapped = chunked(native_backend, 3)
    order = chunks_in_line.replace_starts(monkeypatch)
    in_sequence = run_layer(native_backend, overlap="chunks", num_chunks=3)
    jax.clear_caches()
    assert order[:6] == ["dispatch", "dispatch", "combine", "dispatch", "combine", "combine"]
    for got, want in zip(jax.tree.leaves(overlapped), jax.tree.leaves(in_sequence), strict=True):
        oracle.assert_same(got, want, "result")


def test_experts_that_leave_sms_give_the_same_bits(native_backend, monkeypatch):
    """Their products come in an order of their own."""
    y, aux, dx, d_params = whole(native_backend)
    monkeypatch.setattr(exchange, "_beside", lambda tickets: Beside(108, len(tickets)))
    jax.clear_caches()  # moe's programs are found by their settings
    got_y, got_aux, got_dx, got_params = run_layer(native_backend, overlap="chunks")
    jax.clear_caches()
    oracle.assert_same(got_y, y, "y")
    oracle.assert_same(got_dx, dx, "dx")
    assert got_aux.aux_loss == aux.aux_loss
    for got, want in zip(jax.tree.leaves(got_params), jax.tree.leaves(d_params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


SMS = {  # of gate and up, and of down, by the width of the experts, with 108 SMs left
    2048: (ProductSms(108), ProductSms(d_lhs=108)),
    512: (ProductSms(108), ProductSms(d_lhs=108, d_rhs=108)),
    256: (ProductSms(108, 108, 108), ProductSms(108, 108, 108)),
}


@pytest.mark.parametrize("width", SMS)
def test_which_products_leave_sms(width):
    """As many as take the time of the op: gate and up, and backward of the down projection."""
    dots = products(None, Beside(108, 1), width)
    assert (dots.up, dots.down) == SMS[width]
    two_ops = products(None, Beside(108, 2), width * 2)
    assert (two_ops.up, two_ops.down) == SMS[width]


def test_no_product_leaves_sms_to_nothing():
    all_sms = ProductSms()
    dots = products(None, Beside(), 2048)
    assert (dots.up, dots.down) == (all_sms, all_sms)
    assert products(own := lambda *_: None, Beside(108, 1), 2048) == Products(own)


def first_two(logits, bias):
    """All tokens to experts 0 and 1, as long as those have room."""
    idx = jnp.broadcast_to(jnp.arange(K), (len(logits), K))
    return routing.Routing(idx, jnp.ones(idx.shape), jax.nn.softmax(logits))


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        # Rank 0 gets RANKS * K rows of each token. Chunks of 3, 2 and 2 of its 7 tokens have
        # ceil(10 * t / 7) = 5, 3, 3 of the 10 rows for the 12, 8, 8 that come.
        ({"capacity": 10}, 5 + 3 + 3),
        # Each expert keeps ceil(0.5 * RANKS * t * K / E) = 2, 1, 1 of RANKS * t rows.
        ({"capacity_factor": 0.5}, 2 * (2 + 1 + 1)),
        # Rank 0 keeps ceil(0.7 * t * K) = 5, 3, 3 rows.
        ({"rank_capacity_factor": 0.7}, 5 + 3 + 3),
    ],
)
def test_bounds_divide_among_chunks(bound, kept, native_backend):
    options = {"router": first_two, "overlap": "chunks", "num_chunks": 3, **bound}
    group = spmd.make_group(RANKS, native_backend)
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, **options)
    _, aux = jax.jit(layer)(X, PARAMS)
    assert aux.num_dropped == RANKS * TOKENS * K - kept


@pytest.mark.parametrize(
    ("num_tokens", "num_chunks", "sizes"),
    [(8, 2, [4, 4]), (7, 3, [3, 2, 2]), (2, 5, [1, 1]), (1, 2, [1])],
)
def test_sizes_of_chunks(num_tokens, num_chunks, sizes):
    assert exchange.chunk_sizes(num_tokens, num_chunks) == sizes


def test_capacity_of_a_chunk_is_aligned():
    options = {"capacity": 64, "alignment": 8}
    assert exchange.capacity_of_chunk(options, 3, 7) == {"capacity": 32}
    assert exchange.capacity_of_chunk({"capacity": None, "alignment": 8}, 3, 7) == {}


WRONG = {
    "overlap": (
        {"overlap": "experts"},
        ValueError,
        "argument overlap: expected one of .*'shared_expert', 'chunks'.*, got 'experts'",
    ),
    "no shared expert": (
        {"overlap": "shared_expert", "params": PARAMS._replace(shared=None)},
        ValueError,
        "argument overlap: expected None or 'chunks' without a shared expert, got 'shared_expert'",
    ),
    "one chunk": (
        {"overlap": "chunks", "num_chunks": 1},
        ValueError,
        "argument num_chunks: expected 2 or more, got 1; leave out overlap='chunks'",
    ),
    "half a chunk": (
        {"overlap": "chunks", "num_chunks": 2.5},
        TypeError,
        "argument num_chunks: expected a Python int, got float",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    options, error, text = WRONG[name]
    with pytest.raises(error, match="jax_ep.moe: " + text):
        run_layer("reference", **options)
