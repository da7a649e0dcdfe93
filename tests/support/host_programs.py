"""Programs of processes with one rank each that are several logical hosts, where something goes wrong.

``gpu_processes.start(..., programs=HOST_PROGRAMS)`` starts them. The environment says how many ranks a
host has (``JAX_EP_TEST_RANKS_PER_HOST``) and has the variables of ``run_hosts.py``. Processes tell each
other by files in ``JAX_EP_TEST_FOLDER`` that they are done. A process that has noticed a failure prints
it and ends with NOTICED.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import exact_steps
import gpu_programs
import jax_ep
import late_network
from jax_ep import _compat
from jax_ep._core import libraries
from jax_ep._groups import meetings, network

NOTICED = 7  # exit status
TIMEOUT_S = 8.0  # of ops
MEETING_S = 10.0  # in which all processes must come to make a group
LAST_S = 90.0  # for the other processes to be done
FOLDER = pathlib.Path(os.environ.get("JAX_EP_TEST_FOLDER", "/nonexistent"))
PER_HOST = int(os.environ.get("JAX_EP_TEST_RANKS_PER_HOST", "1"))


def make_mesh() -> jax.sharding.Mesh:
    """All processes, in order."""
    return jax.sharding.Mesh(np.array(jax.devices()), ("expert",))


def make_group(timeout: float = TIMEOUT_S, transport: str = "nvshmem") -> jax_ep.Group:
    """The group of all processes."""
    backend = "auto" if transport == "auto" else "cuda"
    return jax_ep.create_group(
        make_mesh(), backend=backend, timeout=timeout, ranks_per_host=PER_HOST, transport=transport
    )


def say(what: str, text: object = "") -> None:
    """Print a line with the time, for the test that started this process."""
    print(f"{what} at {time.time():.3f}: {text}", flush=True)


def leave(status: int, *, but: int | None = None) -> None:
    """End with ``status``; process 0, which serves JAX's coordinator, after all others but one."""
    (FOLDER / f"done.{jax.process_index()}").touch()
    if jax.process_index() == 0:
        wait_for_done(set(range(jax.process_count())) - {but})
    sys.exit(status)


def wait_for_done(processes: set[int]) -> None:
    """Return once these processes are done, or the time is over."""
    deadline = time.monotonic() + LAST_S
    while not all((FOLDER / f"done.{process}").exists() for process in processes):
        if time.monotonic() > deadline:
            say("some were not done", sorted(processes))
            return
        time.sleep(0.05)


class Layer:
    """Steps of a layer that is compiled, in all processes at once."""

    def __init__(self, group: jax_ep.Group) -> None:
        self._group = group
        self._given = gpu_programs.inputs(group.size)
        self._operands = [gpu_programs.spread(group.mesh, a) for a in self._given]
        layer = jax.jit(gpu_programs.identity_layer(group))
        self._step = layer.lower(*self._operands).compile()
        _compat.wait_for_all(f"compiled for {group.id}", LAST_S)

    def step(self) -> jax.Array:
        """One step; its result, once it is there."""
        with jax_ep.errors():
            return jax.block_until_ready(self._step(*self._operands))

    def right_step(self) -> None:
        """One step, whose result must be right."""
        gpu_programs.check_layer(self.step(), *self._given)
        self._group.check()

    def until_error(self, before_step: Callable[[int], None] = lambda step: None) -> None:
        """Steps until one fails; prints the error, and whether the result of that step is NaN."""
        y = None
        try:
            for step in range(1 << 30):
                before_step(step)
                y = None
                y = self.step()
                self._group.check()
                if step == 20:
                    say("running")
        except jax_ep.CommunicationError as error:
            say("CommunicationError", error)
        poisoned = "no result" if y is None else bool(np.isnan(gpu_programs.mine(y)).all())
        say("poisoned", poisoned)
        with contextlib.suppress(jax_ep.CommunicationError):
            self._group.check()
            say("check raised nothing")


# Programs ------------------------------------------------------------------------------------------


def killed(processes: int) -> None:
    """The test kills the last process: in its steps, or when it has stopped and the others wait."""
    layer = Layer(make_group())
    victim = processes - 1
    stops = os.environ["JAX_EP_TEST_KILL"] == "between"

    def before_step(step: int) -> None:
        if jax.process_index() == victim and stops and step == 30:
            say("stopped")
            time.sleep(600)

    layer.until_error(before_step)
    leave(NOTICED, but=victim)


def network_stops(processes: int) -> None:
    """All that the last process sends gets lost from the seventh operation of a step on."""
    layer = Layer(make_group())

    def before_step(step: int) -> None:
        if jax.process_index() == processes - 1 and step == 30:
            late_network.stop_after(7)
            say("stopped")

    layer.until_error(before_step)
    leave(NOTICED)


def leaves(processes: int) -> None:
    """The last process ends in order, while the others go on."""
    layer = Layer(make_group())
    for _ in range(3):
        layer.right_step()
    if jax.process_index() == processes - 1:
        say("ends")
        (FOLDER / f"done.{jax.process_index()}").touch()
        return
    layer.until_error()
    leave(NOTICED)


