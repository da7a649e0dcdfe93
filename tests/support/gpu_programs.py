"""Programs of several processes with one rank each that share one or more GPUs.

    python tests/support/gpu_programs.py PROGRAM PROCESSES

starts the processes, which run the function of that name below. XLA's own collectives rarely run
with two processes on one GPU, so each rank compares its own results with NumPy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gpu_processes
import jax_ep
from jax_ep import _compat
from jax_ep._groups import gpu_side

TOKENS, TOP_K, HIDDEN = 96, 4, 512


def routes(ranks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``[R, T, K]`` experts, some masked, and weights; the same in all processes."""
    rng = np.random.default_rng(seed)
    experts = 8 * ranks
    scores = rng.random((ranks, TOKENS, experts))
    idx = np.argsort(scores, axis=-1)[..., :TOP_K].astype(np.int32)
    idx[rng.random(idx.shape) < 0.1] = -1
    return idx, rng.random(idx.shape).astype(np.float32)


def inputs(ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x ``[R, T, H]``, experts and weights ``[R, T, K]``; the same in all processes."""
    x = np.random.default_rng(1).standard_normal((ranks, TOKENS, HIDDEN)).astype(np.float32)
    return x, *routes(ranks, seed=0)


def spread(mesh: jax.sharding.Mesh, x: np.ndarray) -> jax.Array:
    """``[R, n, ...]`` as a global array of ``[R * n, ...]``, one slice for each rank."""
    flat = x.reshape(-1, *x.shape[2:])
    sharding = NamedSharding(mesh, P("expert"))
    return jax.make_array_from_callback(flat.shape, sharding, lambda index: flat[index])


def mine(x: jax.Array) -> np.ndarray:
    """This rank's slice."""
    return np.asarray(x.addressable_shards[0].data)


def identity_layer(group: jax_ep.Group, **options: Any) -> Callable[..., jax.Array]:
    """Dispatch, weigh, combine: y = x · sum of the weights of the entries that count."""

    def run(x, idx, weights):
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=8 * group.size, **options)
        rows = out.tokens.astype(jnp.float32)
        if out.handle.layout == "expert":
            rows = rows * out.weights[:, None]
        else:
            rows = rows * out.weights.sum(axis=1, keepdims=True)
        return jax_ep.combine(rows, out.handle, group=group)

    return jax.shard_map(run, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))


