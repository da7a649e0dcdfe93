"""Mode "auto": where it takes latency mode and where throughput mode, seen in the calls of programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_ep
from jax_ep._groups import gpu_side
from jax_ep._groups.tuning import CrossoverKey
from spmd import make_group, native_calls, need_devices, ranks_at_most, shard

pytest.importorskip("jax_ep._cuda", reason="needs the GPU library, which nvcc builds")
pytestmark = pytest.mark.one_process("traces programs, and runs none")

RANKS, TOP_K, EXPERTS, HIDDEN = ranks_at_most(2), 2, 8, 64
AUTO = jax_ep.DispatchConfig(mode="auto")
BOTH = ["latency_dispatch", "latency_combine"]
NEITHER = ["plan_dispatch", "combine"]
ONLY_DISPATCH = ["latency_dispatch", "combine"]


def make(**fields: Any) -> jax_ep.Group:
    """A group with room for 512 tokens of 64 channels in bfloat16, of GPUs as far as tracing goes."""
    sizes = {"latency_tokens": 512, "latency_hidden": HIDDEN}
    for name in sizes:
        sizes[name] = fields.pop(name, sizes[name])
    group = make_group(fields.pop("ranks", RANKS), "reference", **sizes)
    return dataclasses.replace(group, **({"backend": "cuda", "tuning": {}} | fields))


def calls(
    group: jax_ep.Group,
    function: Any = None,
    *,
    tokens: int = 8,
    hidden: int = HIDDEN,
    top_k: int = TOP_K,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> list[str]:
    """The targets of a dispatch and a combine, or of ``function(x, topk_idx)``, less ``jax_ep_``."""

    def both(x, idx):
        config = options.get("config")
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS * group.size, **options)
        rows = out.tokens
        if isinstance(rows, jax_ep.Quantized):
            rows = jax_ep.dequantize(rows, jnp.bfloat16)
        return jax_ep.combine(rows, out.handle, group=group, config=config)

    x = jax.ShapeDtypeStruct((group.size * tokens, hidden), dtype)
    idx = jax.ShapeDtypeStruct((group.size * tokens, top_k), jnp.int32)
    program = jax.make_jaxpr(shard(function or both, group.mesh))(x, idx)
    return [call["target"].removeprefix("jax_ep_") for call in native_calls(program.jaxpr)]


@pytest.mark.parametrize("config", [None, AUTO], ids=["none", "auto"])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, []), (1, BOTH), (256, BOTH), (257, ONLY_DISPATCH), (512, ONLY_DISPATCH), (513, NEITHER)],
)
def test_few_tokens_take_latency_mode(config, tokens, expected):
    """Up to 512 tokens for dispatch and 256 for combine, where nothing was tuned; 0 move nothing."""
    assert calls(make(), tokens=tokens, config=config) == expected


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_what_has_no_room_takes_throughput_mode(layout):
    """Without the error that mode "latency" gives."""
    fits = {"layout": layout, "tokens": 12}
    assert calls(make(latency_tokens=12), **fits) == BOTH
    assert calls(make(latency_tokens=11), **fits) == NEITHER
    assert calls(make(latency_tokens=0, latency_hidden=0), **fits) == NEITHER
    assert calls(make(), **fits, hidden=HIDDEN + 8) == NEITHER
    assert calls(make(), **fits, dtype=jnp.float32) == NEITHER  # each channel counts twice
    assert calls(make(latency_hidden=2 * HIDDEN), **fits, dtype=jnp.float32) == BOTH
    with pytest.raises(ValueError, match="at most 11 tokens a rank in mode 'latency', got 12"):
        calls(make(latency_tokens=11), **fits, config=jax_ep.DispatchConfig(mode="latency"))


def test_more_entries_than_latency_mode_has():
    """R·T·K is at most 65536."""
    need_devices(5)
    group = make(ranks=5)
    assert calls(group, tokens=512, top_k=25) == ONLY_DISPATCH
    assert calls(group, tokens=512, top_k=26) == NEITHER


def test_what_is_asked_for_comes_first():
    for mode, expected in (("throughput", NEITHER), ("latency", BOTH)):
        assert calls(make(), tokens=300, config=jax_ep.DispatchConfig(mode=mode)) == expected
    # A number of SMs says nothing of the mode.
    assert calls(make(), config=jax_ep.DispatchConfig(num_sms=8)) == BOTH


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_crossovers_that_tune_found(op):
    kind = jax.devices()[0].device_kind
    key = CrossoverKey(kind, RANKS, op, "expert", "bfloat16", HIDDEN)

    def of_op(tokens: int, **changes: Any) -> str:
        table = {dataclasses.replace(key, **changes): 8}
        targets = calls(make(tuning=table), tokens=tokens)
        return "latency" if f"latency_{op}" in targets else "throughput"

    assert [of_op(tokens) for tokens in (8, 9)] == ["latency", "throughput"]
    for change in (
        {"device_kind": "another"},
        {"ranks": RANKS + 1},
        {"op": "combine" if op == "dispatch" else "dispatch"},
        {"layout": "token"},
        {"rows": "float16"},
        {"hidden": HIDDEN + 8},
    ):
        assert of_op(9, **change) == "latency", change  # the default
    assert f"latency_{op}" not in calls(make(tuning={key: 0}), tokens=1)


def test_crossovers_of_float8_rows():
    kind = jax.devices()[0].device_kind
    keys = [
        CrossoverKey(kind, RANKS, "dispatch", "expert", rows, 128)
        for rows in ("bfloat16", "bfloat16 as fp8", "bfloat16 through fp8")
    ]
    group = make(tuning=dict(zip(keys, (1, 2, 3), strict=True)), latency_hidden=128)
    for most, options in enumerate(
        ({}, {"quantization": "fp8", "output": "quantized"}, {"quantization": "fp8"}), start=1
    ):
        assert calls(group, tokens=most, hidden=128, **options) == BOTH
        assert "plan_dispatch" in calls(group, tokens=most + 1, hidden=128, **options)


def test_a_handle_and_gradients_are_of_throughput_mode():
    group = make()

    def loss(x, idx):
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS)
        again = jax_ep.dispatch(x, handle=out.handle, group=group)
        return jax_ep.combine(out.tokens + again.tokens, out.handle, group=group).sum()

    found = calls(group, jax.grad(loss))
    assert found[:3] == ["latency_dispatch", "dispatch", "latency_combine"]
    assert sorted(found[3:]) == ["combine", "combine", "dispatch"]


def test_ops_in_flight_are_of_throughput_mode(monkeypatch):
    """They would run in line otherwise, and nothing would overlap."""
    group = make()
    monkeypatch.setitem(gpu_side._blocks_of_groups, group.id, 100)

    def run(x, idx):
        ticket = jax_ep.dispatch_start(x, idx, group=group, num_experts=EXPERTS)
        out = jax_ep.dispatch_done(ticket)
        ticket = jax_ep.combine_start(out.tokens, out.handle, group=group, config=AUTO)
        return jax_ep.combine_done(ticket)

    assert calls(group, run) == ["plan", "dispatch_async", "combine_async"]


@pytest.mark.parametrize("overlap", [None, "chunks"])
def test_layers_take_it_where_nothing_flies(monkeypatch, overlap):
    group = make()
    monkeypatch.setitem(gpu_side._blocks_of_groups, group.id, 100)
    params = jax_ep.MoEParams(
        router_kernel=jnp.ones((HIDDEN, EXPERTS)),
        gate=jnp.ones((EXPERTS, HIDDEN, 16), jnp.bfloat16),
        up=jnp.ones((EXPERTS, HIDDEN, 16), jnp.bfloat16),
        down=jnp.ones((EXPERTS, 16, HIDDEN), jnp.bfloat16),
    )
    x = jax.ShapeDtypeStruct((RANKS * 8, HIDDEN), jnp.bfloat16)

    def layer(x):
        return jax_ep.moe(
            x,
            params,
            num_experts=EXPERTS,
            top_k=TOP_K,
            group=group,
            overlap=overlap,
            num_chunks=2,
            grouped_dot=jax.lax.ragged_dot,
        )[0]

    program = jax.make_jaxpr(layer)(x)
    targets = {call["target"].removeprefix("jax_ep_") for call in native_calls(program.jaxpr)}
    flying = {"plan", "dispatch_async", "combine_async"}
    assert targets == (set(BOTH) if overlap is None else flying)
