"""Environment variables of the network: what is set, whether the values fit, and what to mend."""

from __future__ import annotations

import dataclasses
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from jax_ep._errors import CommunicationError
from jax_ep._groups import network
from jax_ep.doctor.finding import Finding
from jax_ep.doctor.nics import Nic

_OWN = next(iter(network.DEFAULTS)).removesuffix("BYTES")  # what our own names begin with
_SUFFIXES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_TRUE, _FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
_SOURCES = ("INIT", "COLL", "P2P", "PROXY", "TRANSPORT", "MEM", "BOOTSTRAP", "TOPO", "UTIL", "ALL")

Check = Callable[[str, "Machine"], str | None]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What values are compared with: adapters, and names of network interfaces."""

    nics: Sequence[Nic]
    interfaces: Sequence[str]


def number_of_bytes(text: str) -> int | None:
    """What NVSHMEM takes ``text`` for, such as "1.5G"; None if it is no size."""
    size = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmgt]?)", text.lower())
    return None if size is None else int(float(size[1]) * 2 ** _SUFFIXES[size[2]])


def is_true(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable that is a switch is on."""
    return environ.get(name, "").lower() in _TRUE


def _one_of(*values: str) -> Check:
    def check(text: str, _: Machine) -> str | None:
        return (
            None
            if text.lower() in map(str.lower, values)
            else f"expected one of {', '.join(values)}"
        )

    return check


def _between(low: int, high: int) -> Check:
    def check(text: str, _: Machine) -> str | None:
        fits = text.isdigit() and low <= int(text) <= high
        return None if fits else f"expected a number from {low} to {high}"

    return check


def _switch(text: str, _: Machine) -> str | None:
    return None if text.lower() in (*_TRUE, *_FALSE) else "expected 0 or 1"


def _size(text: str, _: Machine) -> str | None:
    return None if number_of_bytes(text) else "expected a size, such as 1073741824 or 1G"


def _gid(text: str, machine: Machine) -> str | None:
    if not text.isdigit():
        return "expected a number from 0"
    roce = [
        (nic.name, port)
        for nic in machine.nics
        for port in nic.ports
        if port.is_active and port.link_layer == "Ethernet"
    ]
    for name, port in roce:
        if int(text) not in port.gids:
            has = ", ".join(f"{index} ({kind})" for index, kind in port.gids.items()) or "none"
            return f"port {port.number} of {name} has no address of that index, but {has}"
    return None


def _hcas(pattern: str, form: str) -> Check:
    def check(text: str, machine: Machine) -> str | None:
        names = {nic.name for nic in machine.nics}
        for entry in text.removeprefix("^").split(","):
            match = re.fullmatch(pattern, entry)
            if match is None:
                return f"expected {form}, got the entry {entry!r}"
            if match[1] not in names:
                return f"there is no {match[1]} here, but {', '.join(sorted(names)) or 'none'}"
        return None

    return check


def _interface(text: str, machine: Machine) -> str | None:
    excludes, exact = text.startswith("^"), text.lstrip("^").startswith("=")
    words = text.lstrip("^").removeprefix("=").split(",")
    if not all(words):
        return "expected names of interfaces, or how they begin"
    left = [
        name
        for name in machine.interfaces
        if excludes != any(name == word if exact else name.startswith(word) for word in words)
    ]
    if not left:
        return f"no interface is left of {', '.join(machine.interfaces) or 'none'}"
    return None


def _sources(text: str, _: Machine) -> str | None:
    words = text.upper().removeprefix("^").split(",")
    return None if set(words) <= set(_SOURCES) else f"expected some of {', '.join(_SOURCES)}"


def _anything(_: str, __: Machine) -> str | None:
    return None


# What is known of NVSHMEM's variables. Others are looked up in its libraries.
CHECKS: dict[str, Check] = {
    "NVSHMEM_BOOTSTRAP_UID_SOCK_FAMILY": _one_of("AF_INET", "AF_INET6"),
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": _interface,
    "NVSHMEM_DEBUG": _one_of("VERSION", "WARN", "INFO", "ABORT", "TRACE"),
    "NVSHMEM_DEBUG_FILE": _anything,
    "NVSHMEM_DEBUG_SUBSYS": _sources,
    "NVSHMEM_DISABLE_NVLS": _switch,
    "NVSHMEM_DISABLE_P2P": _switch,
    "NVSHMEM_ENABLE_NIC_PE_MAPPING": _switch,
    "NVSHMEM_HCA_LIST": _hcas(r"([\w.-]+)(?::[1-9]\d*)?", "NAME:PORT, with commas between them"),
    "NVSHMEM_HCA_PE_MAPPING": _hcas(
        r"([\w.-]+):[1-9]\d*:[1-9]\d*", "NAME:PORT:RANKS, with commas between them"
    ),
    "NVSHMEM_IBGDA_NIC_HANDLER": _one_of("auto", "gpu", "cpu", "cpu_host_memory"),
    "NVSHMEM_IB_ENABLE_IBGDA": _switch,
    "NVSHMEM_IB_ENABLE_RELAXED_ORDERING": _switch,
    "NVSHMEM_IB_GID_INDEX": _gid,
    "NVSHMEM_IB_SL": _between(0, 15),
    "NVSHMEM_IB_TRAFFIC_CLASS": _between(0, 255),
    "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": _switch,
    "NVSHMEM_INFO": _switch,
    "NVSHMEM_REMOTE_TRANSPORT": _one_of("ibrc", "ibdevx", "ucx", "libfabric", "none"),
    "NVSHMEM_SYMMETRIC_SIZE": _size,
}


