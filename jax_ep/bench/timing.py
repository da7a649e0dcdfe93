"""Device time of an op: the slope between N and 2N of them, chained in one program.

Calls of one program follow one another on the device without the host in between, so ::

    time(program of 2N ops) - time(program of N ops) = N · (device time of an op and its link)

and what a launch, the transfer of arguments and the host's waiting cost falls out. Each op of a chain
depends on the one before it by a *link*, a kernel that reads one element of what that op gave and
copies one small array of what the next is given (``topk_idx``, T·K int32), so ops can neither overlap
nor be merged or dropped, and the rows of one are freed before the next makes its own. Links alone are
timed by the same slope in the same run, and are subtracted; records of op "link" say how much
that was. Ops that have a natural link (XLA's exchanges, where rows received are the next rows sent)
take that one instead, and nothing is subtracted. Inputs are those of several sets in turn.
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

_NEVER = 12345.678  # no integer, no 8 or 16 bit float, and no value of any input


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of a chain; both functions see what one rank sees.

    Attributes:
        run: From the inputs of a set to the op's result.
        link: From the inputs of a set and the result of the op before to equal inputs that depend on
            that result.
    """

    run: Callable[[Any], Any]
    link: Callable[[Any, Any], Any]


class Spread(NamedTuple):
    """Microseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of samples in microseconds."""
        return cls(*(float(np.percentile(samples, p)) for p in (50, 10, 90)))

    def less(self, microseconds: float) -> Spread:
        """All of them, less a constant."""
        return Spread(*(value - microseconds for value in self))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a chain gave.

    Attributes:
        spread: Of an op with its link.
        result: What the last op of the longer program gave, in the last sample.
        last_set: Number of the set that this op was given.
        text: The compiled program of N ops.
        length: N.
    """

    spread: Spread
    result: Any
    last_set: int
    text: str
    length: int


def after(value: jax.Array, result: Any) -> jax.Array:
    """``value`` (integers), but not before ``result`` is there: the link of a chain."""
    seen = jnp.float32(0)
    for leaf in jax.tree.leaves(result):
        element = lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim).reshape(())
        seen = seen + element.astype(jnp.float32)
    return jnp.where(seen == _NEVER, -1, value)


def measure(
    step: Step,
    sets: Sequence[Any],
    mesh: jax.sharding.Mesh,
    *,
    length: int,
    repeat: int,
    targets: Sequence[str] = (),
) -> Measured:
    """Time a chain.

    Args:
        step: The op.
        sets: Inputs, pytrees of arrays that are split over the mesh on axis 0.
        mesh: A mesh with one axis.
        length: N.
        repeat: Samples; each is one run of either program.
        targets: Custom calls of which the compiled program must hold N each: a compiler that dropped
            or merged some would be found out.

    Returns:
        The spread over the samples, and what the last op gave.
    """
    programs = []
    for ops in (length, 2 * length):
        program = _program(step, mesh, ops, len(sets)).lower(list(sets)).compile()
        for target in targets:
            count = program.as_text().count(f'custom_call_target="{target}"')
            if count != ops:
                raise RuntimeError(f"a chain of {ops} ops was compiled to {count} of {target}")
        programs.append(program)
    short, long = programs
    for program in (*programs, *programs):  # the first runs load, capture and allocate
        jax.block_until_ready(program(list(sets)))
    samples, result = [], None
    for _ in range(repeat):
        result = None  # frees the memory that the next run needs
        base, result = _time(short, sets)
        result = None
        more, result = _time(long, sets)
        samples.append((more - base) / length * 1e6)
    return Measured(
        Spread.of(samples), result, (2 * length - 1) % len(sets), short.as_text(), length
    )


def _program(step: Step, mesh: jax.sharding.Mesh, ops: int, num_sets: int) -> Any:
    def chain(sets: list[Any]) -> Any:
        result = None
        for op in range(ops):
            inputs = sets[op % num_sets]
            if op:
                inputs = step.link(inputs, result)
            result = step.run(inputs)
        return result

    spec = P(mesh.axis_names)
    # Replication is not tracked: everything here differs from rank to rank.
    return jax.jit(
        jax.shard_map(chain, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    )


def _time(program: Any, sets: Sequence[Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(program(list(sets)))
    return time.perf_counter() - start, result


def link_step() -> Step:
    """A chain of links alone, kept apart from one another as an op between them keeps them."""

    def link(topk_idx: jax.Array, result: jax.Array) -> jax.Array:
        return after(topk_idx, result)

    return Step(run=lax.optimization_barrier, link=link)
