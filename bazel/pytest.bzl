"""py_tests that run the files of a pytest suite."""

def pytest_tests(srcs, support, data, once, quick, part, optimized, deps):
    """One py_test for each test file, of all its tests that are not marked slow.

    Three more run several files in one process, since Python and JAX take about six seconds to start:
    test_quick, test_optimized and test_samples, in two shards each.

    Args:
        srcs: The test files.
        support: Modules that tests import, and the entry point tests/support/run_pytest.py.
        data: Files that tests read.
        once: Files of which a sample is enough with another version of Python and JAX, by name, with the
            tests of the sample. The file's target is tagged "once", and test_samples runs the samples.
        quick: Files of at most a minute, by name, which test_quick runs. Their own targets are tagged
            "manual", so a pattern such as //... leaves them out.
        part: Files of which a part runs, by name, and the options of pytest with which their targets
            run: those that select some of their tests or make them short.
        optimized: Files that XLA compiles with its defaults, as for users, by name, which test_optimized
            runs. For the others tests/conftest.py has it compile quickly.
        deps: Libraries under test.
    """
    common = dict(
        size = "medium",
        timeout = "long",
        data = data,
        legacy_create_init = False,
        main = "tests/support/run_pytest.py",
        deps = deps,
    )
    as_for_users = {"XLA_FLAGS": "--xla_backend_optimization_level=3"}
    paths = {src.split("/")[-1][:-len(".py")]: src for src in srcs}
    for name, src in paths.items():
        native.py_test(
            name = name,
            srcs = [src] + support,
            args = [src] + part.get(name, ["-m", "'not slow'"]),
            env = as_for_users if name in optimized else {},
            tags = ["once"] if name in once else ["manual"] if name in quick + optimized else [],
            **common
        )
    for name, names in {"test_quick": quick, "test_optimized": optimized}.items():
        native.py_test(
            name = name,
            srcs = [paths[file] for file in names] + support,
            args = [paths[file] for file in names] + ["-m", "'not slow'"],
            env = as_for_users if names == optimized else {},
            shard_count = 2,
            **common
        )
    native.py_test(
        name = "test_samples",
        srcs = [paths[name] for name in once] + support,
        # An error if there is no such test.
        args = ["'{}::{}'".format(paths[name], test) for name in once for test in once[name]],
        shard_count = 2,
        **common
    )
