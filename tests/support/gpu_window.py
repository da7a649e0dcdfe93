"""``gpu_suite.py --window``: the most valuable of all stages, where time on GPUs is short.

``window_stages.py`` is the table of stages and their budgets; ``window_files.py`` writes what they
leave. A stage that has not ended shortly before its limit is asked to end. If it does not end, it
is killed with all that it has started. Its output stays. SIGTERM ends the window in the same way.
On one GPU the same command is a rehearsal: ranks share the GPU, and stages that need two are left
out.

With ``fill`` it also keeps the compiled programs in files that can be copied to another machine
(``window_cache.py``).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import machine
import mps
import window_cache
import window_stages
from window_files import Files, Row, line
from window_stages import GRACE, RESERVE, Stage

ROOT = pathlib.Path(__file__).parents[2]
_UPDATE_S = 1.0
_QUICK_GRACE = 3.0  # seconds for stages to end when the whole window is told to end
# A library that was built from other sources may load but lack targets. XLA refuses the targets of
# one that was built with the headers of a newer jaxlib.
_NAMES = """
import sys
from jax_ep import _cpu, _cuda
from jax_ep._core import libraries
if why := libraries.why_unavailable("cpu"):
    sys.exit(why)
if _cuda.build_info()["ffi_api_version"] != _cpu.build_info()["ffi_api_version"]:
    sys.exit("the libraries were built with the headers of two versions of jaxlib")
