"""``python -m jax_ep.doctor --network``: what it says of machines and settings that are not these."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import re
import types

import pytest

from jax_ep._core import libraries
from jax_ep._errors import CommunicationError
from jax_ep._groups import network as settings_of_groups
from jax_ep.doctor import __main__ as command
from jax_ep.doctor import finding, memory, network, nics, settings
from jax_ep.doctor.finding import Finding

pytestmark = pytest.mark.one_process("looks at files")

LISTING = "0, 00000000:1A:00.0\n1, 00000000:9B:00.0\n"
ROOT = "pci0000:17/0000:17:01.0"


def put(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


class Sys:
    """A tree like /sys, with the devices that a test puts there."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root

    def device(self, address: str, way: str, numa_node: int) -> pathlib.Path:
        """A PCI device behind the bridges ``way``."""
        path = self.root / "devices" / way / address
        put(path / "numa_node", str(numa_node))
        link = self.root / "bus" / "pci" / "devices" / address
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        return path

    def nic(self, name, address, way, numa_node, *, layer="InfiniBand", state="4: ACTIVE", gids=()):
        path = self.device(address, way, numa_node) / "infiniband" / name
        port = path / "ports" / "1"
        put(port / "link_layer", layer)
        put(port / "rate", "400 Gb/sec (4X NDR)")
        put(port / "state", state)
        put(port / "gids" / "0", "0000:0000:0000:0000:0000:0000:0000:0000")
        for index, kind in gids:
            put(port / "gids" / str(index), "fe80:0000:0000:0000:0000:0000:0000:0001")
            put(port / "gid_attrs" / "types" / str(index), kind)
        (path / "device").symlink_to(path.parents[1])
        link = self.root / "class" / "infiniband" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)

    def gpus(self) -> None:
        """Two, on a CPU each; the first is behind the switch 0000:18:00.0."""
        self.device("0000:1a:00.0", f"{ROOT}/0000:18:00.0/0000:19:00.0", 0)
        self.device("0000:9b:00.0", "pci0000:97/0000:97:01.0", 1)


@pytest.fixture
def sys(tmp_path) -> Sys:
    return Sys(tmp_path)


def by_name(findings) -> dict[str, Finding]:
    return {found.name: found for found in findings}


def test_adapters_of_gpus(sys):
    """The nearest is behind the same switch, or else on the same CPU, or else it is across."""
    sys.gpus()
    sys.nic("mlx5_10", "0000:1b:00.0", f"{ROOT}/0000:18:00.0/0000:19:01.0", 0)
    sys.nic("mlx5_2", "0000:1c:00.0", ROOT, 0)
    adapters, gpus = nics.nics(sys.root), nics.gpus(LISTING, sys.root)
    assert [nic.name for nic in adapters] == ["mlx5_2", "mlx5_10"]
    assert [gpu.place.numa_node for gpu in gpus] == [0, 1]
    port = by_name(network._adapters(adapters, {}))["mlx5_10 port 1"]
    assert port.status == "ok"
    assert port.detail == ("InfiniBand, 400 Gb/sec (4X NDR), ACTIVE, PCI 0000:1b:00.0, NUMA node 0")
    found = by_name(network._nearest(gpus, adapters))
    assert found["adapter of GPU 0"].status == "ok"
    assert found["adapter of GPU 0"].detail.startswith("mlx5_10, behind 2 common PCI bridge(s)")
    assert found["adapter of GPU 1"].status == "note"
    assert found["adapter of GPU 1"].detail.startswith("mlx5_2, mlx5_10, across NUMA nodes")
    assert "adapters of GPUs" not in found

    sys.nic("mlx5_3", "0000:9c:00.0", "pci0000:98/0000:98:01.0", 1)
    found = by_name(network._nearest(gpus, nics.nics(sys.root)))
    assert found["adapter of GPU 1"].status == "ok"
    assert found["adapter of GPU 1"].detail.startswith("mlx5_3, of the same NUMA node")


