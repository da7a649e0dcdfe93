"""py_tests that run the files of a pytest suite."""

def pytest_tests(srcs, support, data, shards, deps):
    """One py_test for each test file, of all its tests that are not marked slow.

    Args:
        srcs: The test files.
        support: Modules that tests import, and the entry point tests/run_pytest.py.
        data: Files that tests read.
        shards: In how many parts to run a test file, by name, where that is not one.
        deps: Libraries under test.
    """
    for src in srcs:
        name = src.split("/")[-1][:-len(".py")]
        native.py_test(
            name = name,
            size = "medium",
            timeout = "long",
            srcs = [src] + support,
            args = [src, "-m", "'not slow'"],
            data = data,
            legacy_create_init = False,
            main = "tests/run_pytest.py",
            shard_count = shards.get(name),
            deps = deps,
        )
