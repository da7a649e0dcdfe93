"""The ops under jit, scan, vmap and donation, and several of them in one program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import logical_hosts
import oracle
import routings
from small_layer import EXPERTS, RANKS, TOP_K, assert_close, data, dense_layer, layer
from spmd import (
    create_group,
    fetch,
    fit,
    flat,
    make_group,
    make_mesh,
    need_part,
    put,
    shard,
    stacked,
    stacked_jit,
)

# ---- scan


def test_scan_of_whole_layers(backend):
    """Dispatch and combine inside scan, differentiated, against the unrolled loop."""
    group = make_group(RANKS, backend)

    def looped(x, weights, idx):
        body = lambda x, _: (layer(group, x, weights, idx), x.sum())  # noqa: E731
        return jax.lax.scan(body, x, None, length=4)[0]

    def unrolled(x, weights, idx):
        for _ in range(4):
            x = layer(group, x, weights, idx)
        return x

    def run(x, weights, idx):
        results = []
        for forward in (looped, unrolled):
            y, pull = jax.vjp(functools.partial(forward, idx=idx), x, weights)
            results.append((y, *pull(jnp.cos(y))))
        return results

    scanned, plain = stacked_jit(run, group.mesh)(*data())
    assert_close(scanned, plain)


def test_scan_over_routings(backend):
    """A new plan in every step, with routings as scanned input; steps must not mix."""
    group = make_group(RANKS, backend)

    def run(x, weights, idx):
        def body(x, step):
            weights, idx = step
            out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS)
            return layer(group, x, weights, idx), out.counts

        steps = jax.tree.map(lambda a: a.swapaxes(0, 1), (weights, idx))  # [steps, T, K]
        return jax.lax.scan(body, x, steps)

    many = [data(seed, pattern=p) for seed, p in enumerate(routings.PATTERNS)]
    x = many[0][0]
    weights, idx = (np.stack([d[i] for d in many], axis=2) for i in (1, 2))
    y, counts = stacked_jit(run, group.mesh)(x, weights, idx)
    once = stacked_jit(functools.partial(layer, group), group.mesh)
    for step, (_, w, i) in enumerate(many):
        clean, _ = oracle.sanitise(i, EXPERTS)
        wanted = np.stack([(clean == e).sum() for e in range(EXPERTS)]).reshape(RANKS, -1)
        np.testing.assert_array_equal(counts.reshape(RANKS, len(many), -1)[:, step], wanted)
        x = once(x, w, i)
    assert_close(y, x)


def test_handle_through_jit_and_scan(backend):
    """A handle leaves one jit, enters another, and is used and carried by a scan there."""
    group = make_group(RANKS, backend)
    need_part(group.mesh)
    x, weights, idx = (put(flat(a), group.mesh) for a in data())

    def first(x, weights, idx):
        return jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS)

    out = jax.jit(shard(first, group.mesh))(x, weights, idx)
    assert isinstance(out.handle, jax_ep.Handle) and out.handle.capacity == len(out.tokens) // RANKS
    leaves = jax.tree.leaves(out.handle)
    assert all(leaf.dtype == jnp.int32 and leaf.ndim >= 1 for leaf in leaves)

    def second(x, handle):
        def body(carry, _):
            x, handle = carry
            rows = jax_ep.dispatch(x, group=group, handle=handle).tokens
            return (x + 0.5 * jax_ep.combine(rows, handle, group=group), handle), rows.sum()

        (x, handle), _ = jax.lax.scan(body, (x, handle), None, length=3)
        return x, handle

    y, handle = jax.jit(shard(second, group.mesh))(x, out.handle)
    y, x, carried, leaves = fetch((y, x, jax.tree.leaves(handle), leaves), group.mesh)
    for got, want in zip(carried, leaves, strict=True):
        oracle.assert_same(got, want, "a carried handle")
    assert_close(y, x * (1 + 0.5 * TOP_K) ** 3)


# ---- vmap


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "sum"])
def test_vmap(fused, backend):
    """One call per element: values and gradients are those of a loop."""
    group = make_group(RANKS, backend)

    def value_and_gradients(x, weights, idx):
        y, pull = jax.vjp(lambda x, w: layer(group, x, w, idx, fused=fused), x, weights)
        return y, *pull(jnp.cos(y))

    def run(x, weights, idx):  # [n, T, ...]
        mapped = jax.vmap(value_and_gradients)(x, weights, idx)
        loop = [value_and_gradients(*(a[i] for a in (x, weights, idx))) for i in range(len(x))]
        return mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)

    many = [data(seed) for seed in range(3)]
    arrays = [np.stack(a, axis=1) for a in zip(*many, strict=True)]  # [R, n, T, ...]
    mapped, loop = stacked_jit(run, group.mesh)(*arrays)
    for what, got, want in zip(("y", "dx", "dw"), mapped, loop, strict=True):
        assert_close(got, want, what)
    if not fused:
        oracle.assert_same(mapped[0], loop[0], "y")


def test_vmap_of_rows_only(backend):
    """One routing, several x: the routing and the handle are not mapped."""
    group = make_group(RANKS, backend)

    def run(x, idx):
        dispatch = lambda x: jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)  # noqa: E731
        out = jax.vmap(dispatch)(x)
        again = jax.vmap(
            lambda x: jax_ep.combine(dispatch(x).tokens, dispatch(x).handle, group=group)
        )
        return out.tokens, again(x)

    x, _, idx = data()
    many = np.stack([x, 2 * x], axis=1)
    tokens, y = stacked_jit(run, group.mesh)(many, idx)
    oracle.assert_same(tokens[:, 1], 2 * tokens[:, 0], "twice x")
    assert_close(y, many * TOP_K)


# ---- donation


def test_donation(backend):
    """x is donated and overwritten by the result; the ops must have read it by then."""
    group = make_group(RANKS, backend)
    need_part(group.mesh)
    keep = jax.jit(shard(functools.partial(layer, group), group.mesh))
    give = jax.jit(shard(functools.partial(layer, group), group.mesh), donate_argnums=0)
    x, weights, idx = (put(flat(a), group.mesh) for a in data())
    wanted = keep(x, weights, idx)
    for _ in range(4):
        wanted = keep(wanted, weights, idx)
    given = put(flat(data()[0]), group.mesh)
    y = given
    for _ in range(5):
        y = give(y, weights, idx)
    oracle.assert_same(*fetch((y, wanted), group.mesh), "five steps")
    assert given.is_deleted()


# ---- several in one program


def test_several_configurations_in_one_program(backend):
    """Different K, layouts, capacities and wire formats side by side, and none disturbs another."""
    latency = {"top_k": 2, "config": jax_ep.DispatchConfig(mode="latency", num_sms=4)}
    room = {"latency_tokens": 512, "latency_hidden": 1024}
    if logical_hosts.PROCESSES:  # where latency mode is an error
        latency, room = {"top_k": 2}, {}
    group = make_group(RANKS, backend, **room)
    configurations = [
        {"top_k": 1},
        {"top_k": 2, "capacity": 8},
        {"top_k": 3, "layout": "token"},
        {"top_k": 8, "capacity_factor": 0.5},
        {"top_k": 2},
        latency,
    ]
    inputs = [data(seed, c["top_k"]) for seed, c in enumerate(configurations)]

    def one(configuration, x, weights, idx):
        arguments = {"num_experts": EXPERTS, "alignment": 1} | configuration
        arguments.pop("top_k")
        out = jax_ep.dispatch(x, idx, weights, group=group, **arguments)
        return jax_ep.combine(out.tokens, out.handle, group=group), out.tokens, out.num_dropped

    def everything(*inputs):
        return [one(c, *i) for c, i in zip(configurations, inputs, strict=True)]

    together = stacked_jit(everything, group.mesh)(*inputs)
    dropped = []
    for configuration, given, found in zip(configurations, inputs, together, strict=True):
        alone = stacked_jit(functools.partial(one, configuration), group.mesh)(*given)
        for got, want in zip(found, alone, strict=True):
            oracle.assert_same(got, want, str(configuration))
        dropped.append(bool(found[2].any()))
    assert dropped == [False, True, False, True, False, False]


def test_interleaved_groups(backend):
    """The ops of two groups of one mesh alternate and are independent of each other."""
    names = ("row", "column")
    mesh = make_mesh(fit((2, 2), names, "column"), names)
    groups = [create_group(mesh, axis, backend=backend) for axis in names]
    ranks, experts = mesh.size, 4

    def run(x, weights, idx):
        results = []
        a = b = x
        for _ in range(3):
            a = layer(groups[0], a, weights, idx, num_experts=experts)
            b = layer(groups[1], b, weights, idx, num_experts=experts)
            results.append(a * b)
        return a, b, sum(results)

    rng = np.random.default_rng(2)
    x = rng.standard_normal((ranks, 5, 16)).astype(np.float32)
    weights = rng.uniform(0.5, 1, (ranks, 5, 2)).astype(np.float32)
    idx = routings.make("uniform", ranks=ranks, tokens=5, top_k=2, experts=experts)
    a, b, _ = stacked_jit(run, mesh)(x, weights, idx)
    for _ in range(3):
        x = dense_layer(x, weights)
    assert_close(a, x)
    assert_close(b, x)


def test_second_derivative(backend):
    """Without fused weights both ops are linear, and the gradient of each is the other one."""
    group = make_group(2, backend)

    def run(x, idx):
        def y(x):
            out = jax_ep.dispatch(x, idx, group=group, num_experts=4, alignment=1)
            return (jax_ep.combine(out.tokens**3, out.handle, group=group)).sum()

        return jax.grad(lambda x: jax.grad(y)(x).sum())(x)

    x = np.linspace(-1, 1, 2 * 4 * 16, dtype=np.float32).reshape(2, 4, 16)
    idx = routings.make("uniform", ranks=2, tokens=4, top_k=2, experts=4)
    assert_close(stacked_jit(run, group.mesh)(x, idx), 6 * 2 * x)


def test_second_derivative_with_fused_weights(backend):
    """Of rows and weights together, where the gradient itself is ``combine_vjp``."""
    group = make_group(RANKS, backend)

    def second(f):
        y = lambda x, w: jnp.sin(f(x, w)).sum()  # noqa: E731
        gradients = jax.grad(y, (0, 1))
        return jax.grad(lambda x, w: sum((g**2).sum() for g in gradients(x, w)), (0, 1))

    def run(x, weights, idx):
        return second(lambda x, w: layer(group, x, w, idx))(x, weights)

    x, weights, idx = data()
    found = stacked_jit(run, group.mesh)(x, weights, idx)
    assert_close(found, jax.jit(second(dense_layer))(x, weights), tolerance=1e-4)


def test_stacked_helpers():
    x = np.arange(12).reshape(3, 2, 2)
    np.testing.assert_array_equal(stacked(flat(x), 3), x)
