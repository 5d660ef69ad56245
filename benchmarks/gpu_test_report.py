"""A plugin of pytest that writes the result of each test as soon as the test ends, so that an interrupted run keeps its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "GPU_TEST_REPORT"
"""Environment variable with the path of the report: one JSON object per line."""
LONGEST_TEXT = 3000


def pytest_runtest_logreport(report: Any) -> None:
    """Add the result of one test. A setup or teardown that passed is not a result."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"name": report.nodeid.rpartition("::")[2], "status": report.outcome, "seconds": round(report.duration, 1)}
    if report.outcome != "passed":
        line["text"] = report.longreprtext[-LONGEST_TEXT:]
    with Path(os.environ[VARIABLE]).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results by the names of the tests."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line.pop("name"): line for line in lines}
