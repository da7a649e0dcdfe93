"""Device time of an op, from a chain of ops between two readings of the device's clock.

Each op of a chain depends on the one before it by a *link*. This is a kernel that reads one element
of that op's result and copies one small input of the next op (``topk_idx``, T·K int32). So XLA can
neither overlap nor merge nor drop ops, and the rows of one are freed before the next makes its own.
Links alone are timed in the same way in the same run and are subtracted; records of op "link" say
how much that was. XLA's exchanges have a natural link: the rows received are the next rows sent.
They use it, and nothing is subtracted.

Two forms of chain:

* *unrolled*, for ops of microseconds on GPUs: N ops in one program, which XLA turns into one CUDA
  graph. The clock is read after the first few, which absorb how far apart the ranks started, and at the
  end; each run of the program is a sample, the mean of N ops. Inputs are those of several sets in turn.
* a *loop*, for whole layers and for CPU: one op in the body, the clock read before each. An interval is
  a sample; the first is left out. On CPU the number of turns is data, so a chain can grow without being
  compiled again, until its figure stands above the noise.

The chain is checked twice: the compiled program must have the expected number of our calls, and the
group must have counted as many ops as were run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_ep.bench import clock

_NEVER = 12345.678  # no integer, no 8 or 16 bit float, and no value of any input
_WARM_OPS = 2  # of an unrolled chain, before the first reading
_FEWEST_SAMPLES = 5
_MOST_TURNS = 4096  # of a loop
_LOOP_SECONDS = 2.0  # that the samples of a loop may take in all, once it has run

Link = Callable[[Any, Any, clock.Clock], Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a chain; all functions see what one rank sees.

    Attributes:
        run: From the inputs of a set to the op's result.
        link: From the inputs of a set, the result of the op before and the clock to equal inputs that
            depend on that result, one array of which has gone through the clock.
        first: From the inputs of a set to what stands for the result before the first op; None where
            the first op takes its inputs as they are.
    """

    run: Callable[[Any], Any]
    link: Link
    first: Callable[[Any], Any] | None = None


class Spread(NamedTuple):
    """Microseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Spread:
        """The spread of samples in microseconds."""
        return cls(*(float(np.percentile(samples, p)) for p in (50, 10, 90)))

    def less(self, microseconds: float) -> Spread:
        """All of them, less a constant."""
        return Spread(*(value - microseconds for value in self))

    @property
    def is_noise(self) -> bool:
        """Whether the figure is no larger than the range in which four fifths of the samples lie."""
        return not 0 <= self.p90 - self.p10 < self.median


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a chain gave.

    Attributes:
        spread: The spread of an op with its link; with several ranks here, the slowest of each
            sample.
        result: What the last op gave, in the last sample.
        last_set: Number of the set that this op was given.
        text: The compiled program.
        ops: Ops that were run in all.
        temporary_bytes: What XLA allocates besides arguments and results, as the compiler counts; None
            where it does not say.
    """

    spread: Spread
    result: Any
    last_set: int
    text: str
    ops: int
    temporary_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Chain:
    """How an op is to be timed.

    Attributes:
        length: Ops between the readings of an unrolled chain; 0 for a loop.
        repeat: Samples.
        grows: Whether a loop's number of turns is data (CPU).
        options: Compiler options.
        calls: Custom calls that an op consists of, by their names on one host, each as often as it
            occurs. They show whether the compiler has dropped or merged some.
        completed: A function that gives the number of ops that the group has completed, as each
            rank here counts them; None where nobody counts.
        largest: A function that gives the largest of the processes' numbers; all call it together.
    """

    length: int
    repeat: int
    grows: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: Sequence[str] = ()
    completed: Callable[[], list[int]] | None = None
    largest: Callable[[float], float] = float


def after(value: jax.Array, result: Any) -> jax.Array:
    """``value`` (integers), but not before ``result`` is there: the link of a chain."""
    seen = jnp.float32(0)
    for leaf in jax.tree.leaves(result):
        element = lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim).reshape(())
        seen = seen + element.astype(jnp.float32)
    return jnp.where(seen == _NEVER, -1, value)


