"""The runner of logical hosts, without GPUs: options, variables, and which groups span hosts."""

from __future__ import annotations

import os
import pathlib
import re
import stat
import types

import numpy as np
import pytest

import logical_hosts
import run_hosts
from spmd import make_group, ranks_at_most, run_python

pytestmark = pytest.mark.one_process("starts processes itself")
RUNNER = pathlib.Path(run_hosts.__file__)
LATE = run_hosts.Late(pathlib.Path("/built/plugin.so"), 250, 7, pathlib.Path("/counts"))


def test_options():
    options = run_hosts.parse(
        ["2x4", "--late", "--delay-us", "300", "--seed", "0", "-q", "-k", "a or b", "tests/t.py::x"]
    )
    assert (options.hosts, options.ranks, options.late) == (2, 4, True)
    assert (options.delay_us, options.seed, options.counts) == (300, 0, None)
    assert options.pytest == ["-q", "-k", "a or b", "tests/t.py::x"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["4"], "argument HOSTSxRANKS: expected two hosts or more .*such as 2x4, got 4"),
        (["1x4"], "argument HOSTSxRANKS: expected two hosts or more .*got 1x4"),
        (["2x0"], "argument HOSTSxRANKS: expected two hosts or more .*got 2x0"),
        (["2x2x2"], "argument HOSTSxRANKS: expected two hosts or more .*got 2x2x2"),
        (["2x2", "--seed", "3"], "argument --seed: is an option of the late network; add --late"),
        (["2x2", "--delay-us", "0"], "argument --delay-us: is an option of the late network"),
        (["2x2", "--counts", "out"], "argument --counts: is an option of the late network"),
        (["2x2", "--late", "--delay-us", "-1"], "argument --delay-us: expected 0 or more, got -1"),
        (["2x2", "--late", "--platform-cpu"], "argument --late: needs GPUs"),
    ],
)
def test_wrong_options(arguments, text, monkeypatch, capsys):
    if "--platform-cpu" in arguments:
        monkeypatch.setenv("JAX_EP_TEST_PLATFORM", "cpu")
    else:
        monkeypatch.delenv("JAX_EP_TEST_PLATFORM", raising=False)
    with pytest.raises(SystemExit):
        run_hosts.parse(arguments)
    assert re.search(text, capsys.readouterr().err)


def test_variables_without_a_network():
    """All is reached by loads and stores, and only the tests know of hosts."""
    found = run_hosts.common({"PATH": "/bin", "LD_PRELOAD": "nccl.so"}, 3, None)
    assert found == {
        "PATH": "/bin",
        "LD_PRELOAD": "nccl.so",
        "JAX_EP_NETWORK_CHUNK_BYTES": "65536",
        "JAX_EP_NETWORK_LANES": "3",
        "JAX_EP_NETWORK_BYTES": "1073741824",
        "JAX_EP_TEST_PLATFORM": "cuda",
        "JAX_EP_TEST_RANKS_PER_HOST": "3",
        "NVSHMEM_REMOTE_TRANSPORT": "none",
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
        "NVSHMEM_DISABLE_NVLS": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NVSHMEM_DISABLE_NCCL": "1",
        "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "1",
    }
    assert run_hosts.of_process(5, 3, None) == {}


def test_variables_of_the_late_network():
    """The plug-in comes first and its wrapper is found first; each process knows its host."""
    plain = {"PATH": "/bin", "LD_PRELOAD": "nccl.so"}
    more = dict(
        set(run_hosts.common(plain, 3, LATE).items())
        - set(run_hosts.common(plain, 3, None).items())
    )
    wrappers = RUNNER.parent / "cuda" / "late_network" / "bin"
    assert more == {
        "PATH": f"{wrappers}:/bin",
        "LD_PRELOAD": "/built/plugin.so nccl.so",
        "NVSHMEM_REMOTE_TRANSPORT": "ibrc",
        "JAX_EP_LATE_DELAY_US": "250",
        "JAX_EP_LATE_SEED": "7",
        "JAX_EP_LATE_COUNTS": "/counts",
    }
    assert (wrappers / "nvidia-cuda-mps-control").stat().st_mode & stat.S_IXUSR
    hosts = [run_hosts.of_process(index, 3, LATE)["JAX_EP_LATE_HOST"] for index in range(6)]
    assert hosts == ["host0"] * 3 + ["host1"] * 3


