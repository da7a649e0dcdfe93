"""``python -m jax_ep.bench`` as a program, on CPU: whole runs of one process and several, and flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from rich.console import Console

import jax_ep
import machine
from conftest import PLATFORM
from jax_ep.bench import __main__ as program
from jax_ep.bench import launch, records, suites, table
from jax_ep.bench.cases import HALVES, Case
from jax_ep.bench.launch import Job, reason, run
from jax_ep.bench.machine import Machine, left_out
from spmd import run_python

TINY = Case(tokens=6, hidden=128, top_k=2, experts=8)
on_cpu = pytest.mark.skipif(PLATFORM != "cpu", reason="sets up CPU devices of its own")


def bench(*arguments: str, **env: str):
    flags = {
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
        "TERM": "dumb",
        "XLA_FLAGS": machine.compiler_flags(),
        **env,
    }
    return run_python("-m", "jax_ep.bench", *arguments, timeout=300, **flags)


@on_cpu
def test_smoke(tmp_path):
    """The suite in one process: records, table, picture, and failures that are records too."""
    two_ranks = Machine(ranks=2, processes=1, gpus=0)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    done = bench("--suite", "smoke", "--ranks", "2", "--json", str(out), "--plot", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.load(out)  # checks each
    measured = [r for r in found if r["op"] not in ("ceiling", "link")]
    cases, reasons = left_out(suites.suite("smoke", two_ranks), two_ranks)
    assert len(measured) == len(cases) and reasons
    for why, number in reasons.items():
        assert f"left out: {number} case(s): {why}" in done.stdout
    for record in measured:
        assert record["correct"], record
        if record["median_us"] is None:
            assert "too noisy" in record["error"]
        else:
            assert 0 <= record["p90_us"] - record["p10_us"] < record["median_us"]
        assert record["ranks"] == 2 and record["processes"] == 1 and record["device"] == "cpu"
        assert record["workspace_bytes"] == record["scratch_bytes"] == 0
        assert "--suite smoke" in record["command"]
        name, has_figure = record.get("name", ""), record["median_us"] is not None
        beside_calls = record["op"] == "overlap" and record["mode"] == "latency"
        idle = name in ("all-reduce", "matmul", "grouped_dot", "products") or " alone on " in name
        sends_rows = record["op"] not in ("plan", *HALVES) and not idle and not beside_calls
        assert (record["wire_bytes"] > 0) == sends_rows
        both = name == "jax_ep in chunks" or (" beside " in name and not beside_calls)
        assert ("share_hidden" in record) == (both and has_figure)
        bound = name == "jax_ep in chunks" or (beside_calls and name != "grouped_dot")
        assert ("bound_us" in record) == ("within_bound" in record) == (bound and has_figure)
        assert ("late_us" in record) == name.endswith("a peer late")
    assert {r["op"] for r in found} >= {
        *("dispatch", "plan", "combine", "layer", "exchange", "link", "overlap")
    }
    assert f"{len(cases)} cases: {two_ranks}" in done.stdout.splitlines()[0]
    assert "the time of jax_ep's" in done.stdout
    # Noise is no failure, but a benchmark that finds nothing but noise measures nothing. Whole layers
    # take so long that a busy machine does not hide them.
    assert any(r["median_us"] is not None for r in measured if r["op"] == "layer"), measured
    for record in measured:
        assert record["op"] in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@on_cpu
def test_two_processes(tmp_path):
    out = tmp_path / "out.json"
    done = bench(
        *("--ops", "plan,dispatch,dispatch_cached,combine", "--layout", "expert"),
        *("--tokens", "16", "--hidden", "128", "--top-k", "2", "--experts", "8"),
        *("--ranks", "2", "--processes", "2", "--repeat", "2", "--json", str(out)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [r for r in records.load(out) if r["op"] not in ("ceiling", "link")]
    assert [r["op"] for r in found] == ["plan", "dispatch", "dispatch_cached", "combine"]
    assert all(r["correct"] and r["processes"] == 2 and r["ranks"] == 2 for r in found)


@on_cpu
@pytest.mark.parametrize("hosts", ["2", "3"])
def test_logical_hosts(tmp_path, hosts):
    out = tmp_path / "out.json"
    done = bench(
        *("--ops", "combine", "--layout", "token", "--tokens", "16", "--hidden", "128"),
        *("--top-k", "2", "--experts", "8", "--ranks", "4", "--hosts", hosts),
        *("--repeat", "2", "--json", str(out)),
        XLA_FLAGS=machine.compiler_flags(devices=4),
    )
    if hosts == "3":
        assert done.returncode and "--hosts: expected a divisor of the 4 ranks" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.load(out)  # checks each
    assert {r["op"] for r in found} >= {"combine"} and all(r["correct"] for r in found)
    assert {r["hosts"] for r in found} == {2}


@on_cpu
def test_a_process_that_dies_costs_one_case(tmp_path, monkeypatch):
    """A process is killed while it measures; the other cases go on in a new process."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", machine.compiler_flags())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = os.path.dirname(os.path.dirname(jax_ep.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *sys.path]))
    plan = dataclasses.replace(TINY, op="plan")
    doomed = dataclasses.replace(plan, tokens=7)
    job = Job(cases=[doomed, plan], ranks=1, processes=1, gpus=0, repeat=1, command="")

    def kill(name: str) -> None:
        for process in _workers(tmp_path) if "T=7" in name else ():
            os.kill(process, signal.SIGKILL)

    found = [record for record in run(job, timeout=120.0, progress=kill) if record["op"] == "plan"]
    for record in found:
        records.check(record)
    assert [(r["tokens"], r["correct"]) for r in found] == [(7, False), (6, True)]
    assert found[0]["error"] == "process 0 was ended by SIGKILL"
    assert "failed" in table.row(found[0])[-1]


