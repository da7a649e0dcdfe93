"""What ``gpu_suite.py --window`` runs, in which order and for how long: one table.

A *group* is one stage, or several that run side by side. Only tests run side by side; benchmarks,
tuning and the timed all-reduces have the GPUs to themselves.

Kernels of ranks that share a GPU wait for each other, so all of them must have SMs at once. The kernels
of a stage leave room for its own ranks, but not for those of another stage. So stages whose ranks
share GPUs run one at a time, under an MPS daemon of their own. The GPU takes turns between that
daemon and all other stages. Kernels that wait are slow then, but all go on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Literal

import machine

SECONDS = 540.0  # for all stages
RESERVE = 12.0  # of these, for processes that end slowly, and for the last update of the files
GRACE = 8.0  # seconds between asking a stage to end and killing it

Kind = Literal["build", "bench", "tests", "other"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Commands that run one after the other.

    Attributes:
        name: Its name, which no other stage has.
        commands: With {python}, {work}, {binaries} and {seconds} to be filled in; it should end by
            itself within the last.
        kind: How its progress is read.
        seconds: Seconds that it is planned to take.
        most: Seconds that it is given at most, if other stages have left time.
        group: Stages next to each other that have the same run side by side.
        gpus: Number of GPUs that it needs.
        ranks: Processes that wait for each other.
        results: Files in {work} and the files of the window that they go to.
        environment: Environment variables.
    """

    name: str
    commands: Sequence[str]
    kind: Kind
    seconds: float
    most: float
    group: str
    gpus: int = 1
    ranks: int = 1
    results: dict[str, str] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# Suites of jax_ep.bench. The last arms of layers take minutes, so layers come last.
_SUITES = ("baselines", "decode", "routing", "layer")
RECORDS = {2: "records_2_processes.json", 1: "records_1_process.json"}
_BUILD = (
    "JAX_EP_CUDA=ON {python} -m pip install --no-build-isolation --no-deps --upgrade"
    " --target {work}/site . && cp {work}/site/jax_ep/*.so jax_ep/"
)
_LOADS = (
    "mkdir -p {binaries} && nvcc -O3 -std=c++17 -arch=sm_90a -Icsrc benchmarks/loads.cu"
    " -o {binaries}/loads"
)
_PYTEST_OPTIONS = "-v -p window_failures"
_PYTEST = f"{{python}} -m pytest {_PYTEST_OPTIONS} -p no:cacheprovider"
_SEVERAL = "{python} tests/run_processes.py --follow"
_VALUES = (
    "tests/test_suite_values.py tests/test_suite_gradients.py tests/test_ordinals.py"
    " tests/test_large_plans.py"
)
_PROGRAMS = (
    "tests/test_moe.py tests/test_overlap.py tests/test_transforms.py"
    " tests/test_checkpoint_policies.py tests/test_meshes.py tests/test_hypothesis.py"
)
_STEPS = "tests/test_steps.py"


def stages(gpus: int) -> list[Stage]:
    """All stages, the most valuable first, for a machine with that many GPUs.

    Budgets are those of two GPUs, on which they add up to ``SECONDS`` less ``RESERVE``. Time that a
    stage leaves, or that was planned for one that cannot run here, goes to those after it.
    """
    for_nccl = 1 if machine.NCCL_SHARES_GPUS else 2
    return [
        Stage("build", [f"bash -c '{_BUILD}'"], "build", 60, 150, "build"),
        Stage("build_loads", [f"bash -c '{_LOADS}'"], "build", 60, 150, "build"),
        _bench(2, gpus, 170, 190),
        _bench(1, gpus, 116, 220),
        Stage(
            "bench_loads",
            ["{binaries}/loads --json {work}/loads.json"],
            "other",
            12,
            40,
            "bench_loads",
            gpus=2,
            results={"loads.json": "loads.json"},
        ),
        Stage(
            "collectives",
            [f"{_PYTEST} -s -rs tests/test_gpu_collectives.py"],
            "tests",
            45,
            130,
            "collectives",
            gpus=for_nccl,
            ranks=2,
            environment=_share(0.05),
        ),
        _tests(
            "one_process",
            80,
            f"{_PYTEST} {_parallel(4)} {_VALUES} {_PROGRAMS} {_STEPS} tests/test_gpu.py",
            1,
            0.05,
            gpus=2,
        ),
        _tests("processes_2_values", 40, f"{_SEVERAL} 2 {_PYTEST_OPTIONS} {_VALUES}", 2, 0.1),
        _tests("processes_2_programs", 75, f"{_SEVERAL} 2 {_PYTEST_OPTIONS} {_PROGRAMS}", 2, 0.1),
        _tests("processes_4", 70, f"{_SEVERAL} 4 {_PYTEST_OPTIONS} {_VALUES} {_PROGRAMS}", 4, 0.08),
        _tests(
            "training",
            100,
            f"{_PYTEST} -s -rs tests/test_gpu_training.py",
            2,
            0.05,
            gpus=for_nccl,
        ),
        _tests(
            "steps",
            25,
            f"{_SEVERAL} 2 {_PYTEST_OPTIONS} {_STEPS}",
            2,
            0.1,
            JAX_EP_TEST_ALL_STEPS="1",
        ),
        Stage(
            "tune",
            [
                "{python} -m jax_ep.tune --ranks 2 --processes 2 --cache {work}/tuning.json"
                " --tokens 4096 --layout token,expert --quantization none --repeat 20"
                " --num-sms 8,16,24,32,48,64,80,100 --crossover 256,512"
            ],
            "other",
            25,
            90,
            "tune",
            ranks=2,
            results={"tuning.json": "tuning.json"},
        ),
    ]


