"""Devices, processes and the mesh. Imports jax only once its environment is right."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

_DEFAULT_CPU_DEVICES = 8
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, where there are several.

    Attributes:
        coordinator: "host:port" of process 0.
        count: Number of processes.
        index: This one's number.
    """

    coordinator: str
    count: int
    index: int


def processes(coordinator: str | None, *, count: int | None, index: int | None) -> Processes | None:
    """The processes of a run, from the command line; None for a single process.

    Args:
        coordinator: "host:port" of process 0.
        count: Number of processes.
        index: This one's number.

    Raises:
        ValueError: if these do not fit each other.
    """
    if index is not None and index >= (count or 1):
        raise ValueError(
            f"--process-id: expected 0 to {(count or 1) - 1}, less than --num-processes, got {index}."
        )
    if coordinator is None:
        if (count or 1) > 1:
            raise ValueError(
                f"--coordinator: expected host:port of process 0 where --num-processes is {count}, "
                "got none."
            )
        return None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--coordinator: expected host:port of process 0, got {coordinator!r}.")
    if count is None or index is None:
        raise ValueError(
            "--coordinator: expected --num-processes and --process-id beside it, got "
            f"{coordinator!r} without both."
        )
    return Processes(coordinator, count, index)


def start(*, devices: int | None, processes: Processes | None) -> None:
    """Start JAX, on the devices and with the processes asked for.

    On CPU the number of devices is a setting that XLA reads when it starts; here it becomes
    ``devices`` (8 by default) unless ``XLA_FLAGS`` says otherwise. Other platforms ignore it.

    Args:
        devices: Devices of this process.
        processes: The processes of the run; None for a single one.

    Raises:
        RuntimeError: if jax has been imported already and ``XLA_FLAGS`` would have to be set.
        ConnectionError: if the processes do not meet.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT_FLAG not in flags:
        if "jax" in sys.modules:
            raise RuntimeError(
                "cluster.start: expected to run before jax is imported, got jax imported already; "
                f"import it later, or set XLA_FLAGS={_DEVICE_COUNT_FLAG}=N yourself."
            )
        count = devices or _DEFAULT_CPU_DEVICES
        os.environ["XLA_FLAGS"] = f"{flags} {_DEVICE_COUNT_FLAG}={count}".strip()
    import jax_ep  # noqa: F401  (it prepares XLA's CPU client, so before the first device)

    if processes is not None:
        import jax

        try:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.index,
                # Without it the service binds [::], which fails where there is no IPv6.
                coordinator_bind_address=processes.coordinator if processes.index == 0 else None,
            )
        except RuntimeError as error:
            raise ConnectionError(
                f"--coordinator: expected {processes.count} processes to meet at "
                f"{processes.coordinator}, got {error}"
            ) from error


def make_mesh(*, devices: int | None, data_parallel: int | None) -> jax.sharding.Mesh:
    """A mesh ``("data", "expert")`` over ``devices`` devices of every process.

    Args:
        devices: Devices of each process; None takes all of them.
        data_parallel: Size of the axis "data"; None takes 2 where that divides the devices and
            leaves two or more for the axis "expert", else 1.

    Returns:
        The mesh; the axis "expert" runs over neighbouring devices, of one process where possible.

    Raises:
        ValueError: if there are fewer devices, or ``data_parallel`` does not divide them.
    """
    import jax
    import numpy as np

    mine = jax.local_device_count()
    if devices is not None and not 1 <= devices <= mine:
        raise ValueError(f"--devices: expected 1 to {mine} devices on this process, got {devices}.")
    used = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)[:devices]
    ]
    if data_parallel is None:
        data_parallel = 2 if len(used) % 2 == 0 and len(used) >= 4 else 1
    if data_parallel < 1 or len(used) % data_parallel:
        raise ValueError(
            f"--data-parallel: expected a divisor of the {len(used)} devices, got {data_parallel}."
        )
    return jax.sharding.Mesh(np.array(used).reshape(data_parallel, -1), ("data", "expert"))
