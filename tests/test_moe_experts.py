"""The experts of ``jax_ep.moe``: without a gate, with biases, with activations of gate and up."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from dense_experts import check_same, dense_layer, step
from expert_layers import E, F, H, K, S, check_in_stages, check_scanned, make_group
from jax_ep._grouped_dot.api import ProductSms
from jax_ep._moe.biases import add_bias
from jax_ep._moe.experts import Beside, products

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")

SWIGLU = jax_ep.clamped_swiglu(limit=0.8, alpha=1.5)  # a limit that some channels reach
BILINEAR = jax_ep.GatedActivation(lambda gate, up: gate * up)


def swiglu_layer(group):
    return functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, activation=SWIGLU)


def dense_swiglu(x, params):
    return dense_layer(x, params, top_k=K, activation=SWIGLU)


def at_zero(x):
    """Infinite where x is zero, as all channels of unused rows are, and so is its derivative."""
    return 0.1 * jnp.log(jnp.abs(x))


def make_params(*, gated=True, biases="", shared=False, seed=0):
    """Weights; ``biases`` names those that there are, in any order."""
    params = jax_ep.init_moe_params(
        jax.random.key(seed),
        hidden=H,
        intermediate=F,
        num_experts=E,
        shared_intermediate=S if shared else None,
        gated=gated,
        expert_bias=True,
    )
    keys = jax.random.split(jax.random.key(seed + 100), 3)
    for key, name in zip(keys, ("gate", "up", "down"), strict=True):
        bias = getattr(params, f"{name}_bias")
        if bias is not None:
            assert not np.any(bias)
            bias = jax.random.normal(key, bias.shape) / 2 if name in biases else None
        params = params._replace(**{f"{name}_bias": bias})
    return params


def make_x(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (*shape, H), dtype)


ALL = "gate up down"
CASES = {
    "gate and biases": ({"biases": ALL}, {}),
    "gate bias alone": ({"biases": "gate"}, {}),
    "up bias alone": ({"biases": "up", "shared": True}, {"activation": jax.nn.gelu}),
    "down bias alone": ({"biases": "down"}, {}),
    "no gate": ({"gated": False, "shared": True}, {"activation": jax.nn.gelu}),
    "no gate, biases": ({"gated": False, "biases": ALL}, {"activation": jnp.tanh}),
    "gpt-oss": ({"biases": ALL}, {"activation": SWIGLU}),
    "gpt-oss, shared": ({"biases": ALL, "shared": True}, {"activation": SWIGLU}),
    "bilinear": ({"shared": True}, {"activation": BILINEAR}),
    "infinite at zero": ({"biases": ALL}, {"activation": at_zero}),
    "no gate, infinite at zero": ({"gated": False, "biases": "down"}, {"activation": at_zero}),
}


def check(group, weights, options, *, x=None, tolerance=1e-5):
    """``moe`` with these options is the dense layer with those that it knows."""
    known = {n: options[n] for n in ("activation", "mask", "num_used_experts") if n in options}
    layer = functools.partial(jax_ep.moe, group=group, num_experts=E, top_k=K, **options)
    dense = functools.partial(dense_layer, top_k=K, **known)
    x = make_x(3, 5) if x is None else x
    check_same(layer, dense, x, make_params(**weights), mesh=group.mesh, tolerance=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_same_as_dense(case, native_backend):
    """On CPU unused rows hold NaN, of which there are many: every rank has room for all tokens."""
    check(make_group(2, native_backend), *CASES[case])


@pytest.mark.parametrize("ranks", [1, 4, "2x2"])
@pytest.mark.parametrize("case", ["gpt-oss, shared", "no gate, biases"])
def test_any_number_of_ranks(case, ranks, native_backend):
    """Biases that two groups share have the sum of both's gradients."""
    axis_type = AxisType.Explicit if ranks == "2x2" else AxisType.Auto
    check(make_group(ranks, native_backend, axis_type), *CASES[case])


