"""Times the GPU backend's kernels for ranks that share this machine's first GPU, without XLA.

    tests/cuda/build_kernels_test.sh build/cuda
    python benchmarks/kernels.py --output benchmarks/results/kernels_h200.json

Two ranks of 2048 tokens on one GPU move as many rows through its memory, with as many SMs in all,
as one rank of 4096 tokens does on each of two GPUs. Only the link is missing. So these times say
what SMs and local memory allow. Each is the mean of the slower rank over consecutive launches,
which read two copies of the inputs in turn. All results are compared bit by bit with the CPU
backend.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

BLOCKS = {"expert": (24, 48, 64, 96, 128), "token": (16, 24, 32, 48, 64)}  # of both ranks
SHAPE = {"ranks": 2, "tokens": 2048, "hidden": 7168, "topk": 8, "experts": 128, "alignment": 128}
_TIME = re.compile(r"^  (plan|dispatch|combine_vjp|combine) +([\d.]+) us", re.M)


def machine() -> dict[str, Any]:
    """The fields of all records that say where they were made."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.check_output(query, text=True).strip().split(", ")
    return {
        "device": name,
        "versions": {"driver": driver},
        "command": " ".join(["python", *sys.argv]),
    }


def records_of(
    output: str, layout: str, quantization: str | None, blocks: int
) -> list[dict[str, Any]]:
    """The output of one run of kernels_test, as records without the fields of ``machine``.

    Raises:
        ValueError: if it is not what kernels_test prints.
    """
    times = _TIME.findall(output)
    if not {"plan", "dispatch", "combine"} <= {name for name, _ in times}:
        raise ValueError(f"output of kernels_test: expected times of kernels, got {output!r}.")
    return [
        {
            "op": "kernel",
            "kernel": name,
            "layout": layout,
            # Combine brings dense rows home, whichever rows dispatch moved.
            "dtype": "bfloat16",
            "quantization": quantization if name == "dispatch" else None,
            "ranks": SHAPE["ranks"],
            "gpus": 1,
            "tokens": SHAPE["tokens"],
            "hidden": SHAPE["hidden"],
            "top_k": SHAPE["topk"],
            "experts": SHAPE["experts"],
            "alignment": SHAPE["alignment"],
            "blocks": blocks,
            "us": float(us),
            "correct": "all right" in output,
        }
        for name, us in times
        # The other run has the ops that do not depend on the format of the rows.
        if quantization is None or name == "dispatch"
    ]


def main() -> None:
    """Run all shapes and write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--binaries", type=pathlib.Path, default=pathlib.Path("build/cuda"))
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    here, found = machine(), []
    for layout, counts in BLOCKS.items():
        for quantization in (None, "fp8"):
            for blocks in counts:
                arguments = {
                    **SHAPE,
                    "layout": layout,
                    "fp8": int(quantization is not None),
                    "blocks": blocks // SHAPE["ranks"],
                    "sets": 2,
                }
                run = subprocess.run(
                    [
                        options.binaries / "kernels_test",
                        *(f"{k}={v}" for k, v in arguments.items()),
                    ],
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
                    capture_output=True,
                    text=True,
                    timeout=120,
                )
                if run.stderr:
                    print(run.stderr, file=sys.stderr)
                made = records_of(run.stdout, layout, quantization, blocks)
                for r in made:
                    right = "" if r["correct"] else "  WRONG"
                    print(f"{layout:6} {quantization or '-':4} {blocks:3} {r['kernel']:12}", end="")
                    print(f"{r['us']:8.1f} us{right}", flush=True)
                found += [record | here for record in made]
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(not all(r["correct"] for r in found))


if __name__ == "__main__":
    main()