def test_variables_of_faults_stay():
    """Those that the runner has no option for."""
    found = run_hosts.common({"JAX_EP_LATE_DROP_SIGNAL": "1:9"}, 2, LATE)
    assert found["JAX_EP_LATE_DROP_SIGNAL"] == "1:9"


@pytest.fixture
def started(monkeypatch):
    """What the runner would start on one GPU: the number of processes and the environment of each."""
    seen = types.SimpleNamespace(services=0)

    class Service:
        def __enter__(self):
            seen.services += 1
            return {"CUDA_MPS_PIPE_DIRECTORY": "/pipe"}

        def __exit__(self, *_):
            pass

    def run(count, arguments, *, environment, variables, **options):
        seen.arguments, seen.options = arguments, options
        seen.environments = [environment | variables(index) for index in range(count)]
        return 5

    monkeypatch.delenv("JAX_EP_TEST_PLATFORM", raising=False)
    monkeypatch.setattr(run_hosts.mps, "multi_process_service", Service)
    monkeypatch.setattr(run_hosts.run_processes, "run", run)
    monkeypatch.setattr(run_hosts, "build", lambda: LATE.plugin)
    return seen


@pytest.mark.parametrize(("gpus", "services"), [(1, 1), (4, 0)])
def test_processes(gpus, services, started, monkeypatch, tmp_path):
    """MPS runs where ranks share a GPU; the folder of counts is there, whatever the directory."""
    monkeypatch.setattr(run_hosts.machine, "count_gpus", lambda: gpus)
    monkeypatch.chdir(tmp_path)
    status = run_hosts.main(["2x2", "--late", "--counts", "a/b", "--timeout", "9", "-q"])
    assert (status, started.services, started.arguments) == (5, services, ["-q"])
    assert started.options == {"timeout": 9, "grace": 20, "follow": False}
    assert (tmp_path / "a" / "b").is_dir()
    assert len(started.environments) == 4
    for index, found in enumerate(started.environments):
        assert found["JAX_EP_LATE_COUNTS"] == str(tmp_path / "a" / "b")
        assert found["JAX_EP_LATE_HOST"] == f"host{index // 2}"
        assert (found["JAX_EP_LATE_DELAY_US"], found["JAX_EP_LATE_SEED"]) == ("0", "1")
        assert ("CUDA_MPS_PIPE_DIRECTORY" in found) == bool(services)


def test_few_and_small_chunks(started, monkeypatch):
    """All processes get the settings that were asked for, and the usual ones otherwise."""
    monkeypatch.setattr(run_hosts.machine, "count_gpus", lambda: 1)
    names = ("JAX_EP_NETWORK_CHUNK_BYTES", "JAX_EP_NETWORK_LANES")
    for options, expected in (
        (["--chunk-bytes", "8192", "--lanes", "1"], ["8192", "1"]),
        (["--lanes", "2"], ["65536", "2"]),
        ([], ["65536", "3"]),
    ):
        run_hosts.main(["2x1", *options, "-q"])
        assert started.arguments == ["-q"]
        for found in started.environments:
            assert [found[name] for name in names] == expected


def test_build_when_needed(monkeypatch, tmp_path):
    """Once, and again after a source has changed; what the compiler says is in the error."""
    network = tmp_path / "network"
    network.mkdir()
    script = network / "build.sh"
    script.write_text('#!/bin/sh\necho one >> "$0.log"\ntouch "$1/plugin.so"\n')
    script.chmod(0o755)
    plugin = tmp_path / "out" / "plugin.so"
    plugin.parent.mkdir()
    monkeypatch.setattr(run_hosts, "NETWORK", network)
    log = tmp_path / "network" / "build.sh.log"

    def builds() -> int:
        run_hosts.build(plugin)
        count = len(log.read_text().splitlines())
        os.utime(log, (0, 0))
        return count

    os.utime(script, (1000, 1000))
    assert (builds(), builds()) == (1, 1)
    later = plugin.stat().st_mtime + 10
    os.utime(script, (later, later))
    assert builds() == 2
    script.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    os.utime(script, (later, later))
    with pytest.raises(RuntimeError, match=r"build\.sh failed:\nbroken"):
        run_hosts.build(plugin)