OPTIONS = {
    "chunks": {"overlap": "chunks", "num_chunks": 3},
    "shared expert": {"overlap": "shared_expert"},
    "alignment": {"alignment": 8},
    "used experts": {"num_used_experts": 3},
    "mask": {"mask": (jnp.arange(15) % 4 != 1).reshape(3, 5)},
    "capacity": {"capacity": 60},
    "own product": {"grouped_dot": jax.lax.ragged_dot},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_with_other_options(option, native_backend):
    weights, options = CASES["gpt-oss, shared"]
    check(make_group(2, native_backend), weights, options | OPTIONS[option])


@by_itself
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_rows_of_16_bits(dtype, native_backend):
    """Biases are added in float32 to products in the dtype of x; their gradients are as exact."""
    check(
        make_group(2, native_backend),
        *CASES["gate and biases"],
        x=make_x(3, 5, dtype=dtype),
        tolerance=0.03,
    )


def test_dropped_rows_have_no_bias(backend):
    """The bias of an expert counts for rows that it keeps, and so do its gradient and the router's."""
    group = make_group(2, backend)
    x, params = make_x(16), make_params(biases="down")
    # So only biases are left: outputs are sums of weights of kept rows.
    params = params._replace(
        down=jnp.zeros((E, F, H)), down_bias=jnp.tile(jnp.arange(1.0, E + 1)[:, None], (1, H))
    )

    def loss(x, params):
        y, aux = jax_ep.moe(
            x, params, group=group, num_experts=E, top_k=K, capacity_factor=0.5, router=first_two
        )
        return y.sum(), (y, aux.num_dropped)

    run = spmd.whole_jit(jax.value_and_grad(loss, argnums=1, has_aux=True), group.mesh)
    (_, (y, num_dropped)), gradients = run(x, params)
    kept = int(np.ceil(0.5 * 16 * K / E))  # rows of each of experts 0 and 1
    assert num_dropped == 2 * (16 - kept)
    want = np.zeros((16, H))
    want[:kept] = 0.25 * 1 + 0.75 * 2
    np.testing.assert_allclose(y, want, rtol=1e-6)
    d_bias = np.zeros((E, H))
    d_bias[0], d_bias[1] = 0.25 * kept, 0.75 * kept
    np.testing.assert_allclose(gradients.down_bias, d_bias, rtol=1e-6)


def first_two(logits, bias):
    """All tokens to experts 0 and 1, with weights of their own."""
    idx = jnp.broadcast_to(jnp.arange(K), (len(logits), K))
    weights = jnp.broadcast_to(jnp.array([0.25, 0.75]), idx.shape)
    return jax_ep.routing.Routing(idx, weights, jax.nn.softmax(logits))


@pytest.mark.parametrize("saved", [(), ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")])
def test_scan_over_checkpointed_layers(saved, native_backend):
    group = make_group("2x2", native_backend, AxisType.Explicit)
    layers = [make_params(biases=ALL, seed=seed) for seed in range(2)]
    check_scanned(swiglu_layer(group), dense_swiglu, layers, mesh=group.mesh, saved=saved)


@by_itself
def test_inside_another_shard_map(native_backend):
    """As a stage of a pipeline, whose weights are its own."""
    stage = lambda s: make_params(biases=ALL, seed=s)  # noqa: E731
    check_in_stages(swiglu_layer, dense_swiglu, stage, native_backend)


@by_itself
def test_bits_are_the_same_in_every_run(native_backend):
    """Of chunks and of the gradients of biases too."""
    group = make_group(2, native_backend)
    layer = functools.partial(
        jax_ep.moe, group=group, num_experts=E, top_k=K, activation=SWIGLU, overlap="chunks"
    )
    run = jax.jit(step(layer))
    x, params = make_x(64), make_params(biases=ALL)
    first, second = (jax.device_get(run(x, params)) for _ in range(2))
    for got, want in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("weighted", [False, True])
def test_biases_do_not_touch_unused_rows(weighted):
    """NaN in rows past the last group, and in their cotangents, reaches no other row and no bias."""
    rng = np.random.default_rng(4)
    ids = np.array([0, 0, 2, 2, 2, 3, 4, 4], np.int32)  # 4: unused
    rows, cotangents = rng.standard_normal((2, 8, F)).astype(np.float32)
    bias = rng.standard_normal((4, F)).astype(np.float32)
    weights = rng.random(8).astype(np.float32) if weighted else None
    factors = np.ones(8, np.float32) if weights is None else weights
    used = ids < 4
    rows[~used] = cotangents[~used] = np.nan
    arrays = [jnp.asarray(a) for a in (rows, bias, weights) if a is not None]

    def run(rows, bias, weights=None):
        return add_bias(rows, bias, jnp.asarray(ids), weights)

    out, pull = jax.vjp(run, *arrays)
    d_rows, d_bias, *d_weights = pull(jnp.asarray(cotangents))
    added = bias[np.minimum(ids, 3)] * factors[:, None]
    np.testing.assert_allclose(out[used], (rows + added)[used], rtol=1e-6)
    np.testing.assert_array_equal(d_rows[used], cotangents[used])
    want = np.stack([(cotangents * factors[:, None])[ids == e].sum(0) for e in range(4)])
    np.testing.assert_allclose(d_bias, want, rtol=1e-5, atol=1e-6)
    assert not np.any(d_bias[1])
    if weighted:
        d_want = np.where(used, (cotangents * bias[np.minimum(ids, 3)]).sum(1), 0)
        np.testing.assert_allclose(d_weights[0], d_want, rtol=1e-5, atol=1e-6)


def test_gradient_of_a_bias_adds_with_no_scatter():
    """GPUs would add with atomics, in any order."""
    ids, rows, bias = jnp.zeros(8, jnp.int32), jnp.ones((8, F)), jnp.ones((4, F))

    def loss(rows, bias, weights):
        return jnp.sum(add_bias(rows, bias, ids, weights) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(rows, bias, jnp.ones(8)).as_text()
    assert "scatter" not in text and "dot_general" in text


def test_activations():
    """Equal ones are one to ``jax.jit``, and the clamped one is that of gpt-oss."""
    assert jax_ep.clamped_swiglu() == jax_ep.clamped_swiglu(7, 1.702) != SWIGLU
    assert len({jax_ep.clamped_swiglu(), jax_ep.clamped_swiglu(7.0)}) == 1
    gate, up = np.linspace(-9, 9, 60, dtype=np.float32).reshape(2, 30)
    gate, up = (np.concatenate(parts) for parts in ((gate, up), (up[::-1], gate)))
    clamped = np.minimum(gate, 7)
    want = clamped / (1 + np.exp(-1.702 * clamped)) * (np.clip(up, -7, 7) + 1)
    np.testing.assert_allclose(jax_ep.clamped_swiglu()(gate, up), want, rtol=1e-5, atol=1e-6)


def test_new_weights_are_left_out_of_old_trees():
    """A tree without the new options has the leaves of before, in their order."""
    params = jax_ep.MoEParams(*range(6))
    assert jax.tree.leaves(params) == list(range(6))
    shapes = jax_ep.init_moe_params(
        jax.random.key(0), hidden=H, intermediate=F, num_experts=E, shared_intermediate=S
    )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)]
    weights = [".router_kernel", ".gate", ".up", ".down"]
    assert names == [*weights, ".shared.gate", ".shared.up", ".shared.down"]


def test_partition_specs():
    group = make_group(2, "reference")
    names = jax_ep.PartitionNames(hidden="data", intermediate="model")
    specs = jax_ep.moe_partition_specs(make_params(biases=ALL), group=group, names=names)
    assert specs.gate_bias == specs.up_bias == P("expert", "model")
    assert specs.down_bias == P("expert", "data")
    specs = jax_ep.moe_partition_specs(make_params(gated=False, shared=True), group=group)
    assert specs.gate is None and specs.gate_bias is None and specs.shared.gate is None
    assert specs.up == P("expert", None, None) and specs.experts is None


def test_products_of_experts_without_a_gate():
    """The first product leaves SMs, as that of the gate does, and backward the down projection."""
    dots = products(None, Beside(108, 1), 2048, gated=False)
    assert dots.up == ProductSms(108) and dots.down == ProductSms(d_lhs=108)
    dots = products(None, Beside(108, 2), 1024 * 2, gated=False)
    assert dots.up == ProductSms(108)
    dots = products(None, Beside(108, 1), 512, gated=False)
    assert dots.down == ProductSms(108, 108, 108)