def expected(x: np.ndarray, idx: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The right result of ``identity_layer`` on one rank."""
    return x.astype(np.float64) * np.where(idx >= 0, weights, 0).sum(-1, keepdims=True)


def check_layer(y: jax.Array, x: np.ndarray, idx: np.ndarray, weights: np.ndarray) -> None:
    """Compare this rank's part of the result of ``identity_layer`` with the right one."""
    me = jax.process_index()
    np.testing.assert_allclose(mine(y), expected(x[me], idx[me], weights[me]), rtol=1e-4, atol=1e-5)


def error_of(run: Callable[[], jax.Array], group: jax_ep.Group) -> str:
    """The text of the error of ``run``, or "no error"; prints it."""
    text = "no error"
    try:
        with jax_ep.errors():
            jax.block_until_ready(run())
        group.check()
    except jax_ep.CommunicationError as error:
        text = str(error)
    print(f"raised: {text}")
    return text


def values(ranks: int) -> None:
    """Both layouts, dtypes and fp8; then many steps under scan with changing routes."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    begin = time.perf_counter()
    group = jax_ep.create_group(mesh, backend="cuda", timeout=60)
    seconds = time.perf_counter() - begin
    print(f"group in {seconds:.3f} s, staged: {gpu_side.why_staged(group.id)}")
    me = jax.process_index()
    idx, weights = routes(ranks, seed=0)
    x = np.random.default_rng(1).standard_normal((ranks, TOKENS, HIDDEN))
    cases = [
        ({"layout": "expert", "alignment": 8}, jnp.float32, 1e-6),
        ({"layout": "token"}, jnp.float32, 1e-6),
        ({"layout": "expert", "alignment": 16}, jnp.bfloat16, 1e-6),
        ({"layout": "token"}, jnp.bfloat16, 1e-6),
        ({"layout": "expert", "quantization": "fp8"}, jnp.bfloat16, 0.07),
        ({"layout": "token", "quantization": "fp8"}, jnp.float32, 0.07),
    ]
    for options, dtype, tolerance in cases:
        given = np.asarray(jnp.asarray(x, dtype))
        y = jax.jit(identity_layer(group, **options))(
            spread(mesh, given), spread(mesh, idx), spread(mesh, weights)
        )
        want = expected(given[me].astype(np.float64), idx[me], weights[me])
        worst = np.abs(mine(y) - want).max() / np.abs(want).max()
        assert worst <= tolerance, (options, dtype, worst)

    other = jax_ep.create_group(mesh, backend="cuda", timeout=61)
    experts = 8 * ranks

    # Counted rank by rank: a sum over ranks would be a collective.
    def local_steps(x, idx, weights):
        total = jnp.where(idx >= 0, weights, 0).sum(-1, keepdims=True)

        def step(wrong, i):
            shifted = jnp.where(idx >= 0, (idx + i) % experts, idx)
            stamped = x + i.astype(x.dtype)
            want = stamped * total
            for g, layout in ((group, "expert"), (other, "token")):
                out = jax_ep.dispatch(
                    stamped,
                    shifted,
                    weights,
                    group=g,
                    num_experts=experts,
                    layout=layout,
                    alignment=8 if layout == "expert" else 1,
                )
                factor = out.weights if layout == "expert" else out.weights.sum(axis=1)
                y = jax_ep.combine(out.tokens * factor[:, None], out.handle, group=g)
                off = jnp.abs(y - want) > 1e-4 * (1 + jnp.abs(want))
                wrong = wrong + off.sum(dtype=jnp.int32)[None]
            return wrong, None

        start_count = jnp.zeros((1,), jnp.int32) + 0 * idx[:1, 0]
        return jax.lax.scan(step, start_count, jnp.arange(200))[0]

    program = jax.jit(
        jax.shard_map(local_steps, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    )
    given = x.astype(np.float32)
    begin = time.perf_counter()
    for _ in range(3):
        wrong = program(spread(mesh, given), spread(mesh, idx), spread(mesh, weights))
        assert mine(wrong).tolist() == [0], mine(wrong)
    print(f"600 steps of two groups in {time.perf_counter() - begin:.2f} s")
    group.check()
    other.check()


def endless(ranks: int) -> None:
    """Run steps until a peer is gone, and print the error."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    group = jax_ep.create_group(mesh, backend="cuda", timeout=60)
    layer = jax.jit(identity_layer(group))
    operands = [spread(mesh, a) for a in inputs(ranks)]
    try:
        with jax_ep.errors():
            for step in range(10**9):
                jax.block_until_ready(layer(*operands))
                group.check()
                if step == 20:
                    print("running", flush=True)
    except jax_ep.CommunicationError as error:
        print(f"CommunicationError at {time.time():.3f}: {error}", flush=True)
        os._exit(7)  # JAX's own shutdown would wait for the lost process


def again(ranks: int) -> None:
    """One rank stays away for one op; then a new group works."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    group = jax_ep.create_group(mesh, backend="cuda", timeout=2)
    given = inputs(ranks)
    operands = [spread(mesh, a) for a in given]
    layer = jax.jit(identity_layer(group))
    jax.block_until_ready(layer(*operands))
    if jax.process_index() != 0:
        text = error_of(lambda: layer(*operands), group)
        assert "phase arrival: waited 2" in text or "another rank" in text, text
    else:
        time.sleep(4)
    new = jax_ep.create_group(mesh, backend="cuda", timeout=2)
    assert new is not group
    y = jax.jit(identity_layer(new))(*operands)
    check_layer(y, *given)
    new.check()


def ending(ranks: int) -> None:
    """One rank ends in order: the others' check raises nothing, but their next op does."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    group = jax_ep.create_group(mesh, backend="cuda", timeout=60)
    given = inputs(ranks)
    operands = [spread(mesh, a) for a in given]
    layer = jax.jit(identity_layer(group))
    y = layer(*operands)  # not waited for by the rank that ends
    if jax.process_index() == 1:
        gpu_side.library().say_goodbye()
        return
    check_layer(y, *given)
    deadline = time.monotonic() + 30
    while 1 not in gpu_side.library().gone_processes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group.check()
    try:
        with jax_ep.errors():
            jax.block_until_ready(layer(*operands))
        text = "no error"
    except jax_ep.CommunicationError as error:
        text = str(error)
    print(f"raised: {text}")
    assert "the process of rank 1 has ended" in text, text


def side_by_side(ranks: int) -> None:
    """One of two groups side by side fails: all ranks make new groups, and these work."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "expert"))
    group = jax_ep.create_group(mesh, backend="cuda", timeout=5)
    me = jax.process_index()
    idx, weights = routes(2, seed=0)
    x = np.random.default_rng(1).standard_normal((ranks, TOKENS, HIDDEN)).astype(np.float32)
    everywhere = P(("data", "expert"))

    def global_array(a: np.ndarray) -> jax.Array:
        flat = a.reshape(-1, *a.shape[2:])
        return jax.make_array_from_callback(
            flat.shape, NamedSharding(mesh, everywhere), lambda index: flat[index]
        )

    copies = (ranks // 2, 1, 1)
    operands = [global_array(a) for a in (x, np.tile(idx, copies), np.tile(weights, copies))]

    def program(group: jax_ep.Group) -> Callable[..., jax.Array]:
        def run(x, idx, weights):
            out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=16)
            return jax_ep.combine(out.tokens * out.weights[:, None], out.handle, group=group)

        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=everywhere, out_specs=everywhere))

    def check(y: jax.Array) -> None:
        want = expected(x[me], idx[me % 2], weights[me % 2])
        np.testing.assert_allclose(mine(y), want, rtol=1e-4, atol=1e-5)

    check(program(group)(*operands))
    if me == 1:  # its peer, of rank 0, is left alone
        with contextlib.suppress(jax_ep.CommunicationError):
            group.check()
    else:
        try:
            with jax_ep.errors():
                check(program(group)(*operands))
            group.check()
            print("second: fine")
        except (jax_ep.CommunicationError, AssertionError) as error:
            print(f"second: {type(error).__name__}")
    new = jax_ep.create_group(mesh, backend="cuda", timeout=20)
    again = jax_ep.create_group(mesh, backend="cuda", timeout=5)
    assert again is not group
    assert jax_ep.create_group(mesh, backend="cuda", timeout=5) is again
    for made in (new, again):
        check(program(made)(*operands))
        made.check()


def out_of_step(ranks: int) -> None:
    """One rank runs a program of two equal layers, the others run a program of one layer twice.

    Kinds, shapes and numbers of the ops agree. Only their places in the programs differ.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    group = jax_ep.create_group(mesh, backend="cuda", timeout=20)
    operands = [spread(mesh, a) for a in inputs(ranks)]

    def program(count: int) -> Callable[..., jax.Array]:
        def run(x, idx, weights):
            for _ in range(count):
                out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=8 * ranks)
                x = jax_ep.combine(out.tokens * out.weights[:, None], out.handle, group=group)
            return x

        mapped = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        return jax.jit(mapped).lower(*operands).compile()

    one, two = program(1), program(2)  # all compile both, because compiling may wait for the others
    for step in (one, two):
        jax.block_until_ready(step(*operands))
    group.check()

    def steps() -> jax.Array:
        if jax.process_index() == 0:
            return two(*operands)
        y = one(*operands)
        return one(y, *operands[1:])

    text = error_of(steps, group)
    assert "op plan" in text or "op dispatch" in text, text  # which begins while the plan runs
    assert "is at another op" in text or "another rank of the group failed" in text, text


