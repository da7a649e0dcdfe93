"""Everything that needs GPUs, in stages: the tests in all modes, kernels, sanitizers, benchmarks.

    python tests/gpu_suite.py [--out FOLDER] [--binaries FOLDER] [--seconds S] [--list] [STAGE ...]
    python tests/gpu_suite.py --window [--cache FOLDER] [--fill-cache FOLDER] [...]

Without names it runs all stages that the GPUs here suffice for, in the order of ``--list``. The
beginning of a name stands for all such stages: ``hosts`` for groups that span hosts, on one GPU, in
eight minutes, ``network`` for their failures, programs and mutants, in twenty more, and ``latency``
for latency mode at 2, 4 and 8 ranks, in fourteen. Each writes its output to FOLDER/STAGE.log, and
benchmarks write their records to FOLDER/*.json. A table at the end gives the result of each stage.
Where ranks share a GPU, an MPS daemon of our own runs beside them. Stages that also use XLA's
collectives then run only with NCCL 2.30 and ``NCCL_MULTI_RANK_GPU_ENABLE=1``. The programs of
``tests/cuda`` must have been built (no GPU is needed for it)::

    tests/cuda/build_kernels_test.sh build/cuda && tests/cuda/mutations.sh build build/cuda
    tests/cuda/build_kernels_test.sh build/cuda/stamps stamps
    nvcc -O3 -std=c++17 -arch=sm_90a -Icsrc benchmarks/loads.cu -o build/cuda/loads

The package and all that its tests import must be installed, as by ``pip install -e '.[test]'``.

With ``--window`` or ``--fill-cache`` it runs other stages: the most valuable ones, in nine minutes
(see ``support/gpu_window.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import IO

sys.path.insert(0, str(pathlib.Path(__file__).with_name("support")))

import gpu_window
import host_stages
import kernel_stages
import latency_stages
import machine
import mps
import window_stages

ROOT = pathlib.Path(__file__).parents[1]
SUITE = (
    "tests/test_suite_values.py tests/test_suite_gradients.py tests/test_transforms.py"
    " tests/test_checkpoint_policies.py tests/test_overlap.py tests/test_meshes.py"
    " tests/test_hypothesis.py tests/test_steps.py tests/test_moe.py tests/test_ordinals.py"
    f" tests/test_large_plans.py {latency_stages.SUITE}"
)
PYTEST = "{python} -m pytest -q -p no:cacheprovider --durations=5"
# Compiling takes most of the time of these tests. The plugin pytest-benchmark would warn about
# xdist.
PARALLEL = "-n 8 -p no:benchmark" if importlib.util.find_spec("xdist") else ""
BENCH = "{python} -m jax_ep.bench"
NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that run one after the other.

    Attributes:
        commands: With {python}, {out}, {binaries} and {gpus} to be filled in.
        gpus: Number of GPUs that it needs.
        ranks: Number of its processes that wait for each other on the GPUs.
        environment: Environment variables.
        seconds: Time after which it is ended.
    """

    commands: list[str]
    gpus: int = 1
    ranks: int = 1
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 600


