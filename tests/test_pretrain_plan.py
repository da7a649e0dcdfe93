"""The plan of ``examples/pretrain``: what it counts, what it compiles, and what it says."""

from __future__ import annotations

import pretrain_cases  # isort: skip  (first: it makes examples importable)

import dataclasses
import importlib.metadata
import json
import os

import pytest

import gpu_compiler
from examples.pretrain import costs, flops, h200, plan
from examples.pretrain.config import load
from jax_ep.scale import H200

pytestmark = pytest.mark.one_process("compiles a program, and runs none")

PROGRAM = pretrain_cases.ROOT / "tests/support/pretrain_plan.py"
POD = {"data": 1, "fsdp": 4, "expert": 64, "tensor": 1}
WEIGHTS = {"experts": 664e9, "others": 18e9}


def test_weights_are_those_of_the_models_that_they_are_named_after():
    """A token of DeepSeek-V3 uses 37 billion weights; our count leaves out the embedding alone."""
    without_mtp = load("671b", ["model.mtp=false"]).model
    assert flops.active_weights(without_mtp) / 1e9 == pytest.approx(37 - 0.9, abs=0.7)
    assert flops.active_weights(load("16b").model) / 1e9 == pytest.approx(2.4, abs=0.2)


def test_places():
    """Neighbours fill hosts; ranks that are a host or more apart have one each."""
    assert costs.Place.of(64, 1, 8) == costs.Place(hosts=8, on_host=8)
    assert costs.Place.of(4, 64, 8) == costs.Place(hosts=4, on_host=1)
    assert costs.Place.of(4, 2, 8) == costs.Place(hosts=1, on_host=4)
    nic, nvlink = 1e9 * H200.nic_gbs, 1e9 * H200.nvlink_gbs  # bytes in a second
    # NICs share what comes from other hosts. Eight of them outrun NVLink.
    for place, size, wanted in (
        (costs.Place(8, 4), nic, (7 / 8 / 4, "network")),
        (costs.Place(8, 8), nvlink, (7 / 8, "NVLink")),
        (costs.Place(4, 1), nic, (3 / 4, "network")),
        (costs.Place(1, 4), nvlink, (3 / 4, "NVLink")),
    ):
        seconds, link = place.gather(size)
        assert (pytest.approx(seconds), link) == wanted, place
    assert costs.Place(1, 1).gather(1e12)[0] == 0


def seconds(estimate: costs.Estimate, name: str) -> float:
    (found,) = [part.seconds for part in estimate.parts if part.name.startswith(name)]
    return found


def test_time_of_a_pod():
    """By hand: 2 · 4 passes · 4096 tokens · 59 layers · 8 experts · 3 · 7168 · 2048 at 640 TFLOP/s."""
    config = load("671b")
    found = costs.estimate(config, POD, WEIGHTS, per_host=8)
    by_hand = 2 * 4 * 4096 * 59 * 8 * 3 * 7168 * 2048 / 640e12
    assert seconds(found, "experts") == pytest.approx(by_hand)
    gathers = 3 * 2 * WEIGHTS["experts"] / 64 * (3 / 4) / 47e9
    assert seconds(found, "weights of experts (network)") == pytest.approx(gathers)
    parts = dict.fromkeys(("compute", "rows", "weights"), 0.0)
    for part in found.parts:
        parts[part.kind] += part.seconds
    assert found.step_s == max(parts["compute"], parts["weights"]) + parts["rows"]
    assert found.best_s == max(parts["compute"], parts["weights"] + parts["rows"])
    assert found.tokens_per_s == pytest.approx(256 * 4096 / found.step_s)
    useful = flops.flops_per_token(config.model, seq_len=4096) * 4096
    assert found.mfu == pytest.approx(useful / found.step_s / 989e12)
    assert found.bound in [part.name for part in found.parts]


@pytest.mark.parametrize(
    ("override", "part", "less"),
    [
        ("model.fp8_dispatch=false", "rows", False),
        ("model.remat=none", "experts", True),
        ("model.remat=handle", "attention", False),
        ("model.remat=full", "rows", False),
        ("model.num_expert_groups=1", "rows", False),
    ],
)
def test_what_options_cost(override, part, less):
    base = costs.estimate(load("671b"), POD, WEIGHTS, per_host=8)
    overrides = [override] + ["model.top_k_groups=1"] * (override == "model.num_expert_groups=1")
    other = costs.estimate(load("671b", overrides), POD, WEIGHTS, per_host=8)
    assert (seconds(other, part) < seconds(base, part)) == less
    assert seconds(other, part) != seconds(base, part)


def test_batches_follow_the_number_of_ranks():
    config = load("16b")
    assert plan.with_sequences(config, 8, None).data.batch_size == 32
    assert plan.with_sequences(config, 64, None).data.batch_size == 64
    assert plan.with_sequences(config, 8, 2).data.batch_size == 16
    halved = load("16b", ["parallel.tensor=2", "data.accumulate=2"])
    assert plan.with_sequences(halved, 8, None).data.batch_size == 32


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: iter(()))
    before = dict(os.environ)
    with pytest.raises(h200.NoCompilerError) as raised:
        h200.prepare()
    version = importlib.metadata.version("jaxlib")
    assert f"pip install --no-deps --target build/cuda_plugin jax-cuda13-plugin=={version}" in str(
        raised.value
    )
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_step_compiles_for_h200s():
    """Its memory is that of the arrays, and weights travel in bfloat16, gradients in parts."""
    said = json.loads(gpu_compiler.run(str(PROGRAM)))
    found, moved = said["plan"], said["moved"]
    memory, num_weights = found["memory"], sum(found["num_weights"].values())
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    # Three float32 arrays in eight parts; norms, which are whole everywhere, and the batch are small.
    assert memory["arguments"] == pytest.approx(12 * num_weights / 8, rel=0.02)
    assert memory["outputs"] < 1e4 < memory["temporaries"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    # The largest matrices: a rank's two experts, and the projection of queries. The router's is exact.
    experts = 2 * 128 * 128
    assert moved["all-gather"] == {"bf16": experts, "f32": 128 * 8}
    assert moved["reduce-scatter"]["bf16"] == experts
    assert max(moved["all-reduce"].values()) < 1000  # norms, losses and statistics
    assert "fsdp=2 expert=4" in said["table"] and "bound by" in said["table"]
    assert "weights of experts (NVLink)" in said["table"]


def test_plans_as_data():
    """What JSON has, without compiling."""
    estimate = costs.estimate(load("671b"), POD, WEIGHTS, per_host=8)
    memory = plan.Memory(arguments=1, temporaries=2, outputs=3, workspaces=4)
    found = plan.Plan("671b", 32, 8, POD, 1, 1, 4096, {}, memory, estimate, 1.0).as_dict()
    assert found["memory"]["total"] == 10 and found["time"]["mfu"] == estimate.mfu
    assert found["time"]["parts"][0] == dataclasses.asdict(estimate.parts[0])
    assert json.loads(json.dumps(found)) == found | {"time": json.loads(json.dumps(found["time"]))}
