"""Finished tasks are recorded, and the results are computed from the records."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_api.benchmarks import BenchmarkKind
from finetune_api.spec.results import Benchmark
from finetune_trainer.benchmarks.harness import _to_measurements
from finetune_trainer.benchmarks.plan import BenchmarkTask
from finetune_trainer.benchmarks.records import (
    FinishedTasks,
    Measurement,
    TaskRecord,
    combine_results,
    to_status_results,
    write_results,
)


def make_harness_task(folder: Path, *, uses_base: bool = False, **fields: object) -> BenchmarkTask:
    benchmark = Benchmark.model_validate({"name": "lm-eval", "compareWithBase": True} | fields)
    return BenchmarkTask(BenchmarkKind.HARNESS, benchmark, "evaluation.benchmarks[0]", "sums", folder, uses_base)


def test_a_record_is_only_read_for_the_same_task_settings_and_files(tmp_path: Path) -> None:
    data_folder, records_folder = tmp_path / "data", tmp_path / "records"
    data_folder.mkdir()
    records_folder.mkdir()
    (data_folder / "sums.yaml").write_text("task: sums")
    finished_tasks, record = FinishedTasks(records_folder), TaskRecord(measurements=[Measurement(task="sums", metric="acc", value=0.5)])
    finished_tasks.write(make_harness_task(data_folder), record)
    assert finished_tasks.read(make_harness_task(data_folder)) == record
    assert finished_tasks.read(make_harness_task(data_folder, uses_base=True)) is None
    assert finished_tasks.read(make_harness_task(data_folder, limit=3)) is None
    assert finished_tasks.read(make_harness_task(data_folder, tasks=["sums", "more"])) == record
    (data_folder / "sums.yaml").write_text("task: SUMS")  # the same size
    assert finished_tasks.read(make_harness_task(data_folder)) is None


def test_a_damaged_record_is_not_read(tmp_path: Path) -> None:
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    (tmp_path / "records").mkdir()
    finished_tasks = FinishedTasks(tmp_path / "records")
    finished_tasks.write(make_harness_task(data_folder), TaskRecord())
    (record_file,) = (tmp_path / "records").iterdir()
    record_file.write_text("{")
    assert finished_tasks.read(make_harness_task(data_folder)) is None


HARNESS_RESULTS = {
    "results": {
        "all": {"alias": "all", "acc,none": 0.75, "acc_stderr,none": 0.1},
        "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact,strict": 0.25, "exact_stderr,strict": 0.2, "bypass,none": 999j},
    },
    "groups": {"all": {"alias": "all", "acc,none": 0.75, "acc_stderr,none": 0.1}},
    "n-samples": {"sums": {"original": 9, "effective": 4}},
}


def test_the_harness_s_results_become_measurements() -> None:
    assert _to_measurements(HARNESS_RESULTS) == [
        Measurement(task="all", metric="acc", value=0.75, stderr=0.1),
        Measurement(task="sums", metric="acc", value=0.5, samples=4, is_part_of_group=True),
        Measurement(task="sums", metric="exact,strict", value=0.25, stderr=0.2, samples=4, is_part_of_group=True),
        Measurement(task="sums", metric="bypass", samples=4, reason="the task reports no number for bypass", is_part_of_group=True),
    ]


def test_each_result_also_has_the_base_model_s_value_and_the_difference(tmp_path: Path) -> None:
    trained_task, base_task = make_harness_task(tmp_path), make_harness_task(tmp_path, uses_base=True)
    base_measurement = Measurement(task="all", metric="acc", value=1.0, stderr=0.0)
    records = [TaskRecord(measurements=_to_measurements(HARNESS_RESULTS)), TaskRecord(measurements=[base_measurement])]
    entries = combine_results([trained_task, base_task], records)
    assert entries[0] == {
        "name": "lm-eval", "task": "all", "group": None, "metric": "acc", "value": 0.75, "stderr": 0.1, "samples": None, "base": 1.0, "baseStderr": 0.0,
        "difference": -0.25, "reason": None,
    }  # fmt: skip
    assert entries[1]["group"] == "sums" and entries[1]["base"] is None and entries[1]["difference"] is None
    (shown_result,) = to_status_results(entries)
    assert shown_result.to_wire() == {"name": "lm-eval", "task": "all", "metric": "acc", "value": 0.75, "stderr": 0.1, "base": 1.0, "difference": -0.25}
    write_results(tmp_path, [trained_task, base_task], entries)
    assert json.loads((tmp_path / "lm_eval_results.json").read_text())["sums"] == {"acc": 0.5, "exact,strict": 0.25, "bypass": None}
