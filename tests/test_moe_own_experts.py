"""``jax_ep.moe(experts=)``: a function of the user's own, with weights of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
from dense_experts import check_same, dense_layer
from expert_layers import (
    E,
    F,
    H,
    K,
    check_in_stages,
    check_scanned,
    draw,
    make_group,
    make_x,
    own_params,
)

pytestmark = [
    pytest.mark.needs_collectives,  # the layer sums its statistics over the mesh
    pytest.mark.usefixtures("in_float32"),
]
by_itself = pytest.mark.one_process("calls the layer with arrays of one process")


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


def square_layer(group, **options):
    of_layer = {"num_experts": E, "top_k": K, "expert_specs": SQUARE_SPECS} | options
    of_layer.setdefault("experts", square_experts)
    return functools.partial(jax_ep.moe, group=group, **of_layer)


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
    layer = square_layer(group, experts=experts, **options)
    dense = functools.partial(dense_square, **known)
    params = own_params(square_weights(seed), shared=True)
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
    check_same(layer, dense, make_x(3, 5), own_params(1 + draw(3, E)), mesh=group.mesh)


@by_itself
@pytest.mark.parametrize("own", [False, True])
def test_dispatch_clears_unused_rows(own, native_backend):
    group = make_group(2, native_backend)
    if native_backend == "reference":
        pytest.skip("the reference, in place of a native backend here, has no native calls to read")
    experts = square_experts if own else None
    sizes = {"hidden": H, "intermediate": F, "num_experts": E}
    params = own_params(square_weights())
    if not own:
        params = jax_ep.init_moe_params(jax.random.key(0), **sizes)

    def run(x, params):
        options = {"experts": experts, "expert_specs": SQUARE_SPECS} if own else {}
        return jax_ep.moe(x, params, group=group, num_experts=E, top_k=K, **options)[0]

    text = jax.jit(run).lower(make_x(8), params).as_text()
    marks = {
        line.partition("unused_rows = ")[2][:1]
        for line in text.splitlines()
        if "@jax_ep_dispatch(" in line or "@jax_ep_plan_dispatch(" in line
    }
    assert marks == {"0" if own else "1"}


@pytest.mark.parametrize("saved", [(), ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")])
def test_scan_over_checkpointed_layers(saved, native_backend):
    group = make_group("2x2", native_backend, AxisType.Explicit)
    layers = [own_params(square_weights(3 + seed), seed=seed) for seed in range(2)]
    check_scanned(square_layer(group), dense_square, layers, mesh=group.mesh, saved=saved)


@by_itself
def test_inside_another_shard_map(native_backend):
    stage = lambda s: own_params(square_weights(3 + 5 * s))  # noqa: E731
    check_in_stages(square_layer, dense_square, stage, native_backend)
