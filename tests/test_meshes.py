"""Meshes of several axes: which devices form a group, and what the other axes do.

Each device has data of its own. For every group of a mesh the oracle says what its ranks must have.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep
import logical_hosts
import oracle
import routings
from spmd import (
    create_group,
    fetch,
    fit,
    make_mesh,
    mesh_jit,
    need_part,
    put,
    ranks_at_most,
    shard,
    stacked,
    stacked_jit,
)

TOKENS, TOP_K, LOCAL_EXPERTS, HIDDEN, ALIGNMENT = 5, 2, 2, 16, 4

SHAPES: dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]] = {
    # sizes, names, the group's axes
    "expert": ((4,), ("expert",), "expert"),
    "data-expert": ((2, 4), ("data", "expert"), "expert"),
    "expert-data": ((4, 2), ("expert", "data"), "expert"),
    "data-expert-model": ((2, 3, 2), ("data", "expert", "model"), "expert"),
    "pod-expert": ((2, 3), ("pod", "expert"), ("pod", "expert")),
    "expert-pod": ((2, 3), ("pod", "expert"), ("expert", "pod")),
    "data-pod-expert": ((2, 2, 2), ("data", "pod", "expert"), ("pod", "expert")),
    "pod-data-expert": ((2, 2, 2), ("pod", "data", "expert"), ("pod", "expert")),
    "ranks-of-one": ((3, 1), ("data", "expert"), "expert"),
}
MESHES = {
    key: (fit(sizes, names, axes), names, axes) for key, (sizes, names, axes) in SHAPES.items()
}


DATA_EXPERT = fit((2, 2), ("data", "expert"))


def groups_of(sizes, names, axes) -> list[list[int]]:
    """For every group of the mesh, the positions of its ranks' devices, in rank order."""
    axes = (axes,) if isinstance(axes, str) else axes
    others = [name for name in names if name not in axes]
    position = np.arange(int(np.prod(sizes))).reshape(sizes)
    ordered = position.transpose([names.index(name) for name in (*others, *axes)])
    ranks = int(np.prod([sizes[names.index(name)] for name in axes]))
    return ordered.reshape(-1, ranks).tolist()


def test_groups_of():
    assert groups_of((2, 2), ("data", "expert"), "expert") == [[0, 1], [2, 3]]
    assert groups_of((2, 2), ("expert", "data"), "expert") == [[0, 2], [1, 3]]
    assert groups_of((2, 3), ("pod", "expert"), ("expert", "pod")) == [[0, 3, 1, 4, 2, 5]]


def layer(group: jax_ep.Group):
    """Dispatch, a scaling that differs from rank to rank, combine; and the gradients."""

    def forward(x, weights, topk_idx, scale):
        out = jax_ep.dispatch(
            x,
            topk_idx,
            weights,
            group=group,
            num_experts=LOCAL_EXPERTS * group.size,
            alignment=ALIGNMENT,
        )
        y = jax_ep.combine(out.tokens * scale, out.handle, group=group, weights=out.weights)
        return y, out.tokens

    def run(x, weights, topk_idx, scale, dy):
        y, pull, tokens = jax.vjp(
            lambda x, weights: forward(x, weights, topk_idx, scale), x, weights, has_aux=True
        )
        return y, tokens, *pull(dy)

    return run


