"""Starts JAX on devices and processes. Imports jax only once its environment is right."""

from __future__ import annotations

import dataclasses
import os
import sys

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


def given_processes(
    coordinator: str | None, *, count: int | None, index: int | None
) -> Processes | None:
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


def start_jax(*, devices: int | None, processes: Processes | None) -> None:
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
                "start_jax: expected to run before jax is imported, got jax imported already; "
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
