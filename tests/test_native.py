"""What the native CPU module promises by itself: its interface, and its arithmetic.

Values over all layouts, routings and dtypes are the business of ``test_suite_values.py``; here they
are checked where only the native code can go wrong: shared work, rounding, subnormal numbers.
"""

from __future__ import annotations

import re

import jax
import ml_dtypes
import numpy as np
import pytest

import jax_ep
import oracle
import routings
from jax_ep import _cpu, reference
from jax_ep._backends import native
from jax_ep._core import libraries
from native import EXPERTS, HIDDEN, RANKS, TOKENS, UNBOUNDED, indices, plan
from spmd import make_group, native_calls, ranks_at_most, shard, stacked_jit

pytestmark = pytest.mark.one_process("the native CPU backend serves groups of one process")


def test_build_info():
    info = _cpu.build_info()
    assert info["version"] == jax_ep.__version__
    assert info["ffi_api_version"] >= (0, 3)
    assert re.search(r"(GCC|Clang) \d+\.", info["compiler"])


def test_a_library_for_a_newer_jaxlib_is_named(monkeypatch):
    """XLA refuses handlers built with newer headers; the message says so, and nothing crashes."""

    def refuse(name, handlers, platform):
        raise jax.errors.JaxRuntimeError(f"INVALID_ARGUMENT: registration for {name} failed")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    why = libraries.why_unavailable.__wrapped__("cpu")
    version = "{}.{}".format(*_cpu.build_info()["ffi_api_version"])
    assert re.search(rf"jaxlib \S+ refuses .* version {version} .* jax_ep_\w+ failed.*; build", why)


def test_targets_have_both_stages():
    for name, stages in _cpu.targets().items():
        assert name.startswith("jax_ep_")
        assert stages.keys() == {"instantiate", "execute"}


def test_calls_have_the_signatures_of_their_targets():
    group = make_group(RANKS, "cpu")

    def loss(x, idx):
        weights = jax.numpy.ones(idx.shape)
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS, alignment=8)
        return jax_ep.combine(out.tokens, out.handle, group=group, weights=out.weights).sum()

    mapped = shard(jax.grad(loss), group.mesh)
    x = np.zeros((RANKS * TOKENS, HIDDEN), np.float32)
    program = jax.make_jaxpr(mapped)(x, indices().reshape(RANKS * TOKENS, -1)).jaxpr
    signatures = _cpu.signatures()
    assert signatures.keys() == _cpu.targets().keys()
    called = set()
    for call in native_calls(program):
        wanted = signatures[call["target"]]
        called.add(call["target"])
        assert len(call["absent"]) == len(wanted["operands"])  # given or absent
        assert len(call["results"]) == len(wanted["results"])
        names = [name for name, _ in call["attributes"]] + ["ordinal"]
        assert sorted(names) == sorted(wanted["attributes"])
    assert called == signatures.keys() - {"jax_ep_clock"}


def test_call_counts():
    group = make_group(RANKS, "cpu")
    run = stacked_jit(lambda idx: plan(idx, group), group.mesh)
    idx = indices()
    run(idx)
    _cpu.reset_call_counts()
    assert (
        set(_cpu.call_counts().values()) == {0}
        and _cpu.call_counts().keys() == _cpu.targets().keys()
    )
    run(idx)
    run(idx)
    assert _cpu.call_counts() == dict.fromkeys(_cpu.targets(), 0) | {"jax_ep_plan": 2 * RANKS}


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_large_payload(layout):
    """Rows of several chunks, which threads share."""
    ranks, tokens, top_k, hidden = ranks_at_most(3), 257, 4, 1024
    experts = 4 * ranks
    rng = np.random.default_rng(1)
    idx = routings.zipf(rng, ranks, tokens, top_k, experts)
    capacity = 2048 if layout == "expert" else 700
    x = rng.standard_normal((ranks, tokens, hidden), np.float32).astype(ml_dtypes.bfloat16)
    weights = rng.standard_normal((ranks, capacity)).astype(np.float32)
    fused = layout == "expert"
    group = make_group(ranks, "cpu")

    def run(x, idx, weights):
        handle = plan(idx, group, layout, capacity, experts=experts)
        rows, _ = native.dispatch(x, None, handle, group=group)
        y, _ = native.combine(rows, weights if fused else None, None, handle, group=group)
        return rows, y

    rows, y = stacked_jit(run, group.mesh)(x, idx, weights)
    bounds = oracle.Limits(capacity, UNBOUNDED)
    routes = oracle.plan(idx, num_experts=experts, layout=layout, alignment=8, bounds=bounds)
    expected = oracle.move(x, routes)
    oracle.assert_same(rows, expected, "rows")
    oracle.assert_same(y, oracle.combine(expected, routes, weights if fused else None), "y")