def measure(step: Step, sets: Sequence[Any], mesh: jax.sharding.Mesh, chain: Chain) -> Measured:
    """Time a chain.

    Args:
        step: The op.
        sets: Inputs, pytrees of arrays that are split over the mesh on axis 0. A loop takes the first.
        mesh: A mesh with one axis.
        chain: How to time it.

    Raises:
        RuntimeError: if the program was compiled to another number of calls, or ran another number
            of ops, than the chain has.
    """
    jax.block_until_ready(sets)  # some are what ops of the group have made
    begun = chain.completed() if chain.completed is not None else []
    measured = (_unrolled if chain.length else _loop)(step, sets, mesh, chain)
    if chain.completed is not None:
        per_op = len(chain.calls)
        expected = [before + measured.ops * per_op for before in begun]
        if (now := chain.completed()) != expected:
            raise RuntimeError(
                f"{measured.ops} ops of {per_op} calls were to bring the group from {begun} to "
                f"{expected} completed calls, and brought it to {now}"
            )
    return measured


def _unrolled(step: Step, sets: Sequence[Any], mesh: jax.sharding.Mesh, chain: Chain) -> Measured:
    ops = _WARM_OPS + chain.length

    def program(sets: list[Any]) -> Any:
        start, end = clock.Reader(), clock.Reader()
        result = None if step.first is None else step.first(sets[0])
        for op in range(ops):
            inputs = sets[op % len(sets)]
            if result is not None:
                now = start if op == _WARM_OPS else clock.no_clock
                inputs = step.link(inputs, result, now)
            result = step.run(inputs)
        unused = step.link(sets[0], result, end)
        del unused
        return result, jnp.stack([start.stamp, end.stamp])  # type: ignore[list-item]

    compiled = compile_chain(program, mesh, (list(sets),), chain, ops)
    samples, result = [], None
    for run in range(2 + chain.repeat):  # the first runs load, capture and allocate
        result = None  # frees the memory that the next run needs
        result, stamps = jax.block_until_ready(compiled(list(sets)))
        if run >= 2:
            start, end = by_rank(stamps, 2).T
            samples.append((end - start).max() / chain.length)
    return Measured(
        Spread.of(samples),
        result,
        (ops - 1) % len(sets),
        compiled.as_text(),
        ops * (2 + chain.repeat),
    )


def _loop(step: Step, sets: Sequence[Any], mesh: jax.sharding.Mesh, chain: Chain) -> Measured:
    """Turns of one op each. Where their number is data, chains grow until they exceed the noise."""
    turns = _even(chain.repeat + 2)
    room = _MOST_TURNS if chain.grows else turns

    def program(inputs: Any, turns: Any) -> Any:
        def turn(i: Any, carry: Any) -> Any:
            result, stamps = carry
            now = clock.Reader()
            result = step.run(step.link(inputs, result, now))
            return result, lax.dynamic_update_slice(stamps, now.stamp[None], (i, 0))  # type: ignore[index]

        if step.first is None:
            shapes = jax.eval_shape(step.run, inputs)
            first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        else:
            first = step.first(inputs)
        return lax.fori_loop(0, turns, turn, (first, jnp.zeros((room, 2), jnp.uint32)))

    if chain.grows:
        compiled = compile_chain(program, mesh, (sets[0], turns), chain, 1)
    else:  # XLA knows the number of turns, and the host need not look at each whether it is the last
        compiled = compile_chain(lambda x: program(x, turns), mesh, (sets[0],), chain, 1)

    def run(turns: int) -> tuple[Any, np.ndarray]:
        arguments = (sets[0], np.int32(turns)) if chain.grows else (sets[0],)
        result, stamps = jax.block_until_ready(compiled(*arguments))
        return result, np.diff(by_rank(stamps, turns), axis=1)[:, 1:].max(axis=0)

    if not chain.grows:
        for _ in range(2):
            result = None
            result, samples = run(turns)
        return _of_loop(compiled, samples, result, 2 * turns)
    turns, begin = _even(2 + _FEWEST_SAMPLES), time.monotonic()
    result, samples = run(turns)
    ran = turns
    group, longest = 1, chain.largest(float(np.median(samples)))
    count = int(np.clip(_LOOP_SECONDS * 1e6 / longest, _FEWEST_SAMPLES, chain.repeat))
    while True:
        turns = min(_even(2 + group * count), _MOST_TURNS)
        result, intervals = run(turns)
        ran += turns
        usable = len(intervals) // group * group
        samples = intervals[:usable].reshape(-1, group).mean(axis=1)
        over = turns == _MOST_TURNS or time.monotonic() - begin > _LOOP_SECONDS
        if chain.largest(float(Spread.of(samples).is_noise)) == 0 or chain.largest(float(over)):
            return _of_loop(compiled, samples, result, ran)
        group *= 2


