"""The ops under ``jax.checkpoint``: what a policy saves, and what is computed again."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import pytest

from small_layer import RANKS, assert_close, data, dense_layer, layer
from spmd import count_calls, fetch, flat, make_group, need_part, put, shard, stacked_jit

NAMES = ("jax_ep.handle", "jax_ep.dispatch", "jax_ep.combine")
TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_combine_vjp")


def remat(policy: str):
    if policy == "none":
        return lambda f: f
    if policy == "everything":  # plain jax.checkpoint: nothing is saved
        return jax.checkpoint
    return functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*NAMES)
    )


def gradient(group, policy, fused):
    block = remat(policy)(lambda x, w, idx: layer(group, x, w, idx, fused=fused))

    def run(x, weights, idx):
        loss = lambda x, w: jnp.sin(block(x, w, idx)).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(x, weights)

    return run


# Forward: a plan, a dispatch, a combine. Backward: the dispatch's is a combine, the combine's a
# dispatch or, with fused weights, a combine_vjp.
ONCE = {True: (1, 1, 2, 1), False: (1, 2, 2, 0)}
# Plain jax.checkpoint plans and dispatches again; the result of the second combine is not needed.
AGAIN = {True: (2, 2, 2, 1), False: (2, 3, 2, 0)}


def traced_calls(jaxpr) -> collections.Counter[str]:
    """How often a program, as JAX traces it, calls each target, on one host or across hosts."""
    calls = collections.Counter[str]()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jax_ep_call":
            target = equation.params["target"].replace("jax_ep_network_", "jax_ep_")
            both = target == "jax_ep_plan_dispatch"
            calls.update(["jax_ep_plan", "jax_ep_dispatch"] if both else [target])
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                calls += traced_calls(inner)
    return calls


def dense_gradient(steps: int):
    """The gradients of the loss of ``steps`` layers, without ranks, flattened."""

    def loss(x, weights):
        for _ in range(steps):
            x = dense_layer(x, weights)
        return jnp.sin(x).sum()

    x, weights, _ = (flat(a) for a in data())
    return jax.grad(loss, (0, 1))(x, weights)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "sum"])
@pytest.mark.parametrize("policy", ["none", "names", "everything"])
def test_checkpoint(policy, fused, native_backend):
    """With the three names saved, the backward pass plans and dispatches nothing again.

    Counted in the program as traced, as compiled and, on CPU, in what really ran.
    """
    if native_backend == "reference":
        pytest.skip("counts the calls of native targets")
    group = make_group(RANKS, native_backend)
    need_part(group.mesh)
    x, weights, idx = (put(flat(a), group.mesh) for a in data())
    mapped = shard(gradient(group, policy, fused), group.mesh)
    wanted = dict(zip(TARGETS, (AGAIN if policy == "everything" else ONCE)[fused], strict=True))
    traced = traced_calls(jax.make_jaxpr(mapped)(x, weights, idx).jaxpr)
    assert {target: traced[target] for target in TARGETS} == wanted
    compiled = jax.jit(mapped).lower(x, weights, idx).compile()
    assert count_calls(compiled.as_text(), TARGETS) == wanted
    assert_close(fetch(compiled(x, weights, idx), group.mesh), dense_gradient(steps=1))
    if native_backend == "cpu":
        from jax_ep import _cpu

        _cpu.reset_call_counts()
        jax.block_until_ready(compiled(x, weights, idx))
        ran = _cpu.call_counts()
        assert {target: ran[target] for target in TARGETS} == {
            target: RANKS * count for target, count in wanted.items()
        }


@pytest.mark.parametrize("policy", ["none", "names", "everything"])
def test_checkpoint_in_a_scan(policy, backend):
    """Layers stacked with scan, each a remat block, as models do it."""
    group = make_group(RANKS, backend)
    block = remat(policy)(functools.partial(layer, group))

    def run(x, weights, idx):
        def loss(x, w):
            y, _ = jax.lax.scan(lambda x, _: (block(x, w, idx), None), x, None, length=3)
            return jnp.sin(y).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    found = stacked_jit(run, group.mesh)(*data())
    assert_close(jax.tree.map(flat, found), dense_gradient(steps=3), policy)


def test_names_are_where_policies_look():
    """Each name marks what it says, in the program that JAX traces."""
    group = make_group(RANKS, "reference")
    text = str(
        jax.make_jaxpr(shard(functools.partial(layer, group), group.mesh))(*map(flat, data()))
    )
    for name in NAMES:
        assert f"name={name}]" in text
