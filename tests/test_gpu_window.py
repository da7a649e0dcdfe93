"""``gpu_suite.py --window`` itself, without GPUs: its plan, its limits, the files that it leaves."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import gpu_suite
import gpu_window
import machine
import window_files
import window_progress
import window_stages
from window_stages import RECORDS, Stage

pytestmark = pytest.mark.one_process("starts programs of its own")
RECORD = {
    "op": "dispatch",
    "layout": "token",
    "dtype": "bfloat16",
    "correct": True,
    "median_us": 1.0,
}


# The plan -----------------------------------------------------------------------------------------


def runnable(gpus):
    return [s for s in window_stages.stages(gpus) if window_stages.why_not(s, gpus) is None]


@pytest.mark.parametrize("nccl_shares", [False, True])
def test_budgets(monkeypatch, nccl_shares):
    """On two GPUs they add up to all the time; on one, stages that cannot run get none."""
    monkeypatch.setattr(machine, "NCCL_SHARES_GPUS", nccl_shares)
    total = window_stages.SECONDS - window_stages.RESERVE
    assert total < 540 and all(stage.seconds <= stage.most for stage in runnable(2))
    assert sum(map(window_stages.planned, window_stages.groups(runnable(2)))) == total
    assert sum(map(window_stages.planned, window_stages.groups(runnable(1)))) < total


def test_order():
    """Measurements before tests, two processes before one; only builds and tests run side by side."""
    names = [stage.name for stage in window_stages.stages(2)]
    assert len(set(names)) == len(names)
    benches = [n for n in names if n.startswith("bench_") and "process" in n]
    assert benches == ["bench_2_processes", "bench_1_process"]
    assert names.index(benches[-1]) < names.index("collectives") < names.index("one_process")
    for group in window_stages.groups(runnable(2)):
        assert len(group) == 1 or {stage.kind for stage in group} in ({"build"}, {"tests"})


def test_left_out_on_one_gpu(monkeypatch):
    monkeypatch.setattr(machine, "NCCL_SHARES_GPUS", False)
    out = {s.name: window_stages.why_not(s, 1) for s in window_stages.stages(1)}
    assert out["one_process"] == "needs 2 GPUs, there is 1"
    assert out["bench_1_process"] and out["bench_loads"]
    assert out["training"] and out["collectives"]
    assert out["bench_2_processes"] is None and out["processes_4"] is None
    monkeypatch.setattr(machine, "NCCL_SHARES_GPUS", True)
    out = {s.name: window_stages.why_not(s, 1) for s in window_stages.stages(1)}
    assert not out["training"] and not out["collectives"]


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_ranks_that_share_gpus_do_so_alone(gpus):
    for group in window_stages.groups(window_stages.stages(gpus)):
        lanes = window_stages.lanes(group, gpus)
        sharing = [lane for lane in lanes if any(stage.ranks > gpus for stage in lane)]
        assert len(sharing) <= 1 and all(s.ranks > gpus for lane in sharing for s in lane)
        assert sorted(s.name for lane in lanes for s in lane) == sorted(s.name for s in group)


@pytest.mark.parametrize("gpus", [1, 2])
def test_commands(gpus):
    """Commands can be filled in, name files that exist, and give each result a place."""
    for stage in window_stages.stages(gpus):
        for command in stage.commands:
            text = command.format(python="python", work="work", binaries="bin", seconds=9)
            for word in text.split():
                if word.startswith(("tests/", "benchmarks/")):
                    assert (gpu_suite.ROOT / word).exists(), word
        assert set(stage.results.values()) <= set(window_files.FILES)
        assert ("window_bench" in stage.commands[0]) == (
            stage.kind == "bench" and stage.ranks > gpus
        )


def test_what_is_left_goes_on():
    """The next stages that need time get it, up to their ``most``; later ones keep their plan."""
    first, second, third = (Stage(n, [], "other", 10, 25, n) for n in "abc")
    assert window_stages.limit([first], [[second], [third]], 30) == 10
    assert window_stages.limit([second], [[third]], 28) == 18
    assert window_stages.limit([third], [], 100) == 25
    assert window_stages.limit([third], [], 100, bounded=False) == 100
    assert window_stages.limit([first], [[second], [third]], 7) == 7
    assert window_stages.share_of(first, [first, second], 30) == 15
    assert window_stages.share_of(second, [first, second], 30) == 30


# Progress -----------------------------------------------------------------------------------------

ALONE = """\
$ python -m pytest -v
collecting ... collected 5 items / 1 deselected / 4 selected

tests/test_a.py::test_one PASSED                                   [ 25%]
tests/test_a.py::test_two[one process-8 b] process 0 says something
PASSED is what it says
FAILED                                                             [ 50%]
tests/test_a.py::test_three SKIPPED (needs two GPUs, ...)          [ 75%]
tests/test_a.py::test_four """
NOT_CAPTURED = """\
collecting ... collected 3 items

