"""One process of a job that tries the network out."""

from __future__ import annotations

import dataclasses
import json

from jax_ep import _compat
from jax_ep.doctor import finding, transport
from jax_ep.doctor.finding import Finding

_GROUP_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 180.0  # for the findings of all processes
_END_KEY = "jax_ep/doctor/end"


@dataclasses.dataclass(frozen=True)
class Job:
    """Which process of which job this is.

    Attributes:
        coordinator: "host:port" of process 0.
        count: The number of processes.
        index: Which one this is, from 0.
    """

    coordinator: str
    count: int
    index: int


def findings(
    job: Job, *, ranks_per_host: int | None, seconds: float, tables: list[str]
) -> list[Finding]:
    """Take part in the job; what was found. Process 0 also has what the others failed at.

    Args:
        job: The job.
        ranks_per_host: As in ``jax_ep.create_group``.
        seconds: For the measurements and the test under load.
        tables: What was measured is added to these.
    """

    def self_test() -> list[Finding]:
        return _take_part(job, ranks_per_host, seconds, tables)

    found = list(finding.of(self_test))
    return [*found, *_of_others(job, found)]


def _take_part(
    job: Job, ranks_per_host: int | None, seconds: float, tables: list[str]
) -> list[Finding]:
    import jax
    import numpy as np

    import jax_ep
    from jax_ep._groups import create
    from jax_ep.doctor.programs import AXIS
    from jax_ep.doctor.self_test import SelfTest

    jax.distributed.initialize(
        job.coordinator,
        job.count,
        job.index,
        # Without it the service binds [::], which fails where there is no IPv6.
        coordinator_bind_address=job.coordinator if job.index == 0 else None,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    found = [Finding("ok", "processes", f"{job.count}, with {mesh.size} device(s)")]
    if mesh.size < 2:
        return [*found, Finding("fail", "processes", "one rank has no other", "start several")]
    why = create.why_reference(mesh, (AXIS,), ranks_per_host)
    group = jax_ep.create_group(mesh, AXIS, timeout=_GROUP_TIMEOUT_S, ranks_per_host=ranks_per_host)
    found.append(transport.of_group(group, why))
    test = SelfTest(group, seconds=seconds)
    found += finding.of(test.run)
    tables += test.tables
    return found


def _of_others(job: Job, found: list[Finding]) -> list[Finding]:
    """What other processes failed at, if this is process 0."""
    mine = [dataclasses.asdict(f) for f in found if f.status == "fail"]
    try:
        texts = _compat.all_gather_text(_END_KEY, json.dumps(mine), timeout=_END_TIMEOUT_S)
    except Exception as error:  # of a type of XLA's
        return [Finding("fail", "other processes", f"not all came to the end: {error}", "see them")]
    if job.index != 0:
        return []
    return [
        dataclasses.replace(Finding(**failed), name=f"process {process}: {failed['name']}")
        for process, text in enumerate(texts)
        for failed in json.loads(text)
        if process != 0
    ]
