"""Runs the benchmark that kills a rank, the agent or the pod repeatedly, with few steps. The result must equal the result of an uninterrupted run."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest

from benchmarks import repeated_kills
from benchmarks.lib.bench_pods import open_workspace

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_run_with_many_kills_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options = argparse.Namespace(steps=60, every=2, kills=15, pause=0.05)
    run_record = repeated_kills.RunRecord()
    with open_workspace(tmp_path) as workspace:
        while not run_record.is_finished:
            repeated_kills.run_attempt(workspace, options, run_record, random.Random(run_record.attempt))
        figures = repeated_kills.compute_figures(workspace, options, run_record)
    assert figures["curveEqual"] and figures["statesCompared"] >= 60
    assert run_record.kill_count > 5 and sum(run_record.codes.values()) == run_record.attempt
    assert {code.split()[1] for code in run_record.codes} <= {"0", "74", "75", "-9"}, run_record.codes
    assert figures["stepsLost"]["most"] <= 3 * options.every
