"""What groups that span hosts need of this machine, as far as one process can see it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jax_ep._core import libraries
from jax_ep._errors import CommunicationError
from jax_ep._groups import network
from jax_ep.doctor import finding, memory, nics, settings
from jax_ep.doctor.finding import Finding, ask_nvidia_smi
from jax_ep.doctor.nics import Gpu, Nic

_WHEEL = "nvidia-nvshmem-cu13"
_WITHOUT_NICS = ("none", "ucx", "libfabric")  # transports that may do without RDMA adapters
_NO_NICS = (
    "see whether the driver is loaded (ibv_devinfo), and whether the container has /dev/infiniband"
)
_DRIVER = pathlib.Path("/proc/driver/nvidia/params")
_OVERRIDE = "PeerMappingOverride=1"
_MIB = 1 << 20


def findings(sys: pathlib.Path = nics.SYS) -> Iterator[Finding]:
    """Look at everything, one finding at a time; ``sys`` is where Linux lists devices."""
    adapters = nics.nics(sys)
    query = ask_nvidia_smi("--query-gpu=index,pci.bus_id", "--format=csv,noheader")
    gpus = nics.gpus(query, sys)
    machine = settings.Machine(adapters, nics.interfaces(sys))

    def nvshmem() -> Iterator[Finding]:
        yield from library(has_gpu=bool(gpus))

    def network_adapters() -> Iterator[Finding]:
        yield from _adapters(adapters, os.environ)

    def adapters_of_gpus() -> Iterator[Finding]:
        yield from _nearest(gpus, adapters)

    def drivers() -> Iterator[Finding]:
        yield from _drivers(sys, os.environ, _driver_parameters()) if gpus and adapters else ()

    def variables() -> Iterator[Finding]:
        yield from settings.findings(
            machine, mps_runs=mps_runs(os.environ), folder=libraries.nvshmem_folder()
        )

    def network_memory() -> Iterator[Finding]:
        yield _memory(max(1, len(gpus)), os.environ)

    yield from finding.of(
        nvshmem, network_adapters, adapters_of_gpus, drivers, variables, network_memory
    )


def mps_runs(environ: Mapping[str, str]) -> bool:
    """Whether CUDA's multi-process service runs on this machine."""
    pipes = environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return os.path.exists(os.path.join(pipes, "control"))


def library(*, has_gpu: bool) -> Iterator[Finding]:
    """NVSHMEM: what is installed, what jax_ep was built with, and whether they fit."""
    try:
        installed = importlib.metadata.version(_WHEEL)
        yield Finding("ok", "NVSHMEM", f"{installed}, in {libraries.nvshmem_folder()}")
    except importlib.metadata.PackageNotFoundError:
        installed = ""
        yield Finding(
            "fail" if has_gpu else "note",
            "NVSHMEM",
            f"the wheel {_WHEEL} is not installed",
            "pip install 'jax-ep[cuda13]'; without it libnvshmem_host.so.3 must be on the library path",
        )
    name = "native network library"
    if importlib.util.find_spec("jax_ep._nvshmem") is None:
        yield Finding(
            "fail" if has_gpu else "note",
            name,
            "jax_ep was built without NVSHMEM",
            f"pip install {_WHEEL}, then build jax_ep with pip install --no-build-isolation",
        )
        return
    try:
        module: Any = importlib.import_module("jax_ep._nvshmem")
    except ImportError as error:
        mend = "pip install 'jax-ep[cuda13]'"
        yield Finding("fail" if has_gpu else "note", name, f"it did not load ({error})", mend)
        return
    built = module.build_info()["nvshmem"]
    version = ".".join(map(str, built))
    obstacle = _version_obstacle(module, built, installed)
    if obstacle is not None:
        yield Finding("fail", name, obstacle, "install the version that the text names")
        return
    # It registers with XLA's client for GPUs, so it can be loaded only where there is one.
    reason = libraries.why_unavailable("nvshmem") if has_gpu else None
    if reason is not None:
        yield Finding("fail", name, reason, "see the text")
        return
    how = "loaded" if has_gpu else "not loaded, as there is no GPU here"
    yield Finding("ok", name, f"built with NVSHMEM {version}; {how}")


def _version_obstacle(module: Any, built: tuple[int, ...], installed: str) -> str | None:
    """Why the NVSHMEM that is installed does not fit, as far as its version tells."""
    numbers = installed.split(".")[:3]
    if len(numbers) < 3 or not all(number.isdecimal() for number in numbers):
        return None
    return module.version_obstacle(built, tuple(map(int, numbers)))


def _adapters(adapters: list[Nic], environ: Mapping[str, str]) -> Iterator[Finding]:
    """The RDMA adapters and their ports."""
    if not adapters:
        transport = environ.get("NVSHMEM_REMOTE_TRANSPORT", "").lower()
        if transport in _WITHOUT_NICS:
            detail = f"none, and NVSHMEM_REMOTE_TRANSPORT={transport} may do without"
            yield Finding("note", "network adapters", detail)
        else:
            detail = "none: there is nothing under /sys/class/infiniband"
            yield Finding("fail", "network adapters", detail, _NO_NICS)
        return
    for nic in adapters:
        for port in nic.ports:
            active = port.is_active
            yield Finding(
                "ok" if active else "note",
                f"{nic.name} port {port.number}",
                f"{port.link_layer}, {port.rate}, {port.state}, {_where(nic.place)}",
                "" if active else "it has no link: see ibstat and the cable, if it should have one",
            )
    if not any(nic.is_active for nic in adapters):
        detail = "no port of any adapter is ACTIVE"
        yield Finding("fail", "network adapters", detail, "see ibstat, the cables and the switch")
    layers = {port.link_layer for nic in adapters for port in nic.ports if port.is_active}
    chosen = {"NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING"} & set(environ)
    if len(layers) > 1 and not chosen:
        yield Finding(
            "note",
            "network adapters",
            f"active ports are of several kinds ({', '.join(sorted(layers))}), of which some may not "
            "reach the other hosts",
            "name those for the GPUs in NVSHMEM_HCA_LIST",
        )


