"""The model and the step of ``examples/pretrain``, against a dense model on one device."""

from __future__ import annotations

import pretrain_cases  # isort: skip  (first: it makes examples importable)

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dense_decoder
from examples.pretrain import blockwise, shares, step
from examples.pretrain.config import ConfigError, OptimizerConfig, load
from examples.pretrain.optimizer import learning_rate
from spmd import need_devices

pytestmark = pytest.mark.one_process("trains in one process")

NUM_STEPS = 50
BATCHES = [pretrain_cases.batch(pretrain_cases.small(), 100 + seed) for seed in range(NUM_STEPS)]
SCAN = ("parallel.fsdp=4", "model.remat=attention")
# Ways to run a model, and the model where it is another one.
WAYS = {
    "scan": SCAN,
    "unrolled, 2 x 2 x 2, bounded": (
        "parallel.data=2",
        "model.scan_layers=false",
        "model.remat=none",
        "model.rank_capacity_factor=4.0",
    ),
    "mtp, tensor, full remat, accumulated": (
        "parallel.tensor=2",
        "model.remat=full",
        "data.accumulate=2",
        "model.num_layers=1",
        "model.num_dense_layers=0",
        "model.q_lora_rank=0",
        "model.mtp=true",
        "model.rope_factor=4",
        "model.rope_original_seq_len=16",
    ),
}


@functools.cache
def make(*overrides: str) -> step.Setup:
    need_devices(8)
    return step.setup(pretrain_cases.small(*overrides), jax.devices()[:8])


@functools.cache
def trained(*overrides: str):
    setup = make(*overrides)
    return pretrain_cases.train(setup, pretrain_cases.made_up(setup), BATCHES)


@functools.cache
def dense(way: tuple[str, ...], model: Any):
    """What the same steps give on one device, all of it written out."""
    setup = make(*way)
    of_optimizer = setup.config.optimizer
    state = jax.device_get(pretrain_cases.made_up(setup))
    params, bias = state.params, state.router_bias

    def objective(params, bias, batch):
        report = dense_decoder.loss(model, params, bias, batch)
        total = report.loss + model.sequence_loss_weight * report.sequence_loss
        return total + (model.mtp_loss_weight * report.mtp_loss if model.mtp else 0), report

    optimizer = optax.adamw(
        learning_rate(of_optimizer),
        b1=of_optimizer.b1,
        b2=of_optimizer.b2,
        weight_decay=of_optimizer.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "scale" not in str(path[-1]), params
        ),
    )

    @jax.jit
    def one(params, bias, of_params, batch):
        grads, report = jax.grad(objective, has_aux=True)(params, bias, batch)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g / jnp.maximum(1, norm / of_optimizer.clip_norm), grads)
        updates, of_params = optimizer.update(grads, of_params, params)
        load = report.load.astype(jnp.float32)
        bias += model.bias_update_rate * jnp.sign(load.mean(axis=1, keepdims=True) - load)
        return optax.apply_updates(params, updates), bias, of_params, (report, norm)

    of_params, found = optimizer.init(params), []
    for batch in BATCHES:
        params, bias, of_params, reported = one(params, bias, of_params, batch)
        found.append(jax.device_get(reported))
    return params, bias, found