tests/test_a.py::test_one[x] process 0, exit status 0:
2 processes: FAILED
PASSED
tests/test_a.py::test_two SKIPPED (needs two GPUs)
tests/test_a.py::test_three FAILED
"""
WORKERS = """\
created: 2/2 workers
2 workers [3 items]
scheduling tests via LoadScheduling
tests/test_a.py::test_one
[gw0] [ 33%] PASSED tests/test_a.py::test_one
[gw1] [ 66%] ERROR tests/test_a.py::test_two
FAILED tests/test_a.py::test_two - in the summary
"""
REPEATED = """\
process 1:
tests/test_a.py::test_one PASSED                                   [ 50%]
2 processes: FAILED
"""


def test_progress_of_pytest():
    found = window_progress.of("tests", ALONE)
    assert found.text == "3 of 4 tests: 1 passed, 1 failed, 1 skipped"
    assert found.failed == ("tests/test_a.py::test_two[one process-8 b] process 0 says something",)
    assert not found.complete
    found = window_progress.of("tests", NOT_CAPTURED)
    assert found.text == "3 of 3 tests: 1 passed, 1 failed, 1 skipped"
    assert found.failed == ("tests/test_a.py::test_three",)
    found = window_progress.of("tests", WORKERS)
    assert found.text == "2 of 3 tests: 1 passed, 1 error"
    assert found.failed == ("tests/test_a.py::test_two",)
    assert window_progress.of("tests", "importing").text == "no tests yet"
    both = window_progress.of("tests", f"{ALONE}\n{REPEATED}$ next\n{WORKERS}")
    assert both.text == "5 of 7 tests: 2 passed, 1 failed, 1 skipped, 1 error"


FEW = """\
import pytest
@pytest.mark.parametrize("i", range(3))
def test(i):
    assert i < 2
