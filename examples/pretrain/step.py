"""Training state on a mesh, and the jitted steps that work on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

import jax_ep
from examples.pretrain import parallel
from examples.pretrain.config import Config, ConfigError, ModelConfig
from examples.pretrain.loss import Prediction, cross_entropy
from examples.pretrain.model import Decoder, Hidden, Report, segments_mask
from examples.pretrain.optimizer import make_optimizer, state_shardings

# "tokens" [B, S + 1] and "segments" [B, S + 1], both int32. Segment 0 is padding, and every document of
# a packed row has another number. A token's target is the next one of its segment.
Batch = dict[str, Int32[Array, "batch seq_plus_one"]]
Metrics = dict[str, Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "router_bias", "opt_state"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint needs. Its shapes are the same on any mesh.

    Attributes:
        step: Steps taken, skipped ones included; int32.
        params: Master weights in float32, as model.py says.
        router_bias: ``[L, E]`` float32; the balancing rule moves it, not the optimizer.
        opt_state: State of the optimizer. It counts the steps that were not skipped.
    """

    step: Int32[Array, ""]
    params: Any
    router_bias: Float32[Array, "layers experts"]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model, its optimizer and its steps on one mesh.

    Attributes:
        config: The configuration.
        mesh: The mesh.
        group: The group of the experts. Call ``group.check()`` before you trust a step's results.
        decoder: The model.
        batch_sharding: Of both arrays of a batch.
        init: Seed to a new state, each part made on the device that holds it.
        abstract_state: Shapes, dtypes and shardings of a state, such as for reading a checkpoint.
        train_step: ``(state, batch)`` to the next state and metrics. It takes the state's memory.
        eval_step: ``(state, batch)`` to metrics.
    """

    config: Config
    mesh: Mesh
    group: jax_ep.Group
    decoder: Decoder
    batch_sharding: NamedSharding
    init: Callable[[int], TrainState]
    abstract_state: Callable[[], TrainState]
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        data = self.config.data
        shape = (data.batch_size, data.seq_len + 1)
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return {"tokens": array, "segments": array}


def setup(config: Config, devices: Sequence[Any] | None = None) -> Setup:
    """Set up training over ``devices``, or over all of them; no array is made yet.

    All processes of a job call it at the same time, since it makes a group.

    Raises:
        ConfigError: if the configuration does not fit the number of devices.
    """
    mesh = parallel.make_mesh(config, devices)
    _check_attention(config.model, mesh)
    group = jax_ep.create_group(mesh, "expert")
    decoder = Decoder(config.model, mesh, group)
    optimizer = make_optimizer(config.optimizer)

    def new_state(seed: Array) -> TrainState:
        params = decoder.init(jax.random.key(seed))
        bias = decoder.init_router_bias()
        return TrainState(jnp.int32(0), params, bias, optimizer.init(params))

    shapes = jax.eval_shape(new_state, jax.ShapeDtypeStruct((), jnp.uint32))
    of_params = parallel.shardings(shapes.params, mesh)
    of_optimizer = state_shardings(optimizer, shapes.opt_state, of_params, mesh)
    everywhere: Any = NamedSharding(mesh, P())
    at = TrainState(everywhere, of_params, everywhere, of_optimizer)
    steps = _Steps(config, mesh, decoder, optimizer, of_params)
    return assemble(config, mesh, group, decoder, new_state, at, steps.train, steps.evaluate)


def _check_attention(model: ModelConfig, mesh: Mesh) -> None:
    if model.attention != "cudnn":
        return
    # Devices that are there to compile for have no backend, which JAX asks for cuDNN's version.
    device = mesh.devices.flat[0]
    if device.platform != "gpu" or device not in jax.devices():
        raise ConfigError(
            f"model.attention: 'cudnn' needs GPUs that are here, got {device}; take 'blockwise'."
        )
    if model.dtype == "float32":
        raise ConfigError("model.attention: 'cudnn' needs model.dtype = 'bfloat16', got 'float32'.")


def assemble(
    config: Config,
    mesh: Mesh,
    group: jax_ep.Group,
    decoder: Decoder,
    new_state: Callable[[Array], TrainState],
    at: TrainState,
    train: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    evaluate: Callable[[TrainState, Batch], Metrics],
) -> Setup:
    """A setup whose functions are jitted, with the shardings ``at`` of the state."""
    shapes = jax.eval_shape(new_state, jax.ShapeDtypeStruct((), jnp.uint32))
    everywhere: Any = NamedSharding(mesh, P())
    batch_sharding = NamedSharding(mesh, P(parallel.BATCH_AXES, None))
    make = jax.jit(new_state, out_shardings=at)
    return Setup(
        config=config,
        mesh=mesh,
        group=group,
        decoder=decoder,
        batch_sharding=batch_sharding,
        init=lambda seed: make(jnp.uint32(seed)),
        abstract_state=lambda: jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            at,
        ),
        train_step=jax.jit(
            train,
            in_shardings=(at, batch_sharding),
            out_shardings=(at, everywhere),
            donate_argnums=0,
        ),
        eval_step=jax.jit(evaluate, in_shardings=(at, batch_sharding), out_shardings=everywhere),
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps, not yet jitted."""

    config: Config
    mesh: Mesh
    decoder: Decoder
    optimizer: optax.GradientTransformation
    of_params: Any

    def train(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step. Without finite loss and gradients, only the number of steps changes."""
        grads, metrics = self._gradients(state, batch)
        norm = optax.tree.norm(grads)
        fine = jnp.isfinite(metrics["loss"] + metrics["aux_loss"]) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = self.config.model.bias_update_rate
        move = functools.partial(jax_ep.routing.update_bias, rate=rate)
        bias = jax.vmap(move)(state.router_bias, metrics["load"])
        new = (params, bias, opt_state)
        old = (state.params, state.router_bias, state.opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old)
        metrics |= {"grad_norm": norm, "skipped": (~fine).astype(jnp.int32)}
        return TrainState(state.step + 1, *kept), metrics

    def evaluate(self, state: TrainState, batch: Batch) -> Metrics:
        """The same losses and statistics, and nothing moves."""

        def parts(*args: Any) -> Metrics:
            return self._objective(*args)[1]

        return self._metrics(self._over_micro_batches(parts, state, batch), batch)

    def _gradients(self, state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        """Gradients of the whole batch, each where its parameter is, and the metrics."""
        of_batch = jax.grad(self._objective, has_aux=True)

        def gradients(*args: Any) -> tuple[Any, Metrics]:
            grads, parts = of_batch(*args)
            return jax.lax.with_sharding_constraint(grads, self.of_params), parts

        grads, parts = self._over_micro_batches(gradients, state, batch)
        return grads, self._metrics(parts, batch)

    def _over_micro_batches(
        self, of_batch: Callable[..., Any], state: TrainState, batch: Batch
    ) -> Any:
        """The sum of ``of_batch(params, router_bias, micro-batch, number of all targets)``."""
        count = self.config.data.accumulate
        num = jnp.maximum(_num_targets(batch), 1)

        def of_micro(micro: Batch) -> Any:
            return of_batch(state.params, state.router_bias, micro, num)

        if count == 1:
            return of_micro(batch)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            micro = {name: parallel.split_batch(x, self.mesh) for name, x in micro.items()}
            return jax.tree.map(jnp.add, total, of_micro(micro)), None

        def micro_batches(x: Array) -> Array:
            # Every device keeps its own sequences: a micro-batch has each count-th one.
            return jnp.moveaxis(x.reshape(-1, count, x.shape[1]), 1, 0)

        micros = jax.tree.map(micro_batches, batch)
        shapes = jax.eval_shape(of_micro, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, micros)[0]

    def _objective(
        self, params: Any, router_bias: Array, batch: Batch, num_targets: Array
    ) -> tuple[Array, Metrics]:
        """What is minimized, and its parts; sums of tokens are over ``num_targets``."""
        tokens, segments = batch["tokens"], batch["segments"]
        hidden: Hidden = self.decoder(params, router_bias, tokens, segments)
        to_predict = [Prediction(hidden.next, tokens[:, 1:], segments_mask(segments, 1))]
        if hidden.after_next is not None:
            targets = jnp.pad(tokens[:, 2:], ((0, 0), (0, 1)))
            mask = segments_mask(segments, 2)
            to_predict.append(Prediction(hidden.after_next, targets, mask))
        head = params["head"]["kernel"]
        sums = cross_entropy(tuple(to_predict), head, self.mesh, self.decoder.dtype)
        loss, *ahead = (total / num_targets for total in sums)
        aux_loss = self._aux_loss(hidden.report) / self.config.data.accumulate
        parts = {"loss": loss, "aux_loss": aux_loss}
        parts |= {"load": hidden.report.load, "num_dropped": hidden.report.num_dropped.sum()}
        total = loss + aux_loss
        if ahead:
            parts["mtp_loss"] = ahead[0]
            total = total + self.config.model.mtp_loss_weight * ahead[0]
        return total, parts

    def _aux_loss(self, report: Report) -> Array:
        model = self.config.model
        sequence = model.sequence_loss_weight * report.sequence_loss.sum()
        return sequence + model.z_loss_weight * report.z_loss.sum()

    def _metrics(self, parts: Metrics, batch: Batch) -> Metrics:
        """What a step reports of the objective's parts."""
        share = parts["load"] / jnp.maximum(parts["load"].sum(axis=1, keepdims=True), 1)
        entropy = jax.scipy.special.entr(share).sum(axis=1) / jnp.log(share.shape[1])
        return parts | {"tokens": _num_targets(batch), "load_entropy": entropy.mean()}


def _num_targets(batch: Batch) -> Array:
    return segments_mask(batch["segments"], 1).sum(dtype=jnp.int32)
