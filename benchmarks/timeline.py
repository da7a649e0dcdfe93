"""Says when each kernel of a MoE layer runs, forward and backward, and what hides the ops.

    python benchmarks/timeline.py --output benchmarks/results/h200-DATE-timeline.json

The layer is that of ``jax_ep.bench`` (suite "overlap"): in line, in chunks one after the other, and in
the same chunks with ops in flight. Each has a profile of one step, compiled without CUDA graphs, whose
kernels a profile may show as one. The profiler takes time too, and the benchmark says how long a step
takes without.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from jax_ep.bench import layer, layer_ops, trace
from jax_ep.bench.cases import Case
from jax_ep.bench.session import Session, versions

ARMS = ("jax_ep", layer.IN_LINE.name, layer.CHUNKS.name)


def record_of(name: str, kernels: Sequence[trace.Event], case: Case) -> dict[str, Any]:
    """The record of one step on one GPU, without the fields of the machine."""
    first = min(kernel.start for kernel in kernels)
    ops = [kernel for kernel in kernels if kernel.is_op]
    return {
        "op": "timeline",
        "name": name,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "top_k": case.top_k,
        "experts": case.experts,
        "intermediate": case.intermediate,
        "us": (max(kernel.end for kernel in kernels) - first) / 1e3,
        "ops_us": sum(op.end - op.start for op in ops) / 1e3,
        "hidden_us": sum(trace.hidden(op, kernels) for op in ops) / 1e3,
        "kernels": [
            {
                "stream": kernel.line,
                "name": kernel.name[:60],
                "blocks": kernel.blocks,
                "start_us": round((kernel.start - first) / 1e3, 2),
                "us": round((kernel.end - kernel.start) / 1e3, 2),
                **(
                    {"hidden_us": round(trace.hidden(kernel, kernels) / 1e3, 2)}
                    if kernel.is_op
                    else {}
                ),
            }
            for kernel in kernels
        ],
    }


def measure(session: Session, case: Case, name: str) -> dict[str, Any]:
    """A profile of one step of an arm, as the record of the first GPU."""
    problem = session.problem(case)
    sizes = layer_ops.sizes_of(session, case, problem)
    inputs = layer_ops.inputs_of(session, case, problem)
    step = session.on_all_ranks(layer_ops.step_of(layer.BY_NAME[name], sizes).run)
    compiled = step.lower(inputs).compile(compiler_options=trace.WITHOUT_GRAPHS)
    for _ in range(2):
        jax.block_until_ready(compiled(inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(inputs))
        kernels = trace.kernels_of(pathlib.Path(folder))
    session.group.check()
    _, of_first = min(kernels.items())
    return record_of(name, of_first, case)


def main() -> None:
    """Profile each form of the layer, and write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--width", type=int, default=2048, help="of an expert")
    parser.add_argument("--experts", type=int, default=16, help="over all GPUs")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit("timeline: needs a GPU: profiles of other devices show no kernels")
    ranks = jax.device_count()
    case = Case(
        op="layer",
        tokens=options.tokens,
        hidden=options.hidden,
        top_k=options.top_k,
        experts=options.experts,
        intermediate=options.width,
        alignment=1,
        capacity="default",
    )
    command = "python " + shlex.join(sys.argv)
    session = Session(ranks, ranks, 1, command)
    machine = {
        "ranks": ranks,
        "gpus": ranks,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "command": command,
    }
    found = []
    for name in ARMS:
        record = measure(session, case, name) | machine
        found.append(record)
        share = record["hidden_us"] / record["ops_us"]
        print(
            f"{name}: {record['us']:.0f} us, ops {record['ops_us']:.0f} us, {share:.0%} of that beside"
            " other kernels",
            flush=True,
        )
        options.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
