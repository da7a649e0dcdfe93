"""Programs that could hang, each run by ``test_stress`` in a process of its own with a deadline.

``python stress_programs.py NAME [ARGUMENT]`` prints "done" at the end and raises if anything is
wrong.
"""

from __future__ import annotations

import gc
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _cpu

TOKENS, HIDDEN, TOP_K, LOCAL_EXPERTS = 3, 8, 2, 2


def make_group(ranks: int, **kwargs) -> jax_ep.Group:
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("expert",))
    return jax_ep.create_group(mesh, "expert", backend="cpu", **kwargs)


def spmd(fn, group: jax_ep.Group, num_results: int = 1):
    out_specs = P("expert") if num_results == 1 else (P("expert"),) * num_results
    mapped = jax.shard_map(
        fn, mesh=group.mesh, in_specs=(P("expert"), P()), out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped)


def route(group: jax_ep.Group, shift) -> jax.Array:
    """Two experts a token, different for every rank, token and ``shift``."""
    experts = LOCAL_EXPERTS * group.size
    token = lax.axis_index("expert") * TOKENS + jnp.arange(TOKENS) * 5 + shift
    return jnp.stack([token % experts, (token + 1 + token % (experts - 1)) % experts], 1).astype(
        jnp.int32
    )


def there_and_back(x, shift, group: jax_ep.Group):
    """TOP_K · x: the rows go to the experts' ranks and come back unchanged."""
    experts = LOCAL_EXPERTS * group.size
    out = jax_ep.dispatch(x, route(group, shift), group=group, num_experts=experts, alignment=1)
    return jax_ep.combine(out.tokens, out.handle, group=group)


def numbers(ranks: int) -> np.ndarray:
    """Small integers, so that all sums are exact."""
    count = ranks * TOKENS * HIDDEN
    return (np.arange(count) % 251).astype(np.float32).reshape(-1, HIDDEN)


def expect(found, wanted, what: str) -> None:
    if not np.array_equal(np.asarray(found), wanted):
        raise AssertionError(f"{what}: wrong values")


def num_steps(group: jax_ep.Group) -> int:
    """2000 steps of eight ranks; of other numbers as many as have as many calls in flight."""
    return 16_000 // group.size


def unawaited(ranks: str) -> None:
    """Thousands of steps in flight, each with its own data and routing."""
    group = make_group(int(ranks))
    step = spmd(lambda x, i: there_and_back(x + i, i, group), group)
    x = numbers(group.size)
    results = [step(x, jnp.int32(i)) for i in range(num_steps(group))]
    for i, result in enumerate(results):
        expect(result, TOP_K * (x + i), f"step {i}")
    if _cpu.open_rendezvous():
        raise AssertionError("meetings were left open")


def unawaited_chain(ranks: str) -> None:
    """Thousands of steps in flight, each with the result of the one before."""
    group = make_group(int(ranks))
    step = spmd(lambda x, i: there_and_back(x, i, group) / TOP_K + 1, group)
    x = first = numbers(group.size)
    for i in range(num_steps(group)):
        x = step(x, jnp.int32(i))
    expect(x, first + num_steps(group), "the last step")


def eight_dispatches(group: jax_ep.Group):
    """Eight dispatches that do not depend on each other; one in a scan, two by an inner jit."""

    @jax.jit
    def inner(x, shift):
        return there_and_back(x, shift, group)

    def run(x, i):
        def body(total, step):
            return total + there_and_back(x * step, i + 7, group), None

        looped, _ = lax.scan(body, jnp.zeros_like(x), jnp.arange(1.0, 4.0))  # x·(1 + 2 + 3)
        results = [there_and_back(x * k, i + k, group) for k in range(1, 6)]
        results += [inner(6 * x, i + 11), inner(7 * x, i + 12), looped]
        return jnp.concatenate(results, axis=1)

    wanted = TOP_K * np.concatenate([numbers(group.size) * k for k in (1, 2, 3, 4, 5, 6, 7, 6)], 1)
    return spmd(run, group), wanted


def independent(ranks: str) -> None:
    """The eight dispatches, 200 times, the second half with random delays before each op."""
    group = make_group(int(ranks))
    step, wanted = eight_dispatches(group)
    x = numbers(group.size)
    for delay in (0, 300):
        _cpu.set_test_delay_us(delay)
        results = [step(x, jnp.int32(i)) for i in range(100)]
        for i, result in enumerate(results):
            expect(result, wanted, f"step {i} with delays of up to {delay} us")
    _cpu.set_test_delay_us(0)


def threads() -> None:
    """Two threads run two programs of one group at the same time."""
    group = make_group(4)
    steps = [spmd(lambda x, i, k=k: there_and_back(x * k, i, group), group) for k in (1, 3)]
    x, failures = numbers(4), []

    def work(step, factor: int) -> None:
        try:
            results = [step(x, jnp.int32(i)) for i in range(150)]
            for result in results:
                expect(result, TOP_K * factor * x, f"the program with factor {factor}")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=a) for a in zip(steps, (1, 3), strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def absent_rank(group: jax_ep.Group, absent: int):
    def run(x, i):
        here = lax.axis_index("expert") != absent
        return lax.cond(here, lambda x: there_and_back(x, i, group), lambda x: x, x)

    return spmd(run, group)


def never_arrives() -> None:
    """Rank 2 takes the branch without the ops: an error within the deadline, then a right run."""
    group = make_group(4, timeout=2)
    x = numbers(4)
    good = spmd(lambda x, i: there_and_back(x, i, group), group)
    bad = absent_rank(group, absent=2)
    expect(good(x, 0), TOP_K * x, "the step before")
    for attempt in range(2):
        begin = time.monotonic()
        try:
            jax.block_until_ready(bad(x, attempt))
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
        else:
            raise AssertionError("no error")
        seconds = time.monotonic() - begin
        if not 1.5 < seconds < 8:
            raise AssertionError(f"the error came after {seconds:.1f} s")
        print("TEXT", text.replace("\n", " "))
        expect(good(x, attempt), TOP_K * x, "the step after")
        group.check()
    pending = bad(x, 3)
    others = [good(x + i, i) for i in range(20)]
    for i, other in enumerate(others):
        expect(other, TOP_K * (x + i), f"step {i} beside one that waits")
    try:
        jax.block_until_ready(pending)
    except jax.errors.JaxRuntimeError:
        pass
    else:
        raise AssertionError("no error")
    gc.collect()
    if _cpu.open_rendezvous():
        raise AssertionError("meetings were left open")


def errors_context() -> None:
    """``jax_ep.errors()`` raises the class itself, and leaves other errors alone."""
    group = make_group(3, timeout=1)
    bad, x = absent_rank(group, absent=0), numbers(3)
    try:
        with jax_ep.errors():
            jax.block_until_ready(bad(x, 0))
    except jax_ep.CommunicationError as error:
        print("TEXT", str(error).replace("\n", " "))
        if not isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            raise AssertionError("the cause is not kept") from error
    else:
        raise AssertionError("no error")
    for other in (ValueError("mine"), jax.errors.JaxRuntimeError("INTERNAL: another")):
        try:
            with jax_ep.errors():
                raise other
        except type(other) as error:
            if error is not other:
                raise AssertionError(f"{other!r} was replaced") from error
    with jax_ep.errors():
        pass


PROGRAMS = {
    f.__name__: f
    for f in (
        unawaited,
        unawaited_chain,
        independent,
        threads,
        never_arrives,
        errors_context,
    )
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
    print("done")
