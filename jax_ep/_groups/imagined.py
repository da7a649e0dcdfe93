"""The devices that an ``AbstractMesh`` stands for: none are there, but programs are traced for them."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_ep import _compat


@dataclasses.dataclass(frozen=True)
class ImaginedDevice:
    """What groups ask of a device, by the names of ``jax.Device``.

    Attributes:
        id: Its place in the mesh, row-major, as the devices of one real mesh are numbered.
        platform: "cpu", "gpu" or another.
        device_kind: As in "NVIDIA H200".
        core_count: Streaming multiprocessors of a GPU; None if that is not known.
        compute_capability: Of a GPU, as in "9.0".
        process_index: All are of one process.
        local_hardware_id: None, since no process has it.
    """

    id: int
    platform: str
    device_kind: str
    core_count: int | None
    compute_capability: str
    process_index: int = 0
    local_hardware_id: None = None

    def __str__(self) -> str:
        return f"{self.platform}:{self.id}"


def devices_of(mesh: Mesh | AbstractMesh, backend: str) -> np.ndarray:
    """The devices of ``mesh``, in its shape; imagined ones if it has none itself.

    Raises:
        ValueError: if neither the mesh nor ``backend`` says what they are.
    """
    if isinstance(mesh, Mesh):
        return mesh.devices
    described = getattr(mesh, "abstract_device", None)
    if described is None:
        if backend not in ("reference", "cpu"):
            raise ValueError(
                "jax_ep.create_group: argument mesh: expected an AbstractMesh that says for which "
                f"devices programs are, for backend {backend!r}, got one without abstract_device; pass "
                "AbstractMesh(..., abstract_device=AbstractDevice(device_kind='NVIDIA H200', "
                "num_cores=132, platform='gpu')) or the abstract_mesh of a Mesh, or name backend='cpu' "
                "or 'reference'."
            )
        kind, cores, platform = "cpu", None, "cpu"
    else:
        kind, cores, platform = described.device_kind, described.num_cores, described.platform
    capability = "9.0" if _compat.is_hopper(kind) else "unknown"
    devices = np.empty(mesh.size, dtype=object)
    devices[:] = [ImaginedDevice(i, platform, kind, cores, capability) for i in range(mesh.size)]
    return devices.reshape(mesh.axis_sizes)
