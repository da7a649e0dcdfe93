"""Groups whose ranks count as those of several hosts, in processes that ``run_hosts.py`` started.

``JAX_EP_TEST_RANKS_PER_HOST`` says how many processes, one after the other, are one host. Without it,
all are. The mesh then tells which ranks of a group share a host, so tests need not know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

PROCESSES = int(os.environ.get("JAX_EP_TEST_RANKS_PER_HOST", "0"))  # of one host; 0: all
_NATIVE = {"transport": "nvshmem"}  # what a native group that spans hosts takes besides


def arguments(mesh: jax.sharding.Mesh, axes: str | Sequence[str], backend: str) -> dict[str, Any]:
    """Arguments of ``jax_ep.create_group`` for the hosts that the group spans; none if it is one."""
    per_host = of_group(mesh, axes)
    if per_host is None:
        return {}
    if backend == "cuda" and mesh.devices.size < jax.process_count():
        pytest.skip(
            f"a group that spans hosts takes all {jax.process_count()} processes, and the mesh of "
            f"this test has {mesh.devices.size}"
        )
    return {"ranks_per_host": per_host} | (_NATIVE if backend == "cuda" else {})


def of_group(mesh: jax.sharding.Mesh, axes: str | Sequence[str] = "expert") -> int | None:
    """How many ranks of each group along ``axes`` share a host; None if all do."""
    if not PROCESSES:
        return None
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    # What is wrong with others is for create_group to say.
    if not set(names) <= set(mesh.axis_names):
        return None
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    where = [mesh.axis_names.index(name) for name in names]
    size = int(np.prod([mesh.devices.shape[axis] for axis in where]))
    groups = np.moveaxis(processes, where, range(-len(where), 0)).reshape(-1, size)
    found = {_ranks_per_host(tuple((group // PROCESSES).tolist())) for group in groups}
    if len(found) > 1:
        pytest.skip(f"groups side by side have {sorted(found)} ranks a host, which may not differ")
    (per_host,) = found
    return None if per_host == size else per_host


def of_first(ranks: int) -> int | None:
    """The same for a group of the first ``ranks`` processes, in order."""
    if not PROCESSES:
        return None
    per_host = _ranks_per_host(tuple(rank // PROCESSES for rank in range(ranks)))
    return None if per_host == ranks else per_host


def _ranks_per_host(hosts: tuple[int, ...]) -> int:
    """How many ranks one after the other share a host, from the host of each rank."""
    borders = [i for i in range(1, len(hosts)) if hosts[i] != hosts[i - 1]]
    lengths = np.diff([0, *borders, len(hosts)])
    if len(set(lengths)) > 1 or len(set(hosts)) < len(lengths):
        pytest.skip(
            f"needs as many ranks on each host, one after the other; the group's are on {hosts}"
        )
    return int(lengths[0])
