"""The processes of a run: from flags, from Slurm, or from the variables of a JobSet's pods."""

from __future__ import annotations

import os
from collections.abc import Mapping

from examples.common.processes import Processes, given_processes

_PORTS = 4096  # the last ones below 65,536, from which a Slurm job takes one by its number


def find_processes(
    coordinator: str | None,
    *,
    count: int | None,
    index: int | None,
    env: Mapping[str, str] | None = None,
) -> Processes | None:
    """The processes of this run; None for a single one.

    Each of the three values comes from the first of these that has it:

    1. the flags ``--coordinator``, ``--num-processes``, ``--process-id``
    2. ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
    3. inside ``srun``: the first host of ``SLURM_STEP_NODELIST`` with a port that depends on
       ``SLURM_JOB_ID``, ``SLURM_STEP_NUM_TASKS``, ``SLURM_PROCID``
    4. in a pod of an indexed Job, as JobSets make: the process is ``JOB_COMPLETION_INDEX``

    Args:
        coordinator: The flag, "host:port" of process 0.
        count: The flag, the number of processes.
        index: The flag, the number of this process.
        env: The environment; None for that of this program.

    Raises:
        ValueError: if a value is missing or does not fit the others.
    """
    env = os.environ if env is None else env
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS") or _slurm_coordinator(env)
    in_step = "SLURM_STEP_NODELIST" in env  # a script outside srun has the other variables too
    if count is None:
        count = _number(env, "JAX_NUM_PROCESSES", *(("SLURM_STEP_NUM_TASKS",) if in_step else ()))
    if index is None:
        slurm = ("SLURM_PROCID",) if in_step else ()
        # A Job of one pod has an index too.
        pod = ("JOB_COMPLETION_INDEX",) if coordinator or count else ()
        index = _number(env, "JAX_PROCESS_ID", *slurm, *pod)
    if count == 1 and index in (None, 0):
        return None
    return given_processes(coordinator, count=count, index=index)


def _slurm_coordinator(env: Mapping[str, str]) -> str | None:
    """The first host of a list such as ``gpu[003-010,012],cpu1``, with a port for this job."""
    hosts = env.get("SLURM_STEP_NODELIST")
    if not hosts:
        return None
    prefix, bracket, numbers = hosts.split("]")[0].partition("[")
    if bracket and "," not in prefix:
        first = prefix + numbers.replace(",", "-").split("-")[0]
    else:
        first = prefix.split(",")[0]
    port = (1 << 16) - _PORTS + int(env.get("SLURM_JOB_ID", 0)) % _PORTS
    return f"{first}:{port}"


def _number(env: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if value := env.get(name):
            if not value.isdigit():
                raise ValueError(f"{name}: expected a number, got {value!r}.")
            return int(value)
    return None
