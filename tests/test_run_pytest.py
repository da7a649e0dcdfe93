"""Bazel's entry into the suite: files without a test to run; what --each-value keeps."""

from __future__ import annotations

import pathlib
import re

import pytest

import each_value
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

@pytest.fixture(params=["p", "q"])
def fixture(request):
    return request.param

@pytest.mark.parametrize("shape", ["a", "b", "c"])
@pytest.mark.parametrize("dtype, size", [("x", 1), ("y", 1)])
def test_combined(fixture, shape, dtype, size): ...

@pytest.mark.parametrize(("shape", "dtype"), [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")])
def test_table(shape, dtype): ...

@pytest.mark.parametrize("shape", ["a", pytest.param("b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["x", "y"])
def test_slow_cases(shape, dtype): ...

class TestOne:
    def test_plain(self): ...

class TestTwo:
    def test_plain(self): ...
"""


def test_each_value_in_few_cases(tmp_path):
    """All parameters' values and all tests, also those that a marker leaves; not all combinations."""
    file = tmp_path / "test_combined.py"
    file.write_text(COMBINED)
    arguments = [str(ENTRY), str(file), "-v", "-m", "not slow", "--rootdir", str(tmp_path)]
    whole = {"TEST_SHARD_INDEX": "0", "TEST_TOTAL_SHARDS": "1"}  # this test may run in a shard
    done = run_python(*arguments, timeout=100, **whole)
    assert "20 passed, 2 deselected" in done.stdout, done.stdout + done.stderr
    done = run_python(*arguments, "--each-value", timeout=100, **whole)
    assert "11 passed, 11 deselected" in done.stdout, done.stdout + done.stderr
    cases = re.findall(r"::test_combined\[(\w)-(\w)-1-(\w)\] PASSED", done.stdout)
    assert [set(values) for values in zip(*cases, strict=True)] == [
        set("pq"),
        set("xy"),
        set("abc"),
    ]
    slow_cases = re.findall(r"::test_slow_cases\[(.*)\] PASSED", done.stdout)
    assert slow_cases == ["x-a", "y-a"]
    assert done.stdout.count("::test_table[") == 4
    assert "TestOne::test_plain PASSED" in done.stdout
    assert "TestTwo::test_plain PASSED" in done.stdout


def test_a_cover_takes_the_case_that_brings_most():
    one, two = frozenset({("a", "0")}), frozenset({("b", "1")})
    both = one | two
    assert each_value.cover([one, two, both]) == [2]
    assert each_value.cover([one, two]) == [0, 1]
    assert each_value.cover([frozenset(), frozenset()]) == [0]
