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
    """Split over "tensor", and further over "data" (FSDP): gradients come back split in the same way."""
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


def even_dot(rows, weights, group_sizes):
    """A product of rows of which each local expert has as many."""
    of_each = rows.reshape(len(weights), -1, rows.shape[1])
    return jnp.einsum("lch,lhf->lcf", of_each, weights).reshape(len(rows), -1)


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
    axes = group.axis_names
    idx = jnp.arange(16 * K, dtype=jnp.int32).reshape(16, K) % E
    routes = routing.Routing(idx, jnp.full(idx.shape, 0.5), None)

    def loss(x, params):
        options = {"num_experts": E, "top_k": K, "routing": routes, "grouped_dot": even_dot}
        options |= {"group": group, "tensor_axis": tensor_axis, "token_axes": axes}
        return jax_ep.moe(x, params, capacity=16 * K // group.size, **options)[0].sum()

    specs = jax_ep.moe_partition_specs(params, group=group, tensor_axis=tensor_axis)
    put = lambda a, spec: jax.device_put(a, NamedSharding(group.mesh, spec))  # noqa: E731
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
    rows, tokens = 16 * K // 4, 16 // 4
    assert wanted == 3 * 3 * 2 * H * (
        rows * F + tokens * S
    )  # of gate, up and down; and backward twice
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
            **LAYER | {"tensor_axis": axis, "token_axes": TOKEN_AXES},
            **options,
        )
    )
    got, want = (spmd.whole_jit(step_on(axis), group.mesh)(x, params) for axis in ("tensor", None))
    assert got[0].dtype == jnp.bfloat16
    for found, expected in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        found, expected = (np.asarray(a, np.float32) for a in (found, expected))
        atol = 0.03 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0.03, atol=atol)


TOKEN_AXES = ("data", "expert")


@by_itself
def test_rematerialised(native_backend):
    """In a scan over blocks that save what the ops give, nothing is sent or added twice."""
    group = make_group(native_backend)
    params, x = make_params(bias=True), make_x(16)
    stacked = jax.tree.map(lambda w: jnp.stack([w, w * 0.75]), params)
    names = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(layer, wrap, x, stacked):
        def block(x, params):
            y, aux = layer(x, params)
            return x + jnp.tanh(y), aux[0]

        y, losses = jax.lax.scan(wrap(block), x, stacked)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) + losses.sum()

    layer = functools.partial(jax_ep.moe, group=group, **LAYER)
    found = functools.partial(loss, layer, functools.partial(jax.checkpoint, policy=policy))
    dense = functools.partial(loss, functools.partial(dense_layer, top_k=K), lambda block: block)
    dense = lambda *a, f=dense: f(*a)  # noqa: E731
    compiled = jax.jit(jax.grad(found, argnums=(0, 1))).lower(x, stacked).compile()
    got = compiled(x, stacked)
    if native_backend != "reference":
        targets = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine")
        counts = spmd.count_calls(compiled.as_text(), targets)
        assert counts == {"jax_ep_plan": 1, "jax_ep_dispatch": 2, "jax_ep_combine": 2}
    want = jax.jit(jax.grad(dense, argnums=(0, 1)))(x, stacked)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


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