# Which groups span hosts -----------------------------------------------------------------------------


def mesh_of(processes, names):
    """What a mesh has whose devices belong to these processes."""
    devices = np.vectorize(lambda i: types.SimpleNamespace(process_index=i), otypes=[object])
    return types.SimpleNamespace(devices=devices(np.array(processes)), axis_names=names)


@pytest.mark.parametrize(
    ("processes", "names", "axes", "expected"),
    [
        ([0, 1, 2, 3], ("expert",), "expert", 2),
        ([0, 1], ("expert",), "expert", None),
        ([3, 2, 1, 0], ("expert",), "expert", 2),
        ([0, 2, 4], ("expert",), "expert", 1),
        ([[0, 1], [2, 3]], ("data", "expert"), "expert", None),
        ([[0, 1], [2, 3]], ("data", "expert"), "data", 1),
        ([[0, 1], [2, 3]], ("data", "expert"), ("data", "expert"), 2),
        ([[0, 1], [2, 3]], ("data", "expert"), ("expert", "data"), "may not differ|each host"),
        ([0, 1, 2], ("expert",), "expert", "as many ranks on each host"),
        ([0, 2, 1, 3], ("expert",), "expert", "one after the other"),
        ([[0, 1], [1, 2]], ("data", "expert"), "expert", "may not differ"),
        ([0, 1, 2, 3], ("expert",), "unknown", None),
    ],
)
def test_groups(processes, names, axes, expected, monkeypatch):
    """On hosts of two processes."""
    monkeypatch.setattr(logical_hosts, "PROCESSES", 2)
    mesh = mesh_of(processes, names)
    if isinstance(expected, str):
        with pytest.raises(pytest.skip.Exception, match=expected):
            logical_hosts.of_group(mesh, axes)
        return
    assert logical_hosts.of_group(mesh, axes) == expected
    found = {"ranks_per_host": expected} if expected else {}
    assert logical_hosts.arguments(mesh, axes, "reference") == found
    native = found | ({"transport": "nvshmem"} if expected else {})
    assert logical_hosts.arguments(mesh, axes, "cuda") == native


def test_first_ranks(monkeypatch):
    monkeypatch.setattr(logical_hosts, "PROCESSES", 2)
    assert [logical_hosts.of_first(ranks) for ranks in (1, 2, 4, 6)] == [None, None, 2, 2]
    with pytest.raises(pytest.skip.Exception, match="as many ranks on each host"):
        logical_hosts.of_first(3)


def test_without_hosts(monkeypatch):
    monkeypatch.setattr(logical_hosts, "PROCESSES", 0)
    assert logical_hosts.of_first(3) is None
    assert logical_hosts.arguments(mesh_of([0, 1, 2], ("expert",)), "expert", "cuda") == {}


def test_suite_makes_groups_that_span_hosts(monkeypatch):
    """Unless the test itself says how many ranks a host has."""
    monkeypatch.setattr(logical_hosts, "PROCESSES", 2)
    monkeypatch.setattr(logical_hosts, "of_group", lambda mesh, axes: 2)
    ranks = ranks_at_most(4)
    groups = [make_group(ranks, "reference"), make_group(ranks, "reference", ranks_per_host=1)]
    assert [group.topology.ranks_per_host for group in groups] == [2, 1]


SUITE = """
import os

def test_variables():
    found = os.environ
    assert found["JAX_EP_TEST_RANKS_PER_HOST"] == "2" and found["JAX_EP_TEST_PROCESSES"] == "4"
    assert not [name for name in found if name.startswith(("NVSHMEM", "JAX_EP_LATE"))]
    print("process", found["JAX_EP_TEST_PROCESS"])
"""


def test_on_cpu(tmp_path):
    """Four processes of pytest, for which the runner needs no GPU."""
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run_python(
        str(RUNNER),
        *("2x2", "--timeout", "100", "-q", "-rP", "-c", f"{tmp_path}/pytest.ini", str(tmp_path)),
        timeout=120,
        JAX_EP_TEST_PLATFORM="cpu",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"process {index}" in done.stdout for index in range(4)] == [True] * 4
    assert "4 processes: all passed" in done.stdout
