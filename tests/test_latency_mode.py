"""Latency mode: the same results as throughput mode, its errors, and what it calls on GPUs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
import oracle
import routings
from jax_ep import _cpu
from jax_ep._ops import flights, gradients, halves
from spmd import make_group, native_calls, need_devices, ranks_at_most, stacked_jit

RANKS, TOKENS, TOP_K, EXPERTS, HIDDEN = ranks_at_most(2), 12, 3, 8, 128
LATENCY = jax_ep.DispatchConfig(mode="latency")
HALVES = ("start", "done")


def data(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)
    idx = routings.zipf(rng, RANKS, TOKENS, TOP_K, EXPERTS)
    return x, rng.random(idx.shape).astype(np.float32), idx


def make(backend: str = "reference", **kwargs: Any) -> jax_ep.Group:
    sizes = {"latency_tokens": TOKENS, "latency_hidden": 2 * HIDDEN}
    return make_group(RANKS, backend, **sizes | kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "expert", "capacity": 16, "alignment": 4},
        {"layout": "token", "quantization": "fp8"},
    ],
    ids=["expert", "token"],
)
def test_results_and_gradients_are_those_of_throughput_mode(backend, options):
    group = make(backend)
    fused = options["layout"] == "expert"

    def run(config, x, weights, idx):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, config=config, **options
        )
        y = jax_ep.combine(
            out.tokens,
            out.handle,
            group=group,
            weights=out.weights if fused else None,
            config=config,
        )
        return jnp.sum(y**2), (y, out.tokens, out.weights, out.handle)

    def both(x, weights, idx):
        found = []
        for config in (LATENCY, jax_ep.DispatchConfig(mode="throughput")):
            step = jax.grad(lambda *a, c=config: run(c, *a), argnums=(0, 1), has_aux=True)
            gradients, results = step(x, weights, idx)
            found.append((gradients, results))
        return found

    inputs = data()
    latency, throughput = stacked_jit(both, group.mesh)(*inputs)
    for got, want in zip(jax.tree.leaves(latency), jax.tree.leaves(throughput), strict=True):
        oracle.assert_same(got, want, "latency mode")
    assert any(np.any(leaf) for leaf in jax.tree.leaves(latency))


def test_a_group_has_latency_mode_or_not():
    plain = make_group(RANKS, "reference")
    group = make()
    assert group is make() and group is not plain and group.id != plain.id
    assert (group.latency_tokens, group.latency_hidden) == (TOKENS, 2 * HIDDEN)
    assert (plain.latency_tokens, plain.latency_hidden) == (0, 0)


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ((513, 64), ValueError, "latency_tokens: expected 0 to 512, got 513"),
        ((-1, 64), ValueError, "latency_tokens: expected 0 to 512, got -1"),
        ((8, 2**20 + 1), ValueError, "latency_hidden: expected 0 to 1048576"),
        ((8, 0), ValueError, "expected both or neither, got 8 and 0"),
        ((8.0, 64), TypeError, "latency_tokens: expected a Python int, got float"),
        ((8, True), TypeError, "latency_hidden: expected a Python int, got bool"),
    ],
)
def test_sizes_that_no_group_has(sizes, error, text):
    with pytest.raises(error, match=f"jax_ep.create_group: argument.*{text}"):
        make(latency_tokens=sizes[0], latency_hidden=sizes[1])


def test_no_group_on_several_hosts():
    with pytest.raises(
        ValueError, match="expected 0 where a group spans hosts, got 12 with 2 hosts"
    ):
        make(ranks_per_host=RANKS // 2)


@pytest.mark.parametrize(
    ("sizes", "hidden", "top_k", "text"),
    [
        (
            {"latency_tokens": 0, "latency_hidden": 0},
            HIDDEN,
            TOP_K,
            r"argument config: .*group without inboxes.*mode='latency'.*"
            r"create_group\(..., latency_tokens=12, latency_hidden=256\)",
        ),
        (
            {"latency_tokens": 11},
            HIDDEN,
            TOP_K,
            "at most 11 tokens a rank in mode 'latency', got 12",
        ),
        ({}, HIDDEN + 4, TOP_K, "at most 256 channels of 16 bits in mode 'latency', got 264"),
    ],
)
@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_what_latency_mode_has_no_room_for(op, sizes, hidden, top_k, text):
    group = make(**sizes)

    def run(x, idx):
        config = LATENCY if op == "dispatch" else None
        out = jax_ep.dispatch(x, idx, group=group, num_experts=EXPERTS, config=config)
        return jax_ep.combine(out.tokens, out.handle, group=group, config=LATENCY)

    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((RANKS * TOKENS, hidden), jnp.float32)
    idx = jax.ShapeDtypeStruct((RANKS * TOKENS, top_k), jnp.int32)
    with pytest.raises(ValueError, match=f"jax_ep.{op}: .*{text}"):
        jax.eval_shape(mapped, x, idx)


def test_more_entries_than_latency_mode_takes():
    need_devices(5)
    group = make_group(5, "reference", latency_tokens=512, latency_hidden=8)

    def run(x, idx):
        return jax_ep.dispatch(x, idx, group=group, num_experts=40, config=LATENCY).tokens

    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((5 * 512, 8), jnp.bfloat16)
    for top_k in (25, 26):
        idx = jax.ShapeDtypeStruct((5 * 512, top_k), jnp.int32)
        if top_k == 25:
            jax.eval_shape(mapped, x, idx)
            continue
        with pytest.raises(ValueError, match=r"at most 65536 entries of topk_idx.*got 66560"):
            jax.eval_shape(mapped, x, idx)


def test_work_beside_ops_in_flight(backend):
    """Results and gradients are those of plain ops; the work is done wherever XLA runs it."""
    group = make(backend, channels=2)

    def run(in_flight, x, weights, idx):
        given = {"group": group, "config": LATENCY}
        if in_flight:
            ticket = jax_ep.dispatch_start(x, idx, weights, num_experts=EXPERTS, **given)
            ticket, (shared, _) = ticket.beside(lambda x, w: (x * w, None), x, weights[:, :1])
            out = jax_ep.dispatch_done(ticket)
            ticket = jax_ep.combine_start(out.tokens, out.handle, weights=out.weights, **given)
            ticket, more = ticket.beside(jnp.sin, shared)
            y = jax_ep.combine_done(ticket)
        else:
            shared = x * weights[:, :1]
            more = jnp.sin(shared)
            out = jax_ep.dispatch(x, idx, weights, num_experts=EXPERTS, **given)
            y = jax_ep.combine(out.tokens, out.handle, weights=out.weights, **given)
        return jnp.sum((y + shared * more) ** 2), (y, more, out)

    def both(*inputs):
        steps = (jax.grad(lambda *a, f=f: run(f, *a), (0, 1), has_aux=True) for f in (True, False))
        return [step(*inputs) for step in steps]

    (found, results), (wanted, plain) = stacked_jit(both, group.mesh)(*data())
    for got, want in zip(jax.tree.leaves(results), jax.tree.leaves(plain), strict=True):
        oracle.assert_same(got, want, "in flight")
    for got, want in zip(found, wanted, strict=True):  # XLA may fuse their products otherwise
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_work_beside_an_op_must_be():
    opened = flights.Opened(1, 1, 0, None)
    ones = jnp.ones(1, jnp.int32)
    handle = jax_ep.Handle(**dict.fromkeys(f.name for f in dataclasses.fields(jax_ep.Handle)))
    sent = halves.SentCombine(
        ones, None, jnp.ones((1, 1)), None, handle, gradients.CombineOptions(make())
    )
    ticket = jax_ep.Ticket(sent, op="combine", opened=opened)
    with pytest.raises(TypeError, match=r"Ticket.beside: argument args: .*arrays.*got none"):
        ticket.beside(lambda: ones)
    with pytest.raises(
        TypeError, match=r"Ticket.beside: argument work: .*returns arrays.*NoneType"
    ):
        ticket.beside(lambda _: None, ones)
    again, _ = ticket.beside(lambda x: (jnp.zeros(0), x + 1), ones)
    assert again.payload.work.shape == (1,) and again.opened is opened


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "plan": jax.checkpoint_policies.save_only_these_names("jax_ep.handle"),
    "all": jax.checkpoint_policies.save_only_these_names("jax_ep.handle", "jax_ep.dispatch"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_computed_again_on_gpus_is_finished(policy):
    """Work beside an op is computed again without the op, and no op is started in vain."""
    group = dataclasses.replace(make(), backend="cuda")

    @functools.partial(jax.checkpoint, policy=POLICIES[policy])
    def layer(x, idx):
        given = {"group": group, "config": LATENCY}
        ticket = jax_ep.dispatch_start(x, idx, num_experts=EXPERTS, **given)
        ticket, shared = ticket.beside(jnp.sin, x)
        out = jax_ep.dispatch_done(ticket)
        ticket = jax_ep.combine_start(jnp.tanh(out.tokens), out.handle, **given)
        ticket, more = ticket.beside(jnp.cos, shared)
        return jax_ep.combine_done(ticket) + more

    mapped = jax.shard_map(
        lambda *a: jax.grad(lambda x, idx: layer(x, idx).sum())(*a),
        mesh=group.mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
    )
    x, _, idx = (array.reshape(-1, array.shape[-1]) for array in data())
    targets = [c["target"] for c in native_calls(jax.make_jaxpr(mapped)(x, idx).jaxpr)]
    for op in "dispatch", "combine":
        started, done = (targets.count(f"jax_ep_latency_{op}_{half}") for half in HALVES)
        assert started == done > 0, targets
    assert targets.count("jax_ep_latency_dispatch_start") == (1 if policy == "all" else 2)
    assert targets.count("jax_ep_latency_combine_start") == 1  # a sum's gradient is without it


@pytest.mark.parametrize("batch", [1, 2])
def test_an_op_in_flight_on_gpus_has_no_batch(batch):
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    group = dataclasses.replace(make(), backend="cuda")

    def run(x, idx):
        ticket = jax_ep.dispatch_start(x, idx, group=group, num_experts=EXPERTS, config=LATENCY)
        return jax_ep.dispatch_done(ticket).tokens

    mapped = jax.shard_map(
        jax.vmap(run),
        mesh=group.mesh,
        in_specs=P(None, "expert"),
        out_specs=P(None, "expert"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((batch, RANKS * TOKENS, HIDDEN), jnp.float32)
    idx = jax.ShapeDtypeStruct((batch, RANKS * TOKENS, TOP_K), jnp.int32)
    if batch == 1:
        assert len(native_calls(jax.make_jaxpr(mapped)(x, idx).jaxpr)) == 2
        return
    with pytest.raises(NotImplementedError, match="in mode 'latency' has no batch"):
        jax.eval_shape(mapped, x, idx)


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_calls_in_flight_on_gpus(layout):
    """Two calls an op, with the lists of their targets."""
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    wanted = importlib.import_module("jax_ep._cuda").gpu_signatures()
    group = dataclasses.replace(make(), backend="cuda")

    def run(x, weights, idx):
        given = {"group": group, "config": LATENCY}
        ticket = jax_ep.dispatch_start(
            x, idx, weights, num_experts=EXPERTS, layout=layout, capacity=32, **given
        )
        ticket, more = ticket.beside(jnp.sin, x)
        out = jax_ep.dispatch_done(ticket)
        weights = out.weights if layout == "expert" else None
        ticket = jax_ep.combine_start(out.tokens, out.handle, weights=weights, **given)
        return jax_ep.combine_done(ticket) + more

    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x, weights, idx = (array.reshape(-1, array.shape[-1]) for array in data())
    calls = native_calls(jax.make_jaxpr(mapped)(x, weights, idx).jaxpr)
    halves_of_ops = [f"jax_ep_latency_{o}_{h}" for o in ("dispatch", "combine") for h in HALVES]
    assert [call["target"] for call in calls] == halves_of_ops
    for call in calls:
        lists = wanted[call["target"]]
        assert len(call["absent"]) == len(lists["operands"])
        assert len(call["results"]) == len(lists["results"])
        assert call["ordered"] and call["in_line"] and not call["scratch"]
        assert (lists["after"], lists["scratch"]) == (["after"], ["token"])
        names = [name for name, _ in call["attributes"]] + ["ordinal"]
        assert sorted(names) == sorted(lists["attributes"])
        assert dict(call["attributes"])["channel"] == 1
    assert dict(calls[0]["attributes"])["capacity"] == 32


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_dispatch_with_its_plan_on_gpus(quantization):
    """One call in throughput mode too, with scratch memory; along a handle there is no plan."""
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    wanted = importlib.import_module("jax_ep._cuda").gpu_signatures()["jax_ep_plan_dispatch"]
    group = dataclasses.replace(make(), backend="cuda")
    given = {"group": group, "quantization": quantization}
    given["config"] = jax_ep.DispatchConfig(mode="throughput")

    def run(x, idx):
        out = jax_ep.dispatch(x, idx, num_experts=EXPERTS, **given)
        again = jax_ep.dispatch(x, handle=out.handle, **given)
        return out.tokens + again.tokens

    mapped = jax.shard_map(
        run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    x, _, idx = (array.reshape(-1, array.shape[-1]) for array in data())
    x = np.zeros((len(x), 128), np.float32)
    whole, *others = native_calls(jax.make_jaxpr(mapped)(x, idx).jaxpr)
    assert whole["target"] == "jax_ep_plan_dispatch" and whole["in_line"] and whole["ordered"]
    assert len(whole["absent"]) == len(wanted["operands"])
    assert len(whole["results"]) == len(wanted["results"])
    names = [name for name, _ in whole["attributes"]] + ["ordinal"]
    assert sorted(names) == sorted(wanted["attributes"])
    (scratch,) = whole["scratch"]
    # The rows that travel, with a scale for each.
    least = len(x) // group.size * (128 + 4) if quantization else 0
    assert least <= scratch.size < least + 2 * 128
    assert [call["target"] for call in others] == ["jax_ep_dispatch"]


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_calls_on_gpus(layout):
    """One call an op, with the lists of its target; gradients call throughput mode."""
    if not _cpu.build_info()["with_cuda"]:
        pytest.skip("this build is without the GPU backend: no nvcc, or JAX_EP_CUDA=OFF")
    wanted = importlib.import_module("jax_ep._cuda").gpu_signatures()
    group = dataclasses.replace(make(), backend="cuda")

    def loss(x, weights, idx):
        out = jax_ep.dispatch(
            x, idx, weights, group=group, num_experts=EXPERTS, layout=layout, config=LATENCY
        )
        again = jax_ep.dispatch(x, handle=out.handle, group=group, config=LATENCY)
        weights = out.weights if layout == "expert" else None
        y = jax_ep.combine(
            out.tokens + again.tokens, out.handle, group=group, weights=weights, config=LATENCY
        )
        return y.sum()

    x, weights, idx = (array.reshape(-1, array.shape[-1]) for array in data())
    mapped = jax.shard_map(
        lambda *a: jax.grad(loss, argnums=(0, 1))(*a),
        mesh=group.mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
        check_vma=False,
    )
    calls = native_calls(jax.make_jaxpr(mapped)(x, weights, idx).jaxpr)
    targets = [call["target"] for call in calls]
    assert targets.count("jax_ep_latency_dispatch") == 1
    assert targets.count("jax_ep_latency_combine") == 1
    backward = ["jax_ep_combine_vjp" if layout == "expert" else "jax_ep_dispatch"]
    backward += ["jax_ep_combine"] * 2  # of both dispatches
    assert targets.count("jax_ep_plan") == 0
    assert sorted(t for t in targets if "latency" not in t) == sorted(
        ["jax_ep_dispatch", *backward]
    )
    for call in calls:
        if call["target"] not in wanted:
            continue
        lists = wanted[call["target"]]
        assert len(call["absent"]) == len(lists["operands"])
        assert len(call["results"]) == len(lists["results"])
        # In the order of all ops in line, which the region's lowering adds operand and result for.
        assert call["ordered"] and not call["scratch"]
        assert (lists["after"], lists["scratch"]) == (["after"], ["token"])
        names = [name for name, _ in call["attributes"]] + ["ordinal"]
        assert sorted(names) == sorted(lists["attributes"])
        assert dict(call["attributes"])["num_sms"] == 0  # as many as it has use for