"""


def test_progress_of_a_real_run(tmp_path):
    """The output of the installed pytest is understood."""
    test = tmp_path / "test_few.py"
    test.write_text(FEW)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run([*command, str(test)], capture_output=True, text=True, check=False)
    assert window_progress.of("tests", done.stdout).text == "3 of 3 tests: 2 passed, 1 failed"


def test_progress_of_benchmarks(tmp_path):
    records = tmp_path / "records.json"
    log = "3 cases: 2 rank(s) on 2 GPU(s), 2 process(es); starting\nleft out: 2 case(s): no NCCL\n"
    assert window_progress.of("bench", log, records).text == "0 of 3 cases, 2 left out"
    wrong = RECORD | {"correct": False, "median_us": None}
    records.write_text(json.dumps([RECORD | {"op": "ceiling"}, RECORD, wrong]))
    found = window_progress.of("bench", log, records)
    assert found.text == "2 of 3 cases, 1 without a figure, 2 left out" and not found.complete
    records.write_text(json.dumps([RECORD, RECORD, RECORD]))
    assert window_progress.of("bench", log, records).complete


# A run --------------------------------------------------------------------------------------------


def stage(name, program, *, seconds=20.0, kind="other", **options):
    escaped = program.replace("{", "{{").replace("}", "}}")
    command = f'{{python}} -uc "{escaped}"'
    return Stage(name, [command], kind, seconds, seconds, options.pop("group", name), **options)


@pytest.fixture
def window(tmp_path):
    """Makes a window of stages of Python programs."""

    def make(stages, *, seconds=60.0, gpus=1, **options):
        work = tmp_path / "work"
        work.mkdir()
        out = tmp_path / "out"
        return gpu_window.Window(stages, gpus, out, work, tmp_path, seconds, **options)

    return make


def state(tmp_path):
    rows = json.loads((tmp_path / "out/window.json").read_text())["stages"]
    return {row["name"]: row for row in rows}


def test_a_window(window, tmp_path):
    result = json.dumps([RECORD]).replace('"', '\\"')
    write = f"import sys; open('{tmp_path}/work/NAME.json', 'w').write('{result}')"
    target = RECORDS[2]
    stages = [
        stage("b1", write.replace("NAME", "b1"), results={"b1.json": target}),
        stage("b2", write.replace("NAME", "b2"), results={"b2.json": target}),
        stage("bad", "raise SystemExit(3)"),
        stage("large", "print(1)", gpus=2),
    ]
    assert window(stages).run() == 1
    rows = state(tmp_path)
    assert rows["b1"]["state"] == "ok"
    assert rows["bad"]["state"] == "FAILED: exit status 3"
    assert rows["large"]["state"] == "left out: needs 2 GPUs, there is 1"
    assert json.loads((tmp_path / "out" / target).read_text()) == [RECORD, RECORD]
    table = (tmp_path / "out/window.txt").read_text().splitlines()
    assert [line.split()[0] for line in table] == ["b1", "b2", "bad", "large"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found <= set(window_files.FILES) and len(window_files.FILES) <= 8


def test_limits(window, tmp_path, monkeypatch):
    """The output and progress of a killed stage are there, and no process of it is left."""
    monkeypatch.setattr(window_stages, "GRACE", 1.0)
    monkeypatch.setattr(gpu_window, "GRACE", 1.0)
    child = "import os; print('pid', os.getpid(), flush=True); import time; time.sleep(600)"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print('collected 9 items'); print('tests/a.py::b PASSED [ 11%]');"
        "time.sleep(1); print('half a line', end=''); time.sleep(600)"
    ).replace('"', '\\"')
    begin = time.monotonic()
    slow = stage("slow", deaf, seconds=3.0, kind="tests")
    assert window([slow, stage("next", "print('then')")]).run() == 0
    assert time.monotonic() - begin < 15
    rows = state(tmp_path)
    assert rows["slow"]["state"] == "ended at its limit of 3 s"
    assert rows["slow"]["progress"] == "1 of 9 tests: 1 passed"
    assert rows["next"]["state"] == "ok" and rows["next"]["progress"] == "then"
    log = (tmp_path / "out/window.log").read_text()
    assert "[slow] half a line\n" in log and "[next] then\n" in log
    pid = int(next(line for line in log.splitlines() if "] pid " in line).split()[-1])
    cmdline = pathlib.Path(f"/proc/{pid}/cmdline")
    deadline = time.monotonic() + 5
    # It is empty for a process that was killed and not yet waited for.
    while cmdline.exists() and cmdline.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_files_while_it_runs(window, tmp_path):
    """All that a stage has written is in the files a moment later, and ``stop`` ends everything."""
    running = window(
        [stage("long", "print('so far'); import time; time.sleep(600)"), stage("b", "1")]
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    log = tmp_path / "out/window.log"
    deadline = time.monotonic() + 20
    while "[long] so far" not in log.read_text() or state(tmp_path)["long"]["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.stop.set()
    thread.join(20)
    assert not thread.is_alive()
    rows = state(tmp_path)
    assert rows["long"]["state"] == "ended with the window"
    assert rows["b"]["state"] == "left out: the window was told to end"


def test_side_by_side(window, tmp_path):
    """Stages of a group run at once; each waits here for the other."""
    wait = (
        "import pathlib, time; pathlib.Path('{here}/MINE').touch();"
        "[time.sleep(0.02) for _ in range(500) if not pathlib.Path('{here}/OTHER').exists()];"
        "assert pathlib.Path('{here}/OTHER').exists()"
    ).replace("{here}", str(tmp_path))
    stages = [
        stage("x", wait.replace("MINE", "1").replace("OTHER", "2"), group="both"),
        stage("y", wait.replace("MINE", "2").replace("OTHER", "1"), group="both"),
    ]
    assert window(stages).run() == 0


def test_long_logs(window, tmp_path, monkeypatch):
    assert len(window_stages.stages(2)) * window_files.STAGE_LOG_BYTES * 1.2 < 16 << 20
    monkeypatch.setattr(window_files, "STAGE_LOG_BYTES", 1000)
    many = "[print('line', i) for i in range(20000)]; print('the end')"
    assert window([stage("talks", many)]).run() == 0
    log = (tmp_path / "out/window.log").read_text()
    assert len(log) < 60000 and "bytes are left out" in log
    assert "[talks] the end\n" in log


def test_a_build_that_failed_ends_the_window(window, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_window.Window, "_is_built", lambda self, stage: False)
    stages = [stage("build", "raise SystemExit(1)", kind="build"), stage("b", "print(1)")]
    assert window(stages).run() == 1
    assert state(tmp_path)["b"]["state"] == "left out: the build failed"


def test_from_the_command_line(monkeypatch, tmp_path, capsys):
    """SIGTERM ends the window with all files in order."""
    monkeypatch.setattr(machine, "count_gpus", lambda: 1)
    sleeps = stage("sleeps", "import os, time; os.kill(os.getppid(), 15); time.sleep(99)")
    monkeypatch.setattr(window_stages, "stages", lambda gpus: [sleeps])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert gpu_suite.main(["--window", "--out", str(tmp_path / "out")]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert state(tmp_path)["sleeps"]["state"] == "ended with the window"
    with pytest.raises(SystemExit):
        gpu_suite.main(["--window", "nothing"])
    assert "expected names of --list, got nothing" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1], ids=["alone", "xdist"])
def test_failures_show_at_once(tmp_path, workers):
    """Failures show at once with their reasons, and count once, also if the run is ended later."""
    if workers:
        pytest.importorskip("xdist")
    pytest_itself = "os.getppid()" if workers else "os.getpid()"
    (tmp_path / "test_it.py").write_text(
        "import os\n"
        "def test_wrong(): assert 1 == 2, 'tests/other.py::test_x FAILED'\n"
        "def test_right(): pass\n"
        f"def test_that_ends_all(): os.kill({pytest_itself}, 9)\n"
    )
    options = ["-v", "-p", "window_failures", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["-n", str(workers)] if workers else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(gpu_suite.ROOT / "tests" / "support")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode < 0
    assert "| E   AssertionError: tests/other.py::test_x FAILED" in done.stdout
    assert window_progress.of("tests", done.stdout).failed == ("test_it.py::test_wrong",)
