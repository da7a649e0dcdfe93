"""Programs of three processes that share GPUs and go on in latency mode without rank 1.

``gpu_processes.start`` runs them. A new program may not wait for rank 1 while it is compiled, so the
test turns off that processes share the work of XLA's autotuning.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import jax_ep
from gpu_programs import (
    HIDDEN,
    TOKENS,
    check_layer,
    error_of,
    identity_layer,
    inputs,
    spread,
)
from jax_ep import _compat

EVERYBODY, OUT, LEFT = (0, 1, 2), 1, (0, 2)
TIMEOUT_S = 3.0
HEARTBEAT_S = 10
STEPS = 200


def make(**kwargs: Any) -> jax_ep.Group:
    """A group with latency mode, which ops take by themselves; float32 counts twice."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    sizes = {"latency_tokens": TOKENS, "latency_hidden": 2 * HIDDEN}
    return jax_ep.create_group(mesh, backend="cuda", timeout=TIMEOUT_S, **sizes, **kwargs)


def meet(what: str, processes: Sequence[int]) -> None:
    """Wait for these processes, for example until all have compiled, which takes longer than an op."""
    _compat.key_value_set(f"test/{what}/{jax.process_index()}", b"here")
    for process in processes:
        _compat.key_value_get(f"test/{what}/{process}", 120)


class Ranks:
    """The layer of a group of all ranks, which has run once, and its operands."""

    def __init__(self) -> None:
        self.group = make()
        self.x, self.idx, self.weights = inputs(len(EVERYBODY))
        given = (self.x, self.idx, self.weights)
        self.operands = [spread(self.group.mesh, a) for a in given]
        lowered = jax.jit(identity_layer(self.group)).lower(*self.operands)
        assert "jax_ep_latency_dispatch" in lowered.as_text()
        self.layer = lowered.compile()
        meet("compiled", EVERYBODY)
        check_layer(self.layer(*self.operands), *given)

    def run(self) -> str:
        """The error of an op of the first group."""
        return error_of(lambda: self.layer(*self.operands), self.group)

    def go_on(self) -> jax_ep.Group:
        """Make the group without rank 1 and run many steps."""
        begin = time.monotonic()
        group = make(absent_ranks=[OUT])
        assert group is not self.group and group is make(absent_ranks=[OUT])
        self.new_layer = jax.jit(identity_layer(group)).lower(*self.operands).compile()
        meet("compiled without", LEFT)
        self.check()
        print(f"went on after {time.monotonic() - begin:.2f} s", flush=True)
        for _ in range(STEPS):
            self.new_layer(*self.operands)
        self.check()
        group.check()
        return group

    def come_together(self) -> None:
        """Make a group of all ranks again."""
        group = make()
        assert group is not self.group
        layer = jax.jit(identity_layer(group)).lower(*self.operands).compile()
        meet("compiled again", EVERYBODY)
        check_layer(layer(*self.operands), self.x, self.idx, self.weights)
        group.check()

    def check(self) -> None:
        """Compare a step of the new group with NumPy."""
        of_rank_1 = self.idx // 8 == OUT
        kept = np.where(of_rank_1, -1, self.idx)
        assert of_rank_1.any() and (kept >= 0).any()
        check_layer(self.new_layer(*self.operands), self.x, kept, self.weights)


def slow() -> None:
    """Rank 1 stays away from an op, and comes to it when the others have gone on without it."""
    all_ranks = Ranks()
    if jax.process_index() == OUT:
        meet("gone on", EVERYBODY)
        text = all_ranks.run()
        assert "another rank of the group failed" in text, text
        with pytest.raises(ValueError, match="all that process 1 has"):
            make(absent_ranks=[OUT])
        meet("late", EVERYBODY)
    else:
        text = all_ranks.run()
        assert f"rank {OUT}" in text, text
        assert jax_ep.CommunicationError(text).peer in (OUT, None), text
        group = all_ranks.go_on()
        meet("gone on", EVERYBODY)
        meet("late", EVERYBODY)
        all_ranks.check()  # what the late op wrote was read by nobody
        group.check()
        assert all_ranks.run() != "no error"
    all_ranks.come_together()


def dead() -> None:
    """The process of rank 1 dies. The others live on, also when JAX has noticed that."""
    all_ranks = Ranks()
    if jax.process_index() == OUT:
        os.kill(os.getpid(), signal.SIGKILL)
    text = all_ranks.run()
    assert f"rank {OUT} is gone" in text or "another rank of the group failed" in text, text
    group = all_ranks.go_on()
    time.sleep(2.5 * HEARTBEAT_S)
    all_ranks.check()
    group.check()
    meet("end", LEFT)
    if jax.process_index() == 0:  # it has the key-value store
        time.sleep(2)


def main() -> None:
    """Run the program that the command line names."""
    program, processes, rank, port = sys.argv[1], *map(int, sys.argv[2:5])
    address = f"127.0.0.1:{port}"
    if program == "dead":  # else JAX ends the other processes too
        jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(
        address,
        processes,
        rank,
        local_device_ids=[int(os.environ["JAX_EP_TEST_GPU"])],
        coordinator_bind_address=address if rank == 0 else None,
        heartbeat_timeout_seconds=HEARTBEAT_S if program == "dead" else 100,
    )
    globals()[program]()
    print("fine", flush=True)
    if program == "dead":
        os._exit(0)  # JAX's own shutdown would wait for the lost process


if __name__ == "__main__":
    main()
