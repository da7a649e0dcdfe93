"""``jax_ep.moe(tensor_axis=)``: experts whose inner channels are split over an axis of the mesh."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from dense_experts import check_same, compiled_step, dense_layer, step
from jax_ep import routing

pytestmark = [
    pytest.mark.needs_collectives,
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")

H, F, E, K, S = 8, 16, 4, 2, 8
DATA_EXPERT_TENSOR = ("data", "expert", "tensor")
LAYER = {"num_experts": E, "top_k": K, "tensor_axis": "tensor"}


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 2


def make_group(backend, sizes=(2, 2, 2), names=DATA_EXPERT_TENSOR, axis_type=AxisType.Auto):
    spmd.need_devices(math.prod(sizes))
    axis = ("pod", "expert") if "pod" in names else "expert"
    return spmd.create_group(spmd.make_mesh(sizes, names, axis_type), axis, backend=backend)


def make_params(*, gated=True, bias=False, shared=True, hidden=H) -> jax_ep.MoEParams:
    """Weights of which no two are equal, biases included."""
    up_bias = draw(5, E, F) if bias else None
    shared_gate = draw(6, hidden, S) if gated else None
    return jax_ep.MoEParams(
        router_kernel=draw(0, hidden, E),
        gate=draw(1, E, hidden, F) if gated else None,
        up=draw(2, E, hidden, F),
        down=draw(3, E, F, hidden),
        router_bias=draw(4, E) / 4 if bias else None,
        shared=jax_ep.SharedExpert(shared_gate, draw(7, hidden, S), draw(8, S, hidden))
        if shared
        else None,
        gate_bias=-up_bias if bias and gated else None,
        up_bias=up_bias,
        down_bias=draw(9, E, hidden) if bias else None,
    )


def make_x(*shape: int, hidden: int = H) -> jax.Array:
    return 2 * draw(10, *shape, hidden)


def by_expert(rows, weights, group_sizes):
    """A product of all rows with the matrices of all local experts, of which it takes each row's."""
    ends = jnp.cumsum(group_sizes)
    expert = (jnp.arange(len(rows))[:, None] >= ends).sum(axis=1)
    is_of = (expert[:, None] == jnp.arange(len(weights))).astype(rows.dtype)
    return jnp.sum(jnp.einsum("ch,lhf->clf", rows, weights) * is_of[:, :, None], axis=1)


MESHES = {
    "data-expert-tensor": ((2, 2, 2), DATA_EXPERT_TENSOR),
    "tensor-expert-data": ((2, 2, 2), ("tensor", "expert", "data")),
    "expert-tensor": ((2, 4), ("expert", "tensor")),
    "one-position": ((2, 1), ("expert", "tensor")),
    "one-rank": ((1, 2), ("expert", "tensor")),
    "two-axes": ((2, 2, 2), ("pod", "tensor", "expert")),
}


@pytest.mark.parametrize(
    ("mesh", "axis_type", "weights", "options"),
    [
        ("data-expert-tensor", AxisType.Auto, {"bias": True}, {"mask": True}),
        ("data-expert-tensor", AxisType.Explicit, {"bias": True}, {"overlap": "chunks"}),
        ("tensor-expert-data", AxisType.Auto, {}, {"overlap": "shared_expert"}),
        ("tensor-expert-data", AxisType.Explicit, {"shared": False}, {"num_used_experts": 3}),
        (
            "expert-tensor",
            AxisType.Auto,
            {"bias": True, "gated": False},
            {"overlap": "chunks", "num_chunks": 3, "mask": True},
        ),
        ("expert-tensor", AxisType.Auto, {"bias": True}, {"grouped_dot": by_expert}),
        ("one-position", AxisType.Explicit, {"bias": True}, {}),
        ("one-rank", AxisType.Auto, {"bias": True}, {"mask": True, "sequence_loss": True}),
        ("two-axes", AxisType.Auto, {"bias": True}, {"capacity": 40, "return_routing": True}),
    ],
)
def test_same_as_dense(mesh, axis_type, weights, options, native_backend):
    """Outputs, statistics and all gradients; with 15 tokens some rank has a masked one anyway."""
    group = make_group(native_backend, *MESHES[mesh], axis_type)
    x, options = make_x(3, 5), dict(options)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1 if options.pop("mask", False) else None
    layer = functools.partial(jax_ep.moe, group=group, mask=mask, **LAYER, **options)
    used = options.get("num_used_experts")
    dense = functools.partial(dense_layer, top_k=K, mask=mask, num_used_experts=used)
    check_same(layer, dense, x, make_params(**weights), mesh=group.mesh)


