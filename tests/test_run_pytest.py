"""Bazel's entry into the suite: a target whose file has no test to run fails."""

from __future__ import annotations

import pathlib

import pytest

from spmd import run_python

pytestmark = pytest.mark.one_process("its programs have processes of their own")

(ENTRY,) = pathlib.Path(__file__).parent.rglob("run_pytest.py")
FILE = """
import pytest

@pytest.mark.slow
def test_slow(): ...
"""


@pytest.mark.parametrize(
    ("chosen", "shard", "status"),
    [
        ("not slow", "0", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("slow", "1", pytest.ExitCode.OK),  # an empty shard, where another has the test
    ],
)
def test_no_test_is_a_failure(tmp_path, chosen, shard, status):
    file = tmp_path / "test_file.py"
    file.write_text(FILE)
    options = (str(file), "--rootdir", str(tmp_path), "-m", chosen)
    env = {"TEST_SHARD_INDEX": shard, "TEST_TOTAL_SHARDS": "2"}
    done = run_python(str(ENTRY), *options, timeout=100, **env)
    assert done.returncode == status, done.stdout + done.stderr
