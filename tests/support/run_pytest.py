"""Bazel's entry into the suite: runs pytest on the files given, and speaks Bazel's protocols.

Usage: run_pytest.py tests/test_something.py ... [pytest options]
"""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
import sys

import pytest


class Shard:
    """Keeps every n-th test, where Bazel runs n shards of a file."""

    def __init__(self) -> None:
        self.index = int(os.environ.get("TEST_SHARD_INDEX", "0"))
        self.count = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))
        if status_file := os.environ.get("TEST_SHARD_STATUS_FILE"):
            pathlib.Path(status_file).touch()  # says that this runner knows about shards

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        mine = items[self.index :: self.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


def main(arguments: list[str]) -> int:
    """Runs pytest from the root of the source tree; nothing to run is no failure."""
    os.chdir(pathlib.Path(__file__).parents[2])
    # An editable install in this interpreter would come before Bazel's build, which is on the path,
    # and add the libraries that Bazel has not built.
    sys.meta_path[:] = [
        importlib.machinery.BuiltinImporter,
        importlib.machinery.FrozenImporter,
        importlib.machinery.PathFinder,
    ]
    options = ["-c", "pyproject.toml", "-p", "no:cacheprovider"]
    if report := os.environ.get("XML_OUTPUT_FILE"):
        options.append(f"--junitxml={report}")
    if chosen := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        options += ["-k", chosen]
    status = pytest.main([*options, *arguments], plugins=[Shard()])
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
