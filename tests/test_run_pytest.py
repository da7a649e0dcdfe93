"""Bazel's entry into the suite: files without a test to run; what --few-cases keeps."""

from __future__ import annotations

import pathlib
import re

import pytest

import few_cases
from spmd import run_python

pytestmark = pytest.mark.one_process("its programs have processes of their own")

(ENTRY,) = pathlib.Path(__file__).parent.rglob("run_pytest.py")
FILE = """
import pytest

@pytest.mark.slow
def test_slow(): ...
"""


OTHER = """
def test_one(): ...
def test_two(): ...
"""


def run(folder, *options, shard):
    sources = folder / "sources"  # that the files are links to, as Bazel has them
    sources.mkdir(exist_ok=True)
    for name, text in (("test_file.py", FILE), ("test_other.py", OTHER)):
        (sources / name).write_text(text)
        if not (folder / name).exists():
            (folder / name).symlink_to(sources / name)
    env = {"TEST_SHARD_INDEX": shard, "TEST_TOTAL_SHARDS": "2"}
    return run_python(str(ENTRY), *options, "--rootdir", str(folder), timeout=100, **env)


@pytest.mark.parametrize(
    ("chosen", "shard", "status"),
    [
        ("not slow", "0", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("slow", "1", pytest.ExitCode.OK),  # an empty shard, where another has the test
    ],
)
def test_no_test_is_a_failure(tmp_path, chosen, shard, status):
    done = run(tmp_path, str(tmp_path / "test_file.py"), "-m", chosen, shard=shard)
    assert done.returncode == status, done.stdout + done.stderr


def test_files_that_run_together(tmp_path):
    """A shard has whole files, and each file must have a test, or all shards fail."""
    files = [str(tmp_path / name) for name in ("test_file.py", "test_other.py")]
    done = run(tmp_path, *files, shard="1")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert "2 passed, 1 deselected" in done.stdout
    done = run(tmp_path, *files, "-m", "not slow", shard="1")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert done.stdout.endswith("no test to run in test_file.py\n")


COMBINED = """
import pytest

@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param

@pytest.mark.parametrize("shape", ["a", "b", "c"])
@pytest.mark.parametrize("dtype", ["x", "y"])
def test_plain(shape, dtype): ...

@pytest.mark.parametrize("shape", ["a", "b", "c"])
@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_combined(backend, shape, axis_type): ...

@pytest.mark.parametrize(("check_vma", "axis_type"), [(0, "p"), (0, "q"), (1, "p"), (1, "r")])
def test_table(check_vma, axis_type): ...

@pytest.mark.parametrize("axis_type", ["x", pytest.param("y", marks=pytest.mark.slow)])
def test_slow_cases(axis_type): ...

class TestOne:
    def test_plain(self): ...

class TestTwo:
    def test_plain(self): ...
"""


def test_few_cases(tmp_path):
    """One case of each test, and each value of the parameters that choose how JAX is used."""
    file = tmp_path / "test_combined.py"
    file.write_text(COMBINED)
    arguments = [str(ENTRY), str(file), "-v", "-m", "not slow", "--rootdir", str(tmp_path)]
    whole = {"TEST_SHARD_INDEX": "0", "TEST_TOTAL_SHARDS": "1"}  # this test may run in a shard
    done = run_python(*arguments, timeout=100, **whole)
    assert "25 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    done = run_python(*arguments, "--few-cases", timeout=100, **whole)
    kept = re.findall(r"::(\S+) PASSED", done.stdout)
    assert kept == [
        "test_plain[x-a]",
        "test_combined[reference-auto-a]",
        "test_combined[cpu-explicit-a]",
        "test_table[0-p]",
        "test_table[0-q]",
        "test_table[1-r]",
        "test_slow_cases[x]",
        "TestOne::test_plain",
        "TestTwo::test_plain",
    ], done.stdout + done.stderr


def test_a_cover_takes_the_case_that_brings_most():
    one, two = frozenset({("a", "0")}), frozenset({("b", "1")})
    both = one | two
    assert few_cases.cover([one, two, both]) == [2]
    assert few_cases.cover([one, two]) == [0, 1]
    assert few_cases.cover([frozenset(), frozenset()]) == [0]
