"""Text from a model, one byte of each text at a time, and how long its parts take."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

import jax_ep
from byte_lm.config import ModelConfig
from byte_lm.model import DTYPES, ByteLM, Cache, empty_caches
from byte_lm.training import BATCH_AXES, TrainState

_MOST_TOKENS = 512  # of a rank, in latency mode


class Begun(NamedTuple):
    """Texts that are to be continued.

    Attributes:
        caches: Of each block, with the positions so far.
        logits: ``[B, 256]`` of the next byte.
    """

    caches: list[Cache]
    logits: Float32[Array, "batch vocab"]


class Decoder:
    """A model that continues B texts at once, on one mesh. Nothing is dropped.

    Each device has B / devices texts, and so as many tokens in each MoE layer of a step: few enough
    for latency mode, which the ops take by themselves, since the group has room for it.

    Attributes:
        group: The group of the MoE layers.
        batch_size: B.
        new_bytes: Bytes that ``decode`` appends.
        begin: ``(state, prompts [B, n])`` to ``Begun``.
        decode: ``(state, begun, seed, temperature)`` to ``[B, new_bytes]``; temperature 0 takes the
            most likely byte each time. One program for all bytes: a scan over steps.
        exchange: ``(x [B, H], routes [blocks, B, K])`` to ``[B, H]``: the dispatches and combines of
            ``decode`` without all the rest.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: ModelConfig,
        *,
        batch_size: int,
        prompt_bytes: int,
        new_bytes: int,
        latency: bool = True,
    ) -> None:
        """Set up; no array is made yet.

        Args:
            mesh: With axes "data" and "expert"; texts are split over both.
            config: Configuration of the model.
            batch_size: Texts.
            prompt_bytes: Bytes that each text begins with.
            new_bytes: Bytes to append to each.
            latency: Whether to make room for latency mode, which groups on one host have.

        Raises:
            ValueError: if the texts do not split over the mesh.
        """
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(
                f"--batch-size: expected a positive multiple of {mesh.size}, the devices; got "
                f"{batch_size}."
            )
        self.batch_size, self.new_bytes = batch_size, new_bytes
        self._config = dataclasses.replace(config, capacity_factor=None)
        self._mesh, self._prompt_bytes = mesh, prompt_bytes
        tokens, dtype = batch_size // mesh.size, DTYPES[config.dtype]
        room = {}
        if latency and tokens <= _MOST_TOKENS:
            channels = config.hidden * jnp.dtype(dtype).itemsize // 2  # in units of 16 bits
            room = {"latency_tokens": tokens, "latency_hidden": channels}
        self.group = jax_ep.create_group(mesh, "expert", **room)
        make = functools.partial(ByteLM, self._config, self.group)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        self._split = NamedSharding(mesh, P(BATCH_AXES))
        self.begin = jax.jit(self._begin)
        self.decode = jax.jit(self._decode, out_shardings=NamedSharding(mesh, P()))
        self.exchange = jax.jit(self._exchange, out_shardings=self._split)

    def put(self, array: np.ndarray, spec: P | None = None) -> Array:
        """An array that every process has, split over the mesh, by default along its first axis."""
        sharding = self._split if spec is None else NamedSharding(self._mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def texts(
        self, state: TrainState, begun: Begun, *, seed: int, temperature: float
    ) -> Int32[np.ndarray, "batch new"]:
        """The bytes that continue ``begun``.

        Raises:
            jax_ep.CommunicationError: if an op of the group has failed.
        """
        made = np.asarray(self.decode(state, begun, np.int32(seed), np.float32(temperature)))
        self.group.check()
        return made

    def calls(self, state: TrainState, begun: Begun) -> list[str]:
        """The native calls that steps make of jax_ep, by name; none with the reference backend."""
        text = self.decode.lower(state, begun, np.int32(0), np.float32(0)).as_text()
        return sorted(set(re.findall(r"custom_call @(jax_ep_\w+)\(", text)))

    def seconds_of_decode(self, state: TrainState, begun: Begun, *, repeat: int) -> float:
        """Seconds of one step, the median of ``repeat`` runs of ``decode``."""
        return self._seconds(
            lambda: self.decode(state, begun, np.int32(0), np.float32(0)), repeat=repeat
        )

    def seconds_of_exchange(self, *, seed: int, repeat: int) -> float:
        """Seconds that the dispatches and combines of one step take alone, likewise.

        Rows have the shapes of a step, and routes are random: each token goes to K different experts.
        """
        config, random = self._config, np.random.default_rng(seed)
        scores = random.random((config.num_layers, self.batch_size, config.num_experts))
        routes = np.argsort(scores, axis=-1)[..., : config.top_k].astype(np.int32)
        x = np.ones((self.batch_size, config.hidden), np.dtype(DTYPES[config.dtype]))
        given = self.put(x), self.put(routes, P(None, BATCH_AXES))
        return self._seconds(lambda: self.exchange(*given), repeat=repeat)

    def _seconds(self, run: Callable[[], Any], *, repeat: int) -> float:
        jax.block_until_ready(run())  # compiled, and all ranks at the same place
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        self.group.check()
        return statistics.median(times) / self.new_bytes

    def _model(self, state: TrainState) -> ByteLM:
        return nnx.merge(self._graph, state.params, state.buffers)

    def _begin(self, state: TrainState, prompts: Int32[Array, "batch prompt"]) -> Begun:
        length = self._prompt_bytes + self.new_bytes
        caches = jax.lax.with_sharding_constraint(
            empty_caches(self._config, self.batch_size, length), self._split
        )
        logits, caches = self._model(state).extend(prompts, caches, jnp.int32(0))
        return Begun(caches, logits[:, -1])

    def _decode(
        self,
        state: TrainState,
        begun: Begun,
        seed: Int32[Array, ""],
        temperature: Float32[Array, ""],
    ) -> Int32[Array, "batch new"]:
        model, key = self._model(state), jax.random.key(seed)

        def step(begun: Begun, position: Array) -> tuple[Begun, Array]:
            chosen = _choose(begun.logits, jax.random.fold_in(key, position), temperature)
            logits, caches = model.extend(chosen[:, None], begun.caches, position)
            return Begun(caches, logits[:, 0]), chosen

        positions = self._prompt_bytes + jnp.arange(self.new_bytes)
        return jax.lax.scan(step, begun, positions)[1].T

    def _exchange(self, x: Array, routes: Int32[Array, "blocks batch top_k"]) -> Array:
        config, group = self._config, self.group

        def on_rank(x: Array, routes: Array) -> Array:
            weights = jnp.ones(routes.shape[1:], jnp.float32)

            def step(x: Array, _: None) -> tuple[Array, None]:
                for topk_idx in routes:
                    out = jax_ep.dispatch(
                        x, topk_idx, weights, group=group, num_experts=config.num_experts
                    )
                    y = jax_ep.combine(out.tokens, out.handle, group=group)
                    x = y / config.top_k  # the tokens again, and nothing of it is left out
                return x, None

            return jax.lax.scan(step, x, None, length=self.new_bytes)[0]

        split = P(BATCH_AXES)
        mapped = jax.shard_map(
            on_rank, mesh=self._mesh, in_specs=(split, P(None, BATCH_AXES)), out_specs=split
        )
        return mapped(x, routes)


def _choose(
    logits: Float32[Array, "batch vocab"], key: Array, temperature: Float32[Array, ""]
) -> Int32[Array, " batch"]:
    """A byte for each text: the most likely one at temperature 0, else one drawn at random."""
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