def _of_loop(compiled: Any, samples: np.ndarray, result: Any, ops: int) -> Measured:
    needs = compiled.memory_analysis()
    temporary = None if needs is None else int(needs.temp_size_in_bytes)
    return Measured(Spread.of(samples), result, 0, compiled.as_text(), ops, temporary)


def _even(turns: int) -> int:
    """Exchanges bring rows home every other time."""
    return turns + turns % 2


def compile_chain(
    program: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    arguments: tuple[Any, ...],
    chain: Chain,
    ops: int,
) -> Any:
    """The compiled program over the mesh; a scalar argument goes to all ranks.

    Raises:
        RuntimeError: if it has another number of the chain's calls than so many ops have.
    """
    split, whole = P(mesh.axis_names), P()
    specs = tuple(whole if isinstance(x, int) else split for x in arguments)
    # Replication is not tracked: everything here differs from rank to rank.
    mapped = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    typed = tuple(np.int32(x) if isinstance(x, int) else x for x in arguments)
    lowered = jax.jit(mapped).lower(*typed)
    compiled: Any = lowered.compile(compiler_options=chain.options or None)
    text = (compiled.as_text() or "").replace('"jax_ep_network_', '"jax_ep_')
    text = text.replace(
        '"jax_ep_plan_dispatch"', '"jax_ep_plan" and ="jax_ep_dispatch"'
    )  # both ops
    for target in set(chain.calls):
        count = text.count(f'="{target}"')
        if count != ops * chain.calls.count(target):
            raise RuntimeError(f"a chain of {ops} ops was compiled to {count} of {target}")
    _check_memory(compiled, mesh)
    return compiled


def _check_memory(compiled: Any, mesh: jax.sharding.Mesh) -> None:
    """Raise ``MemoryError`` where a program needs more than there is, before it is run."""
    stats, needs = mesh.local_devices[0].memory_stats(), compiled.memory_analysis()
    if not stats or needs is None or "bytes_limit" not in stats:
        return
    if needs.temp_size_in_bytes > stats["bytes_limit"]:
        raise MemoryError(
            f"out of memory: {needs.temp_size_in_bytes / 2**30:.0f} GiB of temporaries, where XLA has "
            f"{stats['bytes_limit'] / 2**30:.0f} GiB"
        )


def by_rank(stamps: jax.Array, count: int) -> np.ndarray:
    """``[ranks here, count]`` microseconds. Clocks of several GPUs are not synchronised."""
    parts = [np.asarray(shard.data)[:count] for shard in stamps.addressable_shards]
    return np.stack([clock.microseconds(part) for part in parts])


def link_step() -> Step:
    """A chain of links alone. A barrier keeps them apart, as an op between them would."""

    def link(topk_idx: jax.Array, result: jax.Array, now: clock.Clock) -> jax.Array:
        return now(after(topk_idx, result))

    return Step(run=lax.optimization_barrier, link=link)
