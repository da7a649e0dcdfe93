"""What the doctor says of packages and drivers, and what it tells users to type."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest

import jax_ep
from jax_ep import _compat
from jax_ep.doctor import installation, packages
from site_pages import ROOT

pytestmark = pytest.mark.one_process("looks at one machine, which is not this one")

FITTING = {"jax": "0.11.2", "jaxlib": "0.11.2", "numpy": "2.3.1"}


@pytest.fixture
def installed(monkeypatch):
    """Sets the packages that there are, by name, with their versions."""

    def put(**versions):
        named = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(package):
            if package not in named:
                raise importlib.metadata.PackageNotFoundError(package)
            return named[package]

        monkeypatch.setattr(packages.importlib.metadata, "version", version)

    return put


def test_missing_packages(installed):
    installed(jax="0.11.2", jaxlib="0.11.2", flax="0.12.0")
    found = {finding.name: finding for finding in packages.versions()}
    assert [name for name in found if found[name].status == "ok"] == ["jax", "jaxlib", "flax"]
    assert (found["numpy"].status, found["numpy"].mend) == ("fail", "pip install numpy")
    for name, extra in {
        "jax-cuda13-plugin": "cuda13",
        "nvidia-nvshmem-cu13": "cuda13",
        "typer": "bench",
    }.items():
        assert found[name].status == "note"
        assert found[name].mend.endswith(f"only: pip install 'jax-ep[{extra}]'")


def test_extras_are_those_of_the_package():
    """What the doctor tells users to type installs the package that is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for package, (_, extra) in packages._OPTIONAL.items():
        brings = [re.match(r"[\w-]+(\[\w+\])?", line)[0] for line in extras[extra]]
        assert (package if package != "jax-cuda13-plugin" else "jax[cuda13]") in brings
    oldest = ".".join(map(str, packages.OLDEST_JAX))
    assert {f"jax>={oldest}", f"jaxlib>={oldest}"} <= set(project["dependencies"])


@pytest.mark.parametrize(
    ("versions", "status", "mend"),
    [
        ({}, None, ""),
        ({"jax": "0.9.0"}, "fail", "pip install 'jax>=0.10.2' 'jaxlib>=0.10.2'"),
        ({"jaxlib": "0.10.1"}, "fail", "pip install 'jax>=0.10.2' 'jaxlib>=0.10.2'"),
        ({"jax": "0.12.0.dev1+g123"}, None, ""),
        ({"jax_cuda13_plugin": "0.11.2", "jax_cuda13_pjrt": "0.11.2"}, None, ""),
        ({"jax_cuda13_plugin": "0.11.1"}, "fail", "pip install 'jax[cuda13]==0.11.2'"),
        ({"jax_cuda13_pjrt": "0.12.0"}, "fail", "pip install 'jax[cuda13]==0.11.2'"),
        ({"jax_cuda12_plugin": "0.11.2"}, "note", "pip install 'jax-ep[cuda13]'"),
        ({"jax_cuda12_plugin": "0.11.2", "jax_cuda13_plugin": "0.11.2"}, None, ""),
    ],
)
def test_versions_that_do_not_fit(installed, versions, status, mend):
    installed(**FITTING | versions)
    found = list(packages.compatibility())
    assert [finding.status for finding in found] == ([status] if status else [])
    assert all(mend in finding.mend for finding in found)


@pytest.mark.parametrize(
    ("driver", "platform", "plugin", "environ", "name", "status", "mend"),
    [
        ("580.95.05", "gpu", True, {}, "NVIDIA driver", "ok", ""),
        ("575.57.08", "cpu", True, {}, "NVIDIA driver", "fail", "nvidia-driver-580-server"),
        ("595.10", "cpu", False, {}, "GPUs of JAX", "fail", "pip install 'jax-ep[cuda13]'"),
        ("595.10", "cpu", True, {}, "GPUs of JAX", "fail", "JAX_PLATFORMS=cuda python -c"),
        ("595.10", "cpu", True, {"JAX_PLATFORMS": "cpu"}, "GPUs of JAX", "note", "unset JAX_PLAT"),
    ],
)
def test_gpus_and_their_driver(
    installed, monkeypatch, driver, platform, plugin, environ, name, status, mend
):
    installed(**FITTING | ({"jax_cuda13_plugin": "0.11.2"} if plugin else {}))
    monkeypatch.setattr(packages, "ask_nvidia_smi", lambda *_: f"{driver}\n{driver}\n")
    (found,) = packages.gpus_in_use(platform, environ)
    assert (found.name, found.status) == (name, status) and mend in found.mend


def test_an_old_driver_that_works_all_the_same(installed, monkeypatch):
    """Data centres have packages with which CUDA 13 runs on an older driver."""
    installed(**FITTING)
    monkeypatch.setattr(packages, "ask_nvidia_smi", lambda *_: "570.10\n")
    assert [finding.status for finding in packages.gpus_in_use("gpu", {})] == ["note", "ok"]
    monkeypatch.setattr(packages, "ask_nvidia_smi", lambda *_: "")
    assert list(packages.gpus_in_use("cpu", {})) == []


def test_nvshmem_is_looked_at_where_it_is_installed(installed, monkeypatch):
    monkeypatch.setattr(installation.network, "library", lambda *, has_gpu: iter([has_gpu]))
    monkeypatch.setattr(installation, "ask_nvidia_smi", lambda *_: "GPU 0: NVIDIA H200\n")
    installed(**FITTING)
    assert list(installation._nvshmem()) == []
    installed(nvidia_nvshmem_cu13="3.4.5")
    assert list(installation._nvshmem()) == [True]


def test_the_report_begins_with_versions():
    first, python, *others = installation._versions()
    assert (first.name, first.detail) == ("jax_ep", jax_ep.__version__)
    assert python.name == "python" and {"jax", "flax"} <= {finding.name for finding in others}


def test_jax_that_is_too_old_to_import():
    """The doctor could not start with it."""
    _compat.check_version((0, 10, 2))
    with pytest.raises(ImportError, match=r"got 0\.9\.1; pip install 'jax>=0\.10\.2' 'jaxlib>="):
        _compat.check_version((0, 9, 1))


def test_the_extra_asks_for_an_nvshmem_that_fits():
    """The wheel is built with the oldest that the extra takes; what the library refuses is left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = [p for p in project["optional-dependencies"]["cuda13"] if "nvshmem" in p]
    oldest = re.search(r"^nvshmem=(.*)$", (ROOT / ".ci" / "package").read_text(), re.MULTILINE)[1]
    assert line == f"nvidia-nvshmem-cu13>={oldest},<3.5.19"
    native = (ROOT / "csrc" / "transport" / "network" / "nvshmem.cc").read_text()
    assert re.search(r"\b3, 5, 19\b", native), "the version at which the layout changed is another"
