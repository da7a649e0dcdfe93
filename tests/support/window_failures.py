"""A plug-in of pytest that shows a failure when it happens.

pytest itself shows failures at the end, which a stage of the window may not reach.
"""

from __future__ import annotations

import pytest

_MOST_LINES = 60
_terminals: list[pytest.TerminalReporter] = []


@pytest.hookimpl(trylast=True)  # after the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # workers of xdist have none
        _terminals.append(reporter)


def pytest_unconfigure() -> None:
    _terminals.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.failed:
        return
    lines = f"{report.nodeid}, {report.when}:\n{report.longreprtext}".splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES // 2], "...", *lines[-_MOST_LINES // 2 :]]
    for terminal in _terminals:
        for line in ["", *lines]:
            terminal.write_line(f"| {line}")  # so that no reader of outcomes takes it for one
