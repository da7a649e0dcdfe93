"""Steps of a group whose right results are known on each rank without communication.

``test_steps.py`` does this for one fixed size. Here sizes and routings vary, for groups that span
hosts: rows, sums and counts are compared on the device, entry by entry, in steps under one scan.
Contents are small integers that tell step, rank, token and channel apart, so a row of another step,
another token or an unfinished copy is a wrong one. Weights are powers of two, so all sums are exact
in any order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_ep
from spmd import fetch, put, shard, stacked_jit

# What ``wrong_entries`` counts.
WHAT = ("rows", "sources of rows", "y", "counts")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of a step.

    Attributes:
        tokens: T, tokens of each rank.
        hidden: H, channels of float32; a multiple of 4.
        top_k: K, at most ``local_experts``.
        local_experts: L, experts of each rank.
        layout: "expert" or "token".
        mode: That of both ops; none takes the default.
    """

    tokens: int
    hidden: int
    top_k: int = 2
    local_experts: int = 4
    layout: str = "expert"
    mode: str | None = None

    @property
    def config(self) -> jax_ep.DispatchConfig | None:
        """The argument ``config`` of both ops."""
        return None if self.mode is None else jax_ep.DispatchConfig(mode=self.mode)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where routes begin: the step (traced), the rank (traced), and the group's shape.

    Attributes:
        i: The step.
        rank: The rank that the tokens belong to.
        ranks: R.
        hosts: P.
    """

    i: Any
    rank: Any
    ranks: int
    hosts: int


def _unmasked(sizes: Sizes, at: Place) -> jax.Array:
    """K different experts for each token, others in every step."""
    experts = at.ranks * sizes.local_experts
    token, k = _token_and_k(sizes)
    stride = 3 if math.gcd(3, experts) == 1 else 1
    return (token * 7 + at.rank * 3 + at.i * (1 + token % 3) + k * stride) % experts


def _spread(sizes: Sizes, at: Place) -> jax.Array:
    """The same, with some choices masked."""
    token, k = _token_and_k(sizes)
    return jnp.where((token + 2 * k + at.i) % 5 == 0, -1, _unmasked(sizes, at))


def _one_host(sizes: Sizes, at: Place) -> jax.Array:
    """All tokens of all ranks to experts of one host, another one in each step."""
    token, k = _token_and_k(sizes)
    each = at.ranks * sizes.local_experts // at.hosts
    return at.i % at.hosts * each + (token + k + at.i) % each


def _one_rank(sizes: Sizes, at: Place) -> jax.Array:
    """All tokens of all ranks to experts of one rank, another one in each step."""
    token, k = _token_and_k(sizes)
    return at.i % at.ranks * sizes.local_experts + (token + k) % sizes.local_experts


def _silent_rank(sizes: Sizes, at: Place) -> jax.Array:
    """All tokens of one rank are masked, another one in each step."""
    return jnp.where(at.rank == at.i % at.ranks, -1, _spread(sizes, at))


def _one_speaks(sizes: Sizes, at: Place) -> jax.Array:
    """All but one rank have no token that goes anywhere."""
    return jnp.where(at.rank != at.i % at.ranks, -1, _spread(sizes, at))


def _one_token(sizes: Sizes, at: Place) -> jax.Array:
    """Of each rank's tokens all but one are masked, another one in each step."""
    token, _ = _token_and_k(sizes)
    return jnp.where(token == at.i % sizes.tokens, _unmasked(sizes, at), -1)


def _nothing(sizes: Sizes, at: Place) -> jax.Array:
    """All tokens of all ranks are masked."""
    return jnp.full_like(_unmasked(sizes, at), -1)


ROUTES: dict[str, Callable[[Sizes, Place], jax.Array]] = {
    f.__name__.strip("_"): f
    for f in (_spread, _one_host, _one_rank, _silent_rank, _one_speaks, _one_token, _nothing)
}
NAMES = tuple(ROUTES)
EACH_IN_TURN = -1  # instead of the number of a routing