def one_rank_identity(capacity: int) -> tuple[jax_ep.Group, np.ndarray]:
    """A group of one rank and a routing that moves row t of T = capacity tokens to row t."""
    return make_group(1, "cpu"), np.zeros((1, capacity, 1), np.int32)


@pytest.mark.parametrize("scale_format", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=str)
def test_quantization_of_every_bit_pattern(dtype, scale_format):
    """Every 16-bit number next to one of every magnitude; for float32, random bits."""
    rng = np.random.default_rng(2)
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    patterns = np.arange(2**16, dtype=bits)
    if bits.itemsize == 4:
        patterns = rng.integers(2**32, size=2**16, dtype=bits)
    x = np.concatenate([patterns, rng.permutation(patterns)]).view(dtype).reshape(1, -1, 256)
    group, idx = one_rank_identity(x.shape[1])

    def run(x, idx):
        handle = plan(idx, group, capacity=x.shape[0], alignment=1, experts=1)
        quantized, _ = native.dispatch(
            x, None, handle, group=group, scale_format=scale_format, dense_output=False
        )
        dense, _ = native.dispatch(x, None, handle, group=group, scale_format=scale_format)
        return quantized, dense

    quantized, dense = stacked_jit(run, group.mesh)(x, idx)
    values, scales = oracle.quantize(x, scale_format)
    oracle.assert_same(quantized.values, values, "values")
    oracle.assert_same(quantized.scales, scales, "scales")
    subnormal = np.finfo(np.float32).tiny > np.abs(x.astype(np.float32))
    expected = oracle.dequantize(values, scales, x.dtype)
    oracle.assert_same(np.where(subnormal, 0, dense), np.where(subnormal, 0, expected), "rows")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=str)
def test_rounding_of_sums(dtype):
    """Products of random bits with weights that make ties, overflows and (float16) subnormals."""
    rng = np.random.default_rng(3)
    x = rng.integers(2**16, size=(1, 1024, 64), dtype=np.uint16).view(dtype)
    weights = np.exp2(rng.integers(-12, 12, size=(1, 1024))).astype(np.float32)
    weights *= rng.choice([1, 3, 1 + 2**-8, 1 + 2**-11], size=weights.shape).astype(np.float32)
    if dtype == ml_dtypes.bfloat16:
        x[np.abs(x.astype(np.float32)) < 2**-100] = 0  # no subnormal float32 products
    group, idx = one_rank_identity(1024)

    def run(x, idx, weights):
        handle = plan(idx, group, capacity=1024, alignment=1, experts=1)
        y, _ = native.combine(x, weights, None, handle, group=group)
        return y

    with np.errstate(all="ignore"):
        partial = (weights[..., None] * x.astype(np.float32)).astype(dtype)
    expected = np.where(partial == 0, np.zeros_like(partial), partial)  # sums begin at +0
    oracle.assert_same(stacked_jit(run, group.mesh)(x, idx, weights), expected, "y")


def test_subnormal_numbers_are_flushed_as_xla_flushes_them():
    group, idx = one_rank_identity(64)
    x = (np.float32(1e-40) * np.arange(64 * 16, dtype=np.float32)).reshape(1, 64, 16)
    weights = np.full((1, 64), 0.5, np.float32)

    def run(backend):
        def body(x, idx, weights):
            handle = plan(idx, group, capacity=64, alignment=1, experts=1)
            y, _ = backend.combine(x, weights, None, handle, group=group)
            return y, backend.combine_vjp(x, x, weights, handle, group=group)

        return stacked_jit(body, group.mesh)(x, idx, weights)

    for found, expected in zip(*map(jax.tree.leaves, (run(native), run(reference))), strict=True):
        oracle.assert_same(found, expected, "with subnormal numbers")
