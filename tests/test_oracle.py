"""The oracle against cases worked out by hand, so that it does not merely agree with itself.

Two ranks, three tokens, K = 2, four experts (two a rank)::

    rank 0: token 0 -> 0, 2    token 1 -> 1, 0    token 2 -> 3, none
    rank 1: token 0 -> 2, 3    token 1 -> 0, 0    token 2 -> 7, 1     (0 repeated, 7 out of range)

Expert 0 is wanted by (rank, token) (0,0) (0,1) (1,1), expert 1 by (0,1) (1,2), expert 2 by (0,0)
(1,0), expert 3 by (0,2) (1,0).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import oracle
import routings

BF16 = np.dtype(ml_dtypes.bfloat16)
ROUTES = np.array([[[0, 2], [1, 0], [3, -1]], [[2, 3], [0, 0], [7, 1]]], np.int32)


def make_plan(layout: str, alignment: int = 1, **bound) -> oracle.Plan:
    bounds = oracle.limits(
        num_ranks=2,
        num_tokens=3,
        top_k=2,
        num_experts=4,
        layout=layout,
        alignment=alignment,
        **bound,
    )
    return oracle.plan(ROUTES, num_experts=4, layout=layout, alignment=alignment, bounds=bounds)


def check(plan: oracle.Plan, **expected) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(plan, name), np.array(value), err_msg=name)


def filled(rows: list[int], length: int) -> list[int]:
    return rows + [-1] * (length - len(rows))


def test_expert_layout():
    plan = make_plan("expert", alignment=2)
    assert plan.capacity == 14  # 2·3·2 rows, 2·(2 - 1) of padding
    check(
        plan,
        topk_idx=[[[0, 2], [1, 0], [3, -1]], [[2, 3], [0, -1], [-1, 1]]],
        num_invalid=[[0], [2]],
        demand=[[3, 2], [2, 2]],
        counts=[[3, 2], [2, 2]],
        group_sizes=[[4, 2], [2, 2]],
        num_dropped=[[0], [0]],
        dest_row=[[[0, 0], [4, 1], [2, -1]], [[1, 3], [2, -1], [-1, 5]]],
        recv_src=[filled([0, 3, 8, -1, 2, 11], 14), filled([1, 6, 4, 7], 14)],
        recv_rows=[
            [[0, -1], [1, 4], [-1, -1], [-1, -1], [2, -1], [5, -1]],
            [[0, -1], [-1, -1], [2, -1], [1, 3], [-1, -1], [-1, -1]],
        ],
    )
    assert plan.expert_idx.shape == (2, 0, 2)
    assert plan.source(0, 5) == (1, 2, 1) and plan.source(0, 3) is None


def test_entries_across_hosts():
    """Rows by source rank and token, where one host has them by source."""
    plan = make_plan("expert", alignment=2)
    one, several = plan.arrays(), plan.arrays(ranks_per_host=1)
    assert plan.arrays(ranks_per_host=2).keys() == one.keys()
    assert one.keys() - several.keys() == {"dest_row", "recv_rows"}
    assert "expert_idx" not in several and "expert_idx" in make_plan("token").arrays(1)
    entries = {
        "recv_start": [[0, 3, 5], [0, 2, 4]],
        "recv_token": [filled([0, 1, 1, 1, 2], 14), filled([0, 2, 0, 0], 14)],
        "recv_row": [filled([0, 1, 4, 2, 5], 14), filled([0, 2, 1, 3], 14)],
    }
    assert several.keys() - one.keys() == entries.keys()
    for name, value in entries.items():
        np.testing.assert_array_equal(several[name], np.array(value), err_msg=name)


def test_token_layout():
    plan = make_plan("token", alignment=128)  # the alignment means nothing here
    assert plan.capacity == 6
    check(
        plan,
        demand=[[3, 2], [2, 2]],
        counts=[[3, 2], [2, 2]],
        group_sizes=[[3, 2], [2, 2]],
        num_dropped=[[0], [0]],
        dest_row=[[[0, 0], [1, 1], [1, -1]], [[2, 2], [2, -1], [-1, 3]]],
        recv_src=[filled([0, 1, 4, 5], 6), filled([0, 2, 3], 6)],
        expert_idx=[
            [[0, -1], [1, 0], [0, -1], [-1, 1], [-1, -1], [-1, -1]],
            [[-1, 0], [1, -1], [0, 1], [-1, -1], [-1, -1], [-1, -1]],
        ],
        recv_rows=[[[0], [1], [-1], [-1], [2], [3]], [[0], [-1], [1], [2], [-1], [-1]]],
    )
    assert plan.source(1, 1) == (0, 2, 0)


def test_experts_share_a_capacity():
    plan = make_plan("expert", alignment=2, capacity=4)
    check(
        plan,
        counts=[[2, 2], [2, 2]],
        group_sizes=[[2, 2], [2, 2]],
        demand=[[3, 2], [2, 2]],
        num_dropped=[[1], [0]],
        dest_row=[[[0, 0], [2, 1], [2, -1]], [[1, 3], [-1, -1], [-1, 3]]],
        recv_src=[[0, 3, 2, 11], [1, 6, 4, 7]],
    )


@pytest.mark.parametrize(
    ("wanted", "alignment", "capacity", "kept"),
    [
        ([5, 1, 9, 0], 1, 15, [5, 1, 9, 0]),
        ([5, 1, 9, 0], 1, 12, [5, 1, 6, 0]),
        ([5, 1, 9, 6], 1, 12, [4, 1, 4, 3]),  # two more than three each go to the lowest ids
        ([5, 1, 9, 6], 2, 12, [4, 1, 4, 2]),  # 4 + 2 + 4 + 2 with padding
        ([5, 1, 9, 6], 4, 12, [4, 1, 4, 0]),
        ([7, 7, 7], 8, 8, [7, 0, 0]),
    ],
)
def test_room_is_dealt_evenly(wanted, alignment, capacity, kept):
    assert oracle.deal_room(wanted, alignment, capacity) == kept


def test_a_capacity_in_token_layout_drops_the_last_rows():
    check(
        make_plan("token", capacity=2),
        counts=[[2, 1], [1, 1]],
        demand=[[3, 2], [2, 2]],
        num_dropped=[[2], [2]],
        dest_row=[[[0, 0], [1, 1], [1, -1]], [[-1, -1], [-1, -1], [-1, -1]]],
        recv_src=[[0, 1], [0, 2]],
    )


def test_a_capacity_factor_bounds_each_expert_alike():
    # ceil(0.5 · 2·3·2 / 4) = 2 rows an expert.
    bounds = oracle.limits(
        num_ranks=2,
        num_tokens=3,
        top_k=2,
        num_experts=4,
        layout="expert",
        alignment=4,
        capacity_factor=0.5,
    )
    assert bounds == oracle.Limits(capacity=8, per_expert=2)
    plan = make_plan("expert", alignment=4, capacity_factor=0.5)
    check(
        plan,
        counts=[[2, 2], [2, 2]],
        group_sizes=[[4, 4], [4, 4]],
        num_dropped=[[1], [0]],
        recv_src=[[0, 3, -1, -1, 2, 11, -1, -1], [1, 6, -1, -1, 4, 7, -1, -1]],
    )


@pytest.mark.parametrize(
    ("layout", "alignment", "experts", "capacity"),
    [("expert", 1, 4, 12), ("expert", 8, 4, 32), ("expert", 128, 2, 256), ("token", 128, 4, 6)],
)
def test_lossless_capacity(layout, alignment, experts, capacity):
    # N = 2·3·min(2, L): 12 with L = 2; 6 with L = 1. C = roundup(N + min(L, N)·(A - 1), A).
    bounds = oracle.limits(
        num_ranks=2,
        num_tokens=3,
        top_k=2,
        num_experts=experts,
        layout=layout,
        alignment=alignment,
    )
    assert bounds.capacity == capacity


def test_dispatch_and_weights():
    x = np.array([[[1], [2], [3]], [[10], [20], [30]]], np.float32)
    w = np.array([[[0.1, 0.2], [0.3, 0.4], [0.5, 9]], [[1, 2], [3, 9], [9, 6]]], np.float32)
    plan = make_plan("expert", alignment=2)
    np.testing.assert_array_equal(
        oracle.move(x, plan)[..., 0],
        [[1, 2, 20, 0, 2, 30] + [0] * 8, [1, 10, 3, 10] + [0] * 10],
    )
    np.testing.assert_array_equal(
        oracle.move_weights(w, plan),
        np.array([[0.1, 0.4, 3, 0, 0.3, 6] + [0] * 8, [0.2, 1, 0.5, 2] + [0] * 10], np.float32),
    )
    by_token = make_plan("token", capacity=4)
    np.testing.assert_array_equal(oracle.move(x, by_token)[..., 0], [[1, 2, 20, 30], [1, 3, 10, 0]])
    np.testing.assert_array_equal(
        oracle.move_weights(w, by_token)[1],
        np.array([[0, 0.2], [0.5, 0], [1, 2], [0, 0]], np.float32),
    )


def test_values_go_home():
    plan = make_plan("expert", alignment=2, capacity=4)
    values = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    np.testing.assert_array_equal(
        oracle.send_home(values, plan), [[[1, 5], [3, 2], [7, 0]], [[6, 8], [0, 0], [0, 4]]]
    )
    by_token = make_plan("token", capacity=2)
    values = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    np.testing.assert_array_equal(
        oracle.send_home(values, by_token), [[[0, 5], [2, 3], [6, 0]], np.zeros((3, 2))]
    )


def test_combine_rounds_once_a_rank_and_once_at_home():
    # One token; experts 0 and 1 on rank 0, expert 2 on rank 1. bf16 has a spacing of 2 at 256.
    routes = np.array([[[0, 1, 2]], [[-1, -1, -1]]], np.int32)
    bounds = oracle.Limits(capacity=3, per_expert=oracle.INT32_MAX)
    plan = oracle.plan(routes, num_experts=4, layout="expert", alignment=1, bounds=bounds)

    def total(first, second, third):
        rows = np.full((2, 3, 1), np.nan, BF16)  # unused rows are never read
        rows[0, 0], rows[0, 1], rows[1, 0] = first, second, third
        return float(oracle.combine(rows, plan)[0, 0, 0])

    assert total(256, 1, 1) == 256  # 257 -> 256 on rank 0, 257 -> 256 at home
    assert total(1, 1, 256) == 258
    assert total(256, 3, -256) == 4  # 259 -> 260
    assert np.signbit(total(-0.0, -0.0, -0.0)) == np.False_  # sums start from +0


def test_combine_multiplies_in_f32_before_it_sums():
    plan = make_plan("expert")
    rows = np.zeros((2, plan.capacity, 1), np.float32)
    weights = np.zeros((2, plan.capacity), np.float32)
    a, b = np.float32(1 + 2**-23), np.float32(1 - 2**-23)  # a·b = 1 - 2^-46 rounds to 1
    rows[0, 0], weights[0, 0] = a, b  # token 0 of rank 0 at expert 0
    rows[1, 0], weights[1, 0] = -1, 1  # and at expert 2
    assert oracle.combine(rows, plan, weights)[0, 0, 0] == 0  # a fused multiply-add gives -2^-46


def test_combine_vjp_in_lanes():
    plan = make_plan("expert")
    rows = np.zeros((2, plan.capacity, 258), np.float32)
    dy = np.ones((2, 3, 258), np.float32)
    dy[0, 0] = 2
    rows[0, 0, [0, 256]] = 2**23, 0.5  # lane 0: 2^24, then 2^24 + 1 -> 2^24
    rows[0, 0, [1, 257]] = 0.5, 0.5  # lane 1: 2; added to lane 0 in the end
    rows[1, 5] = 7  # an unused row
    weights = np.full((2, plan.capacity), 3, np.float32)
    d_rows, d_weights = oracle.combine_vjp(dy, rows, weights, plan)
    assert d_weights[0, 0] == 2**24 + 2 and d_weights[1, 5] == 0
    assert (d_rows[0, 0] == 6).all() and (d_rows[0, 1] == 3).all() and not d_rows[1, 5].any()


def test_quantize_one_block():
    x = np.zeros((1, 128), np.float32)
    x[0, :6] = 448, -17, 3.3, -19, 0.001, 2**-10
    values, scales = oracle.quantize(x)
    assert scales.tolist() == [[1.0]]
    # Spacing 2 at 16 (ties to even: -17 -> -16, -19 -> -20), 0.25 at 2, 2^-9 at the bottom.
    assert values[0, :6].astype(float).tolist() == [448, -16, 3.25, -20, 2**-9, 0]
    assert oracle.dequantize(values, scales, BF16)[0, 2] == 3.25


def test_quantize_with_power_of_two_scales():
    x = np.zeros((1, 384), np.float32)
    x[0, [0, 128]] = 448, 450
    values, scales = oracle.quantize(x, "ue8m0")
    assert scales[0, :2].tolist() == [1, 2]
    assert 1e-30 / 448 <= scales[0, 2] < 2e-30 / 448 and np.frexp(scales[0, 2])[0] == 0.5
    assert values[0, [0, 128, 256]].astype(float).tolist() == [448, 224, 0]  # 225 -> 224


def test_quantize_special_values():
    x = np.ones((3, 128), np.float32)
    x[0, 5], x[1, 5], x[2, 5] = np.nan, np.inf, np.finfo(np.float32).max
    for scale_format in ("f32", "ue8m0"):
        values, scales = oracle.quantize(x, scale_format)
        values = values.astype(np.float32)
        assert np.isnan(values[0]).all() and np.isnan(scales[0, 0])
        assert np.isnan(values[1, 5]) and values[1, 0] == 0 and np.isinf(scales[1, 0])
        assert np.isfinite(values[2]).all() and values[2, 5] >= 224


def test_assert_same_can_fail():
    zeros = np.zeros(3, np.float32)
    oracle.assert_same(np.float32([np.nan]), -np.float32([np.nan]), "NaNs are alike")
    oracle.assert_same(zeros, zeros.copy(), "equal")
    for other in (-zeros, zeros.astype(np.float16), zeros[:2], zeros + np.float32(1e-45)):
        with pytest.raises(AssertionError, match="sums: "):
            oracle.assert_same(other, zeros, "sums")
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ, the first at \(1,\)"):
        oracle.assert_same(np.array([1, 2], BF16), np.array([1, 3], BF16), "rows")


@pytest.mark.parametrize("name", routings.PATTERNS)
def test_patterns_are_what_they_say(name):
    idx = routings.make(name, ranks=4, tokens=13, top_k=3, experts=12)
    clean, num_invalid = oracle.sanitise(idx, 12)
    assert idx.dtype == np.int32 and idx.shape == (4, 13, 3)
    assert (num_invalid > 0).all() == (name == "invalid")
    wanted = np.bincount(clean[clean >= 0], minlength=12)
    owners = np.where(clean >= 0, clean // 3, -1)
    if name == "one_expert":
        assert wanted[6] == wanted.sum() == 4 * 13
    elif name == "one_rank":
        assert (owners == 3).all()
    elif name == "empty_ranks":
        assert (clean[0] == -1).all() and (owners < 3).all() and (clean[1:] >= 0).any()
    elif name == "masked":
        assert (clean == -1).all(axis=-1).any() and (clean >= 0).all(axis=-1).any()
    elif name == "invalid":
        assert {routings.INT_MIN, routings.INT_MAX, 12} <= set(idx.ravel().tolist())
    elif name == "group_limited":
        assert max(len({*token} - {-1}) for token in owners.reshape(-1, 3).tolist()) == 2
    elif name == "zipf":
        assert wanted[0] > 2 * wanted[-1]
    else:
        assert (clean >= 0).all() and wanted.min() > 0
