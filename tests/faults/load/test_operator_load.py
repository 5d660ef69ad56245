"""Runs the operator's load benchmark with few jobs, to check that the benchmark works.

The published figures come from runs of the benchmark with all of its jobs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_small_run_measures_every_figure_that_has_a_budget(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    argv = [sys.executable, "benchmarks/operator_load.py", "--jobs", "10", "--rounds", "1", "--clients", "4"]
    argv += ["--finished", "5", "--idle-seconds", "2", "--steady-seconds", "6", "--timeout", "60"]
    process = subprocess.run(
        [*argv, "--lenient", "--output", str(figures)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(figures.read_text())
    budgets = json.loads((ROOT / "benchmarks" / "budgets" / "operator_load.json").read_text())
    assert [budget["figure"] for budget in results["budgets"]] == list(budgets)
    assert len(process.stdout.splitlines()) == len(budgets)
    operator_figures = results["burst"]["ours"]
    assert 1 <= operator_figures["writesPerJobToPods"] <= 3
    assert 1 <= operator_figures["writesPerJobToEnd"] <= 8
    assert results["idle"]["writes"] == 0
    assert results["restart"]["pods"] == 10
    assert results["steady"]["runningJobs"] == 10
