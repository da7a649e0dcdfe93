"""Every wrong call raises while tracing, with a text that names op, argument, expected, got, fix.

All texts have one form: ``jax_ep.OP: argument ARGUMENT: expected X, got Y; FIX.``
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from spmd import fit, make_group, make_mesh, ranks_at_most, shard

TOKENS, TOP_K, EXPERTS, HIDDEN, CAPACITY = 4, 2, 4, 32, 32  # of one of two ranks
F32, BF16, F16, I32 = jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def array(shape: tuple[int, ...], dtype: Any = F32):
    """A placeholder in the table of calls for an array that is made while tracing."""
    return lambda: jnp.zeros(shape, dtype)


def quantized(values: tuple[int, ...], scales: tuple[int, ...], dtypes: tuple[Any, Any]):
    return lambda: jax_ep.Quantized(jnp.zeros(values, dtypes[0]), jnp.zeros(scales, dtypes[1]))


GOOD_QUANTIZED = quantized((TOKENS, 128), (TOKENS, 1), (E4M3, F32))
HANDLE, FOREIGN_HANDLE, TOKEN_HANDLE = "its handle", "another group's handle", "a token handle"


def make_handle(kind: str, group: jax_ep.Group) -> jax_ep.Handle:
    if kind == FOREIGN_HANDLE:
        group = jax_ep.create_group(group.mesh, backend="reference", timeout=77)
    out = jax_ep.dispatch(
        jnp.zeros((TOKENS, HIDDEN)),
        jnp.zeros((TOKENS, TOP_K), I32),
        group=group,
        num_experts=EXPERTS,
        layout="token" if kind == TOKEN_HANDLE else "expert",
        capacity=CAPACITY,
        alignment=8,
    )
    return out.handle


def resolve(value: Any, group: jax_ep.Group) -> Any:
    if isinstance(value, str) and value in (HANDLE, FOREIGN_HANDLE, TOKEN_HANDLE):
        return make_handle(value, group)
    return value() if callable(value) else value


def refused(op: str, call: dict[str, Any], error: type[Exception], argument: str, text: str):
    """Trace ``call`` on a rank and compare the error with ``text``: "expected / got / fix"."""
    group = make_group(2, "reference")

    def run():
        arguments = {name: resolve(value, group) for name, value in call.items()}
        getattr(jax_ep, op)(**{"group": group, **arguments})
        return jnp.zeros((1,))

    with pytest.raises(error) as raised:
        jax.eval_shape(shard(run, group.mesh, in_specs=(), check_vma=False))
    expected, got, fix = (".*".join(map(re.escape, part.split("…"))) for part in text.split(" / "))
    form = (
        rf"jax_ep\.{op}: argument {re.escape(argument)}: expected .*{expected}.*, got .*{got}.*; "
    )
    assert re.match(rf"{form}.*{fix}.*\.", str(raised.value), re.DOTALL), str(raised.value)
    assert type(raised.value) is error


DISPATCH = {
    "x": array((TOKENS, HIDDEN)),
    "topk_idx": array((TOKENS, TOP_K), I32),
    "num_experts": EXPERTS,
}
V, T = ValueError, TypeError
# name of the case: what differs from a good call, the error, the argument, "expected / got / fix"
BAD_DISPATCH: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "x 1d": ({"x": array((TOKENS,))}, V, "x", "two dimensions / shape (4,) / flatten"),
    "x 3d": ({"x": array((1, TOKENS, HIDDEN))}, V, "x", "two dimensions / shape (1, 4, 32) / flatten"),
    "x int": (
        {"x": array((TOKENS, HIDDEN), I32)},
        T, "x", "bfloat16, float16 or float32 / int32 / cast",
    ),
    "x float4": (
        {"x": array((TOKENS, HIDDEN), jnp.float4_e2m1fn)},
        T, "x", "bfloat16, float16 or float32 / float4_e2m1fn / cast",
    ),
    "x e4m3": (
        {"x": array((TOKENS, 128), E4M3)},
        T, "x", "Quantized / float8_e4m3fn / jax_ep.quantize",
    ),
    "x list": ({"x": [[0.0]]}, T, "x", "array / list / convert"),
    "x none": ({"x": None}, T, "x", "array / NoneType / convert"),
    "hidden f32": ({"x": array((TOKENS, 6))}, V, "x", "16 bytes / hidden 6…24 bytes / multiple of 4"),
    "hidden bf16": (
        {"x": array((TOKENS, 12), BF16)}, V, "x", "16 bytes / hidden 12…24 bytes / multiple of 8",
    ),
    "hidden 0": ({"x": array((TOKENS, 0))}, V, "x", "16 bytes / hidden 0 / pad"),
    "hidden fp8": (
        {"x": array((TOKENS, 144)), "quantization": "fp8"},
        V, "x", "multiple of 128 / hidden 144 / pad",
    ),
    "quantized hidden": (
        {"x": quantized((TOKENS, 144), (TOKENS, 1), (E4M3, F32))},
        V, "x.values", "multiple of 128 / shape (4, 144) / pad",
    ),
    "quantized e5m2": (
        {"x": quantized((TOKENS, 128), (TOKENS, 1), (E5M2, F32))},
        T, "x.values", "float8_e4m3fn / float8_e5m2 / jax_ep.quantize",
    ),
    "quantized scales shape": (
        {"x": quantized((TOKENS, 256), (TOKENS, 1), (E4M3, F32))},
        V, "x.scales", "(4, 2) / (4, 1) / jax_ep.quantize",
    ),
    "quantized scales dtype": (
        {"x": quantized((TOKENS, 128), (TOKENS, 1), (E4M3, BF16))},
        V, "x.scales", "float32 / bfloat16 / jax_ep.quantize",
    ),
    "idx none": ({"topk_idx": None}, T, "topk_idx", "integer…handle= / NoneType / handle"),
    "idx float": (
        {"topk_idx": array((TOKENS, TOP_K))},
        T, "topk_idx", "integer dtype / float32 / astype(jnp.int32)",
    ),
    "idx bool": (
        {"topk_idx": array((TOKENS, TOP_K), jnp.bool_)},
        T, "topk_idx", "integer dtype / bool / astype(jnp.int32)",
    ),
    "idx 1d": (
        {"topk_idx": array((TOKENS,), I32)},
        V, "topk_idx", "[tokens, top_k] / shape (4,) / row",
    ),
    "idx tokens": (
        {"topk_idx": array((TOKENS + 1, TOP_K), I32)}, V, "topk_idx", "4 tokens / shape (5, 2) / row",
    ),
    "K 0": ({"topk_idx": array((TOKENS, 0), I32)}, V, "topk_idx", "1 to 32 / top_k 0 / at most 32"),
    "K 33": (
        {"topk_idx": array((TOKENS, 33), I32), "num_experts": 64},
        V, "topk_idx", "1 to 32 / top_k 33 / at most 32",
    ),
    "K over E": (
        {"topk_idx": array((TOKENS, 5), I32)}, V, "topk_idx", "num_experts = 4 / top_k 5 / once",
    ),
    "weights int": (
        {"topk_weights": array((TOKENS, TOP_K), I32)},
        T, "topk_weights", "float32 / int32 / astype(jnp.float32)",
    ),
    "weights list": ({"topk_weights": [1.0]}, T, "topk_weights", "float32 / list / cast"),
    "weights shape": (
        {"topk_weights": array((TOKENS, TOP_K + 1))},
        V, "topk_weights", "topk_idx, (4, 2) / shape (4, 3) / one weight",
    ),
    "E missing": ({"num_experts": None}, T, "num_experts", "int / NoneType / number of experts"),
    "E float": ({"num_experts": 4.0}, T, "num_experts", "int / float / number of experts"),
    "E odd": ({"num_experts": 5}, V, "num_experts", "multiple…2 ranks / 5 / same number"),
    "E zero": ({"num_experts": 0}, V, "num_experts", "positive multiple / 0 / same number"),
    "E beyond int32": (
        {"num_experts": 2**31}, V, "num_experts", "at most 2147483647 / 2147483648 / fewer",
    ),
    "E negative": ({"num_experts": -4}, V, "num_experts", "positive multiple / -4 / same number"),
    "layout": ({"layout": "rows"}, V, "layout", "'expert', 'token' / 'rows' / choose"),
    "layout unhashable": ({"layout": ["token"]}, V, "layout", "'expert', 'token' / ['token'] / choose"),
    "alignment 0": ({"alignment": 0}, V, "alignment", "positive int / 0 / 128"),
    "alignment -8": ({"alignment": -8}, V, "alignment", "positive int / -8 / 128"),
    "alignment float": ({"alignment": 8.0}, V, "alignment", "positive int / 8.0 / 128"),
    "alignment beyond int32": (
        {"layout": "token", "alignment": 2**40},
        V, "alignment", "at most 2147483647 / 1099511627776 / 128",
    ),
    "capacity 0": (
        {"capacity": 0, "alignment": 8}, V, "capacity", "positive multiple…8 / 0 / round it up",
    ),
    "capacity -8": ({"capacity": -8}, V, "capacity", "positive multiple…1 / -8 / round it up"),
    "capacity small": (
        {"capacity": 64, "alignment": 128},
        V, "capacity", "positive multiple…128 / 64 / round it up",
    ),
    "capacity odd": ({"capacity": 12, "alignment": 8}, V, "capacity", "multiple…8 / 12 / round it up"),
    "capacity float": ({"capacity": 128.0}, V, "capacity", "positive multiple / 128.0 / leave it out"),
    "capacity token": (
        {"capacity": 0, "layout": "token"}, V, "capacity", "positive int / 0 / leave it out",
    ),
    "capacity twice": (
        {"capacity": 128, "capacity_factor": 1.0},
        V, "capacity_factor", "one of capacity and capacity_factor / both / each expert",
    ),
    "factor token": (
        {"capacity_factor": 1.0, "layout": "token"},
        V, "capacity_factor", "None with layout='token' / 1.0 / capacity",
    ),
    "capacity and rank factor": (
        {"capacity": 128, "rank_capacity_factor": 1.0},
        V, "rank_capacity_factor", "one of capacity and rank_capacity_factor / both / each rank",
    ),
    "rank factor in layout token": (
        {"rank_capacity_factor": 1.0, "layout": "token"},
        V, "rank_capacity_factor", "None with layout='token' / 1.0 / capacity",
    ),
    "rank factor 0": (
        {"rank_capacity_factor": 0}, V, "rank_capacity_factor", "positive number / 0 / 1.0",
    ),
    "factor 0": ({"capacity_factor": 0}, V, "capacity_factor", "positive number / 0 / 1.0"),
    "factor -1": ({"capacity_factor": -1.0}, V, "capacity_factor", "positive number / -1.0 / 1.0"),
    "factor nan": (
        {"capacity_factor": float("nan")},
        V, "capacity_factor", "positive number / nan / 1.0",
    ),
    "factor without end": (
        {"capacity_factor": 1e308}, V, "capacity_factor", "at most 2147483647 / 1e+308 / 1.0",
    ),
    "factor text": ({"capacity_factor": "2"}, V, "capacity_factor", "positive number / '2' / 1.0"),
    "quantization": ({"quantization": "int8"}, V, "quantization", "None, 'fp8' / 'int8' / choose"),
    "output": ({"output": "sparse"}, V, "output", "'dense', 'quantized' / 'sparse' / choose"),
    "scale format": (
        {"x": array((TOKENS, 128)), "quantization": "fp8", "scale_format": "e8m0"},
        V, "scale_format", "'f32', 'ue8m0' or 'ue8m0_packed' / 'e8m0' / ",
    ),
    "packed scales of dense rows": (
        {"x": array((TOKENS, 128)), "quantization": "fp8", "scale_format": "ue8m0_packed"},
        V, "scale_format", "'f32' or 'ue8m0' / 'ue8m0_packed' / quantization='fp8' and output='quant",
    ),
    "quantized output of dense rows": (
        {"output": "quantized"}, V, "output", "without quantization / 'quantized' / quantization='fp8'",
    ),
    "dense output of quantized rows": (
        {"x": GOOD_QUANTIZED, "output": "dense"},
        V, "output", "'quantized' or None / 'dense' / jax_ep.dequantize",
    ),
    "quantized twice": (
        {"x": GOOD_QUANTIZED, "quantization": "fp8"},
        V, "quantization", "Quantized already / 'fp8' / leave it out",
    ),
    "group none": ({"group": None}, T, "group", "a Group / NoneType / jax_ep.create_group"),
    "config": ({"config": {"num_sms": 8}}, T, "config", "DispatchConfig / dict / "),
    "too many rows": (
        {"layout": "token", "capacity": 2**31 - 1}, V, "x", "2147483646 / 4294967294 / capacity",
    ),
}  # fmt: skip

AGAIN = {"x": array((TOKENS, HIDDEN)), "handle": HANDLE}
BAD_AGAIN: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "handle and idx": (
        {"topk_idx": array((TOKENS, TOP_K), I32)}, V, "topk_idx", "None…handle= / a value / leave",
    ),
    "handle and E": ({"num_experts": 6}, V, "num_experts", "4, as the handle says / 6 / leave"),
    "handle and capacity": ({"capacity": 8}, V, "capacity", "32, as the handle says / 8 / leave"),
    "handle and capacity array": (
        {"capacity": array((), I32)}, V, "capacity", "32, as the handle says / int32 / leave",
    ),
    "handle and layout": (
        {"layout": "token"}, V, "layout", "'expert', as the handle says / 'token' / leave",
    ),
    "token handle and layout": (
        {"handle": TOKEN_HANDLE, "layout": "expert"},
        V, "layout", "'token', as the handle says / 'expert' / leave",
    ),
    "handle and alignment": (
        {"alignment": 7}, V, "alignment", "8, as the handle says / 7 / leave",
    ),
    "handle and the default alignment": (
        {"alignment": 1}, V, "alignment", "8, as the handle says / 1 / leave",
    ),
    "handle and factor": (
        {"capacity_factor": 1.0},
        V, "capacity_factor", "None…handle= / a value / leave",
    ),
    "rank factor with handle": (
        {"rank_capacity_factor": 1.0},
        V, "rank_capacity_factor", "None…handle= / a value / leave",
    ),
    "handle and tokens": ({"x": array((3, HIDDEN))}, V, "x", "4 tokens / 3 tokens / handle"),
    "handle type": ({"handle": 3}, T, "handle", "jax_ep.Handle / int / .handle"),
    "foreign handle": ({"handle": FOREIGN_HANDLE}, V, "handle", "this group / another group / group"),
    "weights shape": (
        {"topk_weights": array((TOKENS, 3))}, V, "topk_weights", "(4, 2) / (4, 3) / one weight",
    ),
}  # fmt: skip

COMBINE = {"rows": array((CAPACITY, HIDDEN)), "handle": HANDLE}
BAD_COMBINE: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "rows 1d": ({"rows": array((CAPACITY,))}, V, "rows", "two dimensions / shape (32,) / flatten"),
    "rows int": (
        {"rows": array((CAPACITY, HIDDEN), I32)},
        T, "rows", "bfloat16, float16 or float32 / int32 / cast",
    ),
    "rows float4": (
        {"rows": array((CAPACITY, HIDDEN), jnp.float4_e2m1fn)},
        T, "rows", "bfloat16, float16 or float32 / float4_e2m1fn / cast",
    ),
    "rows hidden": (
        {"rows": array((CAPACITY, 3), F16)},
        V, "rows", "16 bytes / hidden 3…6 bytes / multiple of 8",
    ),
    "rows capacity": ({"rows": array((24, HIDDEN))}, V, "rows", "32 rows / shape (24, 32) / padding"),
    "rows quantized": ({"rows": GOOD_QUANTIZED}, T, "rows", "array / Quantized / jax_ep.dequantize"),
    "rows list": ({"rows": [1.0]}, T, "rows", "array / list / convert"),
    "weights token": (
        {"handle": TOKEN_HANDLE, "weights": array((CAPACITY,))},
        V, "weights", "None in layout 'token' / shape (32,) / multiply",
    ),
    "weights int": (
        {"weights": array((CAPACITY,), I32)},
        T, "weights", "float32 / int32 / astype",
    ),
    "weights shape": ({"weights": array((24,))}, V, "weights", "(32,) / (24,) / one factor"),
    "weights 2d": ({"weights": array((CAPACITY, 1))}, V, "weights", "(32,) / (32, 1) / one factor"),
    "weights list": ({"weights": [1.0] * CAPACITY}, T, "weights", "float32 / list / "),
    "handle none": ({"handle": None}, T, "handle", "jax_ep.Handle / NoneType / .handle"),
    "foreign handle": ({"handle": FOREIGN_HANDLE}, V, "handle", "this group / another group / group"),
    "group text": ({"group": "expert"}, T, "group", "a Group / str / jax_ep.create_group"),
    "config": ({"config": 8}, T, "config", "DispatchConfig / int / "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DISPATCH)
def test_dispatch(name):
    changes, error, argument, text = BAD_DISPATCH[name]
    refused("dispatch", DISPATCH | changes, error, argument, text)


@pytest.mark.parametrize("name", BAD_AGAIN)
def test_dispatch_along_a_handle(name):
    changes, error, argument, text = BAD_AGAIN[name]
    refused("dispatch", AGAIN | changes, error, argument, text)


@pytest.mark.parametrize("name", BAD_COMBINE)
def test_combine(name):
    changes, error, argument, text = BAD_COMBINE[name]
    refused("combine", COMBINE | changes, error, argument, text)


AS_IN_HANDLE = {"num_experts": EXPERTS, "layout": "expert", "alignment": 8, "capacity": CAPACITY}


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("dispatch", DISPATCH),
        ("dispatch", AGAIN),
        ("dispatch", AGAIN | {"handle": TOKEN_HANDLE}),
        ("dispatch", AGAIN | AS_IN_HANDLE),
        ("combine", COMBINE),
    ],
)
def test_the_good_calls_are_good(op, call):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(op, call, Exception, "", " /  / ")


def test_float64_weights():
    """Float32 cannot hold them, so they are refused."""
    group = make_group(2, "reference")
    x, idx = np.zeros((8, HIDDEN), np.float32), np.zeros((8, 2), np.int32)
    run = lambda *args: jax_ep.dispatch(*args, group=group, num_experts=4).tokens  # noqa: E731
    with (
        jax.enable_x64(True),
        pytest.raises(
            TypeError, match=r"topk_weights: expected an array of float32, .*float64; cast"
        ),
    ):
        jax.eval_shape(shard(run, group.mesh), x, idx, np.zeros((8, 2)))


OPS = {
    "dispatch": lambda group, x, idx: jax_ep.dispatch(x, idx, group=group, num_experts=4),
    "dispatch_start": lambda group, x, idx: jax_ep.dispatch_start(
        x, idx, group=group, num_experts=4
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_outside_shard_map(op, where):
    group = make_group(2, "reference")
    x, idx = jnp.zeros((4, HIDDEN)), jnp.zeros((4, 2), I32)
    run = lambda x, idx: OPS[op](group, x, idx)  # noqa: E731
    with pytest.raises(ValueError, match=r"argument group: .*is manual, got .*jax\.shard_map"):
        (jax.jit(run) if where == "jit" else run)(x, idx)


def test_axes_left_automatic():
    """All axes of the mesh must be manual, not only the group's."""
    names = ("data", "expert")
    mesh = make_mesh(fit((2, 2), names), names)
    group = jax_ep.create_group(mesh, "expert", backend="reference")
    run = lambda x, idx: jax_ep.dispatch(x, idx, group=group, num_experts=4).tokens  # noqa: E731
    partly = jax.shard_map(
        run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), axis_names={"expert"}
    )
    text = (
        r"every axis of the mesh \('data', 'expert'\) is manual, got \('expert',\) .*; .*whole mesh"
    )
    with pytest.raises(ValueError, match=text):
        jax.jit(partly).lower(jnp.zeros((8, HIDDEN)), jnp.zeros((8, 2), I32))


def test_group_of_another_mesh():
    ranks = ranks_at_most(4)
    group = make_group(ranks, "reference")
    run = lambda x, idx: jax_ep.dispatch(x, idx, group=group, num_experts=4).tokens  # noqa: E731
    text = (
        rf"argument group: expected a group of the mesh in use, \{{'expert': {ranks // 2}\}}, "
        rf"got .*{ranks}.*shard_map"
    )
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(
            shard(run, make_mesh(ranks // 2)), jnp.zeros((8, HIDDEN)), jnp.zeros((8, 2), I32)
        )