def misplaced(ranks: int) -> None:
    """A program on a mesh with its devices in another order than the group's raises an error."""
    devices = np.array(jax.devices())
    group = jax_ep.create_group(
        jax.sharding.Mesh(devices[::-1], ("expert",)), backend="cuda", timeout=20
    )
    mesh = jax.sharding.Mesh(devices, ("expert",))
    idx, weights = routes(ranks, seed=0)
    x = np.ones((ranks, TOKENS, HIDDEN), np.float32)
    operands = [spread(mesh, a) for a in (x, idx, weights)]

    def run(x, idx, weights):
        return jax_ep.dispatch(x, idx, weights, group=group, num_experts=8 * ranks).tokens

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    text = error_of(lambda: jax.jit(mapped)(*operands), group)
    # No rank may leave before all have failed, or the others would report that it left.
    for what in _compat.all_gather_text("misplaced", text):
        assert "make the group with the mesh that shard_map runs on" in what, what


def main() -> None:
    """Run one of the processes, or all of them."""
    program, processes = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) == 3:
        running = gpu_processes.start(program, processes, 1)
        status = 0
        for rank, (code, output) in enumerate(gpu_processes.finish(running, 300)):
            print(f"--- rank {rank}: {code}\n{output}")
            status = status or code
        raise SystemExit(status)
    rank, port = int(sys.argv[3]), sys.argv[4]
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        processes,
        rank,
        local_device_ids=[int(os.environ["JAX_EP_TEST_GPU"])],
        coordinator_bind_address=address,
    )
    globals()[program](processes)
    print("fine", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()
