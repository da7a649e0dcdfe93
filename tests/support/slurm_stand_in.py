"""``srun`` and ``scontrol`` for tests: they start a job's tasks here, and note their calls."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys


def install(folder: pathlib.Path) -> dict[str, str]:
    """Make both programs in ``folder``; returns the variables that put them first on the path.

    A call of one of them adds a line to ``calls.jsonl`` there; ``srun`` writes the ids of its tasks to
    ``tasks.json``.
    """
    folder.mkdir()
    for name in ("srun", "scontrol"):
        script = folder / name
        call = f'exec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"'
        script.write_text(f"#!/bin/sh\n{call}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: pathlib.Path) -> list[list[str]]:
    """The calls so far: the program's name and its arguments."""
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def _srun(folder: pathlib.Path, arguments: list[str]) -> int:
    """Start the tasks; as with --kill-on-bad-exit, the first that fails ends the others."""
    command = list(arguments)
    while command[0].startswith("--"):
        command.pop(0)
    if not pathlib.Path(command[0]).exists():
        return 0  # only the call matters
    count = int(os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "SLURM_STEP_NUM_TASKS": str(count),
                "SLURM_STEP_NODELIST": "127.0.0.1",
            },
        )
        for index in range(count)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    partial = folder / "tasks.partial"
    partial.write_text(json.dumps([task.pid for task in tasks]))
    partial.rename(folder / "tasks.json")
    worst = 0
    for task in tasks:
        code = task.wait()
        worst = worst or code
        if code not in (0, 143):
            for other in tasks:
                other.kill()
    return worst


if __name__ == "__main__":
    where, program, *given = sys.argv[1:]
    with (pathlib.Path(where) / "calls.jsonl").open("a") as log:
        log.write(json.dumps([program, *given]) + "\n")
    sys.exit(_srun(pathlib.Path(where), given) if program == "srun" else 0)
