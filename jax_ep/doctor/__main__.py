"""``python -m jax_ep.doctor``: what is here, what is missing, and how to mend it.

With ``--network`` it looks at what groups across hosts need. In a job of several processes, each of
which runs this command with ``--network --coordinator HOST:PORT --num-processes N --process-id I``,
it also tries the network out between all ranks, for about a minute; process 0 prints the result.

Exit status 0 if jax_ep works on this machine, 1 if something must be mended first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from jax_ep.doctor import finding, installation, job, network
from jax_ep.doctor.finding import Finding

_DEFAULT_SECONDS = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    tables: list[str] = []
    findings: list[Finding]
    if options.job is not None:
        findings = job.findings(
            options.job,
            ranks_per_host=options.ranks_per_host,
            seconds=options.seconds,
            tables=tables,
        )
    elif options.network:
        findings = list(network.findings())
    else:
        findings = list(installation.findings())
    if options.json:
        print(json.dumps([dataclasses.asdict(found) for found in findings], indent=2))
    elif options.job is None or options.job.index == 0:
        verdict = "The network works." if options.job else "jax_ep works here."
        if options.network and options.job is None:
            verdict = "Nothing to mend here; a job of all processes tries the network out."
        for table in tables:
            print(table)
        finding.write(findings, sys.stdout.write, verdict=verdict)
    return int(any(found.status == "fail" for found in findings))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; ``job`` says which process of which job this is, or is None."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings")
    parser.add_argument("--network", action="store_true", help="what groups across hosts need")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 of the job")
    parser.add_argument("--num-processes", type=int, metavar="N", help="of the job")
    parser.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")
    parser.add_argument(
        "--ranks-per-host", type=int, metavar="N", help="logical hosts, as in jax_ep.create_group"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=_DEFAULT_SECONDS,
        metavar="S",
        help="for the measurements and the test under load (default %(default)g)",
    )
    options = parser.parse_args(arguments)
    given = [options.coordinator, options.num_processes, options.process_id]
    asked = any(value is not None for value in [*given, options.ranks_per_host])
    if asked and not options.network:
        parser.error("a job tests the network: add --network.")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: expected more than 0, got {options.seconds:g}.")
    options.job = None
    if any(value is not None for value in given):
        if any(value is None for value in given):
            parser.error(
                "a job takes all of --coordinator, --num-processes and --process-id, the same in "
                "every process but for the last."
            )
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdigit():
            parser.error(
                f"argument --coordinator: expected HOST:PORT of process 0, got {options.coordinator}."
            )
        if not 0 <= options.process_id < options.num_processes:
            parser.error(
                f"argument --process-id: expected 0 to {options.num_processes - 1}, less than "
                f"--num-processes, got {options.process_id}."
            )
        options.job = job.Job(options.coordinator, options.num_processes, options.process_id)
    elif options.ranks_per_host is not None:
        parser.error("argument --ranks-per-host: is of a job; add --coordinator and the others.")
    return options


if __name__ == "__main__":
    sys.exit(main())
