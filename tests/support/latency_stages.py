"""The stages of ``gpu_suite.py`` for latency mode: its whole suite, and steps, by numbers of ranks.

One GPU does, which all ranks share where there are fewer GPUs than ranks. The suite is in three
stages of a minute each: values and programs (``latency_N``), layout "masked", absent ranks and
packed scales (``latency_options_N``), and all ops in two calls (``latency_in_flight_N``). The tests
of 10,000 steps (``many_steps``) run in the stages ``processes_N``. ``latency_steps_N`` has 100,000
steps of two ranks, and fewer of more ranks that share a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

_VALUES = "tests/test_latency_mode.py tests/test_gpu_latency.py"
_OPTIONS = "tests/test_masked_layout.py tests/test_absent_ranks.py tests/test_packed_scales.py"
SUITE = f"{_VALUES} {_OPTIONS}"
_STEPS = "tests/test_latency_steps.py"
_ONE_CALL = "-k 'not flight and not many_steps'"
_TWO_CALLS = "-k 'flight and not many_steps'"
# Seconds that the runner has to end the processes and to report.
_TO_REPORT = 5


class LatencyStage(NamedTuple):
    """Tests in processes of one rank each.

    Attributes:
        name: As ``gpu_suite.py --list`` shows it.
        ranks: Number of processes.
        tests: Arguments of pytest.
        seconds: Time after which it is ended.
    """

    name: str
    ranks: int
    tests: str
    seconds: int

    @property
    def command(self) -> str:
        """The command, with {python} to be filled in; it prints which tests were skipped, and why."""
        limit = self.seconds - _TO_REPORT
        return f"{{python}} tests/run_processes.py --timeout {limit} {self.ranks} -q {self.tests}"


LATENCY = tuple(
    stage
    for ranks in (2, 4, 8)
    for stage in (
        LatencyStage(f"latency_{ranks}", ranks, f"{_ONE_CALL} {_VALUES}", 60),
        LatencyStage(f"latency_options_{ranks}", ranks, f"{_ONE_CALL} {_OPTIONS}", 60),
        LatencyStage(f"latency_in_flight_{ranks}", ranks, f"{_TWO_CALLS} {SUITE}", 60),
        LatencyStage(f"latency_steps_{ranks}", ranks, _STEPS, 90),
    )
)
