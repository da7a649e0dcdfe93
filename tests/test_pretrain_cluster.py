"""How ``examples/pretrain/train.py`` finds its processes, and what it says about wrong options."""

from __future__ import annotations

import pretrain_texts  # noqa: F401  # isort: skip  (first: it puts the repository on the path)

import contextlib
import signal

import pytest
import typer

import jax_ep
from examples.common.processes import Processes
from examples.pretrain import train
from examples.pretrain.cluster import find_processes
from examples.pretrain.loop import DivergedError

pytestmark = pytest.mark.one_process("runs programs of one process")

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
}
STEP = SLURM | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "h:99",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def find(env, coordinator=None, count=None, index=None):
    return find_processes(coordinator, count=count, index=index, env=env)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,cpu1", "gpu7"),
        ("gpu[003-010,012],cpu1", "gpu003"),
        ("gpu[12,14-16]", "gpu12"),
        ("a-1,gpu[1-2]", "a-1"),
        ("rack-2-gpu[1-2]", "rack-2-gpu1"),
    ],
)
def test_slurm(hosts, first):
    expected = Processes(f"{first}:{61440 + 5000 % 4096}", 16, 9)
    assert find(STEP | {"SLURM_STEP_NODELIST": hosts}) == expected


def test_a_slurm_script_outside_srun_is_one_process():
    assert find(SLURM) is None


def test_variables_come_before_slurm_and_flags_before_both():
    step = STEP | {"SLURM_STEP_NODELIST": "gpu7"}
    assert find(step | JAX) == Processes("h:99", 4, 3)
    assert find(step | JAX, "g:1", 8, 5) == Processes("g:1", 8, 5)
    assert find(step | {"JAX_COORDINATOR_ADDRESS": "g:1"}) == Processes("g:1", 16, 9)


def test_a_pod_of_a_job():
    pod = {"JOB_COMPLETION_INDEX": "2"}
    several = {"JAX_COORDINATOR_ADDRESS": "set-workers-0-0.set:9911", "JAX_NUM_PROCESSES": "4"}
    assert find(pod | several) == Processes("set-workers-0-0.set:9911", 4, 2)
    assert find(pod) is None  # a Job without a coordinator


def test_a_single_process():
    assert find({}) is None
    assert find(JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: expected a number, got 'x'"):
        find(JAX | {"JAX_NUM_PROCESSES": "x"})
    with pytest.raises(ValueError, match="--coordinator: expected host:port of process 0 where"):
        find({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"})


def run(capsys, *options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(train.main)
    with pytest.raises(SystemExit) as end:
        app(list(options))
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--config", "none"), "config none: expected one of 16b, 1b, 671b, tiny, or a path"),
        (("--set", "model.top=1"), "[model]: 'top' is none of "),
        (
            ("--profile-steps", "5:3"),
            "--profile-steps: expected FIRST:LAST, as in 10:12, got '5:3'",
        ),
        (
            ("--data", "web=0"),
            "--data: expected FOLDER or FOLDER=WEIGHT, as in web=0.7, got 'web=0'",
        ),
        (("--process-id", "3"), "--process-id: expected 0 to 0, less than --num-processes"),
        (("--data", "/no/such"), "--data: expected a folder of packed rows, got /no/such, which"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_are_one_line(capsys, tmp_path, options, text):
    status, error = run(capsys, *options, "--out", str(tmp_path / "out"))
    assert status == 2
    assert error.startswith(f"train: {text}") and error.count("\n") == 1, error


class Stub(contextlib.nullcontext):
    """A loop that ends in one way."""

    step = 7

    def __init__(self, end: int | Exception) -> None:
        super().__init__()
        self._end = end

    def __enter__(self):
        return self

    def train(self) -> int:
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (int(signal.SIGTERM), 143, ""),
        (jax_ep.CommunicationError("rank 3"), 1, "train: stopped at step 7: rank 3\n"),
        (DivergedError("not finite"), 1, "train: stopped at step 7: not finite\n"),
    ],
    ids=["signal", "group", "diverged"],
)
def test_status(monkeypatch, capsys, end, status, text):
    monkeypatch.setattr(train, "_make_loop", lambda *_: Stub(end))
    assert run(capsys) == (status, text)