def stages(gpus: int) -> dict[str, Stage]:
    """All stages by name, for a machine with that many GPUs."""
    for_nccl = 1 if machine.NCCL_SHARES_GPUS else 2  # GPUs that two ranks of it need
    shared = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".05"}  # tests that start processes
    found = {
        "kernels": Stage(kernel_stages.of_one_host(gpus), seconds=300),
        "kernels_between_hosts": Stage(kernel_stages.between_hosts(), seconds=120),
        "decode": Stage(kernel_stages.of_latency_mode(), seconds=300),
        "mutations": Stage(["tests/cuda/mutations.sh run {binaries}"], seconds=300),
        "sanitizers": Stage(kernel_stages.sanitizers(), seconds=200),
        "grouped_dot": Stage(
            [f"{PYTEST} {PARALLEL} tests/test_grouped_dot.py tests/test_grouped_dot_hopper.py"],
            environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": ".08"},
        ),
        "one_process": Stage(
            [f"{PYTEST} {SUITE} tests/test_gpu.py"],
            gpus=2,
        ),
        "overlap": Stage([f"{PYTEST} tests/test_gpu_overlap.py"]),
        "failures": Stage([f"{PYTEST} tests/test_gpu_processes.py"], environment=shared),
        "collectives": Stage(
            [f"{PYTEST} -rPs tests/test_gpu_collectives.py"],
            gpus=for_nccl,
            ranks=2,
            environment=shared,
        ),
        "training": Stage(
            [f"{PYTEST} -rs tests/test_gpu_training.py"],
            gpus=for_nccl,
            ranks=2,
            environment=shared,
        ),
    }
    for ranks in (2, 4, 8):
        run = f"{{python}} tests/run_processes.py --timeout 400 {ranks}"
        found[f"processes_{ranks}"] = Stage([f"{run} -q {SUITE}"], ranks=ranks)
        if ranks == 2:
            off = {"XLA_FLAGS": NO_COMMAND_BUFFERS}
            found["no_command_buffers"] = Stage([f"{run} -q {SUITE}"], ranks=ranks, environment=off)
        found[f"steps_{ranks}"] = Stage(
            [f"{run} -q tests/test_steps.py"],
            ranks=ranks,
            environment={"JAX_EP_TEST_ALL_STEPS": "1"},
        )
    for one in latency_stages.LATENCY:
        found[one.name] = Stage([one.command], ranks=one.ranks, seconds=one.seconds)
    for stage in host_stages.HOSTS:  # with MPS daemons of their own, as those that follow
        found[stage.name] = Stage(
            [stage.command], environment=stage.environment, seconds=stage.seconds
        )
    found["network_failures"] = Stage(
        [f"{PYTEST} -rs tests/test_hosts_failures.py"], environment=shared
    )
    # Over the late network two processes on two GPUs did not end, for a reason not found yet.
    programs = f"{PYTEST} -rs tests/test_hosts_programs.py"
    found["network_programs"] = Stage(
        [f"env CUDA_VISIBLE_DEVICES=0 {programs} -k late", f"{programs} -k reached"],
        environment=shared,
        seconds=400,
    )
    found["network_sanitizers"] = Stage(
        [f"{PYTEST} -rs tests/test_hosts_sanitizers.py"], seconds=300
    )
    mutants = "{binaries}/network_mutants"
    found["network_mutants"] = Stage(
        [
            f"env PYTHON={{python}} tests/cuda/network_mutants.sh {mutants}",
            f"env JAX_EP_NETWORK_MUTANTS={mutants} {PYTEST} -rs tests/test_hosts_mutants.py",
        ],
    )
    for suite in ("smoke", "baselines", "decode", "routing", "layer"):
        for processes in (1, 2):
            # One process has a GPU for each rank; several may share them.
            ranks = max(2, gpus) if processes > 1 else gpus
            name = f"{suite}_{ranks}_ranks_{'processes' if processes > 1 else 'one_process'}"
            found[f"bench_{name}"] = Stage(
                [
                    f"{BENCH} --suite {suite} --ranks {ranks}"
                    f" --processes {ranks if processes > 1 else 1}"
                    f" --json {{out}}/{name}.json --plot {{out}}/{name}.png"
                ],
                gpus=2 if processes == 1 else for_nccl if suite == "layer" else 1,
                ranks=ranks if processes > 1 else 1,
            )
    found["bench_grouped_dot"] = Stage(
        ["{python} benchmarks/grouped_dot.py --output {out}/grouped_dot.json"]
    )
    found["bench_kernels"] = Stage(
        ["{python} benchmarks/kernels.py --binaries {binaries} --output {out}/kernels.json"]
    )
    found["bench_decode_phases"] = Stage(
        [
            "{python} benchmarks/decode_phases.py --binaries {binaries}/stamps"
            " --output {out}/decode-phases.json"
        ],
        seconds=180,
    )
    found["bench_timeline"] = Stage(
        ["{python} benchmarks/timeline.py --output {out}/timeline.json"], seconds=180
    )
    found["bench_loads"] = Stage(["{binaries}/loads --json {out}/loads.json"], seconds=120)
    found["tune"] = Stage(["{python} -m jax_ep.tune --cache {out}/tuning.json"], gpus=2)
    return found