@by_itself
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_weights_that_are_stored_split(axis_type, native_backend):
    """Split over "tensor", and further over "data" (FSDP): gradients come back split alike."""
    group = make_group(native_backend, axis_type=axis_type)
    params, x = make_params(bias=True), make_x(16)
    names = jax_ep.PartitionNames(hidden="data")
    how = {"group": group, "names": names, "tensor_axis": "tensor"}
    specs = jax_ep.moe_partition_specs(params, **how)
    assert specs.up == P("expert", "data", "tensor") and specs.down == P("expert", "tensor", "data")
    placed = jax.tree.map(
        lambda w, s: jax.device_put(w, NamedSharding(group.mesh, s)), params, specs
    )
    assert placed.up.addressable_shards[0].data.shape == (E // 2, H // 2, F // 2)
    layer = functools.partial(jax_ep.moe, group=group, **LAYER)
    with jax.set_mesh(group.mesh):
        split = jax.device_put(x, NamedSharding(group.mesh, P("data")))
        y, aux, (d_x, d_params) = jax.jit(step(layer))(split, placed)
    want = compiled_step(functools.partial(dense_layer, top_k=K))(x, params)
    for got, expected in zip(*map(jax.tree.leaves, ((y, aux, (d_x, d_params)), want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if axis_type == AxisType.Explicit:
        for gradient, weight in zip(d_params, jax.tree.leaves(placed), strict=True):
            assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def scaled_experts(rows, group_sizes, expert_of_row, params):
    """The part of the outputs that follows from this position's channels; the bias once."""
    inner = jnp.tanh(jax_ep.grouped_dot(rows, params["up"], group_sizes))
    outputs = jax_ep.grouped_dot(inner, params["down"], group_sizes)
    bias = jnp.where(jax.lax.axis_index("tensor") == 0, params["bias"], 0)
    return outputs + bias.at[expert_of_row].get(mode="fill", fill_value=0)


def test_own_experts(native_backend):
    """Their function returns a part of the sum."""
    group = make_group(native_backend)
    weights = {"up": draw(1, E, H, F), "down": draw(2, E, F, H), "bias": draw(3, E, H)}
    specs = {"up": P("expert", None, "tensor"), "down": P("expert", "tensor"), "bias": P("expert")}
    options = {"experts": scaled_experts, "expert_specs": specs}
    layer = functools.partial(jax_ep.moe, group=group, **LAYER, **options)

    def dense(x, params):
        own = params.experts

        def expert(tokens, index):
            return jnp.tanh(tokens @ own["up"][index]) @ own["down"][index] + own["bias"][index]

        return dense_layer(x, params, top_k=K, expert=expert)

    empty = dict.fromkeys(("gate", "up", "down"))
    params = make_params()._replace(experts=weights, **empty)
    check_same(layer, dense, make_x(3, 5), params, mesh=group.mesh)


def test_own_router_reports_what_is_wrong(native_backend):
    """Counts of dropped pairs and invalid choices are not those of all positions together."""
    group = make_group(native_backend)

    def router(logits, bias):
        idx = jnp.tile(jnp.array([0, E], jnp.int32), (len(logits), 1))
        return routing.Routing(idx, jnp.full(idx.shape, 0.5), jax.nn.softmax(logits))

    layer = functools.partial(jax_ep.moe, group=group, router=router, capacity=4, **LAYER)
    _, aux = spmd.whole_jit(layer, group.mesh)(make_x(16), make_params())
    # Each of the two groups has 8 tokens, all for expert 0, whose rank has 4 rows.
    assert aux.num_invalid == 16 and aux.num_dropped == 2 * (8 - 4)
    np.testing.assert_array_equal(aux.load, [16, 0, 0, 0])


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}], ids=str)
def test_half_precision(options, native_backend):
    """In bfloat16, and with rows in 8 bits, about what one position computes."""
    group, hidden = make_group(native_backend), 128
    x = make_x(16, hidden=hidden).astype(jnp.bfloat16)
    params = make_params(bias=True, hidden=hidden)
    step_on = lambda axis: step(  # noqa: E731
        functools.partial(
            jax_ep.moe,
            group=group,
            **LAYER | {"tensor_axis": axis, "token_axes": ("data", "expert")},
            **options,
        )
    )
    got, want = (spmd.whole_jit(step_on(axis), group.mesh)(x, params) for axis in ("tensor", None))
    assert got[0].dtype == jnp.bfloat16
    for found, expected in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        found, expected = (np.asarray(a, np.float32) for a in (found, expected))
        atol = 0.03 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0.03, atol=atol)


@by_itself
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_inside_a_stage(axis_type, native_backend):
    """In a ``shard_map`` over the stages of a pipeline, which share one router."""
    names = ("stage", "expert", "tensor")
    group = make_group(native_backend, (2, 2, 2), names, axis_type)
    params, x = make_params(bias=True), make_x(2, 10)
    kernel = params.router_kernel
    split = jax.tree.map(lambda w: jnp.stack([w, w * 0.75]), params._replace(router_kernel=None))
    mask = np.arange(10) % 3 != 1

    def objective(run, x, kernel, split):
        y, aux_loss = run(x, kernel, split)
        target = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * target) + aux_loss.sum(), y

    def stage(x, kernel, split):
        own = jax.tree.map(lambda w: w[0], split)._replace(router_kernel=kernel)
        y, aux = jax_ep.moe(x[0], own, group=group, mask=mask, **LAYER)
        return y[None], aux.aux_loss[None]

    on_stages = jax.shard_map(
        stage,
        mesh=group.mesh,
        in_specs=(P("stage"), P(), P("stage")),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def dense(x, kernel, split):
        def stage(x, own):
            own = own._replace(router_kernel=kernel)
            y, (aux_loss, _) = dense_layer(x, own, top_k=K, mask=mask)
            return y, aux_loss

        return jax.vmap(stage)(x, split)

    step = lambda run: jax.jit(  # noqa: E731
        jax.value_and_grad(functools.partial(objective, run), argnums=(0, 1, 2), has_aux=True)
    )
    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
    got = step(on_stages)(put(x, P("stage")), put(kernel, P()), put(split, P("stage")))
    want = step(dense)(x, kernel, split)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
