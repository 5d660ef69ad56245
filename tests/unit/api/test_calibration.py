"""Calibration of plans by earlier runs, and the program `benchmarks/recalibrate.py`, which collects these runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api import calibration_table
from finetune_api.calibration import calibrate_memory, find_calibration
from finetune_api.gpus import GPU_TYPES
from finetune_api.status import MemoryPlan, TimePlan, WorkPlan
from finetune_api.time_plan import plan_time

from benchmarks import recalibrate

H100 = GPU_TYPES["h100-80gb"]
WORK = WorkPlan(steps=100, tokens=1, petaflop=0.989 * 360, traffic_terabytes=0)
"""Work with a planned time of 1,000 seconds on one H100, without calibration."""


def test_the_planned_time_is_computed_from_runs_on_the_same_type_of_gpu() -> None:
    table = {("h100-80gb", False): (4, 1.2, 1.0, 1.6), ("l4-24gb", False): (9, 3.0, 3.0, 3.0)}
    assert plan_time(WORK, H100, 1, table) == TimePlan(
        expected_seconds=1200, lower_seconds=800, upper_seconds=2000, calibrated=True, calibration_runs=4
    )


@pytest.mark.parametrize(
    "table", [{}, {("h100-80gb", False): (2, 1.2, 1.0, 1.6)}, {("h100-80gb", True): (9, 1.2, 1.0, 1.6)}], ids=["none", "two", "several GPUs"]
)
def test_the_planned_time_is_not_calibrated_with_fewer_than_three_runs(table: Any) -> None:
    assert plan_time(WORK, H100, 1, table) == TimePlan(expected_seconds=1000, lower_seconds=581, upper_seconds=3000)


def test_runs_on_one_gpu_and_runs_on_several_gpus_are_calibrated_separately() -> None:
    table = {("h100-80gb", True): (3, 2.0, 1.5, 3.0)}
    assert plan_time(WORK, H100, 8, table).expected_seconds == 2 * plan_time(WORK, H100, 8, {}).expected_seconds
    assert find_calibration(table, H100, has_several_gpus=False) is None


@pytest.mark.parametrize(
    ("calibration_entry", "upper_bytes", "run_count"),
    [((5, 1.0, 0.95, 1.05), 1070, 5), ((5, 0.9, 0.8, 0.92), 1000, 5), ((4, 1.1, 1.0, 1.2), 1250, 4), ((2, 1.1, 1.0, 1.2), 1150, None)],
    ids=["near", "never below the expected peak", "plan too low", "too few runs"],
)  # fmt: skip
def test_the_upper_bound_of_the_memory_covers_the_highest_measured_peak(calibration_entry: Any, upper_bytes: int, run_count: int | None) -> None:
    plan = calibrate_memory(MemoryPlan(expected_bytes=1000, upper_bytes=1150), H100, has_several_gpus=False, table={("h100-80gb", False): calibration_entry})
    assert (plan.expected_bytes, plan.upper_bytes, plan.calibration_runs) == (1000, upper_bytes, run_count)


def make_job(uid: str = "u1", **changes: Any) -> dict[str, Any]:
    """Return a job that stopped after half of its steps. The completed steps took 1.5 times the time planned for them, and the job used 0.9 times its planned
    memory.
    """
    plan = {
        "work": WORK.to_wire(), "time": {"expectedSeconds": 1, "lowerSeconds": 1, "upperSeconds": 1},
        "memory": {"expectedBytes": 1000, "upperBytes": 1100}, "measured": {"memoryBytes": 900, "seconds": 750, "steps": 50},
    }  # fmt: skip
    status = {"phase": "Succeeded", "resolved": {"device": "NVIDIA H100 80GB HBM3", "worldSize": 1}, "plan": plan | changes.pop("plan", {})}
    return {"kind": "FineTuneJob", "metadata": {"uid": uid, "name": "secret-name"}, "status": status | changes}


def test_measured_values_are_compared_with_the_uncalibrated_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration_table.TIME, ("h100-80gb", False), (3, 2.0, 2.0, 2.0))
    run = recalibrate.read_run_of_job(make_job())
    assert run is not None and (run.gpu, run.gpus, run.time_ratio, run.memory_ratio) == ("h100-80gb", 1, 1.5, 0.9)
    eight_gpu_run = recalibrate.read_run_of_job(make_job(resolved={"device": "NVIDIA H200", "worldSize": 8}, plan={"measured": {"memoryBytes": 1100}}))
    assert eight_gpu_run is not None and (eight_gpu_run.gpu, eight_gpu_run.gpus) == ("h200-141gb", 8)
    assert (eight_gpu_run.time_ratio, eight_gpu_run.memory_ratio) == (None, 1.1)


@pytest.mark.parametrize(
    "changes",
    [{"phase": "Failed"}, {"resolved": {"device": "cpu"}}, {"plan": {"measured": None}}, {"plan": {"measured": {}}}, {"plan": None}, {"phase": 7}],
)
def test_jobs_without_measured_values_are_left_out(changes: dict[str, Any]) -> None:
    job = make_job(**{**changes, "plan": changes.get("plan") or {}})
    if changes.get("plan", {}) is None:
        job["status"]["plan"] = None
    assert recalibrate.read_run_of_job(job) is None


def write_table(folder: Path, *jobs: dict[str, Any]) -> dict[str, Any]:
    """Run `benchmarks/recalibrate.py` on a list of jobs. Return the global variables of the Python module that the program writes."""
    (folder / "jobs.json").write_text(json.dumps({"kind": "List", "items": [*jobs, {"kind": "Pod"}]}))
    options = ["--runs", str(folder / "runs.jsonl"), "--table", str(folder / "table.py")]
    assert recalibrate.main([str(folder / "jobs.json"), *options]) == 0
    variables: dict[str, Any] = {}
    exec((folder / "table.py").read_text(), variables)
    return variables


def test_the_program_collects_runs_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow_job = make_job("u2", plan={"measured": {"seconds": 2000, "steps": 100}})
    first_table = write_table(tmp_path, make_job(), slow_job, make_job("u3", phase="Failed"))
    assert first_table["TIME"] == {("h100-80gb", False): (2, 1.75, 1.5, 2.0)}
    assert first_table["MEMORY"] == {("h100-80gb", False): (1, 0.9, 0.9, 0.9)}
    # The second call adds its runs to the runs of the first call. A run that the first call has already recorded is not counted twice.
    second_table = write_table(tmp_path, slow_job, make_job("u4", plan={"measured": {"seconds": 1000, "steps": 100}}))
    assert second_table["TIME"] == {("h100-80gb", False): (3, 1.5, 1.0, 2.0)}
    assert plan_time(WORK, H100, 1, second_table["TIME"]).calibration_runs == 3
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 jobs have measured values; the table follows from 3 runs"
    recorded_text = (tmp_path / "runs.jsonl").read_text()
    assert "secret-name" not in recorded_text and "u1" not in recorded_text


def test_the_committed_table_matches_the_recorded_runs() -> None:
    assert recalibrate.TABLE_FILE.read_text() == recalibrate.format_table_module(recalibrate.read_runs(recalibrate.RUNS_FILE))


def test_the_error_for_a_file_that_is_not_json_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.json").write_text("NAME  PHASE")
    assert recalibrate.main([str(tmp_path / "jobs.json")]) == 1
    assert "jobs.json is not a JSON file" in capsys.readouterr().err
