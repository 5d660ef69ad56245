"""A pytest plugin that writes the result of each test as soon as the test ends, so that an interrupted run keeps its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REPORT_VARIABLE = "GPU_TEST_REPORT"
"""Environment variable with the path of the report: one JSON object per line."""
MAX_ERROR_CHARACTERS = 3000
"""Maximum number of characters of an error text in the report."""


def pytest_runtest_logreport(report: Any) -> None:
    """Append the result of one test to the report. A setup or teardown that passed is left out."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    test_result = {"name": report.nodeid.rpartition("::")[2], "status": report.outcome, "seconds": round(report.duration, 1)}
    if report.outcome != "passed":
        test_result["text"] = report.longreprtext[-MAX_ERROR_CHARACTERS:]
    with Path(os.environ[REPORT_VARIABLE]).open("a") as stream:
        stream.write(json.dumps(test_result) + "\n")


def read_report(report_file: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a report by test name."""
    test_results = [json.loads(line) for line in report_file.read_text().splitlines()]
    return {test_result.pop("name"): test_result for test_result in test_results}
