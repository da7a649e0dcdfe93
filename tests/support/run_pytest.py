"""Bazel's entry into the suite: runs pytest on the files given, and speaks Bazel's protocols.

Usage: run_pytest.py tests/test_something.py ... [--few-cases] [pytest options]

``--few-cases`` leaves out most cases of a test with parameters (``few_cases.py``).
"""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
import sys

import pytest

import few_cases

_FEW_CASES = "--few-cases"


class Selection:
    """Keeps every n-th test, where Bazel runs n shards of a file, or every n-th file of several.

    Attributes:
        thin: Whether most cases of tests with parameters are left out first.
        found: The files that have a test to run, in any shard.
    """

    def __init__(self, *, thin: bool) -> None:
        self.thin = thin
        self.index = int(os.environ.get("TEST_SHARD_INDEX", "0"))
        self.count = int(os.environ.get("TEST_TOTAL_SHARDS", "1"))
        self.found: list[pathlib.Path] = []
        if status_file := os.environ.get("TEST_SHARD_STATUS_FILE"):
            pathlib.Path(status_file).touch()  # says that this runner knows about shards

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        self.found = list(dict.fromkeys(item.path for item in items))
        chosen = few_cases.thin_out(items) if self.thin else items
        if len(self.found) > 1:  # tests of a file share what they compile
            files = self.found[self.index :: self.count]
            mine = [item for item in chosen if item.path in files]
        else:
            mine = chosen[self.index :: self.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


def main(arguments: list[str]) -> int:
    """Runs pytest from the root of the source tree; a file without a test to run is a failure."""
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
    chosen = os.environ.get("TESTBRIDGE_TEST_ONLY")
    if chosen:
        options += ["-k", chosen]
    selection = Selection(thin=_FEW_CASES in arguments)
    arguments = [argument for argument in arguments if argument != _FEW_CASES]
    status = pytest.main([*options, *arguments], plugins=[selection])
    names = [argument.partition("::")[0] for argument in arguments]
    files = [pathlib.Path(name).resolve() for name in names if name.endswith(".py")]
    found = [path.resolve() for path in selection.found]  # Bazel's are links to sources elsewhere
    empty = [file.name for file in files if file not in found]
    if status == pytest.ExitCode.OK and empty and not chosen:
        print(f"no test to run in {', '.join(empty)}")
        return int(pytest.ExitCode.NO_TESTS_COLLECTED)
    # A shard may be empty where the others are not.
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED and selection.found else int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
