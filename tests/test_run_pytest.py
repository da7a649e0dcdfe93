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
