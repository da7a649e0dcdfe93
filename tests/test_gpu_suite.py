"""``gpu_suite.py`` itself, without GPUs: stages that it leaves out or ends, and failures."""

from __future__ import annotations

import shlex
import sys
import time

import pytest

import gpu_suite
import host_stages
import latency_stages
import machine
import run_hosts

pytestmark = pytest.mark.one_process("starts programs of its own")


@pytest.fixture
def suite(monkeypatch, tmp_path, capsys):
    """Runs stages made of Python programs, on a machine of one GPU; gives the status and the table."""
    monkeypatch.setattr(machine, "count_gpus", lambda: 1)

    def run(stages, *arguments):
        monkeypatch.setattr(gpu_suite, "stages", lambda gpus: stages)
        status = gpu_suite.main(["--out", str(tmp_path), *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


def stage(*programs, **options):
    return gpu_suite.Stage([f'{{python}} -c "{program}"' for program in programs], **options)


def test_verdicts(suite, tmp_path):
    stages = {
        "good": stage("print('one')", "import os; print(os.environ['WHO'])"),
        "bad": stage("raise SystemExit(3)", "print('never')"),
        "large": stage("print('never')", gpus=2),
    }
    stages["good"].environment["WHO"] = "me"
    status, table = suite(stages)
    assert status == 1 and len(table) == 3
    assert table[0].startswith("good") and table[0].endswith(" s  me")
    assert "FAILED: exit status 3" in table[1]
    assert table[2].endswith("left out: needs 2 GPUs, there are 1")
    assert "never" not in (tmp_path / "bad.log").read_text()
    assert suite(stages, "good")[0] == 0


def test_what_takes_too_long_is_ended_with_its_children(suite, tmp_path):
    sleep = f"['{sys.executable}', '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess; subprocess.run({sleep})"
    begin = time.monotonic()
    status, table = suite({"slow": stage(child, seconds=1), "next": stage("print(1)")})
    assert status == 1 and time.monotonic() - begin < 20
    assert "FAILED: not done after 1 s" in table[0] and table[1].endswith("s  1")
    assert "left out: the 0 s are over" in suite({"any": stage("")}, "--seconds", "0")[1][0]


def test_names(suite, capsys):
    with pytest.raises(SystemExit):
        suite({"a": stage("")}, "b")
    assert "expected names of --list, got b" in capsys.readouterr().err
    assert suite({"a": stage("")}, "--list") == (0, ["a"])


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_stages_name_what_is_there(gpus):
    """Commands can be filled in, and name files that exist."""
    for found in gpu_suite.stages(gpus).values():
        for command in found.commands:
            text = command.format(python="python", out="out", binaries="bin")
            for word in text.split():
                if word.startswith(("tests/", "benchmarks/")):
                    path, *names = word.split("::")
                    assert (gpu_suite.ROOT / path).exists(), word
                    for name in names:
                        assert f"def {name}(" in (gpu_suite.ROOT / path).read_text(), word


def test_beginning_of_a_name(suite, capsys):
    """It stands for all stages that begin so, unless one has that name."""
    stages = {name: stage(f"print('{name}')") for name in ("hosts_a", "hosts_b", "host", "hosted")}
    assert [line.split()[0] for line in suite(stages, "hosts")[1]] == ["hosts_a", "hosts_b"]
    assert [line.split()[0] for line in suite(stages, "host")[1]] == ["host"]
    with pytest.raises(SystemExit):
        suite(stages, "ho")


def test_hosts_fit_their_time():
    """All topologies, reached and late, in eight minutes of one GPU, and each runner ends before."""
    found = {name: s for name, s in gpu_suite.stages(1).items() if name.startswith("hosts_")}
    shapes = ("2x1", "2x2", "4x2", "2x4")
    assert {f"hosts_{shape}{late}" for shape in shapes for late in ("", "_late")} <= set(found)
    assert len(found) == len(host_stages.HOSTS)
    assert sum(s.seconds for s in found.values()) <= host_stages.SECONDS == 480
    for s in found.values():
        (command,) = s.commands
        words = command.split()
        options = run_hosts.parse(words[2:])
        assert options.timeout < s.seconds
        assert options.pytest[0] == "-q" and all("=" not in word for word in options.pytest)
    off = [s for s in found.values() if s.environment]
    assert [s.environment for s in off] == [{"XLA_FLAGS": gpu_suite.NO_COMMAND_BUFFERS}]


def test_latency_mode_has_all_its_tests_at_each_number_of_ranks():
    """Its suite in parts, within a minute each, and steps; runners end before."""
    found, files = gpu_suite.stages(1), set()
    for stage in latency_stages.LATENCY:
        (command,) = found[stage.name].commands
        _, runner, option, limit, ranks, *arguments = shlex.split(command)
        assert (runner, option) == ("tests/run_processes.py", "--timeout")
        assert int(limit) < found[stage.name].seconds <= (90 if "steps" in stage.name else 60)
        assert found[stage.name].ranks == int(ranks) and stage.name.endswith(f"_{ranks}")
        chosen = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
        files |= {(int(ranks), chosen, word) for word in arguments if word.startswith("tests/")}
    suite = latency_stages.SUITE.split()
    assert all(file in gpu_suite.SUITE for file in suite) and len(suite) == 5
    expected = {(chosen, file) for chosen in ("not flight", "flight") for file in suite}
    expected = {(f"{chosen} and not many_steps", file) for chosen, file in expected}
    expected.add(("", "tests/test_latency_steps.py"))
    assert files == {(ranks, *pair) for ranks in (2, 4, 8) for pair in expected}
