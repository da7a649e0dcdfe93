"""The programs of the self-test: round trips of rows whose values say who sent them, and when.

They make their inputs and compare their outputs on the devices, bit for bit, so that only a few
numbers leave a rank. All values are integers that every sum here holds exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep._groups.group import Group

AXIS = "rank"
LOCAL_EXPERTS = 2  # of the test under load
_HOT_EVERY = 4  # steps: in one of so many, all tokens go to the same experts
_MASKED_OF = 8  # one of so many tokens has an expert less

Program = Callable[..., np.ndarray]


def pair(group: Group, *, num_tokens: int, hidden: int, num_trips: int) -> Program:
    """Round trips between one rank and one other: ``num_trips`` in a row, of the same rows.

    Returns:
        A function of (sender, receiver, seed) to ``[ranks of this process, 1]``: the values that are
        wrong at the end.
    """

    def run(sender: jax.Array, receiver: jax.Array, seed: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(AXIS)
        sends = rank == sender
        topk_idx = jnp.full((num_tokens, 1), jnp.where(sends, receiver, -1), jnp.int32)
        x = _values(_token_ids(rank, num_tokens, seed), hidden, 0xFF).astype(jnp.bfloat16)

        def trip(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            out = jax_ep.dispatch(
                x,
                topk_idx,
                group=group,
                num_experts=group.size,
                layout="token",
                capacity=num_tokens,
            )
            return jax_ep.combine(out.tokens, out.handle, group=group), None

        y, _ = jax.lax.scan(trip, x, length=num_trips)
        wanted = jnp.where(sends, x, jnp.zeros_like(x))
        return (y != wanted).sum(dtype=jnp.int32).reshape(1, 1)

    return _on_all_ranks(group, run)


def load(group: Group, *, num_tokens: int, hidden: int, top_k: int, num_steps: int) -> Program:
    """Steps of dispatch and combine, each with other rows and other routing.

    Returns:
        A function of (first step) to ``[ranks of this process, 2]``: the values that were wrong, and
        the first step that had any, or -1.
    """
    num_experts = LOCAL_EXPERTS * group.size

    def run(first: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(AXIS)

        def step(wrong: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[Any, None]:
            tokens = _token_ids(rank, num_tokens, number)
            x = _values(tokens, hidden, 0xFFFF).astype(jnp.float32)
            topk_idx = _routing(tokens, number, num_experts, top_k)
            out = jax_ep.dispatch(x, topk_idx, group=group, num_experts=num_experts)
            # Each expert adds its number, which tells rows that came to another one.
            ends = jnp.cumsum(out.group_sizes)
            row = jnp.arange(out.tokens.shape[0])
            expert = rank * LOCAL_EXPERTS + (row[:, None] >= ends).sum(axis=1)
            rows = out.tokens + expert[:, None].astype(jnp.float32)
            y = jax_ep.combine(rows, out.handle, group=group)
            sent = topk_idx >= 0
            numbers = jnp.where(sent, topk_idx, 0).sum(axis=1, keepdims=True)
            wanted = x * sent.sum(axis=1, keepdims=True) + numbers.astype(jnp.float32)
            bad = (y != wanted).sum(dtype=jnp.int32)
            count, earliest = wrong
            earliest = jnp.where((bad > 0) & (earliest < 0), number, earliest)
            return (count + bad, earliest), None

        none = (rank * 0, rank * 0 - 1)  # they vary over the ranks as what comes after them does
        (count, earliest), _ = jax.lax.scan(step, none, first + jnp.arange(num_steps))
        return jnp.stack([count, earliest]).reshape(1, 2)

    return _on_all_ranks(group, run)


def _on_all_ranks(group: Group, run: Callable[..., jax.Array]) -> Program:
    """A function of integers that runs ``run`` on every rank and gives the rows of this process's."""
    everywhere = NamedSharding(group.mesh, P())

    @jax.jit
    def program(*numbers: jax.Array) -> jax.Array:
        in_specs = (P(),) * len(numbers)
        return jax.shard_map(run, mesh=group.mesh, in_specs=in_specs, out_specs=P(AXIS))(*numbers)

    @functools.wraps(run)
    def call(*numbers: int) -> np.ndarray:
        put = [_put(value, everywhere) for value in numbers]
        shards = program(*put).addressable_shards
        found = [np.asarray(shard.data) for shard in sorted(shards, key=_first_row)]
        group.check()
        return np.concatenate(found)

    return call


def _put(value: int, everywhere: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback((), everywhere, lambda _: np.asarray(value, np.int32))


def _first_row(shard: Any) -> int:
    return shard.index[0].start or 0


def _token_ids(rank: jax.Array, num_tokens: int, seed: jax.Array) -> jax.Array:
    """``[T]`` hashes, other ones for each rank, token and seed."""
    ids = rank.astype(jnp.uint32) * num_tokens + jnp.arange(num_tokens, dtype=jnp.uint32)
    return _hash(ids + _hash(seed.astype(jnp.uint32)))


def _values(tokens: jax.Array, hidden: int, mask: int) -> jax.Array:
    """``[T, H]`` integers from 0 to ``mask``, other ones for each token and channel."""
    return _hash(tokens[:, None] + jnp.arange(hidden, dtype=jnp.uint32)) & jnp.uint32(mask)


def _routing(tokens: jax.Array, step: jax.Array, num_experts: int, top_k: int) -> jax.Array:
    """``[T, K]`` experts, -1 for none; in some steps the same ones for all tokens."""
    hot = jnp.full_like(tokens, _hash(step.astype(jnp.uint32)))
    seed = jnp.where(step % _HOT_EVERY == _HOT_EVERY - 1, hot, tokens)
    apart = num_experts // top_k
    k = jnp.arange(top_k, dtype=jnp.uint32)
    experts = ((seed[:, None] + k * apart) % num_experts).astype(jnp.int32)
    masked = (_hash(tokens + 1) % _MASKED_OF == 0)[:, None] & (k == 0)
    return jnp.where(masked, -1, experts)


def _hash(value: jax.Array) -> jax.Array:
    """Mixes the bits of uint32."""
    for shift, factor in (16, 0x7FEB352D), (15, 0x846CA68B):
        value = (value ^ (value >> shift)) * jnp.uint32(factor)
    return value ^ (value >> 16)
