"""Steps in which all-reduces go on beside dispatch and combine; each checks itself on the device.

    python tests/support/collective_steps.py PROCESSES

runs them on two devices, in one process or in two of one device each, and prints their times.

A step is a chain of layers (dispatch, work on the rows, combine) and all-reduces of arrays that the
chain neither makes nor uses, as the gradients of a data-parallel part would be. XLA:GPU runs these
on a stream of their own, by NCCL. NCCL's kernels wait on the GPU for those of their peers just as
ours do, so the two must leave each other room. As in ``test_steps.py``, numbers are small integers
and powers of two, so that the right results are known exactly without communication.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gpu_processes
import jax_ep
import machine

RANKS, TOP_K = 2, 4
EXPERTS = 8 * RANKS
WHAT = ("y", "rows that arrived", "sums")
# Whether a program has the layers and the all-reduces.
PARTS = {"layers": (True, False), "all-reduces": (False, True), "both": (True, True)}

TIMEOUT_S = 60.0  # of the group
DEADLINE_S = 20.0  # for all steps on GPUs, NCCL's start included
REPEATS = 5
# Both together take at most this many times as long as one after the other.
FACTOR, SLACK_S = 1.5, 0.05


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a step is on each rank, and the numbers of steps.

    Attributes:
        tokens: T.
        hidden: H, in float32.
        layouts: The layouts of its layers.
        gradients: Numbers of elements of the float32 arrays that are summed over the ranks.
        scanned: Steps under one scan.
        single: Programs of one step, dispatched without waiting.
    """

    tokens: int
    hidden: int
    layouts: tuple[Literal["expert", "token"], ...]
    gradients: tuple[int, ...]
    scanned: int
    single: int


SMALL = Sizes(
    tokens=24,
    hidden=64,
    layouts=("expert", "token"),
    gradients=(4096, 1000),
    scanned=6,
    single=4,
)
LARGE = Sizes(
    tokens=512,
    hidden=2048,
    layouts=("expert", "token", "expert", "token"),
    # 24 and 16 MiB: XLA neither combines them nor uses kernels of its own for them.
    gradients=(6 << 20, 4 << 20),
    scanned=200,
    single=100,
)


# A step ------------------------------------------------------------------------------------------


def stamp(i, rank, sizes: Sizes):
    """``[T, H]`` integers from 1 to 61 that tell step, rank, token and channel apart."""
    token, channel = jnp.arange(sizes.tokens)[:, None], jnp.arange(sizes.hidden)
    return ((i * 17 + rank * 29 + token * 5 + channel * 3) % 61 + 1).astype(jnp.float32)


def routes(i, rank, sizes: Sizes):
    """``[T, K]`` different experts of step i, some masked."""
    token, k = jnp.arange(sizes.tokens)[:, None], jnp.arange(TOP_K)
    idx = (token * 7 + rank * 3 + i * (1 + token % 3) + k * 3) % EXPERTS
    masked = (token + 2 * k + i) % 5 == 0
    return jnp.where(masked & (i % 3 != 0), -1, idx).astype(jnp.int32)


