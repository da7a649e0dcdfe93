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
from dense_experts import check_same, dense_layer, step
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
        ("data-expert-tensor", AxisType.Auto, {"bias": True}, {}),
        ("data-expert-tensor", AxisType.Explicit, {"bias": True}, {"overlap": "chunks"}),
        ("tensor-expert-data", AxisType.Auto, {}, {"overlap": "shared_expert"}),
        ("tensor-expert-data", AxisType.Explicit, {"shared": False}, {"num_used_experts": 3}),
        ("expert-tensor", AxisType.Auto, {"bias": True, "gated": False}, {"num_chunks": 3}),
        ("expert-tensor", AxisType.Auto, {"bias": True}, {"grouped_dot": by_expert}),
        ("one-position", AxisType.Explicit, {"bias": True}, {}),
        ("one-rank", AxisType.Auto, {"bias": True}, {}),
        ("two-axes", AxisType.Auto, {"bias": True}, {"rank_capacity_factor": 2.0}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_same_as_dense(mesh, axis_type, weights, options, masked, native_backend):
    """Outputs, statistics and all gradients; with 15 tokens some rank has a masked one anyway."""
    if masked and mesh not in ("data-expert-tensor", "one-rank"):
        pytest.skip("a mask makes little difference")
    group = make_group(native_backend, *MESHES[mesh], axis_type)
    x = make_x(3, 5)
    mask = jnp.arange(15).reshape(3, 5) % 4 != 1 if masked else None
    layer = functools.partial(jax_ep.moe, group=group, mask=mask, **LAYER, **options)
    used = options.get("num_used_experts")
    dense = functools.partial(dense_layer, top_k=K, mask=mask, num_used_experts=used)
    check_same(layer, dense, x, make_params(**weights), mesh=group.mesh)


@by_itself
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_weights_that_are_stored_split(axis_type, native_backend):
    """Split over "tensor", and further over "data" (FSDP): gradients come back split in the same way."""
    group = make_group(native_backend, axis_type=axis_type)
    params, x = make_params(bias=True), make_x(16)
    names = jax_ep.PartitionNames(hidden="data")
    how = {"group": group, "names": names, "tensor_axis": "tensor"}
    specs = jax_ep.moe_partition_specs(params, **how)
    assert specs.up == P("expert", "data", "tensor") and specs.down == P("expert", "tensor", "data")
    placed = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(group.mesh, s)), params, specs)
    assert placed.up.addressable_shards[0].data.shape == (E // 2, H // 2, F // 2)
    layer = functools.partial(jax_ep.moe, group=group, **LAYER)
    with jax.set_mesh(group.mesh):
        split = jax.device_put(x, NamedSharding(group.mesh, P("data")))
        y, aux, (d_x, d_params) = jax.jit(step(layer))(split, placed)
    want = jax.jit(step(functools.partial(dense_layer, top_k=K)))(x, params)
    for got, expected in zip(*map(jax.tree.leaves, ((y, aux, (d_x, d_params)), want)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if axis_type == AxisType.Explicit:
        for gradient, weight in zip(d_params, jax.tree.leaves(placed), strict=True):
            assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)


@by_itself
def test_partition_specs():
    group = make_group("reference")
    specs = jax_ep.moe_partition_specs(make_params(bias=True), group=group, tensor_axis="tensor")
    assert specs.router_kernel == P(None, None) and specs.router_bias == P(None)
    assert specs.gate == specs.up == P("expert", None, "tensor")
    assert specs.down == P("expert", "tensor", None)
    assert specs.gate_bias == specs.up_bias == P("expert", "tensor")
    assert specs.down_bias == P("expert", None)
    assert specs.shared == jax_ep.SharedExpert(
        P(None, "tensor"), P(None, "tensor"), P("tensor", None)
    )
    names = jax_ep.PartitionNames(intermediate=("tensor", "data"))
    how = {"group": group, "names": names, "tensor_axis": "tensor"}
    specs = jax_ep.moe_partition_specs(make_params(), **how)
    assert specs.up == P("expert", None, ("tensor", "data"))


def flops(jaxpr) -> int:
    """Multiplications and additions of all matrix products of one device, as JAX traces them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            total += flops(inner) if hasattr(inner, "eqns") else 0
    return total


def training_step(group, tensor_axis):
    """A step on routes that are given, so that there are no products of a router, and its arguments."""
    params, x = make_params(), make_x(16)
    idx = jnp.arange(16 * K, dtype=jnp.int32).reshape(16, K) % E
    routes = routing.Routing(idx, jnp.full(idx.shape, 0.5), None)

    def loss(x, params):
        options = {"num_experts": E, "top_k": K, "routing": routes, "grouped_dot": by_expert}
        return jax_ep.moe(x, params, group=group, tensor_axis=tensor_axis, **options)[0].sum()

    specs = jax_ep.moe_partition_specs(params, group=group, tensor_axis=tensor_axis)
    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
    axes = tuple(name for name in group.mesh.axis_names if name != "tensor")
    arguments = put(x, P(axes)), jax.tree.map(put, params, specs)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), arguments


@by_itself
def test_no_product_is_repeated(native_backend):
    """Two ranks with two positions each compute as much as four ranks, and gather no weights."""
    work = {}
    for sizes, names, axis in [
        ((4,), ("expert",), None),
        ((2, 2), ("expert", "tensor"), "tensor"),
        ((2, 2), ("expert", "tensor"), None),
    ]:
        run, arguments = training_step(make_group(native_backend, sizes, names), axis)
        lowered = run.trace(*arguments)
        compiled = lowered.lower().compile()
        work[sizes, axis] = flops(lowered.jaxpr), compiled.cost_analysis()["flops"]
        if axis is not None and native_backend != "reference":
            text = compiled.as_text()
            assert "all-reduce" in text and "all-gather" not in text
    wanted, counted = work[(4,), None]
    # Forward and backward, gate, up and down: all rows with all local experts, and the shared expert.
    rows, local, tokens = 16 * K, E // 4, 16 // 4
    assert wanted == 3 * 3 * 2 * H * (rows * local * F + tokens * S)
    assert work[(2, 2), "tensor"][0] == wanted
    assert work[(2, 2), None][0] == 2 * wanted
    assert work[(2, 2), "tensor"][1] < 1.2 * counted < 0.8 * work[(2, 2), None][1]


@by_itself
def test_what_crosses_the_axis(native_backend):
    """One sum of [T, H] forward, one backward with [T, K] beside it; rows and weights do not."""
    group = make_group(native_backend, (2, 2), ("expert", "tensor"))
    run, arguments = training_step(group, "tensor")
    sums = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name.startswith(("psum", "all_gather", "all_to_all", "reduce_scatter")):
                axes = equation.params.get("axes", equation.params.get("axis_name"))
                if "tensor" in axes:
                    sums.extend(v.aval.shape for v in equation.invars if v.aval.ndim)
            for inner in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(run.trace(*arguments).jaxpr)
    assert sorted(sums) == [(8, H), (8, H)]  # the routes that are given have no gradient here
