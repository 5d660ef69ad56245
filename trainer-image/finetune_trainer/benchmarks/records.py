"""Stores the result of each finished task, and computes the result files and the status from all results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_api.base import LenientModel
from finetune_api.benchmarks import BenchmarkKind
from finetune_api.status import BenchmarkResult
from pydantic import Field

from finetune_trainer.benchmarks.domain_files import DOMAIN_FILE_PREFIX
from finetune_trainer.benchmarks.plan import BenchmarkTask
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.files import replace_file

RESULTS_FILE = "benchmark_results.json"
HARNESS_FILE = "lm_eval_results.json"
DOMAIN_RESULT_KEYS = {"bleu": "bleu", "rouge1": "rouge1_f", "rouge2": "rouge2_f", "rougeL": "rougeL_f"}
"""Metrics of a domain, with their names in the domain's result file."""


class Measurement(LenientModel):
    """One metric of a task, or of a task within a group of tasks."""

    task: str
    metric: str = Field(description="Name of the metric, with the harness's filter after a comma if the task has filters.")
    value: float | None = None
    stderr: float | None = Field(default=None, description="Standard error of the value.")
    samples: int | None = Field(default=None, description="Number of questions.")
    reason: str | None = Field(default=None, description="Why there is no value.")
    is_part_of_group: bool = Field(default=False, description="Whether the task belongs to a group of tasks, and the metrics of the group are also reported.")


class TaskRecord(LenientModel):
    """The result of one task with one model."""

    measurements: list[Measurement] = Field(default_factory=list)
    prompts: list[str] = Field(default_factory=list, description="Questions of a rating sheet.")
    answers: list[str] = Field(default_factory=list, description="Answers of the model to the questions in `prompts`.")


class FinishedTasks:
    """Stores the record of each finished task in a file, which the supervisor uploads. A repeated stage skips the tasks that have a record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, task: BenchmarkTask) -> TaskRecord | None:
        """Return the record of a task, or None if the task is not finished."""
        path = self._build_record_path(task)
        try:
            return TaskRecord.model_validate_json(path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, task: BenchmarkTask, record: TaskRecord) -> None:
        """Write the record atomically, because the supervisor may read the folder at any time."""
        with replace_file(self._build_record_path(task)) as partial_file:
            partial_file.write_text(record.model_dump_json(by_alias=True))

    def _build_record_path(self, task: BenchmarkTask) -> Path:
        """Return the path of a task's record. The file name is a hash of all inputs of the task except the model.

        The hash need not depend on the model, because the supervisor restores only records of the same model.
        """
        settings = task.benchmark.model_dump(mode="json", exclude={"tasks", "compare_with_base"})
        identity = json.dumps([settings, task.name, task.uses_base, _list_file_digests(task.folder)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def _list_file_digests(folder: Path | None) -> list[tuple[str, str]]:
    """Return the paths and the sha256 of all files below a folder."""
    return sorted((path.relative_to(folder).as_posix(), sha256_file(path)) for path in folder.rglob("*") if path.is_file()) if folder else []


# ---- results of all tasks ----


def combine_results(tasks: Sequence[BenchmarkTask], records: Sequence[TaskRecord]) -> list[dict[str, Any]]:
    """Return one entry for each metric of each task, in the order of the tasks. Each entry has the values of the trained and the base model."""
    record_by_task = dict(zip(((task.field, task.name, task.uses_base) for task in tasks), records, strict=True))
    entries = []
    for task in tasks:
        if task.uses_base:
            continue
        base_record = record_by_task.get((task.field, task.name, True))
        base_measurements = {(measurement.task, measurement.metric): measurement for measurement in base_record.measurements} if base_record else {}
        entries += [
            _build_result_entry(task, measurement, base_measurements.get((measurement.task, measurement.metric)))
            for measurement in record_by_task[task.field, task.name, False].measurements
        ]
    return entries


def _build_result_entry(task: BenchmarkTask, trained_measurement: Measurement, base_measurement: Measurement | None) -> dict[str, Any]:
    has_both_values = base_measurement is not None and base_measurement.value is not None and trained_measurement.value is not None
    return {
        "name": task.benchmark.name, "task": trained_measurement.task, "group": task.name if trained_measurement.is_part_of_group else None,
        "metric": trained_measurement.metric,
        "value": trained_measurement.value, "stderr": trained_measurement.stderr, "samples": trained_measurement.samples,
        "base": base_measurement.value if base_measurement else None, "baseStderr": base_measurement.stderr if base_measurement else None,
        "difference": trained_measurement.value - base_measurement.value if has_both_values else None,  # type: ignore[operator,union-attr]
        "reason": trained_measurement.reason or (base_measurement.reason if base_measurement else None),
    }  # fmt: skip


def to_status_results(entries: Iterable[dict[str, Any]]) -> list[BenchmarkResult]:
    """Return the results for the status. For a group of tasks, only the group's metrics are included."""
    return [
        BenchmarkResult(**{name: entry[name] for name in ("name", "task", "metric", "value", "stderr", "base", "difference", "reason")})
        for entry in entries
        if entry["group"] is None
    ]


def write_results(folder: Path, tasks: Sequence[BenchmarkTask], entries: Sequence[dict[str, Any]]) -> None:
    """Write `benchmark_results.json`. Also write the results of the harness and of domains to files with the names that other tools expect."""
    (folder / RESULTS_FILE).write_text(json.dumps({"benchmarks": entries}, indent=1))
    harness_benchmarks = {task.benchmark.name for task in tasks if task.kind is BenchmarkKind.HARNESS}
    harness_values: dict[str, dict[str, float | None]] = {}
    for entry in entries:
        if entry["name"] in harness_benchmarks:
            harness_values.setdefault(entry["task"], {})[entry["metric"]] = entry["value"]
    if harness_values:
        (folder / HARNESS_FILE).write_text(json.dumps(harness_values, indent=1))
    for task in tasks:
        if task.kind is BenchmarkKind.DOMAINS and not task.uses_base:
            values_by_metric = {entry["metric"]: entry["value"] for entry in entries if (entry["name"], entry["task"]) == (task.benchmark.name, task.name)}
            values_by_result_key = {DOMAIN_RESULT_KEYS.get(metric, metric): value for metric, value in values_by_metric.items()}
            (folder / f"{DOMAIN_FILE_PREFIX}{task.name}_results.json").write_text(json.dumps(values_by_result_key, indent=1))


def finite_number_or_none(value: Any) -> float | None:
    """Return the value if it is a finite number. Return None for all other values, such as the harness's "N/A"."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