def test_a_log_says_at_which_case_it_is_silent(monkeypatch):
    """Once for each case that takes long. A terminal shows that all the time."""
    late = dataclasses.replace(TINY, op="plan", tokens=7)
    clock = itertools.count(0.0, 10.0)  # seconds, from one look to the next
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    def cases(job, *, timeout, progress):
        for name in ("plan T=6", *["plan T=7"] * 6, *["combine T=7"] * 4, "plan T=8"):
            progress(name)
        yield from ()

    monkeypatch.setattr(launch, "run", cases)
    job = Job(cases=[late], ranks=1, processes=1, gpus=0, repeat=1, command="")
    log = io.StringIO()
    assert program.measure(job, timeout=1.0, console=Console(file=log, width=160)) == []
    told = [line for line in log.getvalue().splitlines() if "still at" in line]
    assert [line.partition("still at ")[2] for line in told] == ["plan T=7", "combine T=7"]
    log = io.StringIO()
    program.measure(job, timeout=1.0, console=Console(file=log, width=160, force_terminal=True))
    assert "still at" not in log.getvalue()


@on_cpu
def test_when_the_time_is_over_no_case_is_begun(tmp_path):
    out = tmp_path / "out.json"
    done = bench(
        *("--suite", "smoke,decode", "--ranks", "2", "--seconds", "0.1", "--json", str(out)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two_ranks = Machine(ranks=2, processes=1, gpus=0)
    cases = [case for name in ("smoke", "decode") for case in suites.suite(name, two_ranks)]
    assert f"0 of {len(left_out(cases, two_ranks)[0])} cases: the time was over" in done.stdout
    assert {record["op"] for record in records.load(out)} <= {"ceiling"}


def _workers(folder: pathlib.Path) -> list[int]:
    """Processes of a run that have a file of the folder as an argument."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            text = path.read_text().replace("\0", " ")
            if str(folder) in text and "jax_ep.bench.worker" in text:
                found.append(int(path.parent.name))
    return found


@on_cpu
def test_a_run_that_is_ended_keeps_its_records_and_leaves_no_process(tmp_path):
    out = tmp_path / "out.json"
    root = os.path.dirname(os.path.dirname(jax_ep.__file__))
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": machine.compiler_flags(), "TMPDIR": str(tmp_path)}
    flags["PYTHONPATH"] = os.pathsep.join([root, *sys.path])
    command = [sys.executable, "-m", "jax_ep.bench", "--suite", "smoke", "--json", str(out)]
    running = subprocess.Popen(
        command, env={**os.environ, **flags}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (out.exists() and records.load(out)):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.1)
        assert _workers(tmp_path)
        running.terminate()
        assert running.wait(30) == 128 + signal.SIGTERM
    finally:
        running.kill()
        running.wait()
    assert records.load(out) and not _workers(tmp_path)


WRONG_FLAGS = {
    "--suite fast": "--suite: expected one of baselines",
    "--ops dispatch --capacity some": "--capacity: expected one of",
    "--ops dispatch --tokens many": "--tokens: expected an integer",
    "--ops dispach": "--ops: expected one of",
    "--ops dispatch --experts 9": "experts: expected a multiple of the 8 ranks",
    "--ops dispatch --suite smoke": "expected one of them",
}
# Runs the program with each of the flags in its first argument, and prints each [exit status,
# stderr].
RUN_EACH = """
import contextlib, io, json, runpy, sys
flags, found = json.loads(sys.argv[1]), []
for given in flags:
    sys.argv = ["bench", *given.split()]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            runpy.run_module("jax_ep.bench", run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
    found.append([status, error.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    """The answers to all wrong flags, from one process."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
        "TERM": "dumb",
        "XLA_FLAGS": machine.compiler_flags(),
    }
    done = run_python("-c", RUN_EACH, json.dumps(list(WRONG_FLAGS)), timeout=300, **flags)
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG_FLAGS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_say_so(answers, flags):
    status, error = answers[flags]
    assert status == 2 and WRONG_FLAGS[flags] in error, error


@pytest.mark.parametrize(
    ("missing", "arguments"), [("typer", []), ("rich", []), ("matplotlib", ["--plot", "x.png"])]
)
def test_missing_packages_name_the_extra(missing, arguments):
    code = f"""
import runpy, sys
sys.modules["{missing}"] = None
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "{missing}" else find(name, *rest)
sys.argv = ["bench", *{arguments!r}]
runpy.run_module("jax_ep.bench", run_name="__main__")
"""
    done = run_python("-c", code, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"jax_ep.bench: {missing} is not installed: pip install 'jax-ep[bench]'"
    )
    assert "Traceback" not in done.stderr


def test_the_reason_of_a_failure_is_the_first_exception():
    told = "Traceback:\n  ...\nRuntimeError: no NVSHMEM\nE0000 grpc noise\n"
    other = "Traceback:\njax.errors.JaxRuntimeError: UNAVAILABLE: no heartbeat\n more\n"
    assert reason([other, told]) == (
        "RuntimeError: no NVSHMEM | jax.errors.JaxRuntimeError: UNAVAILABLE: no heartbeat"
    )
    assert reason(["a\n\nb\n", ""]) == "a | b"
    assert "without a word" in reason([""])
    gone = "jax_ep.CommunicationError: rank 1: the process of rank 0 is gone."
    assert reason(["Fatal", gone], [-11, None]) == f"process 0 was ended by SIGSEGV | {gone}"
    assert reason([gone, told], [1, 1]).startswith("RuntimeError: no NVSHMEM")
