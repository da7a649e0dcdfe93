"""The memory that this process lets other processes of the host map, and that XLA's arrays lie in.

Functions take the native GPU library, whose results end in an error text or None.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from jax_ep import _compat
from jax_ep._errors import CommunicationError
from jax_ep._groups import processes

_STAGING_BYTES = 1 << 30
_MIB = 1 << 20

# What was exported so far; it stays until the process ends. Only the GPUs that it is for can use it,
# so they are part of the keys.
_staging: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # by CUDA ordinal: address, size


class Offer:
    """What this process lets its peers map.

    Attributes:
        devices: By id, as text since it travels as JSON: the GPU's uuid, why it is staged
            ("" if it is not), and the memories as (base, size): the workspace, then the region that
            peers read.
        descriptors: Two for each device, in the order of ``devices``.
        workspaces: Addresses by device.
    """

    def __init__(self, workspace_bytes: int) -> None:
        self._workspace_bytes = workspace_bytes
        self.devices: dict[str, dict[str, Any]] = {}
        self.descriptors: list[int] = []
        self.workspaces: dict[int, int] = {}

    def add(self, native: Any, device: int, ordinal: int, ordinals: list[int]) -> None:
        """Offer the memory of one GPU of this process, whose GPUs are ``ordinals``."""
        uuid = checked(native.device_uuid(ordinal))[0]
        workspace = checked(native.allocate_exportable(ordinal, ordinals, self._workspace_bytes))[0]
        self.workspaces[device] = workspace
        exported = [checked(native.export_allocation(ordinal, workspace))]
        self.descriptors.append(exported[0][0])
        reason = why_not_in_place(native, ordinal)
        if reason == "":
            address = _address_of_an_array(ordinal)
        else:
            address, _ = staging_of(native, ordinal, ordinals)
        exported.append(checked(native.export_allocation(ordinal, address)))
        self.descriptors.append(exported[1][0])
        self.devices[str(device)] = {
            "uuid": uuid,
            "staged": reason,
            "memories": [[base, size] for _, base, size in exported],
        }

    def close(self) -> None:
        """Close the descriptors, which were sent."""
        processes.close_all(self.descriptors)
        self.descriptors = []


def why_not_in_place(native: Any, ordinal: int) -> str:
    """Why peers cannot read XLA's arrays of a GPU where they are, or ""."""
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() in ("false", "0"):
        return "XLA_PYTHON_CLIENT_PREALLOCATE=false lets XLA's memory grow"
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    if allocator not in ("default", "bfc"):
        return f"XLA_PYTHON_CLIENT_ALLOCATOR={allocator} gives no one arena"
    descriptor, _, size, error = native.export_allocation(ordinal, _address_of_an_array(ordinal))
    if error is not None:
        return f"XLA's memory cannot be exported ({error})"
    os.close(descriptor)
    if size < 64 * _MIB:
        return f"XLA's memory comes in parts of {size} bytes"
    return ""


def _address_of_an_array(ordinal: int) -> int:
    device = next(d for d in jax.local_devices() if _compat.local_ordinal(d) == ordinal)
    array = jax.device_put(np.zeros(256, np.float32), device)
    return jax.block_until_ready(array).unsafe_buffer_pointer()


def staging_bytes() -> int:
    """Bytes of memory on each GPU of a group that operands are copied into, where they must be."""
    text = os.environ.get("JAX_EP_STAGING_BYTES", str(_STAGING_BYTES))
    if not text.isdigit() or int(text) == 0:
        raise CommunicationError(f"JAX_EP_STAGING_BYTES: expected a number of bytes, got {text!r}")
    return int(text)


def staging_of(native: Any, ordinal: int, ordinals: list[int]) -> tuple[int, int]:
    """Address and size of the staging memory of a GPU, for the use of ``ordinals``."""
    key = (ordinal, tuple(ordinals))
    if key not in _staging:
        size = staging_bytes()
        address = checked(native.allocate_exportable(ordinal, ordinals, size))[0]
        _staging[key] = (address, size)
    return _staging[key]


def checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """A native result without the error text at its end, which is raised."""
    *values, error = result
    if error is not None:
        raise CommunicationError(error)
    return tuple(values)
