"""The load benchmark runs from end to end at a size that proves nothing but that: figures are read from full runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_small_run_measures_everything_that_has_a_budget(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    argv = [sys.executable, "benchmarks/operator_load.py", "--jobs", "10", "--rounds", "1", "--clients", "4"]
    argv += ["--idle-seconds", "2", "--steady-seconds", "6", "--lenient", "--output", str(figures), "--timeout", "120"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert len(done.stdout.splitlines()) == len(found["budgets"])
    ours = found["burst"]["ours"]
    assert ours["writesPerJobToPods"] <= 3
    assert 1 <= ours["writesPerJobOfALife"] <= 8
    assert found["idle"]["writes"] == 0
    assert found["steady"]["runningJobs"] == 10
