"""The mesh of a run. Imports jax late, since ``common.processes`` prepares its environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


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