def test_adapters_without_a_link(sys):
    sys.gpus()
    sys.nic("mlx5_0", "0000:1b:00.0", ROOT, 0, state="1: DOWN")
    sys.nic("mlx5_1", "0000:1c:00.0", ROOT, 0)
    adapters, gpus = nics.nics(sys.root), nics.gpus(LISTING, sys.root)
    found = by_name(network._adapters(adapters, {}))
    assert found["mlx5_0 port 1"].status == "note" and found["mlx5_1 port 1"].status == "ok"
    assert "network adapters" not in found
    found = by_name(network._nearest(gpus, adapters))
    assert found["adapter of GPU 0"].detail.startswith("mlx5_1,")
    assert found["adapters of GPUs"].detail.startswith("2 GPUs share 1 active adapter(s)")
    found = by_name(network._adapters(adapters[:1], {}))
    assert found["network adapters"].status == "fail"
    assert list(network._nearest(gpus, adapters[:1])) == []


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, "fail"),
        ({"NVSHMEM_REMOTE_TRANSPORT": "ibrc"}, "fail"),
        ({"NVSHMEM_REMOTE_TRANSPORT": "none"}, "note"),
        ({"NVSHMEM_REMOTE_TRANSPORT": "libfabric"}, "note"),
    ],
)
def test_no_adapters(sys, environ, status):
    [found] = network._adapters(nics.nics(sys.root), environ)
    assert found.status == status


def test_adapters_of_several_kinds(sys):
    sys.nic("mlx5_0", "0000:1b:00.0", ROOT, 0)
    sys.nic("mlx5_1", "0000:1c:00.0", ROOT, 0, layer="Ethernet", gids=[(3, "RoCE v2")])
    adapters = nics.nics(sys.root)
    found = by_name(network._adapters(adapters, {}))["network adapters"]
    assert found.status == "note" and "Ethernet, InfiniBand" in found.detail
    assert "NVSHMEM_HCA_LIST" in found.mend
    assert "network adapters" not in by_name(
        network._adapters(adapters, {"NVSHMEM_HCA_LIST": "mlx5_0:1"})
    )


@pytest.fixture
def machine(sys) -> settings.Machine:
    sys.nic(
        "mlx5_0",
        "0000:1b:00.0",
        ROOT,
        0,
        layer="Ethernet",
        gids=[(1, "IB/RoCE v1"), (3, "RoCE v2")],
    )
    return settings.Machine(nics.nics(sys.root), ["eth0", "ib0", "lo"])


def examine(machine, environ, *, mps_runs=False, folder=None) -> dict[str, Finding]:
    """Findings by name; of several of a name the last, which is of several variables."""
    found = settings.findings(machine, mps_runs=mps_runs, environ=environ, folder=folder)
    return by_name(found)


@pytest.mark.parametrize(
    ("name", "good", "bad", "text"),
    [
        ("JAX_EP_NETWORK_BYTES", "1048576", "1G", "expected a number, got '1G'"),
        ("JAX_EP_NETWORK_BYTES", "", "0", "expected at least 1, got 0"),
        ("JAX_EP_NETWORK_CHUNK_BYTES", "65536", "65537", "expected a multiple of 1024"),
        ("JAX_EP_NETWORK_CHUNK_BYTES", "8192", "7168", "of at least 8192, got 7168"),
        ("JAX_EP_NETWORK_LANES", "0", "-1", "expected a number, got '-1'"),
        ("JAX_EP_NETWORK_CHOICES", "1", "²", "expected a number, got '²'"),
        ("NVSHMEM_REMOTE_TRANSPORT", "ibrc", "verbs", "expected one of ibrc, ibdevx"),
        ("NVSHMEM_HCA_LIST", "mlx5_0:1", "mlx5_1:1", "there is no mlx5_1 here, but mlx5_0"),
        ("NVSHMEM_HCA_LIST", "^mlx5_0", "mlx5_0:0", "got the entry 'mlx5_0:0'"),
        ("NVSHMEM_HCA_PE_MAPPING", "mlx5_0:1:2", "mlx5_0:1", "expected NAME:PORT:RANKS"),
        ("NVSHMEM_IB_SL", "15", "16", "expected a number from 0 to 15"),
        ("NVSHMEM_IB_TRAFFIC_CLASS", "106", "256", "expected a number from 0 to 255"),
        ("NVSHMEM_IB_GID_INDEX", "3", "0", "no address of that index, but 1 (IB/RoCE v1), 3 (RoCE"),
        ("NVSHMEM_IB_ENABLE_IBGDA", "1", "2", "expected 0 or 1"),
        ("NVSHMEM_SYMMETRIC_SIZE", "2.5g", "2.5x", "expected a size"),
        ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "eth", "bond", "no interface is left of eth0, ib0, lo"),
        ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "^lo", "=eth", "no interface is left"),
        ("NVSHMEM_DEBUG", "INFO", "LOUD", "expected one of VERSION"),
        ("NVSHMEM_DEBUG_SUBSYS", "INIT,TRANSPORT", "INIT,NET", "expected some of INIT"),
        ("NVSHMEM_IBGDA_NIC_HANDLER", "auto", "nic", "expected one of auto, gpu, cpu"),
    ],
)  # fmt: skip
def test_values(machine, name, good, bad, text):
    environ = {"NVSHMEM_ENABLE_NIC_PE_MAPPING": "1"}
    assert examine(machine, environ | {name: good})[name].status == "ok"
    found = examine(machine, environ | {name: bad})[name]
    assert found.status == "fail" and text in found.detail and found.mend