def dense_of(way: tuple[str, ...]):
    """The dense steps of the model of ``way``, which other ways may share."""
    model = make(*way).config.model
    how = {"remat": "none", "scan_layers": True, "rank_capacity_factor": 0.0}
    same = dataclasses.replace(model, **how)
    base = dataclasses.replace(make(*SCAN).config.model, **how)
    return dense(SCAN if same == base else way, same)


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_a_dense_model(way):
    """Losses, statistics and, at the end, parameters, over 50 steps.

    That is, as long as each token has the same experts. Of two with nearly equal scores, rounding may
    choose the other one after some steps. From then on only the losses are near each other.
    """
    state, found = trained(*WAYS[way])
    params, bias, wanted = dense_of(WAYS[way])
    num_same = 0
    for step_index, (metrics, (report, norm)) in enumerate(zip(found, wanted, strict=True)):
        num_same += num_same == step_index and np.array_equal(metrics["load"], report.load)
        near = 1e-4 if num_same == step_index + 1 else 5e-3
        np.testing.assert_allclose(metrics["loss"], report.loss, rtol=near)
        if near == 1e-4:
            np.testing.assert_allclose(metrics["aux_loss"], 0.01 * report.sequence_loss, rtol=1e-4)
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
        assert ("mtp_loss" in metrics) == (report.mtp_loss is not None)
        if report.mtp_loss is not None:
            np.testing.assert_allclose(metrics["mtp_loss"], report.mtp_loss, rtol=near)
        assert metrics["num_dropped"] == metrics["skipped"] == 0
    print(f"{num_same} of {len(found)} steps with the same experts")
    assert num_same >= 4
    assert found[-1]["loss"] < found[0]["loss"]
    assert np.abs(bias).max() > 0.01
    if num_same == len(found):
        np.testing.assert_allclose(state.router_bias, bias, atol=1e-7)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3), state.params, params)
        # AdamW divides by the size of gradients, so weights with tiny ones may lie further apart.
        far = jax.tree.map(lambda a, b: (np.abs(a - b) > 2e-4).mean(), state.params, params)
        assert max(jax.tree.leaves(far)) < 1e-3


def test_rows_in_float8():
    """The loss is near that with exact rows, and not the same one."""
    one_layer = ("model.num_layers=1", "model.num_dense_layers=0", "model.remat=none")
    setup = make("model.hidden=128", "model.fp8_dispatch=true", "parallel.fsdp=4", *one_layer)
    state = pretrain_cases.made_up(setup)
    given = jax.device_get(state)
    loss = functools.partial(dense_decoder.loss, setup.config.model)
    exact = jax.jit(loss)(given.params, given.router_bias, BATCHES[0]).loss
    _, found = pretrain_cases.train(setup, state, BATCHES[:1] * 4)
    difference = abs(found[0]["loss"] / exact - 1)
    assert 1e-5 < difference < 1e-2
    assert found[3]["loss"] < found[0]["loss"] - 0.1 and not any(one["skipped"] for one in found)


def test_learning_rate_of_each_step():
    """No step has a rate of zero, and the last one has the lowest."""
    config = OptimizerConfig(peak_lr=2.0, warmup_steps=4, total_steps=12, min_lr_ratio=0.25)
    rates = [float(learning_rate(config)(count)) for count in range(12)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(1, 9) / 8))
    np.testing.assert_allclose(rates[4:], 2.0 * (0.25 + 0.75 * cosine), rtol=1e-6)


def test_initial_weights_learn():
    setup = make(*SCAN)
    state, found = pretrain_cases.train(setup, setup.init(0), BATCHES[:1] * 4)
    assert abs(found[0]["loss"] - np.log(64)) < 1 and found[3]["loss"] < found[0]["loss"] - 0.1
    assert state.step == 4
    jax.tree.map(lambda x: np.testing.assert_array_equal(x.dtype, np.float32), state.params)


def test_metrics_say_what_the_batch_was():
    metrics = trained(*SCAN)[1][0]
    segments = BATCHES[0]["segments"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert metrics["tokens"] == same.sum()
    share = metrics["load"] / metrics["load"].sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=1) / np.log(share.shape[1])
    np.testing.assert_allclose(metrics["load_entropy"], entropy.mean(), rtol=1e-5)
    assert (metrics["load"].sum(axis=1) == 2 * (segments[:, :-1] > 0).sum()).all()