def _nearest(gpus: list[Gpu], adapters: list[Nic]) -> Iterator[Finding]:
    """The adapter of each GPU."""
    active = [nic for nic in adapters if nic.is_active]
    if not active:
        return
    for gpu in gpus:
        near = nics.nearest(gpu, active)
        names = ", ".join(nic.name for nic in near)
        bridges = gpu.place.shared_bridges(near[0].place)
        nodes = {nic.place.numa_node for nic in near} | {gpu.place.numa_node}
        name = f"adapter of GPU {gpu.index}"
        where = f"GPU {gpu.index} is on {_where(gpu.place)}"
        if None in nodes and not bridges:
            yield Finding("note", name, f"cannot be told: {where}", "see nvidia-smi topo -m")
        elif bridges:
            yield Finding("ok", name, f"{names}, behind {bridges} common PCI bridge(s); {where}")
        elif len(nodes) == 1:
            yield Finding("ok", name, f"{names}, of the same NUMA node; {where}")
        else:
            yield Finding(
                "note",
                name,
                f"{names}, across NUMA nodes; {where}",
                "rows cross the link between CPUs: see nvidia-smi topo -m for a nearer adapter",
            )
    if len(active) < len(gpus):
        yield Finding(
            "note",
            "adapters of GPUs",
            f"{len(gpus)} GPUs share {len(active)} active adapter(s), and with them their rate",
            "nothing, if the machine has no more of them",
        )


def _drivers(sys: pathlib.Path, environ: Mapping[str, str], parameters: str) -> Iterator[Finding]:
    """Whether adapters can read and write GPU memory, and GPUs can ring adapters.

    Args:
        sys: Where Linux lists modules.
        environ: The variables.
        parameters: Of the NVIDIA driver.
    """
    if (sys / "module" / "nvidia_peermem").exists():
        yield Finding("ok", "GPUDirect RDMA", "the module nvidia_peermem is loaded")
    elif settings.is_true(environ, "NVSHMEM_IB_DISABLE_DMABUF"):
        yield Finding(
            "fail",
            "GPUDirect RDMA",
            "nvidia_peermem is not loaded, and NVSHMEM_IB_DISABLE_DMABUF forbids the other way",
            "modprobe nvidia_peermem, or unset the variable",
        )
    else:
        yield Finding(
            "note",
            "GPUDirect RDMA",
            "nvidia_peermem is not loaded: NVSHMEM needs DMA-BUF (open kernel modules of the driver)",
            "modprobe nvidia_peermem, if registering memory fails",
        )
    if not settings.is_true(environ, "NVSHMEM_IB_ENABLE_IBGDA"):
        yield Finding("ok", "IBGDA", "off: a thread of the CPU passes puts to the adapter")
    elif _OVERRIDE in parameters:
        yield Finding("ok", "IBGDA", f"on, and the driver has {_OVERRIDE}")
    else:
        yield Finding(
            "note",
            "IBGDA",
            f"on, but the driver does not show {_OVERRIDE} in {_DRIVER}",
            "if NVSHMEM cannot map the adapter's registers for the GPU, load the driver with "
            f'NVreg_RegistryDwords="{_OVERRIDE};" or set NVSHMEM_IBGDA_NIC_HANDLER=cpu_host_memory',
        )


def _driver_parameters() -> str:
    try:
        return _DRIVER.read_text()
    except OSError:
        return ""


def _memory(ranks_per_host: int, environ: Mapping[str, str]) -> Finding:
    """What a group takes of the network memory, and for how many there is room."""
    name, num_hosts = "network memory", 2
    try:
        total = network.setting("JAX_EP_NETWORK_BYTES")
        taken = memory.network_bytes(network.settings_for(num_hosts), num_hosts, ranks_per_host)
    except CommunicationError as error:
        return Finding("fail", name, str(error), "set it to what fits, or unset it")
    fraction = environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "unset, which is 0.75")
    detail = (
        f"{total // _MIB} MiB of each GPU (JAX_EP_NETWORK_BYTES); a group of {num_hosts} hosts of "
        f"{ranks_per_host} rank(s) takes {taken / _MIB:.0f} MiB. XLA_PYTHON_CLIENT_MEM_FRACTION is "
        f"{fraction}"
    )
    if taken > total:
        return Finding("fail", name, detail, f"set JAX_EP_NETWORK_BYTES to {taken} or more")
    return Finding("ok", name, detail)


def _where(place: nics.Place) -> str:
    address = place.bridges[-1] if place.bridges else "unknown"
    node = "unknown" if place.numa_node is None else place.numa_node
    return f"PCI {address}, NUMA node {node}"
