"""Training state on a mesh, and the jitted functions that work on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

import jax_ep
from byte_lm.config import ModelConfig, TrainConfig
from byte_lm.data import Corpus
from byte_lm.model import ByteLM

BATCH_AXES = ("data", "expert")


class TrainState(NamedTuple):
    """All that a step changes. With the number of steps done, it is all that a checkpoint needs.

    Attributes:
        params: Parameters that the optimizer trains.
        buffers: The model's other variables: the routers' biases.
        opt_state: State of the optimizer.
    """

    params: nnx.State
    buffers: nnx.State
    opt_state: Any


class Figures(NamedTuple):
    """What one step reports.

    Attributes:
        loss: ``[]`` float32 nats per byte, without the load balancing loss.
        load: ``[E]`` int32 bytes that chose each expert, summed over blocks.
        dropped: ``[]`` float32 share of these choices that were dropped.
    """

    loss: Float32[Array, ""]
    load: Int32[Array, " experts"]
    dropped: Float32[Array, ""]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping, at learning rate 1. The step scales its updates.

    A run by time only estimates its number of steps, so the learning rate is an argument of the step,
    not a schedule compiled into it.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            1.0,
            b1=0.9,
            b2=0.95,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def learning_rate(config: TrainConfig, *, step: int, total_steps: int) -> np.float32:
    """The learning rate of one step: linear warm-up, then a cosine down to a tenth of the peak.

    Args:
        config: Has the peak and the length of the warm-up.
        step: The number of the step, from 1 to ``total_steps``.
        total_steps: Steps of the whole run, as far as that is known now.
    """
    warmup_steps = min(config.warmup_steps, total_steps)
    if step < warmup_steps:
        return np.float32(config.learning_rate * step / warmup_steps)
    done = (step - warmup_steps) / (total_steps + 1 - warmup_steps)
    return np.float32(config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2))


class Trainer:
    """The model, its optimizer and its batches on one mesh.

    Attributes:
        mesh: A mesh with axes "data" and "expert".
        model_config: Configuration of the model.
        config: Configuration of the training.
        abstract_state: Shapes, dtypes and shardings of a ``TrainState``.
        step: ``(state, batch, learning_rate)`` to ``(state, Figures)``; takes the state's memory.
        loss: ``(state, batch)`` to nats per byte, nothing dropped.
        sample: ``(state, tokens [B, S], length, seed, temperature)`` to ``[B, S]``: all bytes from
            position ``length`` on made up by the model.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_config: ModelConfig,
        config: TrainConfig,
        *,
        ranks_per_host: int | None = None,
    ) -> None:
        """Set up; no array is made yet.

        Args:
            mesh: With axes "data" and "expert"; batches are split over both.
            model_config: Configuration of the model.
            config: Configuration of the training.
            ranks_per_host: Ranks along "expert" that count as those of one host, as in
                ``jax_ep.create_group``.

        Raises:
            ValueError: if the batch or the experts do not split over the mesh, the channels over the
                heads, or the ranks over the hosts.
        """
        for name, value, unit, reason in (
            ("--batch-size", config.batch_size, mesh.size, "the devices"),
            ("--num-experts", model_config.num_experts, mesh.shape["expert"], "the ranks"),
            ("--hidden", model_config.hidden, 2 * model_config.num_heads, "twice --num-heads"),
        ):
            if value < 1 or value % unit:
                raise ValueError(
                    f"{name}: expected a positive multiple of {unit}, {reason}; got {value}."
                )
        ranks = mesh.shape["expert"]
        if ranks_per_host is not None and ranks % ranks_per_host:
            raise ValueError(
                f"--ranks-per-host: expected a divisor of the {ranks} ranks, got {ranks_per_host}."
            )
        self.mesh = mesh
        self.model_config = model_config
        self.config = config
        self._group = jax_ep.create_group(mesh, "expert", ranks_per_host=ranks_per_host)
        self._optimizer = make_optimizer(config)
        self._graph = self._make_graph(model_config)
        # For evaluation: the model itself, which drops nothing.
        self._full_graph = self._make_graph(dataclasses.replace(model_config, capacity_factor=None))
        self._batch_sharding = NamedSharding(mesh, P(BATCH_AXES))
        shapes = jax.eval_shape(self._initial_state)
        self._shardings = nnx.get_named_sharding(shapes, mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            shapes,
            self._shardings,
        )
        everywhere = NamedSharding(mesh, P())
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(self._shardings, everywhere)
        )
        self.loss = jax.jit(self._loss, out_shardings=everywhere)
        self.sample = jax.jit(self._sample, out_shardings=everywhere)

    def initial_state(self) -> TrainState:
        """A fresh state, each array made on the devices that hold it."""
        return jax.jit(self._initial_state, out_shardings=self._shardings)()

    def step_on(
        self, state: TrainState, corpus: Corpus, *, step: int, total_steps: int
    ) -> tuple[TrainState, Figures]:
        """``step`` on the batch and at the learning rate of step number ``step``, from 1 on."""
        config = self.config
        batch = corpus.batch(
            seed=config.seed, step=step - 1, batch_size=config.batch_size, seq_len=config.seq_len
        )
        rate = learning_rate(config, step=step, total_steps=total_steps)
        return self.step(state, self.put(batch), rate)

    def put(self, batch: Int32[np.ndarray, "batch seq"]) -> Int32[Array, "batch seq"]:
        """A batch that every process has, split over the mesh."""
        return jax.make_array_from_callback(
            batch.shape, self._batch_sharding, lambda index: batch[index]
        )

    def held_out_loss(
        self, state: TrainState, batches: Iterable[Int32[np.ndarray, "batch seq_plus_one"]]
    ) -> float:
        """Mean nats per byte over ``batches``, which are of one size."""
        mean = float(np.mean([self.loss(state, self.put(batch)) for batch in batches]))
        self.check()
        return mean

    def check(self) -> None:
        """Raise if an op of the group has failed; call it before using the results of a step.

        On GPUs a failed op gives NaN, and steps replayed from CUDA graphs could not say more.

        Raises:
            jax_ep.CommunicationError: if an op has failed.
        """
        self._group.check()

    def _make_graph(self, model_config: ModelConfig) -> nnx.GraphDef[ByteLM]:
        make = functools.partial(ByteLM, model_config, self._group)
        return nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def _initial_state(self) -> TrainState:
        model = ByteLM(self.model_config, self._group, rngs=nnx.Rngs(self.config.seed))
        params, buffers = _variables(model)
        return TrainState(params, buffers, self._optimizer.init(params))

    def _step(
        self,
        state: TrainState,
        batch: Int32[Array, "batch seq_plus_one"],
        learning_rate: Float32[Array, ""],
    ) -> tuple[TrainState, Figures]:
        def objective(params: nnx.State) -> tuple[Array, tuple[Array, jax_ep.MoEAux]]:
            model = nnx.merge(self._graph, params, state.buffers)
            loss, report = _cross_entropy(model, batch)
            total = loss
            if self.model_config.balance == "aux":
                total = total + self.config.aux_weight * report.aux_loss.mean()
            return total, (loss, report)

        grads, (loss, report) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: learning_rate * update, updates)
        params = optax.apply_updates(state.params, updates)
        model = nnx.merge(self._graph, params, state.buffers)
        model.update_router_biases(report.load)
        params, buffers = _variables(model)
        load = report.load.sum(axis=0)
        dropped = report.num_dropped.sum() / jnp.maximum(load.sum(), 1)
        return TrainState(params, buffers, opt_state), Figures(loss, load, dropped)

    def _loss(
        self, state: TrainState, batch: Int32[Array, "batch seq_plus_one"]
    ) -> Float32[Array, ""]:
        return _cross_entropy(nnx.merge(self._full_graph, state.params, state.buffers), batch)[0]

    def _sample(
        self,
        state: TrainState,
        tokens: Int32[Array, "batch seq"],
        length: Int32[Array, ""],
        seed: Int32[Array, ""],
        temperature: Float32[Array, ""],
    ) -> Int32[Array, "batch seq"]:
        model = nnx.merge(self._full_graph, state.params, state.buffers)
        positions = jnp.arange(tokens.shape[1])

        def extend(length: Array, tokens: Array) -> Array:
            mask = jnp.broadcast_to(positions < length, tokens.shape)
            logits = model(tokens, mask=mask)[0][:, length - 1]
            step_key = jax.random.fold_in(jax.random.key(seed), length)
            chosen = jax.random.categorical(step_key, logits / temperature)
            return tokens.at[:, length].set(chosen.astype(tokens.dtype))

        return jax.lax.fori_loop(length, tokens.shape[1], extend, tokens)


def _variables(model: ByteLM) -> tuple[nnx.State, nnx.State]:
    """The variables that the optimizer trains, and the others."""
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))


def _cross_entropy(
    model: ByteLM, batch: Int32[Array, "batch seq_plus_one"]
) -> tuple[Float32[Array, ""], jax_ep.MoEAux]:
    """Nats per byte, and the experts' statistics."""
    logits, report = model(batch[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return nats.mean(), report
