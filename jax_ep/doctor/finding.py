"""What the doctor reports: findings, each with what to do about it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

Status = Literal["ok", "note", "fail"]
Look = Callable[[], Iterable["Finding"]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: "ok", "note" (works, but worth knowing) or "fail" (must be mended).
        name: What was looked at.
        detail: What was found.
        mend: What to do about it; empty if nothing.
    """

    status: Status
    name: str
    detail: str
    mend: str = ""


def of(*looks: Look) -> Iterator[Finding]:
    """The findings of all ``looks``. One that raises an error becomes a finding too."""
    for look in looks:
        try:
            yield from look()
        except Exception as error:  # a doctor reports what breaks, whatever it is
            name = getattr(look, "__name__", "look").strip("_").replace("_", " ")
            yield Finding("fail", name, f"{type(error).__name__}: {error}", "see the error")


def write(findings: list[Finding], write: Callable[[str], object], *, verdict: str) -> None:
    """Write a line for each finding, and ``verdict`` where nothing has to be mended."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        write(f"{finding.status:>4}  {finding.name:<{width}}  {finding.detail}\n")
        if finding.mend:
            write(f"{'':>4}  {'':<{width}}  -> {finding.mend}\n")
    failed = sum(finding.status == "fail" for finding in findings)
    write(f"\n{failed} thing(s) to mend.\n" if failed else f"\n{verdict}\n")


def ask_nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing if it fails."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return ""
    try:
        done = subprocess.run(
            [nvidia_smi, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout
