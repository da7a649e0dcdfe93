"""How the ranks of a group meet in the native CPU module: in time, late, never, or out of step."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ep
import machine
import oracle
from jax_ep import _cpu
from jax_ep._backends import native
from native import EXPERTS, HIDDEN, TOKENS, indices, plan
from spmd import make_group, stacked, stacked_jit

pytestmark = pytest.mark.one_process("the native CPU backend serves groups of one process")

RANKS = 4 if jax.device_count() >= 4 else 2  # the experts are a multiple of both


def name_ranks(ranks) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def plan_where(group):
    """Plans on the ranks whose ``go`` is set, which is what ranks must not do."""

    def body(idx, go):
        def here():
            return plan(idx, group).counts

        def elsewhere():
            return jnp.zeros((EXPERTS // group.size,), jnp.int32)

        return jax.lax.cond(go[0], here, elsewhere)

    return stacked_jit(body, group.mesh, check_vma=False)


def test_missing_ranks():
    group = make_group(RANKS, "cpu", timeout=0.5)
    run, idx = plan_where(group), indices(RANKS)
    everybody = np.ones((RANKS, 1), bool)
    there, absent = range(0, RANKS, 2), range(1, RANKS, 2)
    counts = run(idx, everybody)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        run(idx, np.arange(RANKS)[:, None] % 2 == 0)
    found = re.search(
        r"jax_ep\.CommunicationError: rank (\d): op plan: phase arrival: "
        rf"waited (\d+\.\d) s for {name_ranks(absent)}; {name_ranks(there)} arrived "
        r"\(group id (-?\d+), group index 0\)\. "
        r"Usually a lax\.cond .*create_group\(\.\.\., timeout=seconds\)",
        str(error.value),
    )
    assert found and int(found[1]) in there and int(found[3]) == group.id
    # A busy machine may be late. The default deadline, 600 s, would show that the group's is
    # ignored.
    assert 0.5 <= float(found[2]) < 300
    assert _cpu.open_rendezvous() == 0
    assert (run(idx, everybody) == counts).all()  # the next run is not affected


def test_delays_change_nothing():
    """Many steps in flight of a program with independent ops, ranks out of step."""
    group = make_group(RANKS, "cpu")
    idx = indices(RANKS)
    x = np.random.default_rng(4).standard_normal((RANKS, TOKENS, HIDDEN)).astype(np.float32)

    def body(x, idx):
        handle = plan(idx, group)
        branches = []
        for scale in (1.0, 2.0, 3.0):
            rows, _ = native.dispatch(scale * x, None, handle, group=group)
            y, _ = native.combine(rows, None, None, handle, group=group)
            branches.append(y / scale)
        return jnp.stack(branches, 1)

    run = stacked_jit(body, group.mesh)
    expected = run(x, idx)
    _cpu.set_test_delay_us(200)
    try:
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, idx)]
        outs = [run.jitted(*flat) for _ in range(50)]
        for out in outs:
            oracle.assert_same(stacked(out, RANKS), expected, "with delays")
    finally:
        _cpu.set_test_delay_us(0)
    assert _cpu.open_rendezvous() == 0


def run_script(body: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a script in its own process, so that the suite survives a hang or crash."""
    prelude = """
        import os
        os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"  # the last one holds
        import jax_ep, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, PartitionSpec as P
        mesh = Mesh(np.array(jax.devices()), ("expert",))
        def on_ranks(body):
            return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"),
                                         out_specs=P("expert"), check_vma=False))
        idx = np.tile(np.arange(8, dtype=np.int32), 4).reshape(16, 2)
        x = np.ones((16, 8), np.float32)
    """
    path = machine.python_path(pathlib.Path(jax_ep.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(body)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_blocking_collectives_follow_an_op():
    """XLA's collectives block the thread of a rank, and no other rank may wait behind it."""
    done = run_script(
        """
        group = jax_ep.create_group(mesh, "expert", backend="cpu")
        def body(x, idx):
            for _ in range(4):
                out = jax_ep.dispatch(x, idx, group=group, num_experts=8, alignment=8)
                x = jax_ep.combine(out.tokens, out.handle, group=group)
                x = x / jax.lax.psum(x.sum(), "expert")
            return x
        steps = [on_ranks(body)(x, idx) for _ in range(10)]
        print(all(bool((step == steps[0]).all()) for step in steps))
        """
    )
    assert done.stdout == "True\n", done.stderr


def test_ending_while_a_rank_is_missing():
    """The process ends by itself, at the latest at the deadline, although nobody waits for it."""
    done = run_script(
        """
        group = jax_ep.create_group(mesh, "expert", backend="cpu", timeout=1.0)
        def body(x, idx):
            def here():
                return jax_ep.dispatch(x, idx, group=group, num_experts=8, alignment=8).counts
            return jax.lax.cond(jax.lax.axis_index("expert") < 3, here, lambda: jnp.zeros(2, jnp.int32))
        out = on_ranks(body)(x, idx)
        print("started")
        """
    )
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


def test_rank_that_comes_after_the_deadline():
    """It fails with the meeting that its peers have left, and does not wait at a new one."""
    done = run_script(
        """
        import threading
        peers_failed = threading.Event()
        group = jax_ep.create_group(mesh, "expert", backend="cpu", timeout=1.0)
        def body(x, idx):
            def wait(rank, idx):
                if rank == 2 and not peers_failed.wait(60):
                    print("the peers of rank 2 wait for it")
                return idx
            kind = jax.ShapeDtypeStruct(idx.shape, idx.dtype)
            idx = jax.pure_callback(wait, kind, jax.lax.axis_index("expert"), idx)
            return jax_ep.dispatch(x, idx, group=group, num_experts=8, alignment=8).counts
        shards = on_ranks(body)(x, idx).addressable_shards
        for rank in (0, 1, 3, 2):
            if rank == 2:
                peers_failed.set()
            try:
                jax.block_until_ready(shards[rank].data)
            except jax.errors.JaxRuntimeError as error:
                print(error)
        """
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    waited = r"waited \d+\.\d s for rank 2; ranks 0, 1, 3 arrived"
    assert all(re.search(f"phase arrival: {waited}", line) for line in lines[:3])
    assert re.search(f"came to a meeting that had failed: {waited}", lines[3]), lines[3]