@by_itself
@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_flax_layers(flax, native_backend):
    """Their weights are made split, and their output is that of ``moe``."""
    from flax import linen, nnx

    group, x = make_group(native_backend), make_x(16)
    settings = {"group": group, "shared_intermediate": S, "expert_bias": True} | LAYER
    if flax == "nnx":
        layer = jax_ep.nnx.MoE(H, F, rngs=nnx.Rngs(0), **settings)
        up, params = layer.up[...], layer.params()
        assert up.addressable_shards[0].data.shape == (E // 2, H, F // 2)
        y, _ = layer(x)
    else:
        layer = jax_ep.linen.MoE(H, F, **settings)
        variables = layer.init(jax.random.key(0), x)
        specs = linen.get_partition_spec(variables)["params"]
        assert specs["up"] == P("expert", None, "tensor")
        assert specs["shared_down"] == P("tensor", None)
        weights = linen.unbox(variables)["params"]
        shared = jax_ep.SharedExpert(*(weights.pop(f"shared_{n}") for n in ("gate", "up", "down")))
        params = jax_ep.MoEParams(**weights, shared=shared)
        y, _ = layer.apply(variables, x)
    want, _ = dense_layer(x, jax.device_get(params), top_k=K)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0


@by_itself
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"tensor_axis": "model"},
            ValueError,
            "tensor_axis: expected an axis of the mesh .*'model'",
        ),
        ({"tensor_axis": "expert"}, ValueError, "tensor_axis: expected an axis that is not one of"),
        (
            {"tensor_axis": ("tensor",)},
            TypeError,
            r"tensor_axis: expected one axis .*\('tensor',\)",
        ),
        (
            {"token_axes": ("tensor", "expert")},
            ValueError,
            "token_axes: expected axes without the tensor_axis, 'tensor', got",
        ),
        (
            {"params": make_params},
            ValueError,
            "params.up: expected inner channels F that are a multiple of the 3 .*got F = 16; pad",
        ),
        (
            {
                "params": lambda: jax_ep.MoEParams(
                    make_params().router_kernel, experts=draw(0, E, H)
                )
            },
            ValueError,
            "expert_specs: expected a spec that names tensor_axis='tensor'",
        ),
    ],
)
def test_errors(arguments, error, text):
    size = 3 if "multiple of the 3" in text else 2
    group = make_group("reference", (2, size), ("expert", "tensor"))
    arguments = LAYER | arguments
    params = arguments.pop("params", make_params)()
    own = {} if params.experts is None else {"experts": scaled_experts}
    with pytest.raises(error, match=f"jax_ep.moe: argument {text}"):
        jax_ep.moe(make_x(4), params, group=group, **own, **arguments)


@by_itself
def test_more_errors():
    group = make_group("reference", (2, 3), ("expert", "tensor"))
    params = make_params()
    padded = jax.tree.map(lambda shape: jnp.zeros(shape), {"up": (E, H, 6), "down": (E, 6, H)})
    params = params._replace(gate=None, **padded)
    params = params._replace(shared=params.shared._replace(gate=None))
    with pytest.raises(ValueError, match=r"params.shared.up: expected inner channels S .*S = 8"):
        jax_ep.moe(make_x(4), params, group=group, **LAYER)
    with pytest.raises(
        ValueError, match="moe_partition_specs: argument tensor_axis: expected an ax"
    ):
        jax_ep.moe_partition_specs(params, group=group, tensor_axis="expert")
    with pytest.raises(
        ValueError, match="linen.MoE: argument params.up: expected inner channels F"
    ):
        jax_ep.linen.MoE(H, F, group=group, **LAYER).init(jax.random.key(0), make_x(4))
    entered = jax.shard_map(
        lambda x: jax_ep.moe(x, make_params(), group=group, **LAYER)[0],
        mesh=group.mesh,
        in_specs=P("tensor"),
        out_specs=P("tensor"),
        axis_names={"tensor"},
    )
    with pytest.raises(
        ValueError, match=r"tensor_axis: expected no axis that .* \('tensor',\), got"
    ):
        jax.eval_shape(entered, make_x(6))


@by_itself
def test_any_name_and_no_warning(caplog, monkeypatch):
    """The axis is none of the tokens', whatever its name, and nothing says that work is repeated."""
    from jax_ep._moe import token_axes

    monkeypatch.setattr(token_axes, "_warned", set())
    for name in ("tensor", "inner"):
        group = make_group("reference", (2, 2, 2), ("data", "expert", name))
        seen = []

        def router(logits, bias, seen=seen):
            seen.append(len(logits))
            return routing.softmax_top_k(logits, K)

        options = LAYER | {"tensor_axis": name, "router": router}
        run = functools.partial(jax_ep.moe, group=group, **options)
        jax.eval_shape(run, make_x(16), make_params())
        assert seen == [4]
    assert not caplog.messages
