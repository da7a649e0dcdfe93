"""Says where the time of an op of latency mode goes, by clock stamps in its kernels, without XLA.

    tests/cuda/build_kernels_test.sh build/cuda/stamps stamps
    python benchmarks/decode_phases.py --output benchmarks/results/h200-shared-DATE-decode-phases.json

Two ranks in one process run chains of ops in CUDA graphs, on one GPU that they share, or with
``--gpus 2`` each on its own. The program checks that every block has stamped its phases in order, and
compares the results with the CPU backend before.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from kernels import machine

SHAPE = {"ranks": 2, "hidden": 7168, "topk": 8, "experts": 256, "alignment": 1}
OPS = 48  # of a graph
REPLAYS = 40
# Tokens of a rank, layout, how the rows of dispatch travel. Combine brings dense rows home.
CASES = [
    (128, "token", "quantized"),
    (128, "expert", "fp8"),
    (8, "token", "quantized"),
]
_ROWS = {"none": "", "quantized": "fp8=1", "fp8": "cast=fp8"}  # options of decode_test


def records_of(
    figures: list[dict[str, Any]],
    *,
    tokens: int,
    layout: str,
    quantization: str,
    gpus: int,
    blocks: int,
    shape: dict[str, int],
    correct: bool,
) -> list[dict[str, Any]]:
    """What decode_test has written, as records without the fields of ``kernels.machine``."""
    found = []
    for figure in figures:
        of_dispatch = figure["kernel"] == "dispatch"
        found.append(
            {
                **figure,
                "op": "decode_phases",
                "layout": layout,
                "dtype": "bfloat16",
                "quantization": quantization if of_dispatch else "none",
                "ranks": shape["ranks"],
                "gpus": gpus,
                "tokens": tokens,
                "hidden": shape["hidden"],
                "top_k": shape["topk"],
                "experts": shape["experts"],
                "blocks": blocks,
                # Clocks of several GPUs are not synchronised.
                "skew_us": figure["skew_us"] if gpus == 1 else None,
                "correct": correct,
            }
        )
    return found


def measure(
    binaries: pathlib.Path, tokens: int, layout: str, quantization: str, gpus: int, blocks: int
) -> list[dict[str, Any]]:
    """The records of one case; prints what decode_test prints."""
    given = {**SHAPE, "tokens": tokens, "layout": layout, "blocks": blocks, "steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "phases.json"
        more = [f"phases={OPS}", f"replays={REPLAYS}", f"json={path}", _ROWS[quantization]]
        run = subprocess.run(
            [binaries / "decode_test", *(f"{k}={v}" for k, v in given.items()), *more],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        print(run.stdout, run.stderr, flush=True)
        if not path.exists():
            raise SystemExit(f"decode_test: expected phases, got exit status {run.returncode}")
        return records_of(
            json.loads(path.read_text()),
            tokens=tokens,
            layout=layout,
            quantization=quantization,
            gpus=gpus,
            blocks=blocks,
            shape=SHAPE,
            correct=run.returncode == 0,
        )


def main() -> None:
    """Run all cases and write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--binaries", type=pathlib.Path, default=pathlib.Path("build/cuda/stamps"))
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--blocks", type=int, help="of a rank; default 50 on a shared GPU, else 100"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    blocks = options.blocks or 100 // (3 - options.gpus)
    here, found = machine(), []
    for case in CASES:
        found += measure(options.binaries, *case, options.gpus, blocks)
    options.output.write_text(json.dumps([r | here for r in found], indent=1) + "\n")
    raise SystemExit(not all(r["correct"] for r in found))


if __name__ == "__main__":
    main()
