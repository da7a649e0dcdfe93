"""Arms of op "overlap" in latency mode (``latency_beside``), by the names of their records."""

from __future__ import annotations

from typing import NamedTuple

MATMUL, GROUPED = "matmul", "grouped_dot"
COMPUTE = (MATMUL, GROUPED)
OPS = ("dispatch", "combine")
BETWEEN = f"{GROUPED} between the calls of "
LATE = f" beside {GROUPED}, a peer late"
LATE_US = 100.0  # of about 150 us of compute
BETWEEN_ARMS = tuple(BETWEEN + op for op in OPS)
LATE_ARMS = tuple(op + LATE for op in OPS)


class Arm(NamedTuple):
    """What a name stands for.

    Attributes:
        op: The op, or "" for compute alone.
        compute: "matmul" or "grouped_dot".
        kind: ``BETWEEN``, ``LATE``, or "" for a chain without readings of the clock in between.
    """

    op: str
    compute: str
    kind: str = ""


def beside(compute: str) -> tuple[str, ...]:
    """The compute alone, and each op beside it."""
    return compute, *(f"{op} beside {compute}" for op in OPS)


def parse(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ValueError: if there is none.
    """
    if name in BETWEEN_ARMS:
        return Arm(name.removeprefix(BETWEEN), GROUPED, BETWEEN)
    if name in LATE_ARMS:
        return Arm(name.removesuffix(LATE), GROUPED, LATE)
    op, _, compute = name.rpartition(" beside ")
    if compute not in COMPUTE or op not in ("", *OPS):
        raise ValueError(f"name: expected an arm of latency mode, got {name!r}.")
    return Arm(op, compute)
