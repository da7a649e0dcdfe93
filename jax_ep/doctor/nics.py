"""Network adapters and GPUs as Linux lists them, and how far they are from each other."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

SYS = pathlib.Path("/sys")
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a PCI device is.

    Attributes:
        bridges: The PCI addresses on the way to it from the root, its own last; empty if unknown.
        numa_node: Its NUMA node; None if unknown.
    """

    bridges: tuple[str, ...]
    numa_node: int | None

    def shared_bridges(self, other: Place) -> int:
        """How many bridges lie on the way to both: more are nearer."""
        count = 0
        for a, b in zip(self.bridges[:-1], other.bridges[:-1], strict=False):
            if a != b:
                break
            count += 1
        return count


@dataclasses.dataclass(frozen=True)
class Port:
    """A port of an adapter.

    Attributes:
        number: From 1.
        link_layer: "InfiniBand" or "Ethernet" (RoCE).
        rate: As Linux prints it, such as "400 Gb/sec (4X NDR)".
        state: Such as "ACTIVE".
        gids: The types ("IB/RoCE v1", "RoCE v2") of the addresses that are set, by index.
    """

    number: int
    link_layer: str
    rate: str
    state: str
    gids: dict[int, str]

    @property
    def is_active(self) -> bool:
        """Whether it has a link."""
        return self.state == "ACTIVE"


@dataclasses.dataclass(frozen=True)
class Nic:
    """An RDMA adapter: its name, such as "mlx5_0", its place and its ports."""

    name: str
    place: Place
    ports: tuple[Port, ...]

    @property
    def is_active(self) -> bool:
        """Whether a port has a link."""
        return any(port.is_active for port in self.ports)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: its index in nvidia-smi, and its place."""

    index: int
    place: Place


def nics(sys: pathlib.Path = SYS) -> list[Nic]:
    """The RDMA adapters of this machine, by name."""
    folder = sys / "class" / "infiniband"
    if not folder.is_dir():
        return []
    found = []
    for entry in sorted(folder.iterdir(), key=lambda path: _in_order(path.name)):
        ports = sorted(
            (path for path in (entry / "ports").glob("*") if path.name.isdigit()),
            key=lambda path: int(path.name),
        )
        found.append(Nic(entry.name, _place(entry / "device"), tuple(map(_port, ports))))
    return found


def gpus(listing: str, sys: pathlib.Path = SYS) -> list[Gpu]:
    """The GPUs of this machine.

    Args:
        listing: What ``nvidia-smi --query-gpu=index,pci.bus_id --format=csv,noheader`` printed.
        sys: Where Linux lists devices.
    """
    found = []
    for line in listing.splitlines():
        index, _, address = (part.strip() for part in line.partition(","))
        if index.isdigit():
            # nvidia-smi gives eight digits of the PCI domain, Linux has four.
            short = re.sub(r"^[0-9a-f]{4}(?=[0-9a-f]{4}:)", "", address.lower())
            found.append(Gpu(int(index), _place(sys / "bus" / "pci" / "devices" / short)))
    return found


def nearest(gpu: Gpu, adapters: Sequence[Nic]) -> list[Nic]:
    """The active adapters that are nearest to ``gpu``: by bridges, then by NUMA node."""
    active = [nic for nic in adapters if nic.is_active]

    def distance(nic: Nic) -> tuple[int, bool]:
        return -gpu.place.shared_bridges(nic.place), gpu.place.numa_node != nic.place.numa_node

    best = min(map(distance, active), default=None)
    return [nic for nic in active if distance(nic) == best]


def interfaces(sys: pathlib.Path = SYS) -> list[str]:
    """The names of the network interfaces, such as "eth0"."""
    folder = sys / "class" / "net"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _port(path: pathlib.Path) -> Port:
    gids = {}
    for entry in (path / "gids").glob("*"):
        if entry.name.isdigit() and re.search(r"[1-9a-f]", _read(entry)):  # others are not set
            gids[int(entry.name)] = _read(path / "gid_attrs" / "types" / entry.name)
    return Port(
        int(path.name),
        _read(path / "link_layer") or "unknown",
        _read(path / "rate") or "unknown",
        _read(path / "state").partition(":")[2].strip() or "unknown",  # as in "4: ACTIVE"
        dict(sorted(gids.items())),
    )


def _place(device: pathlib.Path) -> Place:
    bridges = [part for part in device.resolve().parts if _PCI_ADDRESS.fullmatch(part)]
    text = _read(device / "numa_node")
    known = text.isdigit()  # -1 is unknown
    return Place(tuple(bridges), int(text) if known else None)


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also of an entry that may not be read
        return ""


def _in_order(name: str) -> tuple[str, int]:
    """mlx5_10 comes after mlx5_2."""
    digits = re.search(r"\d+$", name)
    return (name, -1) if digits is None else (name[: digits.start()], int(digits[0]))
