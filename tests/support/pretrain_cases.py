"""Small configurations and batches for tests of ``examples/pretrain``, which tests import after it."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.pretrain import config as configs  # noqa: E402

SMALL = (
    "model.vocab_size=64",
    "model.hidden=32",
    "model.num_layers=3",
    "model.num_dense_layers=1",
    "model.num_heads=4",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=6",
    "model.dense_intermediate=24",
    "model.moe_intermediate=16",
    "model.num_experts=8",
    "model.top_k=2",
    "model.num_expert_groups=4",
    "model.top_k_groups=2",
    "model.routed_scaling=1.5",
    "model.bias_update_rate=0.01",
    "model.sequence_loss_weight=0.01",
    "parallel.expert=2",
    "optimizer.peak_lr=0.01",
    "optimizer.warmup_steps=2",
    "optimizer.total_steps=10",
    "optimizer.clip_norm=2.0",
    "data.batch_size=16",
    "data.seq_len=24",
)


def small(*overrides: str) -> Any:
    """A configuration of few channels, with values changed as ``config.load`` takes them."""
    return configs.load("tiny", [*SMALL, *overrides])


def batch(config: Any, seed: int) -> dict[str, np.ndarray]:
    """Rows of several documents, with padding at the end of each."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    starts = rng.random(shape) < 0.1
    starts[:, 0] = True
    segments = starts.cumsum(axis=1, dtype=np.int32)
    lengths = rng.integers(shape[1] // 2, shape[1] + 1, shape[:1])
    segments[np.arange(shape[1]) >= lengths[:, None]] = 0
    return {"tokens": tokens, "segments": segments}


def made_up(setup: Any) -> Any:
    """A first state on the mesh of ``setup``, the same on any mesh, and made without compiling."""
    rng = np.random.default_rng(0)

    def weight(path: Any, like: Any) -> np.ndarray:
        values = rng.standard_normal(like.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + values / 10
        return values / np.sqrt(like.shape[-2], dtype=np.float32)

    state = setup.abstract_state()
    params = jax.tree_util.tree_map_with_path(weight, state.params)
    zeros = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), state)
    state = dataclasses.replace(zeros, params=params)
    shardings = jax.tree.map(lambda like: like.sharding, setup.abstract_state())
    return jax.device_put(state, shardings)


def train(
    setup: Any, state: Any, batches: Sequence[dict[str, np.ndarray]]
) -> tuple[Any, list[Any]]:
    """The state after training on ``batches``, and the metrics of each step."""
    found = []
    for one in batches:
        state, metrics = setup.train_step(state, jax.device_put(one, setup.batch_sharding))
        found.append(jax.device_get(metrics))
    return state, found
