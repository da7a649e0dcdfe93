"""``jax_ep.moe(experts=)``: a function of the user's own, with weights of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import spmd
from dense_experts import check_same, dense_layer

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")

H, F, E, K, S = 8, 12, 4, 2, 8


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / 2


def make_group(ranks, backend, axis_type=AxisType.Auto):
    """A group of so many ranks; "2x2" has two groups of two."""
    names = ("data", "expert")
    sizes = (2, 2) if ranks == "2x2" else (1, ranks)
    sizes = tuple(2 if size == 3 else size for size in spmd.fit(sizes, names))
    return spmd.create_group(spmd.make_mesh(sizes, names, axis_type), "expert", backend=backend)


def make_params(experts, *, shared=False, hidden=H, seed=0) -> jax_ep.MoEParams:
    shared_up = draw(1, hidden, S)
    return jax_ep.MoEParams(
        router_kernel=draw(seed, hidden, E),
        shared=jax_ep.SharedExpert(shared_up, -shared_up, draw(2, S, hidden)) if shared else None,
        experts=experts,
    )


def make_x(*shape: int) -> jax.Array:
    return 2 * draw(9, *shape, H)


# ---- experts that square, with a scale for each expert and a matrix that all have


def square_weights(seed: int = 3):
    return {
        "up": draw(seed, E, H, F),
        "down": (draw(seed + 1, E, F, H), 1 + draw(seed + 2, E)),
        "mixed": draw(seed + 3, H, H),
    }


SQUARE_SPECS = {"up": P("expert"), "down": P("expert"), "mixed": P()}


def square_experts(rows, group_sizes, expert_of_row, params):
    up, (down, scale), mixed = params["up"], params["down"], params["mixed"]
    inner = jax_ep.grouped_dot(rows, up, group_sizes) ** 2
    scale = scale.at[expert_of_row].get(mode="fill", fill_value=0)
    return (jax_ep.grouped_dot(inner, down, group_sizes) * scale[:, None]) @ mixed


def dense_square(x, params, **options):
    weights = params.experts

    def expert(tokens, index):
        down, scale = weights["down"]
        inner = (tokens @ weights["up"][index]) ** 2
        return (inner @ down[index] * scale[index]) @ weights["mixed"]

    return dense_layer(x, params, top_k=K, expert=expert, **options)


def poisoned_experts(rows, group_sizes, expert_of_row, params):
    """NaN in every row that is all zeros, and in rows of no expert."""
    out = square_experts(rows, group_sizes, expert_of_row, params)
    empty = (expert_of_row == len(group_sizes)) | (rows == 0).all(axis=1)
    return jnp.where(empty[:, None], jnp.nan, out)


def greedy_experts(rows, group_sizes, expert_of_row, params):
    """Reads all rows, whose sums are those of the used ones only if the others are zeros."""
    total = jnp.sum(rows, axis=0)
    used = jnp.sum(jnp.where((expert_of_row < len(group_sizes))[:, None], rows, 0), axis=0)
    return square_experts(rows, group_sizes, expert_of_row, params) + 100 * (total - used)


OPTIONS = {
    "plain": {},
    "chunks": {"overlap": "chunks", "num_chunks": 3},
    "shared expert": {"overlap": "shared_expert"},
    "alignment": {"alignment": 8},
    "mask": {"mask": (jnp.arange(15) % 4 != 1).reshape(3, 5)},
    "used experts": {"num_used_experts": 3},
    "capacity": {"capacity": 60},
    "activation": {"activation": jax_ep.clamped_swiglu(0.5)},
}


def check_square(group, options, *, experts=square_experts, seed=3, **more):
    known = {n: options[n] for n in ("activation", "mask", "num_used_experts") if n in options}
    layer = functools.partial(
        jax_ep.moe,
        group=group,
        num_experts=E,
        top_k=K,
        experts=experts,
        expert_specs=SQUARE_SPECS,
        **options,
    )
    dense = functools.partial(dense_square, **known)
    params = make_params(square_weights(seed), shared=True)
    check_same(layer, dense, make_x(3, 5), params, mesh=group.mesh)


@pytest.mark.parametrize("option", OPTIONS)
def test_same_as_dense(option, native_backend):
    """The activation is that of the shared expert alone."""
    check_square(make_group(2, native_backend), OPTIONS[option])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("ranks", [1, 4, "2x2"])
def test_any_number_of_ranks(ranks, axis_type, native_backend):
    """The gradient of a matrix that all ranks have is the sum of theirs."""
    check_square(make_group(ranks, native_backend, axis_type), {})


@pytest.mark.parametrize("experts", [poisoned_experts, greedy_experts])
@pytest.mark.parametrize("option", ["plain", "chunks", "alignment"])
def test_unused_rows_do_no_harm(option, experts, native_backend):
    """Neither those that the function gets, which are zeros, nor those that it returns."""
    check_square(make_group(2, native_backend), OPTIONS[option], experts=experts)


def log_experts(rows, group_sizes, expert_of_row, params):
    """Infinite for rows of zeros, with a gradient of NaN even where their cotangents are zeros."""
    scale = params.at[expert_of_row].get(mode="fill", fill_value=1)
    return rows * scale[:, None] + jnp.log(jnp.sum(rows**2, axis=1, keepdims=True))


@pytest.mark.parametrize("option", ["plain", "chunks", "alignment"])
def test_gradients_of_unused_rows_are_not_read(option, native_backend):
    group = make_group(2, native_backend)

    def dense(x, params):
        log = lambda tokens: jnp.log(jnp.sum(tokens**2, axis=1, keepdims=True))  # noqa: E731
        expert = lambda tokens, i: tokens * params.experts[i] + log(tokens)  # noqa: E731
        return dense_layer(x, params, top_k=K, expert=expert)

    layer = functools.partial(
        jax_ep.moe, group=group, num_experts=E, top_k=K, experts=log_experts, **OPTIONS[option]
    )
    check_same(layer, dense, make_x(3, 5), make_params(1 + draw(3, E)), mesh=group.mesh)


@by_itself
@pytest.mark.parametrize("own", [False, True])
def test_dispatch_clears_unused_rows(own, native_backend):
    group = make_group(2, native_backend)
    if native_backend == "reference":
        pytest.skip("reads the calls of native targets")
    experts = square_experts if own else None
    sizes = {"hidden": H, "intermediate": F, "num_experts": E}
    params = make_params(square_weights())
    if not own:
        params = jax_ep.init_moe_params(jax.random.key(0), **sizes)

    def run(x, params):
        options = {"experts": experts, "expert_specs": SQUARE_SPECS} if own else {}
        return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, **options)[0]

    text = jax.jit(run).lower(make_x(8), params).as_text()
    marks = {
        line.partition("unused_rows = ")[2][:1]
        for line in text.splitlines()
        if "@jax_ep_dispatch(" in line
    }
    assert marks == {"0" if own else "1"}


@pytest.mark.parametrize("saved", [(), ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")])
def test_scan_over_checkpointed_layers(saved, native_backend):
    group = make_group("2x2", native_backend, AxisType.Explicit)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    def network(layer, x, params):
        def block(x, params):
            y, aux = layer(x, params)
            return x + y, tuple(aux[:2])

        x, (losses, loads) = lax.scan(jax.checkpoint(block, policy=policy), x, params)
        return x, (losses.sum(), loads.sum(0))

    layers = [make_params(square_weights(3 + seed), seed=seed) for seed in range(2)]
    layer = functools.partial(
        jax_ep.moe,
        group=group,
        num_experts=E,
        top_k=K,
        experts=square_experts,
        expert_specs=SQUARE_SPECS,
    )
    check_same(
        functools.partial(network, layer),
        functools.partial(network, dense_square),
        make_x(2, 3),
        jax.tree.map(lambda *a: jnp.stack(a), *layers),
        mesh=group.mesh,
        tolerance=1e-4,
    )


@by_itself
def test_inside_another_shard_map(native_backend):
    names = ("stage", "expert")
    mesh = spmd.make_mesh(spmd.fit((2, 2), names), names)
    group = jax_ep.create_group(mesh, "expert", backend=native_backend)
    stages = [make_params(square_weights(3 + 5 * s)) for s in range(mesh.shape["stage"])]
    params = jax.tree.map(lambda *a: jnp.stack(a), *stages)

    def stage(x, params):
        y, aux = jax_ep.moe(
            x[0],
            jax.tree.map(lambda w: w[0], params),
            group=group,
            num_experts=E,
            top_k=K,
            experts=square_experts,
            expert_specs=SQUARE_SPECS,
        )
        return y[None], (aux.aux_loss[None], aux.load[None])

    mapped = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(P("stage"), P("stage")),
        out_specs=P("stage"),
        axis_names={"stage"},
    )

    def layer(x, params):
        y, (losses, loads) = mapped(x, params)
        return y, (losses.sum(), loads)

    def dense(x, params):
        y, (losses, loads) = jax.vmap(dense_square)(x, params)
        return y, (losses.sum(), loads)

    check_same(layer, dense, make_x(len(stages), 5), params, mesh=mesh)