def layers(group: jax_ep.Group, sizes: Sizes, i):
    """Numbers of wrong entries of y and of wrong counts of rows in the layers of step ``i``.

    Each layer's input needs the result of the one before, and is ``stamp`` if that was right.
    """
    rank = jax.lax.axis_index("expert")
    wanted_x = x = stamp(i, rank, sizes)
    weights = 2.0 ** -(1 + (jnp.arange(TOP_K) + jnp.arange(sizes.tokens)[:, None] + i) % 4)
    wrong_y, wrong_rows = 0, 0
    for n, layout in enumerate(sizes.layouts):
        idx = routes(i + n, rank, sizes)
        out = jax_ep.dispatch(x, idx, weights, group=group, num_experts=EXPERTS, layout=layout)
        gate = out.weights if layout == "expert" else out.weights.sum(axis=1)
        y = jax_ep.combine((out.tokens + n) * gate[:, None], out.handle, group=group)
        factor = jnp.where(idx >= 0, weights, 0).sum(axis=1, keepdims=True)
        off = y - (wanted_x + n) * factor
        x = wanted_x + off
        wrong_y += (off != 0).sum(dtype=jnp.int32)
        # What all ranks send here, computed without communication.
        everyone = jnp.stack([routes(i + n, r, sizes) for r in range(RANKS)])
        here = (everyone >= 0) & (everyone // (EXPERTS // RANKS) == rank)
        wrong_rows += (out.counts.sum() != here.sum()).astype(jnp.int32) + out.num_dropped.sum()
    return wrong_y, wrong_rows


def gradient(i, rank, n: int, size: int):
    """``[size]`` integers from 0 to 1020 of step ``i``: the n-th array that is summed."""
    return ((jnp.arange(size) * (rank + 3) + i * 7 + n) % 1021).astype(jnp.float32)


def all_reduces(sizes: Sizes, i):
    """Number of wrong entries of the sums over the ranks in step ``i``."""
    rank = jax.lax.axis_index("expert")
    wrong = 0
    for n, size in enumerate(sizes.gradients):
        total = jax.lax.psum(gradient(i, rank, n, size), "expert")
        wanted = sum(gradient(i, r, n, size) for r in range(RANKS))
        wrong += (total != wanted).sum(dtype=jnp.int32)
    return wrong


def one_step(group: jax_ep.Group, sizes: Sizes, part: str, i):
    """``[3]`` numbers of wrong entries of step ``i``, see ``WHAT``; 0 for parts that it lacks."""
    has_layers, has_all_reduces = PARTS[part]
    zero = jnp.int32(0)
    y, rows = layers(group, sizes, i) if has_layers else (zero, zero)
    return jnp.stack([y, rows, all_reduces(sizes, i) if has_all_reduces else zero])


# Programs of many steps --------------------------------------------------------------------------


def put(x: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """A whole array, split over the ranks."""
    sharding = NamedSharding(mesh, P("expert"))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Programs:
    """The compiled programs of a group; they count the wrong entries of all steps that they run."""

    def __init__(self, group: jax_ep.Group, sizes: Sizes) -> None:
        self.group, self.sizes = group, sizes
        self._steps = 0
        self._wrong = put(np.zeros(RANKS * len(WHAT), np.int32), group.mesh)
        self._scanned = {part: self._compile(part, scanned=True) for part in PARTS}
        self._single = self._compile("both", scanned=False)

    def _compile(self, part: str, *, scanned: bool) -> jax.stages.Compiled:
        def many(wrong, start):
            def body(wrong, i):
                return wrong + one_step(self.group, self.sizes, part, i), None

            return jax.lax.scan(body, wrong, start[0] + jnp.arange(self.sizes.scanned))[0]

        def one(wrong, start):
            return wrong + one_step(self.group, self.sizes, part, start[0])

        spec = P("expert")
        fn = jax.shard_map(
            many if scanned else one, mesh=self.group.mesh, in_specs=spec, out_specs=spec
        )
        return jax.jit(fn).lower(self._wrong, self._start()).compile()

    def _start(self) -> jax.Array:
        return put(np.full(RANKS, self._steps, np.int32), self.group.mesh)

    def texts(self) -> dict[str, str]:
        """The compiled modules that have both layers and all-reduces."""
        return {"scanned": self._scanned["both"].as_text(), "single": self._single.as_text()}

    def run_scanned(self, part: str) -> None:
        """Start ``sizes.scanned`` steps under one scan, and do not wait for them."""
        self._wrong = self._scanned[part](self._wrong, self._start())
        self._steps += self.sizes.scanned

    def run_single(self) -> None:
        """Start ``sizes.single`` steps, each of them a program, and do not wait for them."""
        for _ in range(self.sizes.single):
            self._wrong = self._single(self._wrong, self._start())
            self._steps += 1

    def wait(self) -> None:
        """Wait until all steps are done."""
        jax.block_until_ready(self._wrong)

    def wrong(self) -> np.ndarray:
        """``[ranks of this process, 3]`` numbers of wrong entries so far."""
        shards = [np.asarray(shard.data) for shard in self._wrong.addressable_shards]
        return np.stack(shards)


def run_all(programs: Programs, repeats: int) -> dict[str, list[float]]:
    """Run all programs; gives the seconds of each run of the scanned ones."""
    # NCCL starts while steps are under way.
    programs.run_scanned("layers")
    programs.run_scanned("both")
    programs.wait()
    programs.run_single()
    programs.wait()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(1 + repeats):
        for part, found in seconds.items():
            begin = time.perf_counter()
            programs.run_scanned(part)
            programs.wait()
            found.append(time.perf_counter() - begin)
    return {part: found[1:] for part, found in seconds.items()}


def beside(text: str) -> dict[str, list[str]]:
    """Which of our ops a compiled module has between the start and the end of each all-reduce.

    An all-reduce that XLA has made synchronous does not count.

    Args:
        text: The text of a scheduled module, whose instructions are in the order of their launch.

    Returns:
        The ops ("plan", "dispatch", "combine"), in order, by the name of the start. A call that
        does both "plan" and "dispatch" counts as the two.
    """
    assert "is_scheduled=true" in text.partition("\n")[0], text[:200]
    found: dict[str, list[str]] = {}
    under_way: set[str] = set()
    for line in text.splitlines():
        if start := re.search(r"%([\w.-]+) = .*\ball-reduce-start\(", line):
            found[start[1]] = []
            if not re.search(r'"is_sync": ?true', line):
                under_way.add(start[1])
        elif done := re.search(r"\ball-reduce-done\([^%]*%([\w.-]+)\)", line):
            under_way.discard(done[1])
        elif op := re.search(r'custom_call_target="jax_ep_(\w+)"', line):
            for name in under_way:
                found[name] += ["plan", "dispatch"] if op[1] == "plan_dispatch" else [op[1]]
    return found


# The processes -----------------------------------------------------------------------------------


def start(platform: str, processes: int, **env: str) -> list[subprocess.Popen[str]]:
    """Start the program below on two devices of a platform; ``gpu_processes.finish`` must follow."""
    flags = {"cuda": "--xla_gpu_enable_latency_hiding_scheduler=true"}.get(
        platform, f"--xla_force_host_platform_device_count={RANKS // processes}"
    )
    base = {
        **os.environ,
        "PYTHONPATH": machine.python_path(pathlib.Path(jax_ep.__file__).parents[1]),
        "JAX_PLATFORMS": platform,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1",  # the tests' own process holds most of the memory
    }
    env["XLA_FLAGS"] = f"{flags} {env.get('XLA_FLAGS', '')}".strip()
    port = machine.free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(processes), str(index), str(port)],
            env={**base, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def check_overlap(programs: Programs) -> None:
    """Fail unless XLA has put ops beside the all-reduces, because nothing would be tested then."""
    for name, text in programs.texts().items():
        found = beside(text)
        print(f"{name}: beside the all-reduces {found}")
        ops = {op for ops in found.values() for op in ops}
        assert ops == {"plan", "dispatch", "combine"}, (
            f"of the program {name}, XLA has only {sorted(ops)} of our ops under way beside "
            f"all-reduces ({found}); look for the flags that make it schedule them so"
        )


def check_times(seconds: dict[str, list[float]]) -> None:
    """Fail if both together take much longer than one after the other."""
    took = {part: statistics.median(found) for part, found in seconds.items()}
    bound = FACTOR * (took["layers"] + took["all-reduces"]) + SLACK_S
    print(f"bound {bound:.4f} s for both together, which take {took['both']:.4f} s")
    assert took["both"] <= bound, f"one keeps the other waiting: {seconds}"


def run_here(platform: str) -> None:
    """Run all programs on the devices here; on CPU small ones without limits of time."""
    on_gpu = platform == "gpu"
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:RANKS]), ("expert",))
    group = jax_ep.create_group(mesh, timeout=TIMEOUT_S)
    print(f"{group}, process {jax.process_index()} of {jax.process_count()}", flush=True)
    begin = time.perf_counter()
    programs = Programs(group, LARGE if on_gpu else SMALL)
    print(f"compiled in {time.perf_counter() - begin:.1f} s", flush=True)
    if on_gpu:
        assert group.backend == "cuda", group
        check_overlap(programs)
    begin = time.perf_counter()
    seconds = run_all(programs, REPEATS)
    took = time.perf_counter() - begin
    for part, found in seconds.items():
        runs = ", ".join(f"{s:.4f}" for s in found)
        print(f"{part}: {runs} s for {programs.sizes.scanned} steps")
    print(f"all steps in {took:.1f} s", flush=True)
    group.check()
    wrong = programs.wrong()
    assert not wrong.any(), dict(zip(WHAT, wrong.T.tolist(), strict=True))
    if on_gpu:
        assert took < DEADLINE_S, f"{took:.1f} s"
        check_times(seconds)


def main(arguments: Sequence[str]) -> int:
    """Run one of the processes, or all of them."""
    processes = int(arguments[0])
    if len(arguments) == 1:
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        results = gpu_processes.finish(start(platform, processes), 300)
        for index, (status, output) in enumerate(results):
            print(f"--- process {index}: {status}\n{output}")
        return max(abs(status) for status, _ in results)
    index, address = int(arguments[1]), f"127.0.0.1:{arguments[2]}"
    if processes > 1:
        on_gpus = os.environ["JAX_PLATFORMS"] == "cuda"
        jax.distributed.initialize(
            address,
            processes,
            index,
            local_device_ids=[index % machine.count_gpus()] if on_gpus else None,
            # Without it the service binds [::], which fails where there is no IPv6.
            coordinator_bind_address=address if index == 0 else None,
        )
    run_here(jax.default_backend())
    print("fine", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