def findings(
    machine: Machine,
    *,
    mps_runs: bool,
    environ: Mapping[str, str] = os.environ,
    folder: pathlib.Path | None = None,
) -> Iterator[Finding]:
    """What the variables say, one finding for each that is set, and what follows from several.

    Args:
        machine: What values are compared with.
        mps_runs: Whether CUDA's multi-process service runs on this machine.
        environ: The variables.
        folder: Where NVSHMEM is installed, whose libraries have the names of its variables.
    """
    yield from _own(environ)
    for name in sorted(name for name in environ if name.startswith("NVSHMEM_")):
        yield _of_nvshmem(name, environ[name], machine, folder)
    yield from _together(environ, mps_runs)


def _own(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = set(network.DEFAULTS)
    for name in sorted(name for name in environ if name.startswith(_OWN)):
        value = environ[name]
        if name not in known:
            names = ", ".join(sorted(known))
            yield Finding("fail", name, f"{value}: there is no such variable", f"one of {names}")
            continue
        try:
            network.check_setting(name, value)
        except CommunicationError as error:
            yield Finding("fail", name, str(error), "the same good value in every process")
        else:
            yield Finding("ok", name, f"{value or 'empty, so the default'}")


def _of_nvshmem(name: str, value: str, machine: Machine, folder: pathlib.Path | None) -> Finding:
    check = CHECKS.get(name)
    if check is not None:
        wrong = check(value, machine)
        if wrong is None:
            return Finding("ok", name, value)
        return Finding("fail", name, f"{value}: {wrong}", "set it to what fits, or unset it")
    if folder is None:
        return Finding("note", name, f"{value}: not checked, as NVSHMEM is not installed here")
    if _is_in_libraries(name, folder):
        return Finding("ok", name, f"{value} (known to NVSHMEM, not checked)")
    return Finding(
        "note",
        name,
        f"{value}: the NVSHMEM that is installed has no such variable",
        "see docs/network.md, or the list that NVSHMEM_INFO=1 prints",
    )


def _is_in_libraries(name: str, folder: pathlib.Path) -> bool:
    """Whether NVSHMEM's libraries have the name of a variable, as they store it: without NVSHMEM_."""
    wanted = [b"\0%b\0" % text.encode() for text in (name, name.removeprefix("NVSHMEM_"))]
    for path in sorted((folder / "lib").glob("*.so.3")):
        if not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if any(text.find(word) >= 0 for word in wanted):
                return True
    return False


def _together(environ: Mapping[str, str], mps_runs: bool) -> Iterator[Finding]:
    """What follows from several variables, and from those that are not set."""
    listed = [name for name in ("NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING") if name in environ]
    maps = is_true(environ, "NVSHMEM_ENABLE_NIC_PE_MAPPING")
    if len(listed) == 2:
        yield Finding(
            "fail",
            "NVSHMEM_HCA_PE_MAPPING",
            "NVSHMEM ignores it, because NVSHMEM_HCA_LIST is set too",
            "unset one of them",
        )
    elif "NVSHMEM_HCA_PE_MAPPING" in listed and not maps:
        yield Finding(
            "fail",
            "NVSHMEM_HCA_PE_MAPPING",
            "without NVSHMEM_ENABLE_NIC_PE_MAPPING=1 a GPU takes the nearest adapter instead",
            "set NVSHMEM_ENABLE_NIC_PE_MAPPING=1",
        )
    if is_true(environ, "NVSHMEM_DISABLE_P2P"):
        yield Finding(
            "fail",
            "NVSHMEM_DISABLE_P2P",
            "the GPUs of a host have to read each other's memory",
            "unset it",
        )
    if is_true(environ, "NVSHMEM_IB_ENABLE_RELAXED_ORDERING"):
        yield Finding(
            "note",
            "NVSHMEM_IB_ENABLE_RELAXED_ORDERING",
            "a signal might overtake its data between adapter and GPU; nobody has tried that",
            "unset it",
        )
    if environ.get("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "").lstrip("=") == "lo":
        yield Finding(
            "note",
            "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
            "over lo, processes of other machines do not find this one",
            "on several machines name the interface that joins them",
        )
    if not is_true(environ, "NVSHMEM_DISABLE_NVLS"):
        yield Finding(
            "note",
            "NVSHMEM_DISABLE_NVLS",
            "not on: NVSHMEM sets NVLink multicast up, which jax_ep does not use and which ranks that "
            "share a GPU cannot have",
            "set NVSHMEM_DISABLE_NVLS=1",
        )
    if mps_runs and not is_true(environ, "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"):
        yield Finding(
            "note",
            "NVSHMEM_IGNORE_CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
            "not on, and MPS runs: NVSHMEM supports ranks that share a GPU only in part, unless their "
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE add up to 100 at most",
            "set it to 1 where ranks share a GPU",
        )
    heap = number_of_bytes(environ.get("NVSHMEM_SYMMETRIC_SIZE", ""))
    text = environ.get("JAX_EP_NETWORK_BYTES", "")
    own = int(text) if text.isdigit() else network.DEFAULTS["JAX_EP_NETWORK_BYTES"]
    if heap is not None and heap < own:
        yield Finding(
            "note",
            "NVSHMEM_SYMMETRIC_SIZE",
            f"{heap} bytes are less than the {own} bytes of JAX_EP_NETWORK_BYTES",
            "raise it, or unset it",
        )
