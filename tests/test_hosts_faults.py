"""A signal that gets lost between hosts: every rank of every host raises an error, and in time.

The network of process 0 loses the signal of the last chunk of an op, so its counterpart on the next
host waits. Faults that stop a process or the network for good are in ``test_hosts_failures.py``.
"""

from __future__ import annotations

import re
import time

import jax
import numpy as np
import pytest

import exact_steps
import jax_ep
import late_network
import lockstep
import logical_hosts
from spmd import create_group, make_mesh, put, shard

RANKS = lockstep.COUNT
PER_HOST = logical_hosts.PROCESSES or 1
# Two windows of at most 32 tokens. Both are sent before anything has come from the other host.
SIZES = exact_steps.Sizes(tokens=40, hidden=16)
EXPERTS = RANKS * SIZES.local_experts
TIMEOUT_S = 4.0
LATE_S = 1.5  # by which the waiting host comes later, so that no credit is among the signals
OPS = {"plan": 1, "dispatch": 2, "combine": 2}  # signals towards the counterpart, credits left out

pytestmark = [pytest.mark.gpu, late_network.needs_late_network]


class Programs:
    """A plan with its dispatch, a dispatch along the handle, and a combine; compiled, in step."""

    def __init__(self) -> None:
        mesh = make_mesh(RANKS)
        self.group = create_group(mesh, backend="cuda", timeout=TIMEOUT_S)
        number = exact_steps.NAMES.index("spread")
        idx = exact_steps.host_routes(
            SIZES, i=1, number=number, ranks=RANKS, hosts=RANKS // PER_HOST
        )
        x = np.ones((RANKS * SIZES.tokens, SIZES.hidden), np.float32)
        self._x, self._idx = put((x, idx.reshape(-1, SIZES.top_k)), mesh)
        # Compiled before any op, whose deadline would not wait for a process that compiles.
        self._plan = self._compiled(self._first, self._x, self._idx)
        self._rows, self._handle = jax.block_until_ready(self._plan(self._x, self._idx))
        self._again = self._compiled(self._along, self._x, self._handle)
        self._combine = self._compiled(self._home, self._rows, self._handle)
        for op in ("dispatch", "combine"):
            self.run(op)
        self.group.check()

    def _compiled(self, fn, *arguments):
        """``fn`` on all ranks, once every process has compiled it."""
        compiled = jax.jit(shard(fn, self.group.mesh)).lower(*arguments).compile()
        lockstep.exchange.swap(None, range(RANKS))
        return compiled

    def _first(self, x, idx):
        out = jax_ep.dispatch(x, idx, group=self.group, num_experts=EXPERTS)
        return out.tokens, out.handle

    def _along(self, x, handle):
        return jax_ep.dispatch(x, group=self.group, handle=handle).tokens

    def _home(self, rows, handle):
        return jax_ep.combine(rows, handle, group=self.group)

    def run(self, op: str) -> jax.Array:
        """The op; its result on this rank."""
        with jax_ep.errors():
            if op == "plan":
                return jax.block_until_ready(self._plan(self._x, self._idx)[0])
            if op == "dispatch":
                return jax.block_until_ready(self._again(self._x, self._handle))
            return jax.block_until_ready(self._combine(self._rows, self._handle))

    def until_error(self, op: str) -> tuple[str, bool | None, float]:
        """Ops until one fails: the error, whether that op's result is NaN, and seconds.

        The rank that has lost the signal cannot know it in the same op, but when others fail.
        """
        begin, y = time.monotonic(), None
        try:
            for _ in range(5):
                y = None
                y = self.run(op)
                self.group.check()
        except jax_ep.CommunicationError as error:
            nan = None if y is None else bool(np.isnan(y.addressable_shards[0].data).all())
            return str(error), nan, time.monotonic() - begin
        return "no error", None, time.monotonic() - begin


@pytest.mark.parametrize("op", OPS)
def test_lost_signal_of_the_last_chunk(op):
    programs, me = Programs(), jax.process_index()
    waiting = PER_HOST  # the counterpart of rank 0 on the next host
    late_network.settled(range(RANKS))
    lockstep.exchange.swap(None, range(RANKS))
    if me == 0:
        late_network.drop_signal(waiting, OPS[op])
    lockstep.exchange.swap(None, range(RANKS))
    if me // PER_HOST == 1:
        time.sleep(LATE_S)
    error, nan, seconds = programs.until_error(op)
    with pytest.raises(jax_ep.CommunicationError):
        programs.group.check()
    found = lockstep.exchange.swap((error, nan, seconds), range(RANKS))
    first, *_ = found[waiting]
    # Which rank noticed it, in which op and phase, for whom it waited, and what it expected: the chunk
    # from the other host, or what this rank tells its own warps when the chunk is there.
    chunk, word = "rank 0; expected the chunk", f"rank {waiting}; expected the word that a chunk is"
    expected = rf"^rank {waiting}, op {op}, phase arrival: waited 4\.\d+ s for ({chunk}|{word})"
    assert re.search(expected, first), first
    for rank, (error, nan, seconds) in enumerate(found):
        told = "another rank of the group failed" in error
        waits = re.search(r"waited \d+\.\d+ s for rank \d+; expected", error)
        assert error.startswith(f"rank {rank}, op ") and (told or waits), error
        assert nan in (True, None), f"rank {rank} has values after: {error}"
        # A rank may first come to know of it in an op of its own.
        assert seconds < 2 * TIMEOUT_S + LATE_S + 2, f"rank {rank}: {seconds:.1f} s"
    assert found[waiting][1] is True
    # All go on with a new group, in which the next op here is tried first.
    again = create_group(make_mesh(RANKS), backend="cuda", timeout=TIMEOUT_S)
    assert again.id != programs.group.id