def data(devices: int, experts: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(devices)
    x, dy = rng.standard_normal((2, devices, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.standard_normal((devices, TOKENS, TOP_K)).astype(np.float32)
    idx = routings.uniform(rng, devices, TOKENS, TOP_K, experts)
    scale = 2.0 ** np.arange(devices).astype(np.float32)[:, None]
    return x, weights, idx, scale, dy


def expected(x, weights, idx, scale, dy, per_host) -> tuple[np.ndarray, ...]:
    """What one group must hold, with ``per_host`` ranks on each host."""
    experts = LOCAL_EXPERTS * len(x)
    sizes = {"num_ranks": len(x), "num_tokens": TOKENS, "top_k": TOP_K, "num_experts": experts}
    bounds = oracle.limits(**sizes, layout="expert", alignment=ALIGNMENT)
    plan = oracle.plan(
        idx, num_experts=experts, layout="expert", alignment=ALIGNMENT, bounds=bounds
    )
    tokens, row_weights = oracle.move(x, plan), oracle.move_weights(weights, plan)
    rows = tokens * scale[..., None]
    d_rows, d_row_weights = oracle.combine_vjp(dy, rows, row_weights, plan)
    return (
        oracle.combine(rows, plan, row_weights, per_host),
        tokens,
        oracle.combine(d_rows * scale[..., None], plan, ranks_per_host=per_host),
        oracle.send_home(d_row_weights, plan),
    )


def check(mesh, run, sizes, names, axes) -> None:
    groups = groups_of(sizes, names, axes)
    arrays = data(mesh.size, LOCAL_EXPERTS * len(groups[0]))
    found = run(*(put(a.reshape(-1, *a.shape[2:]), mesh) for a in arrays))
    found = [stacked(leaf, mesh.size) for leaf in fetch(found, mesh)]
    per_host = logical_hosts.of_group(mesh, axes)
    for devices in groups:
        wanted = expected(*(a[devices] for a in arrays), per_host)
        for what, got, want in zip(("y", "tokens", "dx", "dw"), found, wanted, strict=True):
            oracle.assert_same(got[devices], want, f"{what} of the group of devices {devices}")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MESHES)
def test_mesh(name, check_vma, backend):
    sizes, names, axes = MESHES[name]
    mesh = make_mesh(sizes, names)
    need_part(mesh)
    group = create_group(mesh, axes, backend=backend)
    check(mesh, jax.jit(shard(layer(group), mesh, check_vma=check_vma)), sizes, names, axes)


@pytest.mark.parametrize("name", ["expert", "data-expert", "pod-expert"])
def test_explicit_axes(name, backend):
    """Axes of type Explicit, which ``jax.make_mesh`` makes, outside and in the context of a mesh."""
    sizes, names, axes = MESHES[name]
    mesh = make_mesh(sizes, names, AxisType.Explicit)
    need_part(mesh)
    group = create_group(mesh, axes, backend=backend)
    run = jax.jit(shard(layer(group), mesh))
    check(mesh, run, sizes, names, axes)
    with jax.set_mesh(mesh):
        check(mesh, run, sizes, names, axes)


def test_two_groups_of_one_mesh(backend):
    """One program uses both axes of a mesh as groups, one after the other."""
    names = ("row", "column")
    sizes = fit((2, 3), names, "column")
    mesh = make_mesh(sizes, names)
    groups = [create_group(mesh, axis, backend=backend) for axis in names]
    assert groups[0].id != groups[1].id

    def both(*arrays):
        return [layer(group)(*arrays) for group in groups]

    run = mesh_jit(both, mesh)
    for index, axis in enumerate(names):
        ranks = sizes[names.index(axis)]
        # Ids past the smaller group's experts are invalid there, and only there.
        arrays = data(mesh.size, LOCAL_EXPERTS * ranks)
        found = run(*(a.reshape(-1, *a.shape[2:]) for a in arrays))[index]
        per_host = logical_hosts.of_group(mesh, axis)
        for devices in groups_of(sizes, names, axis):
            wanted = expected(*(a[devices] for a in arrays), per_host)
            for got, want in zip(found, wanted, strict=True):
                oracle.assert_same(stacked(got, mesh.size)[devices], want, f"{axis} of {devices}")


def test_devices_in_another_order(backend):
    """Ranks follow the mesh, not the devices' numbers."""
    ordered = make_mesh(ranks_at_most(4))
    need_part(ordered)
    order = {2: [1, 0], 3: [2, 0, 1], 4: [2, 0, 3, 1]}[ordered.size]
    devices = ordered.devices[order]
    mesh = jax.sharding.Mesh(devices, ("expert",))
    group = create_group(mesh, backend=backend)
    assert group is not create_group(ordered, backend=backend)
    check(mesh, jax.jit(shard(layer(group), mesh)), (mesh.size,), ("expert",), "expert")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("varying", list(itertools.product([True, False], repeat=2)), ids=str)
def test_operands_replicated_over_data(varying, check_vma, backend):
    """x, the routing or both are the same in two groups side by side.

    If both are the same, so are the results, and JAX must be able to see that.
    """
    x_varies, idx_varies = varying
    mesh = make_mesh(DATA_EXPERT, ("data", "expert"))
    groups = groups_of(DATA_EXPERT, mesh.axis_names, "expert")
    ranks, experts = len(groups[0]), LOCAL_EXPERTS * len(groups[0])
    group = create_group(mesh, backend=backend)
    x, weights, idx, _, _ = data(mesh.size, experts)
    x_spec = P(("data", "expert")) if x_varies else P("expert")
    idx_spec = P(("data", "expert")) if idx_varies else P("expert")
    out_spec = P(("data", "expert")) if x_varies or idx_varies else P("expert")

    def run(x, weights, idx):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=experts, alignment=ALIGNMENT
        )
        rows = out.tokens * out.weights[:, None]
        return jax_ep.combine(rows, out.handle, group=group), out.tokens

    specs = {"in_specs": (x_spec, idx_spec, idx_spec), "out_specs": out_spec}
    first = np.tile(np.arange(ranks), len(groups))  # the first group's data, for all groups
    per_device = [x if x_varies else x[first]]
    per_device += [a if idx_varies else a[first] for a in (weights, idx)]
    given = [x if x_varies else x[:ranks]]
    given += [a if idx_varies else a[:ranks] for a in (weights, idx)]
    call = mesh_jit(run, mesh, check_vma=check_vma, **specs)
    found = call(*(a.reshape(-1, *a.shape[2:]) for a in given))
    num_parts = mesh.size if x_varies or idx_varies else ranks
    found = [stacked(leaf, num_parts) for leaf in found]
    for devices in groups[: num_parts // ranks]:
        a, b, c = (array[devices] for array in per_device)
        sizes = {"num_ranks": ranks, "num_tokens": TOKENS, "top_k": TOP_K, "num_experts": experts}
        bounds = oracle.limits(**sizes, layout="expert", alignment=ALIGNMENT)
        plan = oracle.plan(
            c, num_experts=experts, layout="expert", alignment=ALIGNMENT, bounds=bounds
        )
        tokens, row_weights = oracle.move(a, plan), oracle.move_weights(b, plan)
        oracle.assert_same(found[1][devices], tokens, f"tokens, {devices}")
        per_host = logical_hosts.of_group(mesh)
        y = oracle.combine(tokens * row_weights[..., None], plan, ranks_per_host=per_host)
        oracle.assert_same(found[0][devices], y, f"y, {devices}")


def test_scan_over_a_carry(backend):
    """The result can be a scan's carry: it varies over the axes that the input varies over."""
    mesh = make_mesh(DATA_EXPERT, ("data", "expert"))
    group = create_group(mesh, backend=backend)
    experts = LOCAL_EXPERTS * group.size
    x, weights, idx, _, _ = data(mesh.size, experts)

    def step(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=experts, alignment=1)
        return jax_ep.combine(out.tokens, out.handle, group=group, weights=out.weights)

    def run(x, idx, weights):
        looped, _ = jax.lax.scan(lambda x, _: (step(x, idx, weights), None), x, length=3)
        unrolled = step(step(step(x, idx, weights), idx, weights), idx, weights)
        return looped, unrolled

    looped, unrolled = stacked_jit(run, mesh)(x, idx, weights)
    assert np.abs(looped).max() > 0
    oracle.assert_same(looped, unrolled, "three steps")