def ends_early(processes: int) -> None:
    """The last process is done first. It waits for the others, and all of them end NVSHMEM."""
    atexit.register(lambda: say("at exit", f"NVSHMEM runs: {network.library().runs()}"))
    layer = Layer(make_group())
    layer.right_step()
    if jax.process_index() != processes - 1:
        time.sleep(4)  # more than a message takes
    say("ends")


def missing(processes: int) -> None:
    """The last process does not come to make the group."""
    meetings.TIMEOUT_S = MEETING_S
    if jax.process_index() == processes - 1:
        wait_for_done(set(range(processes - 1)))
        return
    begin = time.monotonic()
    try:
        make_group()
    except jax_ep.CommunicationError as error:
        say("CommunicationError", f"after {time.monotonic() - begin:.1f} s: {error}")
    leave(NOTICED, but=processes - 1)


def unlike(processes: int) -> None:
    """Process 1 has no NVSHMEM, another version, or other settings; then all is well."""
    for what, changed in (
        ("wheel", _without_wheel),
        ("version", _other_version),
        ("settings", _other_settings),
    ):
        with changed() if jax.process_index() == 1 else contextlib.nullcontext():
            network.obstacle.cache_clear()
            try:
                make_group()
                say(what, "no error")
            except ValueError as error:
                say(what, error)
            say(f"{what}, auto", make_group(transport="auto").backend)
    network.obstacle.cache_clear()
    Layer(make_group()).right_step()


@contextlib.contextmanager
def _without_wheel() -> Iterator[None]:
    saved = libraries.nvshmem_folder, libraries._NVSHMEM
    libraries.nvshmem_folder = lambda: None
    libraries._NVSHMEM = "libnvshmem_of_no_wheel.so.3"
    with _asked_again():
        yield
    libraries.nvshmem_folder, libraries._NVSHMEM = saved


@contextlib.contextmanager
def _other_version() -> Iterator[None]:
    assert libraries._load_nvshmem() is None
    native = network.library()
    saved = native.loaded_version
    native.loaded_version = lambda: (3, 8, 0)
    with _asked_again():
        yield
    native.loaded_version = saved


@contextlib.contextmanager
def _asked_again() -> Iterator[None]:
    """What was found out about NVSHMEM is forgotten for a while, but not about CUDA's library."""
    known: Any = libraries.why_unavailable
    libraries.why_unavailable = lambda backend="cpu", **options: (
        known.__wrapped__ if backend == "nvshmem" else known
    )(backend, **options)
    yield
    libraries.why_unavailable = known


@contextlib.contextmanager
def _other_settings() -> Iterator[None]:
    saved = os.environ["JAX_EP_NETWORK_LANES"]
    os.environ["JAX_EP_NETWORK_LANES"] = str(int(saved) + 1)
    yield
    os.environ["JAX_EP_NETWORK_LANES"] = saved


def steps(processes: int) -> None:
    """Steps that check themselves, with ``JAX_EP_TEST_LIBRARY`` instead of ``jax_ep._nvshmem``.

    The library may lack a wait: then rows are wrong, or a wait elsewhere does not end.
    """
    use_library(pathlib.Path(os.environ["JAX_EP_TEST_LIBRARY"]))
    _check_steps(make_group(), 3, 100)


def slow_steps(processes: int) -> None:
    """Some such steps where a tool slows each kernel down."""
    _check_steps(make_group(timeout=LAST_S), 1, 10)


def _check_steps(group: jax_ep.Group, runs: int, count: int) -> None:
    """Run a scan of ``count`` steps so many times."""
    sizes = exact_steps.Sizes(tokens=70, hidden=256)
    run = exact_steps.local_program([group], sizes, count)
    _compat.wait_for_all(f"compiled for {group.id}", LAST_S)
    say("began")
    try:
        for start in range(0, runs * count, count):
            with jax_ep.errors():
                wrong = run(start)
            group.check()
            if wrong.any():
                say("noticed", dict(zip(exact_steps.WHAT, wrong.tolist(), strict=True)))
                leave(NOTICED)
    except jax_ep.CommunicationError as error:
        say("noticed", error)
        leave(NOTICED)
    say("all right")
    leave(0)


def use_library(path: pathlib.Path) -> None:
    """Have this process take another build of ``jax_ep._nvshmem``."""
    not_loaded = libraries._load_nvshmem()
    assert not_loaded is None, not_loaded
    name = "jax_ep._nvshmem"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert network.library() is module


def main() -> None:
    """Run the program that the command line names."""
    program, processes, rank, port = sys.argv[1], *map(int, sys.argv[2:5])
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        processes,
        rank,
        local_device_ids=[int(os.environ["JAX_EP_TEST_GPU"])],
        coordinator_bind_address=address if rank == 0 else None,
        # JAX ends all processes once it knows that one is gone. Here they must notice before.
        heartbeat_timeout_seconds=60,
        # At the end JAX waits for all processes, also for one that is gone.
        shutdown_timeout_seconds=10 if program == "killed" else 60,
    )
    globals()[program](processes)
    say("fine")


if __name__ == "__main__":
    main()