def _bench(processes: int, gpus: int, seconds: float, most: float) -> Stage:
    """All suites in one start of the processes, because a start takes ten seconds."""
    name = f"bench_{processes}_process{'es' if processes > 1 else ''}"
    shares = processes > gpus
    program = "tests/support/window_bench.py" if shares else "-m jax_ep.bench"
    return Stage(
        name,
        [
            f"{{python}} {program} --suite {','.join(_SUITES)} --ranks 2 --processes {processes}"
            f" --timeout 90 --seconds {{seconds}} --json {{work}}/{name}.json"
        ],
        "bench",
        seconds,
        most,
        name,
        gpus=2 if processes == 1 else 1,
        ranks=processes,
        results={f"{name}.json": RECORDS[processes]},
    )


def _tests(
    name: str,
    seconds: float,
    command: str,
    ranks: int,
    share: float,
    *,
    gpus: int = 1,
    **env: str,
) -> Stage:
    environment = {**_share(share), **env}
    return Stage(name, [command], "tests", seconds, 400, "tests", gpus, ranks, {}, environment)


def _share(of_memory: float) -> dict[str, str]:
    """The share of a GPU's memory for each of the processes that use it side by side."""
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{of_memory:g}"}


def _parallel(workers: int) -> str:
    """Options for xdist, if it is installed; the plugin pytest-benchmark would warn about it."""
    return f"-n {workers} -p no:benchmark" if importlib.util.find_spec("xdist") else ""


def why_not(stage: Stage, gpus: int) -> str | None:
    """Why a stage cannot run on that many GPUs, or None."""
    if gpus < stage.gpus:
        return f"needs {stage.gpus} GPUs, there {'is' if gpus == 1 else 'are'} {gpus}"
    return None


def groups(chosen: Sequence[Stage]) -> list[list[Stage]]:
    """Stages that run at the same time."""
    found: list[list[Stage]] = []
    for stage in chosen:
        if found and found[-1][0].group == stage.group:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def lanes(group: Sequence[Stage], gpus: int) -> list[list[Stage]]:
    """The stages of a group, those in one lane one after the other."""
    sharing = [stage for stage in group if stage.ranks > gpus]
    alone = [[stage] for stage in group if stage.ranks <= gpus]
    return [*alone, sharing] if sharing else alone


def planned(group: Sequence[Stage]) -> float:
    """Seconds that a group is planned to take; longer lanes need time that others leave."""
    return max(stage.seconds for stage in group)


def limit(
    group: Sequence[Stage],
    later: Sequence[Sequence[Stage]],
    left: float,
    *,
    bounded: bool = True,
) -> float:
    """Seconds that a group is given.

    Args:
        group: The stages.
        later: The groups after it, which keep what they are planned to take.
        left: Seconds that are left for all of these.
        bounded: Whether the stages' own ``most`` applies.
    """
    spare = left - planned(group) - sum(map(planned, later))
    most = max(stage.most for stage in group) if bounded else left
    return min(left, most, planned(group) + max(spare, 0.0))


def share_of(stage: Stage, lane: Sequence[Stage], left: float) -> float:
    """Seconds that a stage is given of those that are left for its lane."""
    rest = lane[lane.index(stage) :]
    return left * stage.seconds / sum(s.seconds for s in rest)
