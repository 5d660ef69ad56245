"""Which row of the fault matrix a test shows, and the table that is printed at the end of a run."""

from __future__ import annotations

import sys

import pytest

_outcomes: dict[int, dict[str, int]] = {}


def register(config: pytest.Config) -> None:
    """For the `pytest_configure` of a conftest; several may call it."""
    name = "fault-rows"
    if config.pluginmanager.has_plugin(name):
        return
    config.pluginmanager.register(sys.modules[__name__], name)
    config.addinivalue_line(
        "markers", "row(*numbers): rows of the fault matrix (docs/guides/faults.md) shown by this test"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count one outcome for each row of the test: its call, or a failure before or after."""
    if report.when != "call" and report.passed:
        return
    for key, value in report.user_properties:
        if key == "row":
            counts = _outcomes.setdefault(int(str(value)), {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("row"):
        for number in mark.args:
            if ("row", number) not in item.user_properties:
                item.user_properties.append(("row", number))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: which rows held and which did not."""
    if not _outcomes:
        return
    broken = sorted(row for row, counts in _outcomes.items() if counts.get("failed"))
    held = sorted(row for row, counts in _outcomes.items() if not counts.get("failed") and counts.get("passed"))
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(f"rows that held: {', '.join(map(str, held)) or 'none'}")
    terminalreporter.write_line(f"rows that broke: {', '.join(map(str, broken)) or 'none'}")
