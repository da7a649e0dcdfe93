"""A model for tests of ``examples/pretrain`` that compiles in a second: a table of the next token.

``setup`` gives the same interface as ``examples.pretrain.step.setup``, and imports nothing of the
decoder's. Losses can be made not finite, and the group can fail.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from examples.pretrain import parallel
from examples.pretrain.config import Config, load
from examples.pretrain.step import Setup, TrainState, assemble

_EXPERTS = 4


class Group:
    """Counts its checks, and fails from then on that ``failed`` is set."""

    def __init__(self) -> None:
        self.failed = False
        self.num_checks = 0

    def check(self) -> None:
        self.num_checks += 1
        if self.failed:
            raise jax_ep.CommunicationError("rank 0, op dispatch: a failure for a test")


def config(*changes: str) -> Config:
    """The configuration "tiny", with a small vocabulary and short rows."""
    small = ["model.vocab_size=304", "data.seq_len=16", "data.batch_size=8", "parallel.expert=1"]
    steps = ["optimizer.warmup_steps=1", "optimizer.total_steps=8", "optimizer.peak_lr=0.3"]
    run = ["run.log_every=1", "run.save_every=4", "run.eval_every=4", "run.eval_batches=2"]
    return load("tiny", [*small, *steps, *run, *changes])


def setup(
    config: Config, devices: Sequence[Any] | None = None, *, bad_steps: Sequence[int] = ()
) -> Setup:
    """As ``step.setup``; the loss of the steps in ``bad_steps``, from 1 on, is NaN."""
    mesh: Mesh = parallel.make_mesh(config, devices)
    optimizer = optax.adam(config.optimizer.peak_lr)
    vocab = config.model.vocab_size

    def new_state(seed: jax.Array) -> TrainState:
        table = jax.random.normal(jax.random.key(seed), (vocab, vocab)) * 0.1
        params = {"table": table}
        bias = jnp.zeros((1, _EXPERTS))
        return TrainState(jnp.int32(0), params, bias, optimizer.init(params))

    def loss_of(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        tokens, segments = batch["tokens"], batch["segments"]
        mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        logits = params["table"][tokens[:, :-1]]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        count = mask.sum(dtype=jnp.int32)
        return jnp.where(mask, nats, 0).sum() / jnp.maximum(count, 1), count

    def metrics_of(loss: jax.Array, count: jax.Array) -> dict[str, jax.Array]:
        load = jnp.full((1, _EXPERTS), count // _EXPERTS)
        zero = jnp.int32(0)
        return {
            "loss": loss,
            "aux_loss": jnp.float32(0),
            "tokens": count,
            "num_dropped": zero,
            "load_entropy": jnp.float32(1),
            "load": load,
        }

    def train(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        step = state.step + 1
        (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        bad = jnp.isin(step, jnp.array([*bad_steps, -1]))
        loss = jnp.where(bad, jnp.nan, loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state
        old = state.params, state.opt_state
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)
        metrics = metrics_of(loss, count) | {
            "grad_norm": optax.tree.norm(grads),
            "skipped": bad.astype(jnp.int32),
        }
        return TrainState(step, params, state.router_bias, opt_state), metrics

    def evaluate(state: TrainState, batch: Any) -> dict[str, jax.Array]:
        return metrics_of(*loss_of(state.params, batch))

    shapes = jax.eval_shape(new_state, jax.ShapeDtypeStruct((), jnp.uint32))
    at = jax.tree.map(
        lambda leaf: NamedSharding(mesh, P(None, "fsdp") if leaf.shape == (vocab, vocab) else P()),
        shapes,
    )
    group: Any = Group()
    decoder: Any = None
    return assemble(config, mesh, group, decoder, new_state, at, train, evaluate)
