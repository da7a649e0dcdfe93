"""Wrong calls of the native targets: clear errors on all ranks, whichever rank made the call.

The targets are called directly, without the Python layers that check arguments.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ep import _cpu
from native import CAPACITY, EXPERTS, HIDDEN, RANKS, TOKENS, TOP_K, UNBOUNDED, indices, plan
from spmd import make_group, make_mesh, stacked_jit

pytestmark = pytest.mark.one_process("the native CPU backend serves groups of one process")


def raw_call(group, target, *operands, results, **attributes):
    """Calls a target with the attributes that all of them have."""
    attributes = {
        "num_ranks": np.int32(group.size),
        "num_experts": np.int32(EXPERTS),
        "layout": np.int32(0),
        "group_id": np.int64(7),
        "timeout_ms": np.int64(60_000),
        "num_sms": np.int32(0),
        "channel": np.int32(0),
        "ordinal": np.int32(0),
    } | attributes
    return jax.ffi.ffi_call(target, results)(*operands, **attributes)


def raw_plan(group, idx, coords=None, *, topk_shape=(TOKENS, TOP_K), **attributes):
    num_local = EXPERTS // group.size
    rank = jnp.stack([jax.lax.axis_index("expert"), 0])
    shapes = [
        topk_shape, (TOKENS, TOP_K), (group.size * TOKENS, min(TOP_K, num_local)),
        (CAPACITY,), (0, TOP_K), (num_local,), (num_local,), (num_local,), (1,), (1,),
    ]  # fmt: skip
    return raw_call(
        group,
        "jax_ep_plan",
        idx,
        rank if coords is None else coords,
        results=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        **(
            {
                "alignment": np.int32(8),
                "expert_capacity": np.int32(UNBOUNDED),
                "masked": np.int32(0),
            }
            | attributes
        ),
    )


def run_on_ranks(body, *args, ranks=RANKS):
    """``body`` on every rank, untyped by JAX: results of ``raw_call`` say nothing of mesh axes."""
    return stacked_jit(body, make_mesh(ranks), check_vma=False)(*args)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"num_ranks": np.int32(0)}, "attribute num_ranks: expected a positive number, got 0"),
        (
            {"num_experts": np.int32(3)},
            "attribute num_experts: expected a positive multiple of num_ranks, got 3",
        ),
        ({"layout": np.int32(2)}, "attribute layout: expected 0 (expert) or 1 (token), got 2"),
        ({"timeout_ms": np.int64(0)}, "attribute timeout_ms: expected a positive number, got 0"),
        ({"ordinal": np.int32(-1)}, "attribute ordinal: expected a count of calls, got -1"),
        ({"alignment": np.int32(0)}, "attribute alignment: expected a positive number, got 0"),
        ({"alignment": np.int32(24)}, "attribute alignment: expected a divisor of the capacity"),
        ({"expert_capacity": np.int32(-1)}, "attribute expert_capacity: expected a number of rows"),
        ({"masked": np.int32(2)}, "attribute masked: expected 0, or 1 in layout 'expert', got 2"),
        (
            {"masked": np.int32(1), "alignment": np.int32(4)},
            "attribute alignment: expected the rows of a masked expert, got 4",
        ),
        ({"topk_shape": (TOKENS, 3)}, "result topk: expected S32[4,2], got S32[4,3]"),
    ],
)
def test_wrong_calls_of_plan(attributes, text):
    group = make_group(RANKS, "cpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape("jax_ep.plan: " + text)):
        run_on_ranks(lambda idx: raw_plan(group, idx, **attributes), indices())
    assert _cpu.open_rendezvous() == 0


@pytest.mark.parametrize("rank", [-1, RANKS])
def test_rank_out_of_range(rank):
    group = make_group(RANKS, "cpu")
    text = re.escape(f"jax_ep.plan: argument coords: expected a rank in [0, 2), got {rank}")
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        run_on_ranks(lambda idx: raw_plan(group, idx, jnp.array([rank, 0])), indices())
    assert _cpu.open_rendezvous() == 0


def test_rank_that_arrives_twice():
    group = make_group(RANKS, "cpu")
    text = "op plan: phase arrival: expected every rank once, got rank 1 twice"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        run_on_ranks(lambda idx: raw_plan(group, idx, jnp.array([1, 0])), indices())
    assert _cpu.open_rendezvous() == 0


def raw_operands(op, group, idx) -> dict[str, jax.Array]:
    """The operands of a right call of an op that takes a handle, by name, in order."""
    handle = plan(idx, group)
    absent = jnp.zeros((0,))
    payload = {
        "dispatch": {
            "x": jnp.ones((TOKENS, HIDDEN)),
            "scales": absent,
            "weights": jnp.ones((TOKENS, TOP_K)),
        },
        "combine": {
            "rows": jnp.ones((CAPACITY, HIDDEN)),
            "row_weights": absent,
            "values": jnp.ones((CAPACITY,)),
        },
        "combine_vjp": {
            "dy": jnp.ones((TOKENS, HIDDEN)),
            "rows": jnp.ones((CAPACITY, HIDDEN)),
            "row_weights": jnp.ones((CAPACITY,)),
        },
    }[op]
    return payload | {
        "topk": handle.topk_idx,
        "dest_row": handle.dest_row,
        "recv_rows": handle.recv_rows,
        "recv_src": handle.recv_src,
        "expert_idx": jnp.zeros((0, TOP_K), jnp.int32),
        "coords": jnp.stack([jax.lax.axis_index("expert"), 0]),
    }


RESULTS = {
    "dispatch": [(CAPACITY, HIDDEN), (0,), (CAPACITY,)],
    "combine": [(TOKENS, HIDDEN), (TOKENS, TOP_K)],
    "combine_vjp": [(CAPACITY, HIDDEN), (CAPACITY,)],
}


def run_changed(op, change, results=None, **attributes):
    """Calls an op with operands changed by ``change``, and other results or attributes."""
    group = make_group(RANKS, "cpu")
    kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results or RESULTS[op]]
    if op == "dispatch":
        attributes = {"quantization": np.int32(0), "dense_output": np.int32(0)} | attributes
    if op != "combine":
        attributes = {"unused_rows": np.int32(0)} | attributes

    def body(idx):
        operands = change(raw_operands(op, group, idx))
        return raw_call(group, f"jax_ep_{op}", *operands.values(), results=kinds, **attributes)

    return run_on_ranks(body, indices())


@pytest.mark.parametrize("op", RESULTS)
def test_right_calls(op):
    """The calls that the tests below change are right before the change."""
    run_changed(op, lambda operands: operands)


@pytest.mark.parametrize("value", [-2, -(2**31), 2**31 - 1, "limit"])
@pytest.mark.parametrize(
    ("op", "argument", "limit"),
    [
        ("dispatch", "recv_src", RANKS * TOKENS * TOP_K),
        ("combine", "recv_rows", CAPACITY),
        ("combine", "dest_row", CAPACITY),
        ("combine", "topk", EXPERTS),
        ("combine_vjp", "recv_src", RANKS * TOKENS * TOP_K),
    ],
)
def test_damaged_handle(op, argument, limit, value):
    """One bad entry, on one rank: an error on all, and no access out of bounds."""
    bad = limit if value == "limit" else value

    def damage(operands):
        array = operands[argument]
        flat = array.reshape(-1)
        flat = flat.at[3].set(jnp.where(operands["coords"][0] == 1, bad, flat[3]))
        return operands | {argument: flat.reshape(array.shape)}

    text = (
        f"jax_ep.{op}: argument {argument}: expected entries in [-1, {limit}), "
        f"got {bad} at flat index 3 of rank 1"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(text)):
        run_changed(op, damage)
    assert _cpu.open_rendezvous() == 0


E4M3, BF16, F32, S32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.int32


@pytest.mark.parametrize(
    ("op", "argument", "shape", "dtype", "text"),
    [
        ("dispatch", "x", (5, 8), F32, "expected F32[4,8], got F32[5,8]"),
        ("dispatch", "x", (4,), F32, "expected two dimensions, got F32[4]"),
        ("dispatch", "x", (4, 8), S32, "expected dtype BF16, F16, F32 or F8E4M3FN, got S32[4,8]"),
        ("dispatch", "x", (4, 8), E4M3, "expected a hidden size that is a multiple of 128, got 8"),
        ("dispatch", "scales", (4, 1), F32, "expected F32[0], got F32[4,1]"),
        ("dispatch", "weights", (4, 2), BF16, "expected F32[4,2], got BF16[4,2]"),
        ("dispatch", "topk", (0, 2), S32, "expected at least one entry, and fewer than 2^31"),
        ("dispatch", "dest_row", (4, 3), S32, "expected S32[4,2], got S32[4,3]"),
        ("dispatch", "recv_rows", (4, 2), S32, "expected S32[8,2], got S32[4,2]"),
        ("dispatch", "recv_src", (64, 1), S32, "expected S32[64], got S32[64,1]"),
        ("dispatch", "expert_idx", (64, 2), S32, "expected S32[0,2], got S32[64,2]"),
        ("dispatch", "coords", (3,), S32, "expected S32[2], got S32[3]"),
        ("combine", "rows", (32, 8), F32, "expected F32[64,8], got F32[32,8]"),
        ("combine", "rows", (64, 8), E4M3, "expected dtype BF16, F16 or F32, got F8E4M3FN[64,8]"),
        ("combine", "row_weights", (65,), F32, "expected F32[64], got F32[65]"),
        ("combine", "values", (65,), F32, "expected F32[64], got F32[65]"),
        ("combine_vjp", "dy", (4, 8), BF16, "expected F32[4,8], got BF16[4,8]"),
        ("combine_vjp", "row_weights", (0,), F32, "expected F32[64], got F32[0]"),
    ],
)
def test_wrong_operands(op, argument, shape, dtype, text):
    text = re.escape(f"jax_ep.{op}: argument {argument}: {text}")
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        run_changed(op, lambda operands: operands | {argument: jnp.zeros(shape, dtype)})
    assert _cpu.open_rendezvous() == 0


@pytest.mark.parametrize(
    ("op", "result", "text"),
    [
        ("dispatch", 0, "result rows: expected F32[64,8], got F32[7]"),
        ("dispatch", 1, "result row_scales: expected F32[0], got F32[7]"),
        ("dispatch", 2, "result row_weights: expected F32[64], got F32[7]"),
        ("combine", 0, "result y: expected F32[4,8], got F32[7]"),
        ("combine", 1, "result home: expected F32[4,2], got F32[7]"),
        ("combine_vjp", 0, "result d_rows: expected F32[64,8], got F32[7]"),
        ("combine_vjp", 1, "result d_weights: expected F32[64], got F32[7]"),
    ],
)
def test_wrong_results(op, result, text):
    shapes = [(7,) if place == result else shape for place, shape in enumerate(RESULTS[op])]
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(f"jax_ep.{op}: {text}")):
        run_changed(op, lambda operands: operands, results=shapes)


@pytest.mark.parametrize(
    ("op", "attributes", "text"),
    [
        ("dispatch", {"quantization": np.int32(3)}, "attribute quantization: expected 0 (none)"),
        (
            "dispatch",
            {"quantization": np.int32(1)},
            "argument x: expected a hidden size that is a multiple of 128, got 8",
        ),
        ("combine_vjp", {"layout": np.int32(1)}, "attribute layout: expected 0 (expert), got 1"),
    ],
)
def test_wrong_attributes(op, attributes, text):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(f"jax_ep.{op}: {text}")):
        run_changed(op, lambda operands: operands, **attributes)
