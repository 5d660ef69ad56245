"""Computes the metric files of a run from its log entries, and defines the fields of these files.

`step_metrics.json`, `epoch_metrics.json` and `final_metrics.json` have the same keys as the files of ATMECS-IT/finetuning;
`training_metrics.json` and `performance_summary.json` have the same keys as those of Danielmark001/llm-finetuning-lora-spectrum. Each value
belongs to the step at which it was measured. A value that was not measured or is not finite is written as null. Times are UTC.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.log_entry import LineKind, LogEntry, log_to_jsonl, select_training_lines
from finetune_trainer.results.run_names import time_folder_name

EPOCH_TOLERANCE = 1e-6
"""Largest rounding error of logged epochs. At the end of an epoch, the logged epoch may be slightly below or above the whole number."""


class FileModel(BaseModel):
    """The contents of a JSON file. The fields have the names of the JSON keys. Fields that are None are written as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def to_json(self) -> str:
        """Return the contents of the file."""
        return self.model_dump_json(indent=2) + "\n"


class RunDescription(BaseModel):
    """The facts about a run that the metric files contain, but its log entries do not."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str = Field(description="Base model, as the user wrote it, without secrets.")
    technique: str = Field(description="Method, such as `lora`.")
    learning_rate: str | None = Field(default=None, description="Learning rate, as the user wrote it, such as `3e-4`.")
    batch_size: str | None = Field(default=None, description="Rows of one micro-batch of a rank.")
    epochs: str | None = Field(default=None, description="Number of epochs. None if the run has a maximum number of steps instead.")
    lora_r: str | None = Field(default=None, description="Rank of the adapter. None for methods without a rank.")
    lora_alpha: str | None = Field(default=None, description="Scaling of the adapter. None for methods without scaling.")
    dataset_type: str | None = Field(default=None, description="Format of the data set, such as `mcq`.")
    metrics_directory: str = Field(
        default="", description="Folder of the metric files, relative to `storage.uri`. If empty, the folder is `storage.uri` itself."
    )
    started_at: datetime = Field(description="Time at which the first attempt of the run started.")
    completed_at: datetime = Field(description="Time at which the last attempt had saved the final model.")
    training_seconds: float | None = Field(
        default=None, ge=0, description="Seconds of training over all attempts. None if the log entries contain this value."
    )
    trainable_parameters: int | None = Field(default=None, ge=0, description="Number of trained parameters.")
    total_parameters: int | None = Field(default=None, ge=0, description="Number of all parameters, including adapters.")


class StepMetrics(FileModel):
    """One entry of `step_metrics.json`: one training line."""

    step: int = Field(description="Optimizer steps done.")
    loss: float | None = Field(description="Mean training loss of the steps since the previous entry.")
    learning_rate: float | None = Field(description="Learning rate of the step.")
    grad_norm: float | None = Field(description="Gradient norm of the step before clipping.")
    timestamp: str | None = Field(description="Time of the line, ISO 8601.")


class EpochMetrics(FileModel):
    """One entry of `epoch_metrics.json`. The last epoch may be incomplete."""

    epoch: int = Field(description="Number of the epoch; the first is 1.")
    epoch_time: float | None = Field(
        description="Duration of the epoch in seconds, including its evaluations. Interpolated if no line was logged at the end of the epoch."
    )
    train_loss: float | None = Field(
        description="Mean training loss over the steps of the epoch. The loss of a line over two epochs counts in both, in proportion to the steps."
    )
    eval_loss: float | None = Field(description="Validation loss of the last evaluation within the epoch.")
    timestamp: str | None = Field(description="Time of the last line within the epoch, ISO 8601.")
    eval_accuracy: float | None = Field(description="Token accuracy of the last evaluation within the epoch.")
    eval_f1: float | None = Field(description="Weighted F1 score of the last evaluation within the epoch.")
    eval_precision: float | None = Field(description="Weighted precision of the last evaluation within the epoch.")
    eval_recall: float | None = Field(description="Weighted recall of the last evaluation within the epoch.")


class TrainingSummary(FileModel):
    """`training_summary` of `final_metrics.json`.

    A `final_...` value is that of the last epoch in which the metric was measured. A `best_...` value is the best of all epochs: the lowest loss, or
    the highest value of any other metric.
    """

    total_steps: int = Field(description="Optimizer steps of the run.")
    total_epochs: int = Field(description="Number of entries in `epoch_metrics.json`.")
    total_training_time: float | None = Field(description="Seconds of training over all attempts.")
    avg_epoch_time: float | None = Field(description="Mean of `epoch_time` over the epochs.")
    final_train_loss: float | None
    final_eval_loss: float | None
    best_train_loss: float | None
    best_eval_loss: float | None
    best_eval_accuracy: float | None
    final_eval_accuracy: float | None
    best_eval_f1: float | None
    final_eval_f1: float | None
    best_eval_precision: float | None
    final_eval_precision: float | None
    best_eval_recall: float | None
    final_eval_recall: float | None


class Configuration(FileModel):
    """`configuration` of `final_metrics.json`. Numbers are strings, as the user wrote them."""

    model: str
    technique: str
    learning_rate: str | None
    batch_size: str | None
    epochs: str | None
    lora_r: str | None
    lora_alpha: str | None
    dataset_type: str | None


class MetricsFiles(FileModel):
    """`metrics_files` of `final_metrics.json`: paths relative to `storage.uri`."""

    step_metrics: str
    epoch_metrics: str
    final_metrics: str


class RunInfo(FileModel):
    """`run_info` of `final_metrics.json`."""

    timestamp: str = Field(description="Start of the run as YYYYMMDD_HHMMSS.")
    metrics_directory: str = Field(description="Folder of the metric files, relative to `storage.uri`.")
    completed_at: str = Field(description="End of the run, ISO 8601.")


class FinalMetrics(FileModel):
    """The contents of `final_metrics.json`."""

    training_summary: TrainingSummary
    configuration: Configuration
    metrics_files: MetricsFiles
    run_info: RunInfo


class ResourceUsage(FileModel):
    """One entry of `resource_usage` in `training_metrics.json`."""

    step: int = Field(description="Optimizer steps done.")
    gpu_memory_gb: float | None = Field(description="Peak GPU memory of rank 0 in units of 1e9 bytes. null on CPUs.")
    loss: float | None = Field(description="Mean training loss of the steps since the previous entry.")


class TrainingMetrics(FileModel):
    """The contents of `training_metrics.json`. Each of the three lists in the file has one entry for each training line."""

    loss_history: list[float | None] = Field(description="Training losses.")
    resource_usage: list[ResourceUsage]
    step_times: list[float | None] = Field(
        description="Mean seconds of an optimizer step since the previous training line, without evaluations."
    )


class PerformanceSummary(FileModel):
    """The contents of `performance_summary.json`."""

    training_time_minutes: float | None = Field(description="Minutes of training over all attempts.")
    trainable_parameters: int | None = Field(description="Number of trained parameters.")
    total_parameters: int | None = Field(description="Number of all parameters, including adapters.")
    parameter_efficiency: float | None = Field(description="Trained parameters divided by all parameters.")
    pruning: None = Field(default=None, description="Always null, because the trainer does not prune models.")


def build_metric_files(entries: Sequence[LogEntry], run: RunDescription) -> dict[ResultFile, str]:
    """Return the contents of each metric file. `entries`: the log entries of the whole run (see `join_attempts`)."""
    epoch_metrics = compute_epoch_metrics(entries)
    return {
        ResultFile.STEP_METRICS: _list_to_json(list[StepMetrics], compute_step_metrics(entries)),
        ResultFile.EPOCH_METRICS: _list_to_json(list[EpochMetrics], epoch_metrics),
        ResultFile.FINAL_METRICS: compute_final_metrics(entries, epoch_metrics, run).to_json(),
        ResultFile.TRAINING_METRICS: compute_training_metrics(entries).to_json(),
        ResultFile.PERFORMANCE_SUMMARY: compute_performance_summary(entries, run).to_json(),
        ResultFile.LOG: log_to_jsonl(entries),
    }


def compute_step_metrics(entries: Iterable[LogEntry]) -> list[StepMetrics]:
    """Compute `step_metrics.json`: one entry for each training line."""
    return [
        StepMetrics(
            step=line.step, loss=line.loss, learning_rate=line.learning_rate, grad_norm=line.grad_norm, timestamp=_format_unix_time(line.unix_time),
        )
        for line in select_training_lines(entries)
    ]  # fmt: skip


def compute_epoch_metrics(entries: Sequence[LogEntry]) -> list[EpochMetrics]:
    """Compute `epoch_metrics.json`. Log entries of the test set, the summary, and log entries without an epoch are ignored."""
    lines_with_epoch = [line for line in entries if line.epoch is not None and line.kind in (LineKind.TRAINING, LineKind.EVALUATION)]
    lines_by_epoch: dict[int, list[LogEntry]] = defaultdict(list)
    for line in lines_with_epoch:
        lines_by_epoch[_compute_epoch_number(line)].append(line)
    loss_by_epoch, time_curve = _compute_mean_loss_by_epoch(lines_with_epoch), _TimeCurve(lines_with_epoch)
    return [
        _build_epoch_entry(number, lines_by_epoch[number], time_curve.seconds_of_epoch(number), loss_by_epoch.get(number))
        for number in range(1, max(lines_by_epoch, default=0) + 1)
    ]


def _build_epoch_entry(number: int, lines: Sequence[LogEntry], seconds: float | None, loss: float | None) -> EpochMetrics:
    evaluations = [line for line in lines if line.kind is LineKind.EVALUATION]
    evaluation = evaluations[-1] if evaluations else LogEntry(step=0)
    return EpochMetrics(
        epoch=number, epoch_time=seconds, train_loss=loss, timestamp=_format_unix_time(lines[-1].unix_time) if lines else None,
        eval_loss=evaluation.eval_loss, eval_accuracy=evaluation.eval_mean_token_accuracy, eval_f1=evaluation.eval_f1,
        eval_precision=evaluation.eval_precision, eval_recall=evaluation.eval_recall,
    )  # fmt: skip


def compute_final_metrics(entries: Sequence[LogEntry], epochs: Sequence[EpochMetrics], run: RunDescription) -> FinalMetrics:
    """Compute `final_metrics.json`."""

    def list_values(name: str) -> list[float]:
        return [value for epoch in epochs if (value := getattr(epoch, name)) is not None]

    def build_final_and_best(name: str, best_of: Callable[..., float | None]) -> dict[str, float | None]:
        measured_values = list_values(name)
        return {f"final_{name}": measured_values[-1] if measured_values else None, f"best_{name}": best_of(measured_values, default=None)}

    metrics: dict[str, float | None] = {}
    for name in ("train_loss", "eval_loss"):
        metrics |= build_final_and_best(name, min)
    for name in ("eval_accuracy", "eval_f1", "eval_precision", "eval_recall"):
        metrics |= build_final_and_best(name, max)
    epoch_times = list_values("epoch_time")
    folder = run.metrics_directory.strip("/")
    prefix = f"{folder}/" if folder else ""
    return FinalMetrics(
        training_summary=TrainingSummary(
            total_steps=max((entry.step for entry in entries), default=0), total_epochs=len(epochs),
            total_training_time=_find_total_seconds(entries, run),
            avg_epoch_time=sum(epoch_times) / len(epoch_times) if epoch_times else None,
            **metrics,
        ),
        configuration=Configuration(**{name: getattr(run, name) for name in Configuration.model_fields}),
        metrics_files=MetricsFiles(
            step_metrics=prefix + ResultFile.STEP_METRICS, epoch_metrics=prefix + ResultFile.EPOCH_METRICS,
            final_metrics=prefix + ResultFile.FINAL_METRICS,
        ),
        run_info=RunInfo(
            timestamp=time_folder_name(run.started_at), metrics_directory=folder or ".",
            completed_at=run.completed_at.astimezone(UTC).isoformat(timespec="milliseconds"),
        ),
    )  # fmt: skip


def compute_training_metrics(entries: Sequence[LogEntry]) -> TrainingMetrics:
    """Compute `training_metrics.json`."""
    lines = list(select_training_lines(entries))
    return TrainingMetrics(
        loss_history=[line.loss for line in lines],
        resource_usage=[ResourceUsage(step=line.step, gpu_memory_gb=line.peak_memory_gb, loss=line.loss) for line in lines],
        step_times=_compute_step_times(entries),
    )


def compute_performance_summary(entries: Sequence[LogEntry], run: RunDescription) -> PerformanceSummary:
    """Compute `performance_summary.json`."""
    seconds = _find_total_seconds(entries, run)
    trained_count, total_count = run.trainable_parameters, run.total_parameters
    return PerformanceSummary(
        training_time_minutes=None if seconds is None else seconds / 60, trainable_parameters=trained_count, total_parameters=total_count,
        parameter_efficiency=trained_count / total_count if trained_count is not None and total_count else None,
    )  # fmt: skip


def _compute_mean_loss_by_epoch(lines: Iterable[LogEntry]) -> dict[int, float]:
    """Return the mean training loss of each epoch, by the epoch's number.

    The loss in a training line is a mean over the steps since the previous training line. In the mean of an epoch, the weight of a line is the share
    of these steps that lies in the epoch.
    """
    weighted_sum_by_epoch: dict[int, float] = defaultdict(float)
    weight_by_epoch: dict[int, float] = defaultdict(float)
    line_start = 0.0
    for line in select_training_lines(lines):
        line_end = line.epoch or 0.0
        for number in range(math.floor(line_start + EPOCH_TOLERANCE) + 1, _compute_epoch_number(line) + 1):
            share = min(line_end, number) - max(line_start, number - 1)
            if line.loss is not None and share > 0:
                weighted_sum_by_epoch[number] += share * line.loss
                weight_by_epoch[number] += share
        line_start = line_end
    return {number: weighted_sum_by_epoch[number] / weight for number, weight in weight_by_epoch.items()}


class _TimeCurve:
    """The seconds of training as a function of the epoch. Between two logged lines, the seconds are interpolated linearly."""

    def __init__(self, lines: Iterable[LogEntry]) -> None:
        points = [(line.epoch or 0.0, line.training_seconds) for line in lines if line.training_seconds is not None]
        self._epochs = [0.0, *(epoch for epoch, _ in points)]
        self._seconds = [0.0, *(seconds for _, seconds in points)]

    def seconds_of_epoch(self, number: int) -> float | None:
        """Return the duration in seconds of the epoch with this number. The last epoch ends at the last logged line. None if no seconds were logged."""
        return self._seconds_at(number) - self._seconds_at(number - 1) if len(self._epochs) > 1 else None

    def _seconds_at(self, epoch: float) -> float:
        """Return the seconds of training until `epoch`.

        If several lines have this epoch, the last line is used, because the evaluation at the end of an epoch counts as part of the epoch.
        """
        index_after = bisect_right(self._epochs, epoch + EPOCH_TOLERANCE)
        index_before = index_after - 1
        if index_after == len(self._epochs) or epoch <= self._epochs[index_before]:
            return self._seconds[index_before]
        share = (epoch - self._epochs[index_before]) / (self._epochs[index_after] - self._epochs[index_before])
        return self._seconds[index_before] + share * (self._seconds[index_after] - self._seconds[index_before])


def _compute_step_times(entries: Sequence[LogEntry]) -> list[float | None]:
    """Return, for each training line, the mean seconds of an optimizer step since the previous training line, without evaluations."""
    times: list[float | None] = []
    last_step, last_seconds, evaluation_seconds = 0, 0.0, 0.0
    for entry in entries:
        if entry.kind is LineKind.EVALUATION:
            evaluation_seconds += entry.eval_runtime or 0.0
        if entry.kind is not LineKind.TRAINING:
            continue
        steps, seconds = entry.step - last_step, entry.training_seconds
        if seconds is None or steps <= 0:
            times.append(None)
        else:
            times.append(max(0.0, seconds - last_seconds - evaluation_seconds) / steps)
        last_step, last_seconds, evaluation_seconds = entry.step, last_seconds if seconds is None else seconds, 0.0
    return times


def _find_total_seconds(entries: Sequence[LogEntry], run: RunDescription) -> float | None:
    if run.training_seconds is not None:
        return run.training_seconds
    return max((entry.training_seconds for entry in entries if entry.training_seconds is not None), default=None)


def _compute_epoch_number(line: LogEntry) -> int:
    """Return the number of the epoch that a line belongs to. The line at the end of epoch 1 was logged with epoch 1.0 and belongs to epoch 1."""
    return math.ceil((line.epoch or 0.0) - EPOCH_TOLERANCE)


def _format_unix_time(unix_time: float | None) -> str | None:
    return None if unix_time is None else datetime.fromtimestamp(unix_time, UTC).isoformat(timespec="milliseconds")


def _list_to_json(list_type: Any, items: Sequence[FileModel]) -> str:
    return TypeAdapter(list_type).dump_json(list(items), indent=2).decode() + "\n"
