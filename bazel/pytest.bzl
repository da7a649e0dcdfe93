"""py_tests that run the files of a pytest suite."""

def pytest_tests(srcs, support, data, shards, once, deps):
    """One py_test for each test file, of all its tests that are not marked slow.

    Args:
        srcs: The test files.
        support: Modules that tests import, and the entry point tests/support/run_pytest.py.
        data: Files that tests read.
        once: Files whose tests say the same with every version of Python and JAX, by name, and one test of
            each. The file's target is tagged "once", and another, NAME_sample, runs that test alone.
        shards: In how many parts to run a test file, by name, where that is not one.
        deps: Libraries under test.
    """
    for src in srcs:
        name = src.split("/")[-1][:-len(".py")]
        common = dict(
            size = "medium",
            timeout = "long",
            srcs = [src] + support,
            data = data,
            legacy_create_init = False,
            main = "tests/support/run_pytest.py",
            deps = deps,
        )
        native.py_test(
            name = name,
            args = [src, "-m", "'not slow'"],
            shard_count = shards.get(name),
            tags = ["once"] if name in once else [],
            **common
        )
        if name in once:
            native.py_test(
                name = name + "_sample",
                args = ["'{}::{}'".format(src, once[name])],  # an error if there is no such test
                **common
            )