def main(arguments: list[str]) -> int:
    """Run the stages; returns 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/gpu_suite"))
    parser.add_argument("--binaries", type=pathlib.Path, default=pathlib.Path("build/cuda"))
    parser.add_argument("--seconds", type=float, help="for all stages; 540 for a window")
    parser.add_argument("--window", action="store_true", help="what two GPUs show in nine minutes")
    parser.add_argument("--cache", type=pathlib.Path, help="parts of a compilation cache to use")
    parser.add_argument("--fill-cache", type=pathlib.Path, help="write such parts")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    options = parser.parse_args(arguments)
    gpus = machine.count_gpus()
    window = options.window or options.fill_cache is not None
    known: Iterable[str] = stages(gpus)
    if window:
        known = [stage.name for stage in window_stages.stages(gpus)]
    if options.list:
        print(*known, sep="\n")
        return 0
    options.stages = [name for given in options.stages for name in stages_named(given, known)]
    wrong = [name for name in options.stages if name not in known]
    if wrong:
        parser.error(f"argument STAGE: expected names of --list, got {', '.join(wrong)}")
    if window:
        return gpu_window.main(
            out=options.out,
            binaries=options.binaries,
            seconds=options.seconds or window_stages.SECONDS,
            names=options.stages,
            cache=options.cache,
            fill=options.fill_cache,
            rehearses=not options.window,
        )
    return run_all(options, gpus)


def stages_named(given: str, known: Iterable[str]) -> list[str]:
    """The stage ``given``, or all whose names begin with it: "hosts" stands for "hosts_2x1" etc."""
    if given in known:
        return [given]
    return [name for name in known if name.startswith(f"{given}_")] or [given]


def run_all(options: argparse.Namespace, gpus: int) -> int:
    """Run the stages that were asked for, or all; returns 0 if all went well."""
    known = stages(gpus)
    seconds = float("inf") if options.seconds is None else options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    names = {"python": sys.executable, "out": options.out, "binaries": options.binaries}
    begin, verdicts = time.monotonic(), {}
    for name in options.stages or known:
        stage = known[name]
        left = begin + seconds - time.monotonic()
        if gpus < stage.gpus:
            verdicts[name] = f"left out: needs {stage.gpus} GPUs, there are {gpus}"
        elif left <= 0:
            verdicts[name] = f"left out: the {seconds:.0f} s are over"
        else:
            verdicts[name] = run(stage, name, gpus, min(left, stage.seconds), options.out, names)
        print(f"{name:36} {verdicts[name]}", flush=True)
    return int(any(verdict.startswith("FAILED") for verdict in verdicts.values()))


def run(
    stage: Stage,
    name: str,
    gpus: int,
    seconds: float,
    out: pathlib.Path,
    names: dict[str, object],
) -> str:
    """Run a stage and say how it went."""
    begin = time.monotonic()
    environment = {
        **os.environ,
        "JAX_EP_TEST_PLATFORM": "cuda",
        "PYTHONPATH": machine.python_path(ROOT, ROOT / "tests", ROOT / "tests" / "support"),
        **stage.environment,
    }
    shares = stage.ranks > gpus
    if shares and machine.NCCL_SHARES_GPUS:
        environment.setdefault("NCCL_MAX_NCHANNELS", "8")  # see test_gpu_collectives.py
    with (
        mps.multi_process_service() if shares else contextlib.nullcontext({}) as variables,
        (out / f"{name}.log").open("w") as log,
    ):
        for command in stage.commands:
            text = command.format(**names)
            print(f"$ {text}", file=log, flush=True)
            left = begin + seconds - time.monotonic()
            status = finish(text, environment | variables, log, left)
            if status is None:
                return f"FAILED: not done after {seconds:.0f} s: {text}"
            if status:
                return f"FAILED: exit status {status}: {text}"
    last = [line for line in (out / f"{name}.log").read_text().splitlines() if line.strip()][-1]
    return f"{time.monotonic() - begin:6.1f} s  {last[:100]}"


def finish(command: str, environment: dict[str, str], log: IO[str], seconds: float) -> int | None:
    """Run a command; gives its exit status, or None if it and its processes had to be ended."""
    process = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
