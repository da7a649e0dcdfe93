"""``jax_ep.bench`` with the workloads of ranks that have a GPU each, where they share one.

    python tests/support/window_bench.py --suite baselines --ranks 2 --processes 2

The benchmarks take smaller workloads where ranks share GPUs. A rehearsal of the window on one GPU
takes the workloads of two GPUs instead, so that the programs are the same and one GPU can fill the
compilation cache.
"""

from __future__ import annotations

import typer

from jax_ep.bench import __main__ as bench
from jax_ep.bench import suites
from jax_ep.bench.cases import Case

if __name__ == "__main__":
    suites.throughput_case = lambda machine: Case()
    typer.run(bench.main)
