"""The load benchmark runs at a small size, which shows only that it works; its figures come from full runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_small_run_measures_everything_with_a_budget(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    argv = [sys.executable, "benchmarks/operator_load.py", "--jobs", "10", "--rounds", "1", "--clients", "4"]
    argv += ["--finished", "5", "--idle-seconds", "2", "--steady-seconds", "6", "--timeout", "60"]
    done = subprocess.run(
        [*argv, "--lenient", "--output", str(figures)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(figures.read_text())
    budgets = json.loads((ROOT / "benchmarks" / "budgets" / "operator_load.json").read_text())
    assert [one["figure"] for one in found["budgets"]] == list(budgets)
    assert len(done.stdout.splitlines()) == len(budgets)
    ours = found["burst"]["ours"]
    assert 1 <= ours["writesPerJobToPods"] <= 3
    assert 1 <= ours["writesPerJobToEnd"] <= 8
    assert found["idle"]["writes"] == 0
    assert found["restart"]["pods"] == 10
    assert found["steady"]["runningJobs"] == 10
