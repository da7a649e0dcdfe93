"""The reference by itself: the examples of the docstrings and cases worked out by hand.

``test_suite_values`` compares it with the oracle; here the expected numbers are written out. The
routes of two ranks with two experts each are those of ``test_oracle``::

    rank 0: token 0 -> 0, 2    token 1 -> 1, 0    token 2 -> 3, none
    rank 1: token 0 -> 2, 3    token 1 -> 0, 0    token 2 -> 7, 1     (0 repeated, 7 out of range)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_ep
import oracle
from jax_ep import reference
from spmd import fields, make_group, stacked_jit

pytestmark = pytest.mark.needs_collectives

ROUTES = np.array([[[0, 2], [1, 0], [3, -1]], [[2, 3], [0, 0], [7, 1]]], np.int32)
BF16 = np.dtype(ml_dtypes.bfloat16)
NO_LIMIT = oracle.INT32_MAX


def make_plan(layout, capacity, *, alignment=2, expert_capacity=NO_LIMIT, routes=ROUTES):
    group = make_group(2, "reference")

    def run(idx):
        handle = reference.plan(
            idx,
            group=group,
            num_experts=4,
            layout=layout,
            capacity=capacity,
            alignment=alignment,
            expert_capacity=expert_capacity,
        )
        return fields(handle)

    return stacked_jit(run, group.mesh)(routes)


def check(found, **expected) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], np.array(value), err_msg=name)
        assert found[name].dtype == np.int32


def test_plan_by_expert():
    check(
        make_plan("expert", 8),
        topk_idx=[[[0, 2], [1, 0], [3, -1]], [[2, 3], [0, -1], [-1, 1]]],
        num_invalid=[[0], [2]],
        demand=[[3, 2], [2, 2]],
        counts=[[3, 2], [2, 2]],
        group_sizes=[[4, 2], [2, 2]],
        num_dropped=[[0], [0]],
        dest_row=[[[0, 0], [4, 1], [2, -1]], [[1, 3], [2, -1], [-1, 5]]],
        recv_src=[[0, 3, 8, -1, 2, 11, -1, -1], [1, 6, 4, 7, -1, -1, -1, -1]],
        recv_rows=[
            [[0, -1], [1, 4], [-1, -1], [-1, -1], [2, -1], [5, -1]],
            [[0, -1], [-1, -1], [2, -1], [1, 3], [-1, -1], [-1, -1]],
        ],
    )


def test_dispatch_pads_nothing_by_default():
    """The rows of an expert follow those of the one before; room for all that may come."""
    group = make_group(2, "reference")

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=4)
        return out.tokens[:, 0], out.group_sizes

    x = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1) * np.ones(4, np.float32)
    first, group_sizes = stacked_jit(run, group.mesh)(x, ROUTES)
    np.testing.assert_array_equal(group_sizes, [[3, 2], [2, 2]])
    rows = [[1, 2, 5, 2, 6], [1, 4, 3, 4]]  # numbers of the tokens
    np.testing.assert_array_equal(first, [row + [0] * (2 * 3 * 2 - len(row)) for row in rows])


def test_plan_by_token():
    check(
        make_plan("token", 4),
        counts=[[3, 2], [2, 2]],
        dest_row=[[[0, 0], [1, 1], [1, -1]], [[2, 2], [2, -1], [-1, 3]]],
        recv_src=[[0, 1, 4, 5], [0, 2, 3, -1]],
        expert_idx=[
            [[0, -1], [1, 0], [0, -1], [-1, 1]],
            [[-1, 0], [1, -1], [0, 1], [-1, -1]],
        ],
        recv_rows=[[[0], [1], [-1], [-1], [2], [3]], [[0], [-1], [1], [2], [-1], [-1]]],
    )


def test_plan_with_little_room():
    check(
        make_plan("expert", 4),
        counts=[[2, 2], [2, 2]],
        group_sizes=[[2, 2], [2, 2]],
        num_dropped=[[1], [0]],
        recv_src=[[0, 3, 2, 11], [1, 6, 4, 7]],
        dest_row=[[[0, 0], [2, 1], [2, -1]], [[1, 3], [-1, -1], [-1, 3]]],
    )
    check(
        make_plan("expert", 4, alignment=1, expert_capacity=1),
        counts=[[1, 1], [1, 1]],
        num_dropped=[[3], [2]],
        recv_src=[[0, 2, -1, -1], [1, 4, -1, -1]],
    )
    check(make_plan("token", 2), counts=[[2, 1], [1, 1]], num_dropped=[[2], [2]])


def test_the_example_of_the_docstrings():
    """The example that ``dispatch`` and ``combine`` show, through the public functions."""
    group = make_group(2, "reference")
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    idx = np.array([[[0, 2], [3, 0]], [[2, 3], [0, -1]]], np.int32)
    x = np.repeat(np.array([[a, b], [c, d]], np.float32)[..., None], 8, axis=-1)
    p, q, r, s, t, u, v = 2.0 ** np.arange(7)
    rows = np.zeros((2, 8, 8), np.float32)
    rows[0, :3], rows[1, :4] = np.array([[p], [q], [r]]), np.array([[s], [t], [u], [v]])

    def run(x, idx, rows):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=4, alignment=2, capacity=8)
        y = jax_ep.combine(rows, out.handle, group=group)
        return out.tokens, out.group_sizes, out.counts, y

    tokens, group_sizes, counts, y = stacked_jit(run, group.mesh)(x, idx, rows)
    expected = [[a, b, d, 0, 0, 0, 0, 0], [a, c, b, c, 0, 0, 0, 0]]
    np.testing.assert_array_equal(tokens[..., 0], expected)
    np.testing.assert_array_equal(group_sizes, [[4, 0], [2, 2]])
    np.testing.assert_array_equal(counts, [[3, 0], [2, 2]])
    np.testing.assert_array_equal(y[..., 0], [[p + s, u + q], [t + v, r]])


def call(function, *arrays, layout="expert", capacity=8, **kwargs):
    """``reference.function(*arrays, handle)`` with the routes above."""
    group = make_group(2, "reference")

    def run(idx, *arrays):
        handle = reference.plan(
            idx,
            group=group,
            num_experts=4,
            layout=layout,
            capacity=capacity,
            alignment=2,
            expert_capacity=NO_LIMIT,
        )
        return function(*arrays, handle, group=group, **kwargs)

    return stacked_jit(run, group.mesh)(ROUTES, *arrays)


def test_dispatch():
    x = np.array([[[1], [2], [3]], [[10], [20], [30]]], np.float32)
    w = np.array([[[0.1, 0.2], [0.3, 0.4], [0.5, 9]], [[1, 2], [3, 9], [9, 6]]], np.float32)
    rows, weights = call(reference.dispatch, x, w)
    np.testing.assert_array_equal(
        rows[..., 0], [[1, 2, 20, 0, 2, 30, 0, 0], [1, 10, 3, 10, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        weights,
        np.array([[0.1, 0.4, 3, 0, 0.3, 6, 0, 0], [0.2, 1, 0.5, 2, 0, 0, 0, 0]], np.float32),
    )
    rows, weights = call(reference.dispatch, x, w, layout="token", capacity=4)
    np.testing.assert_array_equal(rows[..., 0], [[1, 2, 20, 30], [1, 3, 10, 0]])
    np.testing.assert_array_equal(
        weights[1], np.array([[0, 0.2], [0.5, 0], [1, 2], [0, 0]], np.float32)
    )


def test_combine_and_what_goes_home():
    rows = np.full((2, 8, 1), np.nan, np.float32)  # what is unused is not read
    rows[0, [0, 1, 2, 4, 5], 0] = 1, 2, 4, 8, 16
    rows[1, :4, 0] = 32, 64, 128, 256
    factors = np.where(np.isnan(rows[..., 0]), np.nan, 0.5).astype(np.float32)
    values = np.arange(16, dtype=np.float32).reshape(2, 8)
    y, home = call(reference.combine, rows, factors, values)
    np.testing.assert_array_equal(2 * y[..., 0], [[1 + 32, 2 + 8, 128], [64 + 256, 4, 16]])
    np.testing.assert_array_equal(home, [[[0, 8], [4, 1], [10, 0]], [[9, 11], [2, 0], [0, 5]]])


def test_combine_rounds_once_a_rank_and_once_at_home():
    routes = np.array([[[0, 1, 2]], [[-1, -1, -1]]], np.int32)
    group = make_group(2, "reference")

    def run(idx, rows):
        out = jax_ep.dispatch(rows[:1], idx, group=group, num_experts=4, alignment=1)
        return jax_ep.combine(rows, out.handle, group=group)

    total = stacked_jit(run, group.mesh)
    for first, second, third, wanted in (
        (256, 1, 1, 256),  # 257 -> 256 on rank 0, 257 -> 256 at home
        (1, 1, 256, 258),
        (256, 3, -256, 4),  # 259 -> 260
        (-0.0, -0.0, -0.0, 0.0),  # sums start from +0
    ):
        rows = np.zeros((2, 4, 8), BF16)
        rows[0, 0], rows[0, 1], rows[1, 0] = first, second, third
        found = total(routes, rows)[0, 0].astype(np.float32)
        oracle.assert_same(found, np.full(8, wanted, np.float32), f"{first} {second} {third}")


def test_combine_vjp_in_lanes():
    rows = np.zeros((2, 8, 258), np.float32)
    dy = np.ones((2, 3, 258), np.float32)
    dy[0, 0] = 2
    rows[0, 0, [0, 256]] = 2**23, 0.5  # lane 0: 2^24, then 2^24 + 1 -> 2^24
    rows[0, 0, [1, 257]] = 0.5, 0.5  # lane 1: 2; added to lane 0 in the end
    rows[1, 5] = np.nan  # an unused row
    weights = np.full((2, 8), 3, np.float32)
    d_rows, d_weights = call(reference.combine_vjp, dy, rows, weights)
    assert d_weights[0, 0] == 2**24 + 2 and d_weights[1, 5] == 0
    assert (d_rows[0, 0] == 6).all() and (d_rows[0, 1] == 3).all() and not d_rows[1, 5].any()


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_jax_differentiates_it(layout):
    """No custom gradient is in the way: forward and reverse mode agree with the linear map itself."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, 2, 3, 8)).astype(np.float32)
    group = make_group(2, "reference")

    def run(x, v, idx):
        def there_and_back(x):
            handle = reference.plan(
                idx,
                group=group,
                num_experts=4,
                layout=layout,
                capacity=8,
                alignment=2,
                expert_capacity=NO_LIMIT,
            )
            rows, _ = reference.dispatch(x, None, handle, group=group)
            return reference.combine(rows, None, None, handle, group=group)[0]

        y, forward = jax.jvp(there_and_back, (x,), (v,))
        return y, forward, jax.vjp(there_and_back, x)[1](v)[0], jnp.sum(y)[None]

    y, forward, reverse, _ = stacked_jit(run, group.mesh)(x, v, ROUTES)
    copies = {"expert": [[2, 2, 1], [2, 1, 1]], "token": [[2, 1, 1], [1, 1, 1]]}[layout]
    copies = np.array(copies, np.float32)[..., None]
    np.testing.assert_allclose(y, copies * x, rtol=1e-6)
    np.testing.assert_allclose(forward, copies * v, rtol=1e-6)
    np.testing.assert_allclose(reverse, copies * v, rtol=1e-6)
