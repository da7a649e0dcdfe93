"""One process of a run: measures the cases of a job. Started by ``launch``, not by hand.

Usage: python -m jax_ep.bench.worker JOB INDEX, with the environment that ``launch`` makes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from jax_ep.bench import records
from jax_ep.bench.cases import HALVES, Case
from jax_ep.bench.launch import Job


def main(path: str, index: int) -> None:
    """Measure all cases; process 0 appends a line to the job's file for each."""
    job = Job.load(pathlib.Path(path))
    import jax

    import jax_ep  # noqa: F401  (it prepares XLA's CPU client, so before the first device)

    if job.processes > 1:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            index,
            local_device_ids=None if job.gpus == 0 else [index % job.gpus],
            # Without it the service binds [::], which fails where there is no IPv6.
            coordinator_bind_address=job.coordinator if index == 0 else None,
        )
    from jax_ep.bench.session import Session

    session = Session(job.ranks, min(job.gpus, job.ranks), job.repeat, job.command, hosts=job.hosts)
    out = pathlib.Path(job.output)

    def tell(record: dict[str, Any] | None) -> None:
        """Write a record, or with None the end of a case."""
        if index == 0:
            if record is not None:
                records.check(record)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")

    for record in _ceilings(session, job.cases[0]):
        tell(record)
    for case in job.cases:
        if session.largest(float(time.time() > job.until)):  # all stop at the same case
            break
        tell(_measure(session, case))
        for record in _new_links(session, case):
            tell(record)
        tell(None)


def _measure(session: Any, case: Case) -> dict[str, Any]:
    """The record of a case, or of its failure in this process."""
    from jax_ep.bench import half_ops, latency_beside, layer_ops, ops, overlap_ops, peers
    from jax_ep.bench.traffic import Traffic

    by_op = {"layer": layer_ops.measure, "overlap": overlap_ops.measure}
    by_op |= dict.fromkeys(HALVES, half_ops.measure)
    run = by_op.get(case.op, ops.measure)
    if case.op == "overlap" and case.mode == "latency":
        run = latency_beside.measure
    if case.op == "exchange" or case.name == peers.ALL_TO_ALL:
        run = peers.measure
    try:
        return run(session, case)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        return session.record(case, None, Traffic(0, 0), correct=False, name=case.name, error=text)


def _plain(case: Case) -> Case:
    return Case(hidden=case.hidden, experts=case.experts, top_k=case.top_k)


def _ceilings(session: Any, case: Case) -> Iterator[dict[str, Any]]:
    """The ways in which the machine moves bytes."""
    from jax_ep.bench.ceilings import NUM_BYTES
    from jax_ep.bench.timing import Spread
    from jax_ep.bench.traffic import Traffic

    for way in session.ways():
        us = NUM_BYTES / way.gbs / 1e3
        link = way.kind == "link"
        traffic = Traffic(NUM_BYTES if link else 0, NUM_BYTES, NUM_BYTES * max(session.gpus, 1))
        yield session.record(
            _plain(case), Spread(us, us, us), traffic, correct=True, name=way.name, op="ceiling"
        )


def _new_links(session: Any, last: Case) -> Iterator[dict[str, Any]]:
    """The links between chained ops that were measured for the last case."""
    from jax_ep.bench.traffic import Traffic

    while session.untold_links:
        tokens, top_k = session.untold_links.pop()
        case = dataclasses.replace(_plain(last), tokens=tokens, top_k=top_k)
        yield session.record(
            case, session.link(tokens, top_k), Traffic(0, 0), correct=True, op="link"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