def _token_and_k(sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(sizes.tokens)[:, None], jnp.arange(sizes.top_k)


def routes(sizes: Sizes, at: Place, number: Any) -> jax.Array:
    """``[T, K]`` experts of a step; ``number`` (traced) picks one of ``NAMES``, or EACH_IN_TURN."""
    number = jnp.where(number == EACH_IN_TURN, at.i % len(ROUTES), number)
    every = jnp.stack([jnp.asarray(f(sizes, at), jnp.int32) for f in ROUTES.values()])
    return every[number]


def host_routes(sizes: Sizes, *, i: int, number: int, ranks: int, hosts: int) -> np.ndarray:
    """``[R, T, K]`` experts of all ranks, on the host."""
    each = [routes(sizes, Place(i, rank, ranks, hosts), number) for rank in range(ranks)]
    return np.stack([np.asarray(idx) for idx in each])


def stamp(sizes: Sizes, i: Any, rank: Any, token: Any) -> jax.Array:
    """``[n, H]`` values from 1 to 61 of tokens ``[n]`` of ``rank`` (a number, or ``[n]``)."""
    of_token = i * 17 + rank * 29 + token * 5
    return ((of_token[:, None] + jnp.arange(sizes.hidden) * 3) % 61 + 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A step between its dispatch and its combine."""

    x: jax.Array
    idx: jax.Array
    everyone: jax.Array
    weights: jax.Array
    out: jax_ep.Dispatched


def _begin(group: jax_ep.Group, sizes: Sizes, i: Any, number: Any) -> _Begun:
    rank = jax.lax.axis_index(group.axis_names[0])
    place = functools.partial(Place, i, ranks=group.size, hosts=len(group.topology.hosts))
    everyone = jnp.stack([routes(sizes, place(rank=r), number) for r in range(group.size)])
    idx = everyone[rank]
    x = stamp(sizes, i, rank, jnp.arange(sizes.tokens))
    token, k = _token_and_k(sizes)
    weights = 2.0 ** -(1 + (k + token + i) % 4)
    out = jax_ep.dispatch(
        x,
        idx,
        weights,
        group=group,
        num_experts=group.size * sizes.local_experts,
        layout=sizes.layout,
        config=sizes.config,
    )
    return _Begun(x, idx, everyone, weights, out)


def _finish(group: jax_ep.Group, sizes: Sizes, i: Any, begun: _Begun) -> jax.Array:
    rank = jax.lax.axis_index(group.axis_names[0])
    out, by_expert = begun.out, sizes.layout == "expert"
    given: dict[str, Any] = {"group": group, "config": sizes.config}
    if by_expert:
        y = jax_ep.combine(out.tokens, out.handle, weights=out.weights, **given)
    else:
        rows = out.tokens * out.weights.sum(axis=1, keepdims=True)
        y = jax_ep.combine(rows, out.handle, **given)
    # Each row against the token that it should be.
    source = out.handle.recv_src // (sizes.top_k if by_expert else 1)
    used = (out.handle.recv_src >= 0)[:, None]
    want = stamp(sizes, i, source // sizes.tokens, source % sizes.tokens)
    rows_off = out.tokens != jnp.where(used, want, 0)
    # The tokens that should have come, and in layout "expert" the choices.
    is_here = (begun.everyone >= 0) & (begun.everyone // sizes.local_experts == rank)
    wanted = is_here if by_expert else is_here.any(axis=-1)
    came = wanted.reshape(-1)[jnp.maximum(out.handle.recv_src, 0)]
    sources_off = (used[:, 0] & ~came).sum() + jnp.abs(used.sum() - wanted.sum())
    factor = jnp.where(begun.idx >= 0, begun.weights, 0).sum(axis=1, keepdims=True)
    y_off = y != begun.x * factor
    counts = jnp.abs(out.handle.counts.sum() - is_here.sum()) + out.handle.num_dropped.sum()
    return jnp.stack([rows_off.sum(), sources_off, y_off.sum(), counts]).astype(jnp.int32)


def wrong_entries(groups: Sequence[jax_ep.Group], sizes: Sizes, i: Any, number: Any) -> jax.Array:
    """``[4]`` numbers of wrong entries of step ``i``, see ``WHAT``; inside ``shard_map``.

    All groups dispatch before the first one combines, each the data of a step of its own.
    """
    steps = [i + 1000 * n for n in range(len(groups))]
    begun = [_begin(group, sizes, i, number) for group, i in zip(groups, steps, strict=True)]
    found = [
        _finish(group, sizes, i, one)
        for group, i, one in reversed(list(zip(groups, steps, begun, strict=True)))
    ]
    return functools.reduce(jnp.add, found)


def _scan(groups: Sequence[jax_ep.Group], sizes: Sizes, count: int) -> Callable[..., jax.Array]:
    """What a rank does: ``count`` steps under one scan, from step ``[1]`` on, of a routing ``[1]``."""

    def run(start: jax.Array, number: jax.Array) -> jax.Array:
        def body(wrong: jax.Array, n: jax.Array) -> tuple[jax.Array, None]:
            return wrong + wrong_entries(groups, sizes, start[0] + n, number[0]), None

        none = jnp.zeros(len(WHAT), jnp.int32) + 0 * start[0]
        return jax.lax.scan(body, none, jnp.arange(count))[0]

    return run


def _number(name: str | None) -> int:
    return EACH_IN_TURN if name is None else NAMES.index(name)


def program(groups: Sequence[jax_ep.Group], sizes: Sizes, count: int) -> Callable[..., np.ndarray]:
    """A function of the first step and the name of a routing (none: each in turn), for tests.

    It runs ``count`` steps and gives the ``[R, 4]`` wrong entries of all of them.
    """
    ranks = groups[0].size
    jitted = stacked_jit(_scan(groups, sizes, count), groups[0].mesh)

    def call(start: int, name: str | None = None) -> np.ndarray:
        return jitted(*(np.full((ranks, 1), n, np.int32) for n in (start, _number(name))))

    return call


def repeated(
    groups: Sequence[jax_ep.Group], sizes: Sizes, count: int
) -> Callable[[int, int], np.ndarray]:
    """A function of the first step and a number of runs of ``count`` steps each, for tests.

    Each step has a routing of ``NAMES``, in turn. It gives the ``[R, 4]`` wrong entries of all steps
    of all runs, which are added up on the devices, so a run has nothing to do on the host but its
    launch.
    """
    mesh, ranks = groups[0].mesh, groups[0].size
    scanned = _scan(groups, sizes, count)

    def run(wrong: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        return wrong + scanned(start, 0 * start + EACH_IN_TURN), start + count

    jitted = jax.jit(shard(run, mesh))

    def call(start: int, runs: int) -> np.ndarray:
        wrong = put(np.zeros(ranks * len(WHAT), np.int32), mesh)
        begin = put(np.full(ranks, start, np.int32), mesh)
        for _ in range(runs):
            # One run at a time, so that few launches are in flight.
            wrong, begin = jax.block_until_ready(jitted(wrong, begin))
        return fetch(wrong, mesh).reshape(ranks, len(WHAT))

    return call


def local_program(
    groups: Sequence[jax_ep.Group], sizes: Sizes, count: int
) -> Callable[..., np.ndarray]:
    """The same for a process that runs no tests: it gets the ``[4]`` wrong entries of its rank.

    The program is compiled already.
    """
    mesh = groups[0].mesh
    spec = jax.P(mesh.axis_names)
    run = jax.shard_map(_scan(groups, sizes, count), mesh=mesh, in_specs=spec, out_specs=spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def everywhere(number: int) -> jax.Array:
        whole = np.full(mesh.size, number, np.int32)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    compiled = jax.jit(run).lower(everywhere(0), everywhere(0)).compile()

    def call(start: int, name: str | None = None) -> np.ndarray:
        wrong = compiled(everywhere(start), everywhere(_number(name)))
        return np.asarray(wrong.addressable_shards[0].data)

    return call


def explain(wrong: np.ndarray) -> dict[str, list[int]]:
    """The wrong entries of each rank, by what they are; those without any left out."""
    return {what: wrong[:, n].tolist() for n, what in enumerate(WHAT) if wrong[:, n].any()}
