"""Start and done halves give what the plain ops give, and refuse each other's tickets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import oracle
import routings
import schedule
import shapes
from spmd import flat, here, make_group, put, ranks_at_most, shard, stacked_jit

RANKS, TOKENS, TOP_K, HIDDEN = ranks_at_most(4), 7, 3, 128
EXPERTS = oracle.round_up(8, RANKS)


def data(dtype: str = "float32"):
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal((2, RANKS, TOKENS, HIDDEN)).astype(shapes.DTYPES[dtype])
    weights = rng.standard_normal((RANKS, TOKENS, TOP_K)).astype(np.float32)
    sizes = {"ranks": RANKS, "tokens": TOKENS, "top_k": TOP_K, "experts": EXPERTS}
    return x, weights, routings.make("zipf", **sizes), dy


def plain_dispatch(x, *args, **kwargs):
    return jax_ep.dispatch(x, *args, **kwargs)


def split_dispatch(x, *args, **kwargs):
    return jax_ep.dispatch_done(jax_ep.dispatch_start(x, *args, **kwargs))


def plain_combine(*args, **kwargs):
    return jax_ep.combine(*args, **kwargs)


def split_combine(*args, **kwargs):
    return jax_ep.combine_done(jax_ep.combine_start(*args, **kwargs))


CASES = {
    "plain": ({}, False),
    "fused": ({}, True),
    "fp8": ({"quantization": "fp8"}, True),
    "capacity": ({"capacity": 16}, False),
    "token": ({"layout": "token"}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_split_equals_plain(name, backend):
    """Values and gradients, to the bit."""
    arguments, fused = CASES[name]
    group = make_group(RANKS, backend)

    def layer(dispatch, combine, x, weights, idx):
        out = dispatch(x, idx, weights, group=group, num_experts=EXPERTS, alignment=8, **arguments)
        gate = out.weights if out.weights.ndim == 1 else out.weights.sum(axis=1)
        rows = jnp.sin(out.tokens) if fused else jnp.sin(out.tokens) * gate[:, None]
        y = combine(rows, out.handle, group=group, weights=gate if fused else None)
        again = dispatch(y, group=group, handle=out.handle).tokens
        return y, again, out.counts

    def run(x, weights, idx, dy):
        results = []
        for dispatch, combine in (
            (plain_dispatch, plain_combine),
            (split_dispatch, split_combine),
        ):
            forward = lambda x, w: layer(dispatch, combine, x, w, idx)  # noqa: B023, E731
            (y, again, counts), pull = jax.vjp(forward, x, weights)
            zeros = np.zeros(counts.shape, jax.dtypes.float0)
            results.append((y, again, counts, *pull((dy, jnp.cos(again), zeros))))
        return results

    plain, split = stacked_jit(run, group.mesh)(*data())
    for what, want, got in zip(("y", "again", "counts", "dx", "dw"), plain, split, strict=True):
        assert np.abs(want).max() > 0
        oracle.assert_same(got, want, what)


def test_independent_work_between_the_halves(backend):
    """Both ops of two layers in flight, with other work and another op between the halves."""
    group = make_group(RANKS, backend, channels=2)

    def run(x, weights, idx):
        common = {"group": group, "num_experts": EXPERTS, "alignment": 1}
        first = jax_ep.dispatch_start(x, idx, weights, **common)
        second = jax_ep.dispatch_start(2 * x, idx, weights, **common)
        shared = jnp.tanh(x)
        two, one = jax_ep.dispatch_done(second), jax_ep.dispatch_done(first)
        home_one = jax_ep.combine_start(one.tokens, one.handle, group=group)
        home_two = jax_ep.combine_start(two.tokens, two.handle, group=group)
        return jax_ep.combine_done(home_two), jax_ep.combine_done(home_one), shared

    x, weights, idx, _ = data()
    two, one, shared = stacked_jit(run, group.mesh)(x, weights, idx)
    clean, _ = oracle.sanitise(idx, EXPERTS)
    np.testing.assert_allclose(one, x * (clean >= 0).sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    np.testing.assert_allclose(shared, np.tanh(x), rtol=1e-5)


@pytest.mark.parametrize("order", ["free", "after"])
def test_after_orders_ops(order, backend):
    """``after=`` makes an op wait for an earlier one; without it, nothing does."""
    group = make_group(RANKS, backend, channels=2)

    def run(x, idx):
        common = {"group": group, "num_experts": EXPERTS, "alignment": 1}
        first = jax_ep.dispatch_start(x, idx, **common)
        after = {"after": first} if order == "after" else {}
        second = jax_ep.dispatch_start(x + 1, idx, **common, **after)
        one, two = jax_ep.dispatch_done(first), jax_ep.dispatch_done(second)
        third = jax_ep.combine_start(two.tokens, one.handle, group=group, after=second)
        return jax_ep.combine_done(third), one.tokens.sum()[None]

    x, _, idx, _ = data()
    call = stacked_jit(run, group.mesh)
    wanted = (oracle.sanitise(idx, EXPERTS)[0] >= 0).sum(-1, keepdims=True) * (x + 1)
    np.testing.assert_allclose(call(x, idx)[0], wanted, rtol=1e-5)
    if backend != "reference" and here(group.mesh):
        given = put((flat(x), flat(idx)), group.mesh)
        text = call.jitted.lower(*given).compile().as_text()
        assert schedule.chained(text, "jax_ep_dispatch") == (order == "after")


def trace(run):
    """Trace ``run(ticket of a dispatch, ticket of a combine, group)`` on a rank."""
    group = make_group(2, "reference", channels=2)

    def body():
        x, idx = jnp.zeros((4, HIDDEN)), jnp.zeros((4, 1), jnp.int32)
        dispatched = jax_ep.dispatch_start(x, idx, group=group, num_experts=2)
        out = jax_ep.dispatch_done(dispatched)
        run(dispatched, jax_ep.combine_start(out.tokens, out.handle, group=group), group)
        return jnp.zeros((1,))

    jax.eval_shape(shard(body, group.mesh, in_specs=(), check_vma=False))


def start(group, **kwargs):
    x, idx = jnp.zeros((4, HIDDEN)), jnp.zeros((4, 1), jnp.int32)
    return jax_ep.dispatch_start(x, idx, group=group, num_experts=2, **kwargs)


def test_more_ops_in_flight_than_channels():
    """An op that is done, or that others come after, holds no second channel."""
    seen = []

    def run(d, c, group):  # d is done
        first = start(group)
        with pytest.raises(ValueError, match=EXCESS):
            start(group)
        queued = start(group, after=first)
        jax_ep.dispatch_done(first)
        with pytest.raises(ValueError, match=EXCESS):
            start(group)  # the op behind it holds its channel
        jax_ep.dispatch_done(queued)
        seen.append(start(group))

    trace(run)
    assert len(seen) == 1


EXCESS = (
    "jax_ep.dispatch_start: argument group: expected a group with a channel that no op in flight "
    r"holds, got one of create_group\(channels=2\), all held by tickets that are not done; 3 ops in "
    r"flight at once take create_group\(channels=3\); else finish .*done half, or .*after="
)


def test_a_group_has_one_op_in_flight_unless_asked():
    group = make_group(2, "reference")
    assert group.channels == 1

    def body():
        first = start(group)
        with pytest.raises(
            ValueError, match=r"2 ops in flight at once take .*\(channels=2\); else"
        ):
            start(group)
        start(group, after=first)
        return jnp.zeros((1,))

    jax.eval_shape(shard(body, group.mesh, in_specs=(), check_vma=False))


def test_tickets_of_another_trace_hold_no_channel():
    """Such as those of a program that failed while it was traced."""
    kept = []
    for _ in range(2):
        trace(lambda d, c, group: kept.append((c, start(group))))  # two in flight
    assert len(kept) == 2


def test_groups_with_more_channels():
    mesh = make_group(2, "reference").mesh
    group = jax_ep.create_group(mesh, "expert", backend="reference", channels=3)
    assert group.channels == 3 and group.id != make_group(2, "reference").id

    def body():
        tickets = [start(group) for _ in range(3)]
        most = r"\(channels=3\), all held by tickets that are not done; finish .*done half, or"
        with pytest.raises(ValueError, match=most):
            start(group)
        with pytest.raises(ValueError, match=r"argument after: .*create_group\(channels=3\)"):
            start(make_group(2, "reference"), after=tickets[2])
        return jnp.zeros((1,))

    jax.eval_shape(shard(body, mesh, in_specs=(), check_vma=False))


WRONG = {
    "dispatch_done of a combine": (
        lambda d, c, group: jax_ep.dispatch_done(c),
        r"dispatch_done: argument ticket: expected the ticket of dispatch_start, got a ticket of "
        r"combine_start; .*done half",
    ),
    "combine_done of a dispatch": (
        lambda d, c, group: jax_ep.combine_done(d),
        r"combine_done: argument ticket: expected the ticket of combine_start, got a ticket of "
        r"dispatch_start; .*done half",
    ),
    "done of a result": (
        lambda d, c, group: jax_ep.dispatch_done(jax_ep.dispatch_done(d)),
        "dispatch_done: argument ticket: expected the ticket of dispatch_start, got Dispatched; ",
    ),
    "after a result": (
        lambda d, c, group: jax_ep.dispatch_start(
            jnp.zeros((4, 16)), jnp.zeros((4, 1), jnp.int32), group=group, num_experts=2, after=3
        ),
        "dispatch_start: argument after: expected a Ticket or None, got int; .*start half",
    ),
    "combine after a result": (
        lambda d, c, group: jax_ep.combine_start(
            jnp.zeros((4, 16)), jax_ep.dispatch_done(d).handle, group=group, after="ticket"
        ),
        "combine_start: argument after: expected a Ticket or None, got str; .*start half",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tickets(name):
    run, text = WRONG[name]
    with pytest.raises(TypeError, match="jax_ep." + text):
        trace(run)


def test_right_tickets():
    seen = []
    trace(lambda d, c, group: seen.append((jax_ep.dispatch_done(d), jax_ep.combine_done(c))))
    assert isinstance(seen[0][0], jax_ep.Dispatched) and seen[0][1].shape == (4, HIDDEN)


def test_start_checks_as_the_plain_op_does():
    def run(d, c, group):
        jax_ep.dispatch_start(
            jnp.zeros((4, 6)), jnp.zeros((4, 1), jnp.int32), group=group, num_experts=2
        )

    with pytest.raises(ValueError, match=r"argument x: expected .*16 bytes"):
        trace(run)
