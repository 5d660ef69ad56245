"""Pytest plugin for the fault matrix: the marker `row` names the rows of the matrix that a test covers, and a summary lists which rows passed and which
failed.
"""

from __future__ import annotations

import sys

import pytest

_counts_by_row: dict[int, dict[str, int]] = {}


def register_plugin(config: pytest.Config) -> None:
    """Register the plugin, unless it is already registered. Call this function in the `pytest_configure` of a conftest."""
    name = "fault-rows"
    if config.pluginmanager.has_plugin(name):
        return
    config.pluginmanager.register(sys.modules[__name__], name)
    config.addinivalue_line(
        "markers", "row(*numbers): rows of the fault matrix (docs/guides/faults.md) covered by this test"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count one outcome for each row that the test covers: the outcome of the test function, or a failed setup or teardown."""
    if report.when != "call" and report.passed:
        return
    for key, value in report.user_properties:
        if key == "row":
            counts = _counts_by_row.setdefault(int(str(value)), {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("row"):
        for number in mark.args:
            if ("row", number) not in item.user_properties:
                item.user_properties.append(("row", number))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the numbers of the passed rows and of the failed rows."""
    if not _counts_by_row:
        return
    failed_rows = sorted(row for row, counts in _counts_by_row.items() if counts.get("failed"))
    passed_rows = sorted(row for row, counts in _counts_by_row.items() if not counts.get("failed") and counts.get("passed"))
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(f"passed rows: {', '.join(map(str, passed_rows)) or 'none'}")
    terminalreporter.write_line(f"failed rows: {', '.join(map(str, failed_rows)) or 'none'}")
