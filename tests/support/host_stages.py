"""The stages of ``gpu_suite.py`` for groups that span hosts: which tests run on which logical hosts.

One GPU does, which all ranks share. The stages ``hosts_*`` fit eight minutes of it together. Those that
start many programs one after the other, ``network_*``, take longer.
"""

from __future__ import annotations

import dataclasses

SECONDS = 480  # for all stages hosts_*

_VALUES, _GRADIENTS = "tests/test_suite_values.py", "tests/test_suite_gradients.py"
_TRANSFORMS = "tests/test_transforms.py tests/test_meshes.py tests/test_checkpoint_policies.py"
_HAZARDS = "tests/test_hosts_hazards.py"
_BYTES, _FAULTS = "tests/test_hosts_bytes.py", "tests/test_hosts_faults.py"
# A thousand steps under one scan, with new routing in each.
_STEPS = "tests/test_steps.py::test_every_step_is_right"
_OUT_OF_STEP = "tests/test_steps.py::test_ranks_at_different_ops"
# Chunks of one row, in rings of two slots.
_SMALL = "--chunk-bytes 8192 --lanes 1"
_LONG_QUEUES = " ".join(
    f"{_HAZARDS}::test_{name}"
    for name in ("rings_go_round", "skew_deeper_than_a_queue", "no_flag_overtakes_its_data")
)
NO_COMMAND_BUFFERS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}


@dataclasses.dataclass(frozen=True)
class HostsStage:
    """Tests on logical hosts.

    Attributes:
        shape: HOSTSxRANKS.
        tests: Arguments of pytest.
        seconds: Time after which it is ended.
        late: A late network between the hosts; else their ranks reach each other's memory.
        options: More of ``run_hosts.py``.
        environment: Environment variables.
    """

    shape: str
    tests: str
    seconds: int
    late: bool = False
    options: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """As ``gpu_suite.py --list`` shows it."""
        late = "_late" if self.late else ""
        off = "_no_command_buffers" if self.environment else ""
        return f"hosts_{self.shape}{late}{off}"

    @property
    def command(self) -> str:
        """The command, with {python} to be filled in."""
        late = "--late --delay-us 100" if self.late else ""
        # Some seconds before its time is over, the runner ends the processes and reports.
        words = ["{python} tests/run_hosts.py", self.shape, late, self.options]
        words += [f"--timeout {self.seconds - 5} -q", self.tests]
        return " ".join(filter(None, words))


HOSTS = (
    HostsStage("2x1", f"{_VALUES} {_GRADIENTS}", 60),
    HostsStage("2x1", _HAZARDS, 70, late=True),
    HostsStage("2x1", _STEPS, 30, environment=NO_COMMAND_BUFFERS),
    HostsStage("2x2", f"{_TRANSFORMS} {_STEPS} {_OUT_OF_STEP}", 60),
    HostsStage("2x2", f"{_VALUES} {_BYTES} {_FAULTS}", 85, late=True),
    HostsStage("4x2", f"{_VALUES} {_STEPS}", 45),
    HostsStage("4x2", _LONG_QUEUES, 50, late=True, options=_SMALL),
    HostsStage("2x4", f"{_STEPS} {_OUT_OF_STEP}", 35),
    HostsStage("2x4", f"{_BYTES} {_STEPS}", 45, late=True),
)
