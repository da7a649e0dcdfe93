"""NVSHMEM that is missing, or of a version that does not fit, is a reason that says what to install."""

from __future__ import annotations

import importlib.util
import re
import types

import numpy as np
import pytest

import jax_ep
from jax_ep._core import libraries
from jax_ep._groups import create, network, places
from jax_ep._groups.topology import Topology

pytestmark = pytest.mark.one_process("looks at this process alone")


@pytest.fixture
def found(monkeypatch):
    """What ``find_spec`` finds, by name; anything else as it is."""
    specs: dict[str, object] = {}
    real = importlib.util.find_spec

    def find_spec(name, *arguments):
        spec = specs.get(name, real)
        if isinstance(spec, Exception):
            raise spec
        return real(name, *arguments) if spec is real else spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return specs


HERE = types.SimpleNamespace(submodule_search_locations=None)


def test_build_without_nvshmem(found):
    found["jax_ep._nvshmem"] = None
    reason = libraries._load_nvshmem()
    assert reason is not None and reason.startswith("jax_ep was built without NVSHMEM; pip install")
    assert "--no-build-isolation" in reason and "NVSHMEM_HOME" in reason


@pytest.mark.parametrize(
    "wheel",
    [ModuleNotFoundError("No module named 'nvidia'"), None],
    ids=["no package nvidia", "no wheel"],
)
def test_missing_wheel(found, wheel, monkeypatch):
    """Without the wheel the system's library is tried, and the reason names the wheel."""
    found |= {"jax_ep._nvshmem": HERE, "nvidia.nvshmem": wheel}
    monkeypatch.setattr(libraries, "_NVSHMEM", "libnvshmem_of_no_wheel.so.3")
    assert libraries.nvshmem_folder() is None
    reason = libraries._load_nvshmem()
    assert reason is not None
    assert reason.startswith("NVSHMEM did not load (libnvshmem_of_no_wheel.so.3: cannot open")
    assert reason.endswith("; pip install 'jax-ep[cuda13]'")


def test_wheel_without_its_library(found, tmp_path):
    found |= {
        "jax_ep._nvshmem": HERE,
        "nvidia.nvshmem": types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
    }
    reason = libraries._load_nvshmem()
    assert reason is not None and f"{tmp_path}/lib/libnvshmem_host.so.3" in reason


def test_version_that_does_not_fit(monkeypatch):
    """The library of the build says so, before anything of it is registered."""
    said = "NVSHMEM 3.8.0 is installed, and jax_ep was built with 3.4.5, whose device code"
    version = jax_ep.__version__
    fits = {((3, 4, 5), (3, 8, 0)): said}
    native = types.SimpleNamespace(
        build_info=lambda: {"version": version, "nvshmem": (3, 4, 5)},
        loaded_version=lambda: (3, 8, 0),
        version_obstacle=lambda built, loaded: fits[built, loaded],
    )
    cuda = types.SimpleNamespace(registry=lambda: pytest.fail("taken although it does not fit"))
    modules = {"jax_ep._nvshmem": native, "jax_ep._cuda": cuda}
    monkeypatch.setattr(libraries.importlib, "import_module", lambda name: modules[name])
    monkeypatch.setattr(libraries, "_load_nvshmem", lambda: None)
    ask = libraries.why_unavailable.__wrapped__
    monkeypatch.setattr(libraries, "why_unavailable", lambda backend, **_: None)
    assert ask("nvshmem") == said


WHY = "in process 1 NVSHMEM did not load (no file); pip install nvidia-nvshmem-cu13"
TWO_HOSTS = Topology(hosts=((0,), (1,)), processes=((0, 1),))


@pytest.fixture
def obstacle(monkeypatch):
    """GPUs of two hosts, on which NVSHMEM has this obstacle."""
    monkeypatch.setattr(network, "obstacle", lambda processes, num_hosts: WHY)
    monkeypatch.setattr(create, "_warned", set())

    def choose(instances, ranks_per_host, backend, transport, absent):
        return "reference", TWO_HOSTS, places._why_no_transport(TWO_HOSTS, transport)

    monkeypatch.setattr(create, "_choose", choose)


def test_group_that_asks_for_nvshmem_raises(obstacle):
    text = (
        f"argument transport: .*, got 'nvshmem', but the group spans 2 hosts, and {re.escape(WHY)}"
    )
    with pytest.raises(ValueError, match=text):
        create._resolve(np.array([[None, None]]), None, "auto", "nvshmem")


def test_group_that_asks_for_nothing_takes_the_reference(obstacle, caplog):
    backend, _ = create._resolve(np.array([[None, None]]), None, "auto", "auto")
    assert backend == "reference"
    (record,) = caplog.records
    assert WHY in record.getMessage()