def test_names(machine, tmp_path):
    """Names that jax_ep knows nothing of are looked up in NVSHMEM's libraries."""
    put(tmp_path / "lib" / "libnvshmem_host.so.3", "code\0QP_DEPTH\0code")
    (tmp_path / "lib" / "empty.so.3").touch()
    environ = {"NVSHMEM_QP_DEPTH": "1024", "NVSHMEM_DEPTH": "1", "JAX_EP_NETWORK_SIZE": "1"}
    found = examine(machine, environ, folder=tmp_path)
    assert found["NVSHMEM_QP_DEPTH"].status == "ok"
    assert found["NVSHMEM_DEPTH"].status == "note"
    assert "has no such variable" in found["NVSHMEM_DEPTH"].detail
    assert found["JAX_EP_NETWORK_SIZE"].status == "fail"
    assert "JAX_EP_NETWORK_CHUNK_BYTES" in found["JAX_EP_NETWORK_SIZE"].mend
    assert "not checked" in examine(machine, environ)["NVSHMEM_QP_DEPTH"].detail


@pytest.mark.parametrize(
    ("environ", "name", "text"),
    [
        ({"NVSHMEM_HCA_LIST": "mlx5_0:1", "NVSHMEM_HCA_PE_MAPPING": "mlx5_0:1:1"},
         "NVSHMEM_HCA_PE_MAPPING", "NVSHMEM ignores it"),
        ({"NVSHMEM_HCA_PE_MAPPING": "mlx5_0:1:1"},
         "NVSHMEM_HCA_PE_MAPPING", "without NVSHMEM_ENABLE_NIC_PE_MAPPING=1"),
        ({"NVSHMEM_DISABLE_P2P": "true"}, "NVSHMEM_DISABLE_P2P", "read each other's memory"),
        ({"NVSHMEM_IB_ENABLE_RELAXED_ORDERING": "1"},
         "NVSHMEM_IB_ENABLE_RELAXED_ORDERING", "overtake its data"),
        ({"NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"},
         "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "do not find this one"),
        ({"NVSHMEM_SYMMETRIC_SIZE": "1M"}, "NVSHMEM_SYMMETRIC_SIZE", "less than the 2147483648 bytes"),
        ({"NVSHMEM_DISABLE_NVLS": "0"}, "NVSHMEM_DISABLE_NVLS", "does not use"),
    ],
)  # fmt: skip
def test_values_together(machine, environ, name, text):
    found = examine(machine, environ)[name]
    assert found.status != "ok" and text in found.detail and found.mend


def test_nothing_to_say(machine):
    environ = {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_SYMMETRIC_SIZE": "2G", "PATH": "/bin"}
    assert {found.status for found in examine(machine, environ).values()} == {"ok"}


def test_multi_process_service(machine, tmp_path):
    name = "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    assert not network.mps_runs({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
    (tmp_path / "control").touch()
    assert network.mps_runs({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
    assert examine(machine, {}, mps_runs=True)[name].status == "note"
    assert examine(machine, {name: "1"}, mps_runs=True)[name].status == "ok"
    assert name not in examine(machine, {})


def test_drivers(sys):
    def look(parameters="", **environ):
        return by_name(network._drivers(sys.root, environ, parameters))

    assert look()["GPUDirect RDMA"].status == "note"
    assert look(NVSHMEM_IB_DISABLE_DMABUF="1")["GPUDirect RDMA"].status == "fail"
    (sys.root / "module" / "nvidia_peermem").mkdir(parents=True)
    assert look(NVSHMEM_IB_DISABLE_DMABUF="1")["GPUDirect RDMA"].status == "ok"
    assert look()["IBGDA"].detail.startswith("off")
    assert look(NVSHMEM_IB_ENABLE_IBGDA="1")["IBGDA"].status == "note"
    parameters = 'RegistryDwords: "PeerMappingOverride=1;"\n'
    assert look(parameters, NVSHMEM_IB_ENABLE_IBGDA="1")["IBGDA"].status == "ok"


def put_library(monkeypatch, *, installed: str | None, built=(3, 4, 5)) -> None:
    """A library that knows versions, and a wheel of a version."""

    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    def version_obstacle(built, found):
        return None if found >= built else f"{found} is older than {built}"

    library = types.SimpleNamespace(
        build_info=lambda: {"nvshmem": built}, version_obstacle=version_obstacle
    )
    monkeypatch.setattr(network.importlib.metadata, "version", version)
    monkeypatch.setattr(network.importlib, "import_module", lambda name: library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if built is None else name)
    monkeypatch.setattr(libraries, "nvshmem_folder", lambda: "/nvshmem")


def test_library(monkeypatch):
    why = {"nvshmem": None}
    monkeypatch.setattr(libraries, "why_unavailable", why.get)
    put_library(monkeypatch, installed="3.4.5")
    wheel, library = network.library(has_gpu=True)
    assert (wheel.status, wheel.detail) == ("ok", "3.4.5, in /nvshmem")
    assert (library.status, library.detail) == ("ok", "built with NVSHMEM 3.4.5; loaded")
    why["nvshmem"] = "NVSHMEM did not load"
    assert [found.status for found in network.library(has_gpu=True)] == ["ok", "fail"]
    _, library = network.library(has_gpu=False)
    assert library.status == "ok" and "not loaded, as there is no GPU" in library.detail
    put_library(monkeypatch, installed="3.3.20")
    _, library = network.library(has_gpu=False)
    assert library.status == "fail" and "(3, 3, 20) is older" in library.detail


@pytest.mark.parametrize(("has_gpu", "status"), [(True, "fail"), (False, "note")])
def test_no_library(monkeypatch, has_gpu, status):
    put_library(monkeypatch, installed=None, built=None)
    wheel, library = network.library(has_gpu=has_gpu)
    assert wheel.status == library.status == status
    assert "pip install 'jax-ep[cuda13]'" in wheel.mend


def test_room_for_a_group(monkeypatch):
    for name in settings_of_groups.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    found = network._memory(8, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"})
    assert found.status == "ok" and "takes 642 MiB" in found.detail and "is .6" in found.detail
    monkeypatch.setenv("JAX_EP_NETWORK_BYTES", "1000000")
    found = network._memory(8, {})
    assert found.status == "fail"
    assert found.mend == "set JAX_EP_NETWORK_BYTES to 673275904 or more"
    monkeypatch.setenv("JAX_EP_NETWORK_BYTES", "much")
    assert network._memory(8, {}).status == "fail"


@pytest.mark.parametrize(("hosts", "ranks"), [(2, 1), (3, 2), (8, 8), (64, 8)])
def test_memory_is_what_the_library_counts(hosts, ranks):
    library = pytest.importorskip(
        "jax_ep._nvshmem", reason="jax_ep was built without NVSHMEM", exc_type=ImportError
    )
    assert library.limits()["chunk_slots"] == memory.CHUNK_SLOTS
    for lanes, chunk, message in ((1, 8192, 128), (7, 131072, 262144)):
        used = settings_of_groups.Settings(lanes, chunk, message)
        counted = library.network_bytes(hosts, ranks, lanes, chunk, message)
        assert memory.network_bytes(used, hosts, ranks) == counted


def test_group_settings_are_checked_alike(monkeypatch):
    """What the doctor refuses, ``create_group`` refuses by the same text."""
    monkeypatch.setenv("JAX_EP_NETWORK_CHUNK_BYTES", "1000")
    with pytest.raises(CommunicationError, match="CHUNK_BYTES: expected a multiple of 1024"):
        settings_of_groups.settings_for(2)


def test_everything_on_a_machine(sys, monkeypatch):
    """All parts, in order; one that raises does not keep the others from being seen."""
    sys.gpus()
    sys.nic("mlx5_0", "0000:1b:00.0", ROOT, 0)
    monkeypatch.setattr(network, "ask_nvidia_smi", lambda *arguments: LISTING)

    def broken(*, has_gpu):
        raise OSError("no such library")
        yield

    monkeypatch.setattr(network, "library", broken)
    found = by_name(network.findings(sys.root))
    assert found["nvshmem"] == Finding(
        "fail", "nvshmem", "OSError: no such library", "see the error"
    )
    assert {"mlx5_0 port 1", "adapter of GPU 1", "GPUDirect RDMA", "network memory"} <= set(found)


def test_report(capsys, monkeypatch):
    findings = [Finding("ok", "a", "fine"), Finding("note", "long name", "so so", "try b")]
    monkeypatch.setattr(network, "findings", lambda: iter(findings))
    assert command.main(["--network"]) == 0
    out = capsys.readouterr().out
    assert "note  long name  so so\n                 -> try b\n" in out
    assert "Nothing to mend here" in out
    findings.append(Finding("fail", "c", "broken"))
    assert command.main(["--network"]) == 1
    assert "1 thing(s) to mend." in capsys.readouterr().out
    assert command.main(["--network", "--json"]) == 1
    assert '"name": "long name"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--num-processes 2", "add --network"),
        ("--network --num-processes 2", "takes all of --coordinator, --num-processes and"),
        ("--network --coordinator h --num-processes 2 --process-id 0", "expected HOST:PORT"),
        ("--network --coordinator h:1 --num-processes 2 --process-id 2", "expected 0 to 1"),
        ("--network --ranks-per-host 2", "add --coordinator"),
        ("--network --seconds 0", "expected more than 0, got 0"),
    ],
)
def test_command_lines_that_do_not_fit(arguments, text, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments.split())
    assert text in capsys.readouterr().err


def test_errors_become_findings():
    def _good_look():
        yield Finding("ok", "a", "b")

    def _bad_look():
        yield Finding("ok", "c", "d")
        raise ValueError("e")

    found = list(finding.of(_bad_look, _good_look))
    assert [f.name for f in found] == ["c", "bad look", "a"]
    assert found[1].detail == "ValueError: e"


@pytest.fixture(scope="module")
def render_network():
    path = pathlib.Path(__file__).parents[1] / "docs" / "render_network.py"
    spec = importlib.util.spec_from_file_location("render_network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current(render_network, monkeypatch):
    """Its table, whatever the environment says; and its variables with their defaults."""
    monkeypatch.setenv("JAX_EP_NETWORK_CHUNK_BYTES", "8192")
    page = render_network.PAGE.read_text()
    assert render_network.render(page) == page, "run python docs/render_network.py"
    for name, default in settings_of_groups.DEFAULTS.items():
        assert f"| `{name}` | {default}" in page
    with pytest.raises(ValueError, match="one block of memory, got 0"):
        render_network.render(page.replace("<!-- memory", "<!-- memories"))


def test_the_page_names_variables_that_nvshmem_has(render_network):
    """Those that the doctor checks, or that it finds in the libraries of NVSHMEM 3.4.5."""
    named = set(re.findall(r"NVSHMEM_[A-Z0-9_]+", render_network.PAGE.read_text()))
    known = set(settings.CHECKS) | {
        "NVSHMEM_HOME",  # of our build
        "NVSHMEM_IB_ADDR_FAMILY",
        "NVSHMEM_IB_ADDR_RANGE",
        "NVSHMEM_IB_ROCE_VERSION_NUM",
    }
    assert named <= known
    assert set(settings.CHECKS) - named <= {"NVSHMEM_BOOTSTRAP_UID_SOCK_FAMILY"}
    folder = libraries.nvshmem_folder()
    if folder is None:
        pytest.skip("the names are compared, but not with NVSHMEM's libraries: it is not installed")
    assert [n for n in known - {"NVSHMEM_HOME"} if not settings._is_in_libraries(n, folder)] == []


@pytest.mark.parametrize(("has_gpu", "status"), [(True, "fail"), (False, "note")])
def test_library_that_does_not_load(monkeypatch, has_gpu, status):
    """As from a wheel of jax_ep that was installed without the extra."""
    put_library(monkeypatch, installed=None)

    def load(name):
        raise ImportError("libnvshmem_host.so.3: cannot open shared object file")

    monkeypatch.setattr(network.importlib, "import_module", load)
    wheel, library = network.library(has_gpu=has_gpu)
    assert wheel.status == library.status == status
    assert "pip install 'jax-ep[cuda13]'" in wheel.mend and "cannot open" in library.detail
