"""Packed scales of a dispatch: the words that ``pack_scales`` makes of those of format "ue8m0"."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import oracle
import routings
from spmd import make_group, native_calls, ranks_at_most, stacked_jit

# Rows of two parts in latency mode, and no sizes that are multiples of four.
RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN = ranks_at_most(2), 13, 3, 8, 15 * 128
LOCAL, WORDS = EXPERTS // RANKS, 4
ROOM = {"expert": RANKS * TOKENS + 1, "token": RANKS * TOKENS - 1, "masked": 6 * LOCAL}
LATENCY = {"latency_tokens": TOKENS, "latency_hidden": HIDDEN}
CAST = {"quantization": "fp8", "output": "quantized"}


def data() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(jnp.bfloat16)
    idx = routings.masked(rng, RANKS, TOKENS, TOP_K, EXPERTS)
    return x, rng.random(idx.shape).astype(np.float32), idx


def shape_of(layout: str) -> tuple[int, ...]:
    rows = ROOM[layout]
    return (LOCAL, WORDS, 8) if layout == "masked" else (WORDS, -(-rows // 4) * 4)


@pytest.mark.parametrize("layout", ROOM)
@pytest.mark.parametrize("mode", ["throughput", "latency", "in flight"])
def test_they_are_the_packed_scales_of_the_rows(layout, mode, backend):
    """Of rows that are cast, of quantized ones, and along a handle."""
    if (backend, layout, mode) == ("cuda", "masked", "throughput"):
        pytest.skip("on GPUs layout 'masked' has no throughput mode; the case 'latency' has it")
    in_two = mode == "in flight"
    group = make_group(RANKS, backend, **LATENCY)
    config = jax_ep.DispatchConfig(mode="throughput" if mode == "throughput" else "latency")
    given: dict[str, Any] = {"group": group, "config": config}
    routed = {"num_experts": EXPERTS, "layout": layout, "capacity": ROOM[layout]}

    def dispatch(*args, **kwargs):
        if in_two:
            return jax_ep.dispatch_done(jax_ep.dispatch_start(*args, **given, **kwargs))
        return jax_ep.dispatch(*args, **given, **kwargs)

    def run(x, weights, idx):
        found = []
        q = jax_ep.quantize(x, scale_format="ue8m0")
        for rows, how in (x, CAST), (q, {}):
            plain = dispatch(rows, idx, weights, scale_format="ue8m0", **how, **routed)
            packed = dispatch(rows, idx, weights, scale_format="ue8m0_packed", **how, **routed)
            again = dispatch(rows, handle=packed.handle, scale_format="ue8m0_packed", **how)
            want = jax_ep.Quantized(plain.tokens.values, jax_ep.pack_scales(plain.tokens.scales))
            pairs = [(packed.tokens, want), (packed.handle, plain.handle)]
            pairs += [(packed.weights, plain.weights), (again.tokens.scales, want.scales)]
            found.append(tuple(zip(*pairs, strict=True)))
        return found

    for got, want in stacked_jit(run, group.mesh)(*data()):
        assert got[0].scales.shape[1:] == shape_of(layout) and got[0].scales.any()
        used = np.ones(got[0].values.shape[:-1], bool)
        if layout == "masked":  # whose unused rows are anything
            used = np.arange(used.shape[-1]) < np.asarray(want[1].counts)[..., None]
        rows = [np.asarray(tokens.values).view(np.uint8)[used] for tokens in (got[0], want[0])]
        np.testing.assert_array_equal(*rows)
        pairs = zip((got[0].scales, got[1:]), (want[0].scales, want[1:]), strict=True)
        for one, other in pairs:
            jax.tree.map(lambda a, b: oracle.assert_same(a, b, "packed"), one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_no_tokens(masked):
    group = make_group(RANKS, "reference")
    layout = "masked" if masked else "expert"

    def run(x, idx):
        return jax_ep.dispatch(
            x,
            idx,
            group=group,
            num_experts=EXPERTS,
            layout=layout,
            capacity=ROOM[layout],
            scale_format="ue8m0_packed",
            **CAST,
        ).tokens

    x, _, idx = (array[:, :0] for array in data())
    found = stacked_jit(run, group.mesh)(x, idx)
    assert found.scales.shape == (RANKS, *shape_of(layout)) and found.scales.dtype == np.int32
    assert not found.scales.any()


def trace(run, group):
    """The program of ``run`` on each rank."""
    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x, weights, idx = (array.reshape(-1, array.shape[-1]) for array in data())
    return jax.make_jaxpr(mapped)(x, weights, idx)


@pytest.mark.parametrize("layout", ["expert", "masked"])
@pytest.mark.parametrize("in_two", [False, True])
def test_calls_of_latency_mode_give_words(layout, in_two):
    """Nothing packs them behind the call; in throughput mode something does."""
    group = dataclasses.replace(make_group(RANKS, "reference", **LATENCY), backend="cuda")

    def run(mode, *args):
        given: dict[str, Any] = {"group": group, "num_experts": EXPERTS, "layout": layout, **CAST}
        given |= {"capacity": ROOM[layout], "scale_format": "ue8m0_packed"}
        given["config"] = jax_ep.DispatchConfig(mode=mode)
        x, weights, idx = args
        if in_two and mode == "latency":
            return jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, weights, **given)).tokens
        return jax_ep.dispatch(x, idx, weights, **given).tokens

    jaxpr = trace(lambda *args: run("latency", *args), group)
    calls = native_calls(jaxpr.jaxpr)
    assert [dict(call["attributes"])["packed_scales"] for call in calls] == [1] * (1 + in_two)
    words = calls[-1]["results"][1]
    assert words.dtype == jnp.int32 and words.size == np.prod(shape_of(layout))
    assert "shift_right" not in str(jaxpr)
    if layout == "expert" and not in_two:
        jaxpr = trace(lambda *args: run("throughput", *args), group)
        (call,) = native_calls(jaxpr.jaxpr)
        assert "packed_scales" not in dict(call["attributes"]) and "shift_right" in str(jaxpr)
        assert call["results"][1].dtype == jnp.float32


@pytest.mark.needs_collectives  # of the reference
def test_no_gradient():
    """As of other quantized rows: an error that says what to do; weights have theirs."""
    group = make_group(RANKS, "reference")

    def loss(x, weights, idx):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, scale_format="ue8m0_packed", **CAST
        )
        return out.weights.sum() + out.tokens.values.astype(jnp.float32).sum()

    with pytest.raises(TypeError, match="Quantized rows have no gradient"):
        trace(lambda *args: jax.grad(loss)(*args), group)
    found = stacked_jit(lambda *args: jax.grad(loss, 1)(*args), group.mesh)(*data())
    np.testing.assert_array_equal(found, (data()[2] >= 0).astype(np.float32))
