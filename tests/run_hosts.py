"""Runs the suite on logical hosts: processes that share the GPUs there are, as ranks of several hosts.

Usage: python tests/run_hosts.py HOSTSxRANKS [--late] [--delay-us N] [--seed N] [--counts FOLDER]
                                 [--chunk-bytes N] [--lanes N]
                                 [--timeout S] [--grace S] [--follow] [pytest arguments]

``2x4`` starts eight processes, one rank each; the first four are the first host. Groups of the suite
that span hosts run on NVSHMEM (``support/logical_hosts.py``). Without ``--late`` NVSHMEM reaches all
ranks by plain loads and stores. With it, what leaves a host goes through the late network of
``tests/cuda/late_network``, which this builds where it is missing or old. ``--counts`` names a folder,
where the file pe-RANK.json says how much each rank has sent to each other. ``--chunk-bytes`` and
``--lanes`` set the variables JAX_EP_NETWORK_CHUNK_BYTES and JAX_EP_NETWORK_LANES: few and small chunks
make long queues.

Where ranks share a GPU, an MPS daemon of our own runs beside them. ``JAX_EP_TEST_PLATFORM=cpu`` runs
the suite on CPU devices instead, with the reference backend and no NVSHMEM. The output and the exit
status are those of ``run_processes.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).with_name("support")))

import machine
import mps
import run_processes

ROOT = pathlib.Path(__file__).parents[1]
NETWORK = ROOT / "tests" / "cuda" / "late_network"
PLUGIN = ROOT / "build" / "late_network" / "nvshmem_transport_ibrc.so.3"
# One machine, over its loopback interface; no multicast, which ranks that share a GPU cannot have.
NVSHMEM = {
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
    # Memory of many groups has to fit, and small chunks go round their slots more often.
    "JAX_EP_NETWORK_CHUNK_BYTES": str(64 << 10),
    "JAX_EP_NETWORK_LANES": "3",
    # So that eight ranks fit one GPU, with this memory, XLA's arenas and their contexts.
    "JAX_EP_NETWORK_BYTES": str(1 << 30),
}


@dataclasses.dataclass(frozen=True)
class Late:
    """A late network between the hosts.

    Attributes:
        plugin: The library that NVSHMEM takes for a network.
        delay_us: The longest delay of each half of an operation's way, in microseconds.
        seed: Of delays and order.
        counts: A folder for what was sent, or None.
    """

    plugin: pathlib.Path
    delay_us: int = 0
    seed: int = 1
    counts: pathlib.Path | None = None


def common(environment: dict[str, str], ranks: int, late: Late | None) -> dict[str, str]:
    """``environment`` with the variables of all processes, for hosts of ``ranks`` ranks each."""
    found = environment | {"JAX_EP_TEST_RANKS_PER_HOST": str(ranks)}
    if environment.get("JAX_EP_TEST_PLATFORM") == "cpu":
        return found
    found |= NVSHMEM | {"JAX_EP_TEST_PLATFORM": "cuda"}
    if late is None:
        return found | {"NVSHMEM_REMOTE_TRANSPORT": "none"}
    # Others that are preloaded, such as a newer NCCL, stay.
    preloaded = [str(late.plugin), *filter(None, [environment.get("LD_PRELOAD")])]
    found |= {
        "NVSHMEM_REMOTE_TRANSPORT": "ibrc",
        "LD_PRELOAD": " ".join(preloaded),
        "PATH": os.pathsep.join([str(NETWORK / "bin"), environment.get("PATH", os.defpath)]),
        "JAX_EP_LATE_DELAY_US": str(late.delay_us),
        "JAX_EP_LATE_SEED": str(late.seed),
    }
    if late.counts is not None:
        found["JAX_EP_LATE_COUNTS"] = str(late.counts)
    return found


def of_chunks(chunk_bytes: int | None, lanes: int | None) -> dict[str, str]:
    """The variables of the network's chunks that are not the usual ones here."""
    given = {"CHUNK_BYTES": chunk_bytes, "LANES": lanes}
    return {f"JAX_EP_NETWORK_{name}": str(value) for name, value in given.items() if value}


