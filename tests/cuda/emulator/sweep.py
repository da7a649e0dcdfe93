"""Random shapes for kernels_test on the emulator: sweep.py FOLDER SECONDS [SEED]

FOLDER is that of build.sh. It prints each run that fails, and the number of runs.
"""

from __future__ import annotations

import pathlib
import random
import subprocess
import sys
import time


def arguments() -> str:
    """The arguments of one run."""
    pick = random.choice
    ranks, alignment, dtype = pick([1, 2, 2, 3, 4, 5, 8]), pick([1, 8, 32]), "bf16"
    experts = ranks * pick([1, 2, 4, 8])
    fp8 = random.random() < 0.2
    hidden = pick([8, 24, 136, 384, 1032, 2056, 4104, 4224, 7168, 8200])
    if fp8:
        hidden = pick([128, 256, 1152, 2048, 7168])
    elif (dtype := pick(["bf16", "bf16", "f16", "f32"])) == "f32":
        hidden //= 2
    given = {
        "layout": pick(["expert", "expert", "token"]),
        "ranks": ranks,
        "tokens": pick([1, 7, 40, 64, 100] if hidden < 3000 else [3, 17, 30]),
        "hidden": hidden,
        "experts": experts,
        "topk": random.randint(1, min(experts, pick([2, 8, 32]))),
        "dtype": dtype,
        "fp8": int(fp8),
        "blocks": pick([1, 2, 3]),
        "more_blocks": pick([0, 0, 1]),
        "weighted": pick([0, 1]),
        "repeat": pick([1, 2]),
        "alignment": alignment,
        "plan": "pull" if random.random() < 0.8 or ranks > 4 else "push",  # which takes seconds
        "sets": pick([1, 3]),
        "seed": random.randint(1, 99),
        "timeout": 600,
    }
    if random.random() < 0.3:
        given["capacity"] = alignment * random.randint(1, 12)
    if hidden % 128 == 0 and not fp8:
        given |= pick([{}, {"cast": pick(["fp8", "ue8m0"]), "dense": 1}])
    return " ".join(f"{name}={value}" for name, value in given.items())


def main(folder: pathlib.Path, seconds: float, seed: int) -> int:
    """The number of runs that failed."""
    random.seed(seed)
    end, runs, failed = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        run = arguments()
        settings = {
            "JAX_EP_EMULATOR_SEED": str(random.randint(1, 10**6)),
            "JAX_EP_EMULATOR_RING_SLOTS": str(random.choice([1, 2, 3, 7, 1024])),
        }
        done = subprocess.run(
            [folder / "kernels_test", *run.split()],
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
        runs += 1
        if done.returncode or "all right" not in done.stdout:
            failed += 1
            given = " ".join(f"{name}={value}" for name, value in settings.items())
            print(f"FAILED: {given} kernels_test {run}", flush=True)
            print(done.stdout[-1000:] + done.stderr[-1000:], flush=True)
    print(f"{runs} runs, {failed} failed")
    return failed


if __name__ == "__main__":
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int(time.time())
    sys.exit(min(main(pathlib.Path(sys.argv[1]).resolve(), float(sys.argv[2]), seed), 1))
