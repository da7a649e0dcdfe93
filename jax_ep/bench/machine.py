"""The machine of a run, and which cases cannot run on it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess

from jax_ep.bench import latency_arms, peers
from jax_ep.bench.cases import Case

NCCL_SHARES = "NCCL_MULTI_RANK_GPU_ENABLE"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the ranks of a run are.

    Attributes:
        ranks: Devices that take part.
        processes: Processes that the ranks are spread over.
        gpus: GPUs of this machine that are used; 0 on CPU.
    """

    ranks: int
    processes: int
    gpus: int

    @property
    def shares_gpus(self) -> bool:
        """Whether several ranks are on one GPU."""
        return 0 < self.gpus < self.ranks

    def why_not(self, case: Case) -> str | None:
        """Why a case cannot run here, as far as that is known beforehand; or None."""
        in_latency_mode = case.op == "overlap" and case.mode == "latency"
        by_xla = case.op in ("exchange", "layer") or case.name == peers.ALL_TO_ALL
        by_xla |= case.op == "overlap" and not in_latency_mode
        if self.gpus == 0 and any(part in (case.name or "") for part in ("ragged", "plain")):
            return "XLA has no ragged_all_to_all on CPU"
        if in_latency_mode and self.ranks == 1 and case.name in latency_arms.LATE_ARMS:
            return "nobody can be late for one rank"
        if in_latency_mode and self.shares_gpus and latency_arms.MATMUL in (case.name or ""):
            return "XLA's matmul takes all SMs of a GPU, and ranks share some"
        if by_xla and self.shares_gpus and os.environ.get(NCCL_SHARES) != "1":
            return (
                f"{self.ranks} ranks share {self.gpus} GPU(s): NCCL, which XLA's collectives run on, "
                f"wants a GPU for each, or {NCCL_SHARES}=1 (from 2.30 on)"
            )
        return None

    def __str__(self) -> str:
        """The machine in words."""
        where = f"{min(self.gpus, self.ranks)} GPU(s)" if self.gpus else "CPU"
        return f"{self.ranks} rank(s) on {where}, {self.processes} process(es)"


def count_gpus() -> int:
    """The number of GPUs that JAX would use here, without starting JAX."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu" or not shutil.which("nvidia-smi"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    listing = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
    )
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def check_processes(ranks: int, processes: int, gpus: int) -> None:
    """Raise ``ValueError`` unless the ranks can be spread over these processes and GPUs."""
    if ranks < 1 or processes < 1:
        raise ValueError(f"--ranks, --processes: expected 1 or more, got {ranks} and {processes}.")
    if processes not in (1, ranks) and (gpus or ranks % processes):
        raise ValueError(
            f"--processes: expected 1 or one for each of the {ranks} ranks, got {processes}."
        )
    if gpus and processes == 1 and ranks > gpus:
        raise ValueError(
            f"--ranks: expected at most {gpus} GPUs for one process, got {ranks}; with --processes "
            f"{ranks} ranks share GPUs."
        )


def left_out(cases: list[Case], machine: Machine) -> tuple[list[Case], dict[str, int]]:
    """The cases that can run on a machine, and how many others cannot for each reason."""
    kept, reasons = [], dict[str, int]()
    for case in cases:
        why = machine.why_not(case)
        if why is None:
            kept.append(case)
        else:
            reasons[why] = reasons.get(why, 0) + 1
    return kept, reasons