def test_shares_of_the_time_of_a_step(tmp_path):
    """From a profile of CPU devices: each runs two layers with experts, forward, again and backward."""
    setup = make(*SCAN)
    pretrain_cases.train(setup, pretrain_cases.made_up(setup), BATCHES[:1])
    batch = jax.device_put(BATCHES[0], setup.batch_sharding)
    state = pretrain_cases.made_up(setup)
    with jax.profiler.trace(str(tmp_path)):
        state, metrics = setup.train_step(state, batch)
        jax.block_until_ready(metrics)
    text = setup.train_step.lower(state, batch).compile().as_text()
    devices = shares._cpu_events(tmp_path, text)
    assert len(devices) == 8
    for events in devices.values():
        kinds = [event.kind for event in events]
        counts = {kind: kinds.count(kind) for kind in ("plan", "dispatch", "combine")}
        assert counts == {"plan": 2, "dispatch": 6, "combine": 4}
    found = shares.read(tmp_path, lambda: text)
    of_kinds = [found[f"{kind}_share"] for kind in ("plan", "dispatch", "combine")]
    assert min(of_kinds) > 0 and max(of_kinds) <= found["exchange_share"] < 1
    assert sum(of_kinds) >= found["exchange_share"] * 0.999 and "exposed_share" not in found


def test_a_step_without_finite_loss_is_skipped():
    """It changes nothing but the number of steps; the next step goes on."""
    setup = make(*SCAN)
    put = functools.partial(jax.device_put, device=setup.batch_sharding)
    state = pretrain_cases.made_up(setup)
    broken = jax.tree.map(lambda x: x, state.params)
    broken["embedding"] = broken["embedding"].at[:, 3].set(jnp.inf)
    broken["embedding"] = jax.device_put(broken["embedding"], state.params["embedding"].sharding)
    state = step.TrainState(state.step, broken, state.router_bias, state.opt_state)
    before = jax.device_get(state)
    state, metrics = setup.train_step(state, put(BATCHES[0]))
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    after = jax.device_get(state)
    assert after.step == 1
    for name in ("params", "router_bias", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_states_fit_any_mesh():
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), make(*way).abstract_state())
        for way in (SCAN, WAYS["unrolled, 2 x 2 x 2, bounded"])
    ]
    assert shapes[0] == shapes[1]
    state, wanted = trained(*SCAN)[0], make(*SCAN).abstract_state()
    placed = jax.tree.map(lambda x, like: x.sharding == like.sharding, state, wanted)
    assert all(jax.tree.leaves(placed))
    # Every matrix is in as many parts as there are ranks, and so is what the optimizer keeps of it.
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if "scale" not in str(path[-1]) and leaf.size > 1:
                assert leaf.addressable_shards[0].data.size == leaf.size // 8, path


def test_segments_do_not_see_each_other():
    """A loss does not depend on tokens before the segments of its targets, if they are in others."""
    setup = make(*SCAN)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 64, BATCHES[0]["tokens"].shape, dtype=np.int32)
    changed = tokens.copy()
    changed[:, :10] = rng.integers(0, 64, changed[:, :10].shape)
    one = np.ones_like(tokens)
    apart = np.maximum(10 - np.arange(tokens.shape[1]), 0) + 1  # those of one token have no target

    def loss(tokens, segments):
        batch = {"tokens": tokens, "segments": segments}
        state = pretrain_cases.made_up(setup)
        return pretrain_cases.train(setup, state, [batch])[1][0]["loss"]

    later = apart.astype(np.int32) * one
    np.testing.assert_allclose(loss(tokens, later), loss(changed, later), rtol=1e-6)
    assert abs(loss(tokens, one) - loss(changed, one)) > 1e-3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_pass_keeps_gathered_weights(remat):
    """What the forward pass hands over to the backward pass has no layer's weights in bfloat16."""
    setup = make(f"model.remat={remat}", "model.dtype=bfloat16", "parallel.fsdp=4")
    traced = setup.train_step.trace(setup.abstract_state(), setup.abstract_batch())
    text = str(traced.jaxpr)
    assert "f32[2,32,20]" in text  # as stored: a projection of both layers
    for shape in ("32,16", "16,48", "32,20", "16,56", "8,32,16", "8,16,32"):
        assert f"bf16[2,{shape}]" not in text, shape
    assert "bf16[32,20]" in text and "bf16[8,32,16]" in text


def test_attention_is_kept():
    """With its results kept, no pass computes a layer's softmax again but the backward scan."""
    counts = {}
    for remat in ("handle", "attention"):
        setup = make(f"model.remat={remat}", "parallel.fsdp=4")
        traced = setup.train_step.trace(setup.abstract_state(), setup.abstract_batch())
        counts[remat] = str(traced.jaxpr).count("reduce_max[")
    assert counts["attention"] == counts["handle"] - 2  # of dense layers and of those with experts


@pytest.mark.parametrize("block", [4, 16])
def test_blockwise_attention(block):
    """Values and gradients, with queries and keys wider than values, and segments across blocks."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 16, 3, c)).astype(np.float32) for c in (6, 6, 4))
    segments = np.array([[1] * 3 + [2] * 8 + [3] * 3 + [0] * 2, [1] * 16], np.int32)

    def all_scores(q, k, v):
        seen = np.tril(segments[:, :, None] == segments[:, None, :])
        scores = jnp.where(seen[:, None], jnp.einsum("bqnc,bknc->bnqk", q, k) * 0.3, -jnp.inf)
        return jnp.einsum("bnqk,bknc->bqnc", jax.nn.softmax(scores), v)

    def in_blocks(q, k, v):
        return blockwise.attention(q, k, v, segments, 0.3, block)

    def both(run):
        value, back = jax.vjp(run, q, k, v)
        return value, back(jnp.cos(value))

    found, wanted = jax.jit(lambda: (both(in_blocks), both(all_scores)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, wanted)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.top=4", "'top' is none of vocab_size"),
        ("model.topk=4", "do you mean top_k?"),
        ("moe.top_k=4", "'moe' is none of model, parallel"),
        ("model.top_k", "expected section.key=value"),
        ("model.top_k=many", "model.top_k: expected a value of int, got 'many'"),
        ("model.mtp=1", "model.mtp: expected a value of bool, got 1"),
        ("model.dtype=float16", "model.dtype: expected one of 'bfloat16', 'float32'"),
        ("model.top_k=9", "model.top_k: expected at most the 8 experts allowed, got 9"),
        ("model.num_dense_layers=3", "expected fewer than the 3 layers, got 3"),
        ("model.num_expert_groups=3", "expected a divisor of 16 experts, got 3"),
        ("model.rank_capacity_factor=0.5", "expected 0, or 1 or more, got 0.5"),
        (
            "data.seq_len=100000",
            "data.seq_len: expected at most model.max_seq_len, 1024, got 100000",
        ),
        ("data.accumulate=3", "data.batch_size: expected a multiple of accumulate, 3, got 16"),
        ("parallel.data=-1", "at most one −1"),
    ],
)
def test_wrong_configurations(override, text):
    with pytest.raises(ConfigError) as raised:
        load("tiny", [override])
    assert text in str(raised.value)


def test_long_sequences_have_blocks():
    """Attention and the loss work on divisors of the length."""
    overrides = ["model.max_seq_len=8192", "data.seq_len=4099"]
    with pytest.raises(ConfigError, match="expected at most 1024, or a multiple of 128"):
        load("tiny", overrides)
    assert load("tiny", [*overrides, "data.seq_len=4224"]).data.seq_len == 4224


def test_unknown_configuration():
    with pytest.raises(ConfigError, match="expected one of 16b, 1b, 671b, tiny, or a path"):
        load("2b")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["parallel.fsdp=3"], "sizes that multiply to the 8 devices, got data=1 × fsdp=3"),
        (["parallel.expert=3"], "parallel: expected sizes that multiply to the 8 devices"),
        (["data.batch_size=12"], "data.batch_size: expected a multiple of 8"),
        (["data.accumulate=4"], "data.batch_size: expected a multiple of 32"),
        (["model.hidden=36"], "model.hidden: expected a multiple of 8"),
        (["parallel.tensor=8", "parallel.expert=1"], "model.num_heads: expected a multiple of 8"),
    ],
)
def test_configurations_that_do_not_fit_the_devices(overrides, text):
    need_devices(8)
    with pytest.raises(ConfigError) as raised:
        make(*overrides)
    assert text in str(raised.value)