def of_process(index: int, ranks: int, late: Late | None) -> dict[str, str]:
    """The variables of one process: the name of its host, by which NVSHMEM tells hosts apart."""
    return {} if late is None else {"JAX_EP_LATE_HOST": f"host{index // ranks}"}


def build(plugin: pathlib.Path = PLUGIN) -> pathlib.Path:
    """Build the late network, unless that was done after its sources were last changed.

    Raises:
        RuntimeError: if it does not build; with the output of the compiler.
    """
    sources = [path for path in NETWORK.iterdir() if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    if plugin.exists() and plugin.stat().st_mtime > newest:
        return plugin
    built = subprocess.run(
        [NETWORK / "build.sh", plugin.parent], capture_output=True, text=True, check=False
    )
    if built.returncode:
        raise RuntimeError(f"{NETWORK / 'build.sh'} failed:\n{built.stderr}")
    return plugin


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the numbers ``hosts`` and ``ranks``, and pytest's arguments as ``pytest``."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s HOSTSxRANKS [options] [pytest arguments]",
        allow_abbrev=False,  # what is not an option here is pytest's
    )
    parser.add_argument("--late", action="store_true", help="a late network between the hosts")
    parser.add_argument("--delay-us", type=int, metavar="N", help="its longest delay (default 0)")
    parser.add_argument("--seed", type=int, metavar="N", help="of its delays and order (default 1)")
    parser.add_argument("--counts", type=pathlib.Path, metavar="FOLDER", help="for what was sent")
    parser.add_argument("--chunk-bytes", type=int, metavar="N", help="of a chunk (default 65536)")
    parser.add_argument("--lanes", type=int, metavar="N", help="between two ranks (default 3)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for the whole run")
    parser.add_argument("--grace", type=float, default=20, help="seconds for the others to end")
    parser.add_argument("--follow", action="store_true", help="show what process 0 writes, at once")
    parser.add_argument("shape", metavar="HOSTSxRANKS", help="hosts, and ranks of each")
    options, options.pytest = parser.parse_known_args(arguments)
    shape = re.fullmatch(r"([0-9]+)x([0-9]+)", options.shape)
    options.hosts, options.ranks = map(int, shape.groups()) if shape else (0, 0)
    if options.hosts < 2 or options.ranks < 1:
        parser.error(
            "argument HOSTSxRANKS: expected two hosts or more and a rank or more on each, such as "
            f"2x4, got {options.shape}."
        )
    for name in ("delay_us", "seed", "counts"):
        value = getattr(options, name)
        option = "--" + name.replace("_", "-")
        if value is not None and not options.late:
            parser.error(f"argument {option}: is an option of the late network; add --late.")
        if isinstance(value, int) and value < 0:
            parser.error(f"argument {option}: expected 0 or more, got {value}.")
    if options.late and os.environ.get("JAX_EP_TEST_PLATFORM") == "cpu":
        parser.error("argument --late: needs GPUs, but JAX_EP_TEST_PLATFORM is cpu.")
    return options


def main(arguments: list[str]) -> int:
    """Start the processes and wait for them; the worst exit status."""
    options = parse(arguments)
    late = None
    if options.late:
        late = Late(build(), options.delay_us or 0, 1 if options.seed is None else options.seed)
        if options.counts is not None:
            options.counts.mkdir(parents=True, exist_ok=True)
            late = dataclasses.replace(late, counts=options.counts.resolve())
    count = options.hosts * options.ranks
    environment = common(dict(os.environ), options.ranks, late)
    environment |= of_chunks(options.chunk_bytes, options.lanes)
    shares = environment["JAX_EP_TEST_PLATFORM"] == "cuda" and count > machine.count_gpus()
    with mps.multi_process_service() if shares else contextlib.nullcontext({}) as variables:
        return run_processes.run(
            count,
            options.pytest,
            timeout=options.timeout,
            grace=options.grace,
            follow=options.follow,
            environment=environment | variables,
            variables=lambda index: of_process(index, options.ranks, late),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