print(*_cpu.targets().keys() & _cuda.targets().keys())
"""
_MACHINE = {
    "gpus": "nvidia-smi -L",
    "links": "nvidia-smi topo -m",
    "driver": "nvidia-smi --query-gpu=driver_version --format=csv,noheader",
    "commit": "git log -1 --format=%H",
}


def main(
    *,
    out: pathlib.Path,
    binaries: pathlib.Path,
    seconds: float,
    names: Sequence[str] = (),
    cache: pathlib.Path | None = None,
    fill: pathlib.Path | None = None,
    rehearses: bool = False,
) -> int:
    """Run the window; returns 1 if a stage failed.

    Args:
        out: The folder of ``window_files.FILES``.
        binaries: The folder where CUDA programs are, or are built.
        seconds: Time for all stages.
        names: Names of the stages to run; none stands for all.
        cache: A folder with the parts of a compilation cache.
        fill: A folder for the parts of the cache as it is afterwards.
        rehearses: Whether only the cache matters: stages may take all the time left, and leave no
            results.
    """
    with tempfile.TemporaryDirectory(prefix="jax_ep_window_", ignore_cleanup_errors=True) as work:
        gpus = machine.count_gpus()
        stages = [s for s in window_stages.stages(gpus) if not names or s.name in names]
        window = Window(stages, gpus, out, pathlib.Path(work), binaries, seconds, fill, rehearses)
        if cache is not None:
            entries = window_cache.unpack(cache, window.cache)
            window.files.say(f"{entries} files of the compilation cache")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: window.stop.set())
        return window.run()


class Window:
    """One run of the stages. ``stop`` ends it early."""

    def __init__(
        self,
        stages: list[Stage],
        gpus: int,
        out: pathlib.Path,
        work: pathlib.Path,
        binaries: pathlib.Path,
        seconds: float,
        fill: pathlib.Path | None = None,
        rehearses: bool = False,
    ) -> None:
        self.gpus, self.work, self.fill, self.rehearses = gpus, work, fill, rehearses
        self.cache = work / "cache"
        self.stop = threading.Event()
        self.files = Files(out, work, stages, keeps_results=not rehearses)
        self._deadline = time.monotonic() + seconds - min(RESERVE, seconds / 10)
        self._names = {"python": sys.executable, "work": work, "binaries": ROOT / binaries}
        self._stages = stages

    def run(self) -> int:
        """Run all groups, one after the other."""
        self.files.machine = {what: _output(command) for what, command in _MACHINE.items()}
        self.files.machine["gpu count"] = self.gpus
        self.files.say(f"{len(self._stages)} stages on {self.gpus} GPU(s)")
        self.files.update()
        waiting = [stage for stage in self._stages if not self._left_out(stage)]
        groups = window_stages.groups(waiting)
        for number, group in enumerate(groups):
            left = self._deadline - time.monotonic()
            seconds = window_stages.limit(
                group, groups[number + 1 :], left, bounded=not self.rehearses
            )
            if self.stop.is_set() or seconds < 1:
                why = "the window was told to end" if self.stop.is_set() else "no time was left"
                self._leave_out(group, why)
                continue
            self._run_group(group, time.monotonic() + seconds)
            if self.fill is not None:
                looked_up = window_cache.used(
                    self.files.lookups_of(stage) for stage in self._stages
                )
                self.files.say(window_cache.pack(self.cache, self.fill, first=looked_up))
            first = self.files.rows[group[0].name]
            if first.stage.name == "build" and first.state != "ok":
                self._leave_out([s for g in groups[number + 1 :] for s in g], "the build failed")
                break
        self.files.close()
        print(*map(line, self.files.rows.values()), sep="\n", flush=True)
        return int(any(row.state.startswith("FAILED") for row in self.files.rows.values()))

    def _left_out(self, stage: Stage) -> bool:
        why = window_stages.why_not(stage, self.gpus)
        if stage.kind == "build" and self._is_built(stage):
            why = "it is there"
        if self.rehearses and "{binaries}" in stage.commands[0] and stage.kind != "build":
            why = "it compiles nothing"
        if why is not None:
            self._leave_out([stage], why)
        return why is not None

    def _leave_out(self, stages: Sequence[Stage], why: str) -> None:
        for stage in stages:
            self.files.rows[stage.name].state = f"left out: {why}"
        self.files.update()

    def _is_built(self, stage: Stage) -> bool:
        if stage.name == "build_loads":
            return (pathlib.Path(self._names["binaries"]) / "loads").exists()
        environment = {
            **os.environ,
            "PYTHONPATH": window_cache.python_path(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-c", _NAMES]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        wanted = re.findall(r"X\((jax_ep_\w+),", (ROOT / "csrc/ffi/targets.h").read_text())
        return done.returncode == 0 and set(wanted) <= set(done.stdout.split())

    def _run_group(self, group: list[Stage], deadline: float) -> None:
        """Run stages side by side, in lanes; keep all files up to date meanwhile."""
        lanes = window_stages.lanes(group, self.gpus)
        threads = [threading.Thread(target=self._run_lane, args=(x, deadline)) for x in lanes]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.files.update()
            next_update = time.monotonic() + _UPDATE_S
            while time.monotonic() < next_update and any(t.is_alive() for t in threads):
                threads[0].join(0.05)
        for thread in threads:
            thread.join()
        self.files.update()
        for stage in group:
            self.files.say(line(self.files.rows[stage.name]))

    def _run_lane(self, lane: list[Stage], deadline: float) -> None:
        for stage in lane:
            row = self.files.rows[stage.name]
            seconds = window_stages.share_of(stage, lane, deadline - time.monotonic())
            if self.stop.is_set() or seconds < 1:
                row.state = "left out: no time was left"
                continue
            row.limit, row.begun = round(seconds, 1), round(self.files.seconds(), 1)
            row.state = "running"
            try:
                state = self._run_stage(stage, time.monotonic() + seconds)
            except Exception as error:  # say so, and go on with the next
                state = f"FAILED: {type(error).__name__}: {error}"
            row.seconds = round(self.files.seconds() - row.begun, 1)
            row.state = self._verdict(row, state)

    def _verdict(self, row: Row, state: str) -> str:
        """The state of a stage. One that was ended failed only if something in it failed."""
        if state == "ended":
            why = "with the window" if self.stop.is_set() else f"at its limit of {row.limit:.0f} s"
            return f"ended {why}"
        return state

    def _run_stage(self, stage: Stage, deadline: float) -> str:
        """Run the commands of a stage; "ok", "ended" or "FAILED: …"."""
        environment = self._environment(stage)
        shares = stage.ranks > self.gpus
        if shares and machine.NCCL_SHARES_GPUS:
            environment.setdefault("NCCL_MAX_NCHANNELS", "8")  # see test_gpu_collectives.py
        service = mps.multi_process_service() if shares else contextlib.nullcontext({})
        with service as variables, self.files.log_of(stage).open("ab") as log:
            for number, command in enumerate(stage.commands):
                # Each command has its share of the time left and should end by itself within it.
                left = (deadline - time.monotonic()) / (len(stage.commands) - number)
                until = time.monotonic() + left
                text = command.format(**self._names, seconds=max(int(left - GRACE), 1))
                log.write(f"$ {text}\n".encode())
                log.flush()
                status = self._finish(text, environment | variables, log, until)
                if status is None:
                    return "ended"
                if status:
                    return f"FAILED: exit status {status}"
        return "ok"

    def _environment(self, stage: Stage) -> dict[str, str]:
        return {
            **os.environ,
            "JAX_EP_TEST_PLATFORM": "cuda",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": window_cache.python_path(ROOT),
            **window_cache.environment(self.cache, self.files.lookups_of(stage)),
            **stage.environment,
        }

    def _finish(
        self, command: str, environment: dict[str, str], log: Any, deadline: float
    ) -> int | None:
        """The exit status of a command; None if it and all that it started had to be ended."""
        process = subprocess.Popen(
            shlex.split(command),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if self.stop.is_set() or time.monotonic() > deadline - GRACE / 2:
                    # pytest reports its failures when it is interrupted; the others clean up.
                    ask = signal.SIGINT if " -m pytest " in command else signal.SIGTERM
                    process.send_signal(ask)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_QUICK_GRACE if self.stop.is_set() else GRACE / 2)
                    return None
                time.sleep(0.05)
            return process.returncode
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _output(command: str) -> str:
    """The output of a command, or why there is none."""
    try:
        done = subprocess.run(
            command.split(), cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
