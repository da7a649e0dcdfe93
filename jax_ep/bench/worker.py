"""One process of a run: measures the cases of a job. Started by ``launch``, not by hand.

Usage: python -m jax_ep.bench.worker JOB INDEX, with the environment that ``launch`` makes.
"""

from __future__ import annotations

import json
import pathlib
import sys
import traceback
from typing import Any

from jax_ep.bench import records
from jax_ep.bench.cases import Case
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

    session = Session(job.ranks, min(job.gpus, job.ranks), job.repeat, job.command)
    out = pathlib.Path(job.output)

    def tell(record: dict[str, Any] | None) -> None:
        """A record, or None at the end of a case."""
        if index == 0:
            if record is not None:
                records.check(record)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")

    for case in job.cases:
        tell(_measure(session, case))
        tell(None)
    for record in machine_records(session, job.cases[-1]):
        tell(record)


def _measure(session: Any, case: Case) -> dict[str, Any]:
    """The record of a case, of its failure if it fails in this process."""
    from jax_ep.bench import layer_ops, ops, peers
    from jax_ep.bench.traffic import Traffic

    run = {"exchange": peers.measure, "layer": layer_ops.measure}.get(case.op, ops.measure)
    try:
        case.check_ranks(session.ranks)
        return run(session, case)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        return session.record(case, None, Traffic(0, 0), correct=False, name=case.name, error=text)


def machine_records(session: Any, last: Case) -> list[dict[str, Any]]:
    """What was measured of the machine: the ways to move bytes, and the links that chain ops."""
    import dataclasses

    from jax_ep.bench.ceilings import num_bytes
    from jax_ep.bench.timing import Spread
    from jax_ep.bench.traffic import Traffic

    plain = Case(hidden=last.hidden, experts=last.experts, top_k=last.top_k)
    found = []
    for ceiling in session.fastest_ways():
        moved = num_bytes(on_gpu=session.on_gpu)
        us = moved / ceiling.gbs / 1e3
        traffic = Traffic(moved if session.ranks > 1 else 0, moved)
        found.append(
            session.record(
                plain, Spread(us, us, us), traffic, correct=True, name=ceiling.name, op="ceiling"
            )
        )
    for (tokens, top_k), spread in session.links().items():
        case = dataclasses.replace(plain, tokens=tokens, top_k=top_k)
        found.append(session.record(case, spread, Traffic(0, 0), correct=True, op="link"))
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
