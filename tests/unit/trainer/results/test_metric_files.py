"""The metric files have the contents that were computed by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.log_entry import LogEntry, join_attempts
from finetune_trainer.results.metric_files import (
    RunDescription,
    build_metric_files,
    compute_epoch_metrics,
    compute_final_metrics,
    compute_step_metrics,
    compute_training_metrics,
)
from pydantic import ValidationError

START = 1760030516.0
"""2025-10-09 17:21:56 UTC, the start of the sample run of ATMECS-IT/finetuning."""
RUN = RunDescription(
    model="gpt2", technique="lora", learning_rate="3e-4", batch_size="1", epochs="2", lora_r="8", lora_alpha="16", dataset_type="mcq_jsonl",
    metrics_directory="results/default_project/gpt2/20251009_172156/", started_at=datetime.fromtimestamp(START, UTC),
    completed_at=datetime.fromtimestamp(START + 100.25, timezone(timedelta(hours=2))), trainable_parameters=25, total_parameters=1000,
)  # fmt: skip


def make_entries(*lines: dict[str, Any]) -> list[LogEntry]:
    return [LogEntry.model_validate(line) for line in lines]


def make_training_line(step: int, epoch: float, loss: float | None, seconds: float, **values: Any) -> dict[str, Any]:
    """Return a training line that was logged after `seconds` of training."""
    return {
        "step": step, "epoch": epoch, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.001, "unix_time": START + seconds,
        "training_seconds": seconds, **values,
    }  # fmt: skip


def make_evaluation_line(step: int, epoch: float, loss: float, seconds: float, **values: Any) -> dict[str, Any]:
    """Return the line of an evaluation that took two seconds and ended after `seconds` of training."""
    return {
        "step": step, "epoch": epoch, "eval_loss": loss, "eval_runtime": 2.0, "unix_time": START + seconds, "training_seconds": seconds,
        "eval_mean_token_accuracy": 0.5, "eval_precision": 0.25, "eval_recall": 0.125, "eval_f1": 0.375, **values,
    }  # fmt: skip


TWO_EPOCHS = make_entries(
    make_training_line(2, 0.5, 4.0, 10.0, peak_memory_gb=1.5, tokens_per_second=99.0),
    make_training_line(4, 1.0, 2.0, 20.0, peak_memory_gb=1.75),
    make_evaluation_line(4, 1.0, 3.0, 22.0),
    make_training_line(6, 1.5, float("nan"), 32.0, grad_norm=float("inf")),
    make_training_line(8, 2.0, 1.0, 42.0),
    make_evaluation_line(8, 2.0, 3.5, 44.0, eval_mean_token_accuracy=0.75, eval_precision="nan"),
    {"step": 8, "epoch": 2.0, "train_runtime": 44.0, "train_loss": 2.0, "unix_time": START + 44, "training_seconds": 44.0},
    {"step": 8, "epoch": 2.0, "test_loss": 9.0, "eval_entropy": 1.0, "unix_time": START + 50, "training_seconds": 44.0},
)
"""Eight steps in two epochs. The line of step 6 has a loss and a gradient norm that are not finite."""


def test_all_files_of_a_run_have_exactly_the_expected_contents() -> None:
    files = build_metric_files(TWO_EPOCHS, RUN)
    contents = {file: json.loads(text) for file, text in files.items() if file is not ResultFile.LOG}
    folder = "results/default_project/gpt2/20251009_172156"
    assert contents == {
        "step_metrics.json": [
            {"step": 2, "loss": 4.0, "learning_rate": 0.001, "grad_norm": 1.0, "timestamp": "2025-10-09T17:22:06.000+00:00"},
            {"step": 4, "loss": 2.0, "learning_rate": 0.001, "grad_norm": 1.0, "timestamp": "2025-10-09T17:22:16.000+00:00"},
            {"step": 6, "loss": None, "learning_rate": 0.001, "grad_norm": None, "timestamp": "2025-10-09T17:22:28.000+00:00"},
            {"step": 8, "loss": 1.0, "learning_rate": 0.001, "grad_norm": 1.0, "timestamp": "2025-10-09T17:22:38.000+00:00"},
        ],
        "epoch_metrics.json": [
            {
                "epoch": 1, "epoch_time": 22.0, "train_loss": 3.0, "eval_loss": 3.0, "timestamp": "2025-10-09T17:22:18.000+00:00",
                "eval_accuracy": 0.5, "eval_f1": 0.375, "eval_precision": 0.25, "eval_recall": 0.125,
            },
            {
                "epoch": 2, "epoch_time": 22.0, "train_loss": 1.0, "eval_loss": 3.5, "timestamp": "2025-10-09T17:22:40.000+00:00",
                "eval_accuracy": 0.75, "eval_f1": 0.375, "eval_precision": None, "eval_recall": 0.125,
            },
        ],
        "final_metrics.json": {
            "training_summary": {
                "total_steps": 8, "total_epochs": 2, "total_training_time": 44.0, "avg_epoch_time": 22.0,
                "final_train_loss": 1.0, "final_eval_loss": 3.5, "best_train_loss": 1.0, "best_eval_loss": 3.0,
                "best_eval_accuracy": 0.75, "final_eval_accuracy": 0.75, "best_eval_f1": 0.375, "final_eval_f1": 0.375,
                "best_eval_precision": 0.25, "final_eval_precision": 0.25, "best_eval_recall": 0.125, "final_eval_recall": 0.125,
            },
            "configuration": {
                "model": "gpt2", "technique": "lora", "learning_rate": "3e-4", "batch_size": "1", "epochs": "2", "lora_r": "8",
                "lora_alpha": "16", "dataset_type": "mcq_jsonl",
            },
            "metrics_files": {
                "step_metrics": f"{folder}/step_metrics.json", "epoch_metrics": f"{folder}/epoch_metrics.json",
                "final_metrics": f"{folder}/final_metrics.json",
            },
            "run_info": {
                "timestamp": "20251009_172156", "metrics_directory": folder, "completed_at": "2025-10-09T17:23:36.250+00:00",
            },
        },
        "training_metrics.json": {
            "loss_history": [4.0, 2.0, None, 1.0],
            "resource_usage": [
                {"step": 2, "gpu_memory_gb": 1.5, "loss": 4.0}, {"step": 4, "gpu_memory_gb": 1.75, "loss": 2.0},
                {"step": 6, "gpu_memory_gb": None, "loss": None}, {"step": 8, "gpu_memory_gb": None, "loss": 1.0},
            ],
            # Two steps take 10 seconds. The two seconds of the evaluation before step 6 do not count as time of a step.
            "step_times": [5.0, 5.0, 5.0, 5.0],
        },
        "performance_summary.json": {
            "training_time_minutes": 44 / 60, "trainable_parameters": 25, "total_parameters": 1000, "parameter_efficiency": 0.025,
            "pruning": None,
        },
    }  # fmt: skip
    assert files[ResultFile.LOG].count("\n") == len(TWO_EPOCHS)
    assert json.loads(files[ResultFile.LOG].splitlines()[0])["tokens_per_second"] == 99.0


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not valid JSON")


def test_every_file_is_valid_json_even_if_values_are_not_finite() -> None:
    for text in build_metric_files(TWO_EPOCHS, RUN).values():
        for part in [text] if text.startswith(("[", "{\n")) else text.splitlines():
            json.loads(part, parse_constant=refuse_constant)


SAMPLE_KEYS = {
    "training_summary": [
        "total_steps", "total_epochs", "total_training_time", "avg_epoch_time", "final_train_loss", "final_eval_loss", "best_train_loss",
        "best_eval_loss", "best_eval_accuracy", "final_eval_accuracy", "best_eval_f1", "final_eval_f1", "best_eval_precision",
        "final_eval_precision", "best_eval_recall", "final_eval_recall",
    ],
    "configuration": ["model", "technique", "learning_rate", "batch_size", "epochs", "lora_r", "lora_alpha", "dataset_type"],
    "metrics_files": ["step_metrics", "epoch_metrics", "final_metrics"],
    "run_info": ["timestamp", "metrics_directory", "completed_at"],
}  # fmt: skip
"""Keys of `final_metrics.json` in the sample run of ATMECS-IT/finetuning, in their order."""


def test_the_keys_and_their_order_are_those_of_the_sample_run() -> None:
    files = build_metric_files(TWO_EPOCHS, RUN)
    final_metrics = json.loads(files[ResultFile.FINAL_METRICS])
    assert {name: list(group) for name, group in final_metrics.items()} == SAMPLE_KEYS and list(final_metrics) == list(SAMPLE_KEYS)
    first_step, first_epoch = (json.loads(files[file])[0] for file in (ResultFile.STEP_METRICS, ResultFile.EPOCH_METRICS))
    assert list(first_step) == ["step", "loss", "learning_rate", "grad_norm", "timestamp"]
    assert list(first_epoch) == [
        "epoch", "epoch_time", "train_loss", "eval_loss", "timestamp", "eval_accuracy", "eval_f1", "eval_precision", "eval_recall",
    ]  # fmt: skip


def test_an_evaluation_between_two_lines_does_not_shift_the_values_of_steps() -> None:
    """In the files of ATMECS-IT/finetuning, the entry of step N has the values of step N - 10, or nulls after an evaluation."""
    log = make_entries(
        make_training_line(10, 0.5, 2.0, 10.0), make_evaluation_line(15, 0.75, 9.0, 17.0),
        make_training_line(20, 1.0, 1.0, 22.0), make_evaluation_line(20, 1.0, 8.0, 24.0),
    )  # fmt: skip
    assert [(row.step, row.loss) for row in compute_step_metrics(log)] == [(10, 2.0), (20, 1.0)]
    assert compute_training_metrics(log).step_times == [1.0, 1.0]
    (epoch,) = compute_epoch_metrics(log)
    assert (epoch.eval_loss, epoch.train_loss, epoch.epoch_time) == (8.0, 1.5, 24.0)


def test_an_epoch_without_evaluation_has_no_values_of_another_epoch() -> None:
    log = make_entries(
        make_training_line(4, 1.0, 4.0, 4.0), make_evaluation_line(4, 1.0, 3.0, 5.0), make_training_line(8, 2.0, 3.0, 9.0),
        make_training_line(10, 2.5, 2.0, 11.0), make_evaluation_line(10, 2.5, 5.0, 13.0),
    )  # fmt: skip
    epochs = compute_epoch_metrics(log)
    assert [(row.epoch, row.eval_loss, row.eval_accuracy) for row in epochs] == [(1, 3.0, 0.5), (2, None, None), (3, 5.0, 0.5)]
    assert [row.epoch_time for row in epochs] == [5.0, 4.0, 4.0]
    summary = compute_final_metrics(log, epochs, RUN).training_summary
    assert (summary.best_eval_loss, summary.final_eval_loss, summary.total_epochs) == (3.0, 5.0, 3)
    assert (summary.best_train_loss, summary.final_train_loss) == (2.0, 2.0)


def test_lines_that_cross_an_epoch_count_for_both_epochs() -> None:
    """An epoch has four steps, but every third step is logged."""
    log = make_entries(make_training_line(3, 0.75, 4.0, 3.0), make_training_line(6, 1.5, 1.0, 6.0), make_training_line(9, 2.25, 7.0, 9.0))
    epochs = compute_epoch_metrics(log)
    assert [row.train_loss for row in epochs] == [(3 * 4.0 + 1 * 1.0) / 4, (2 * 1.0 + 2 * 7.0) / 4, 7.0]
    assert [row.epoch_time for row in epochs] == [4.0, 4.0, 1.0]
    assert [row.timestamp for row in epochs] == [
        "2025-10-09T17:21:59.000+00:00", "2025-10-09T17:22:02.000+00:00", "2025-10-09T17:22:05.000+00:00",
    ]  # fmt: skip


def test_epochs_without_a_line_of_their_own_have_an_entry() -> None:
    (first_epoch, second_epoch, third_epoch) = compute_epoch_metrics(make_entries(make_training_line(1, 0.5, 3.0, 1.0), make_training_line(6, 3.0, 1.0, 6.0)))
    assert (first_epoch.train_loss, first_epoch.epoch_time) == (2.0, 2.0)
    assert (second_epoch.train_loss, second_epoch.epoch_time, second_epoch.timestamp) == (1.0, 2.0, None)
    assert (third_epoch.train_loss, third_epoch.epoch_time) == (1.0, 2.0)


def test_rounded_epochs_belong_to_the_epoch_that_they_end() -> None:
    log = make_entries(make_training_line(3, 0.9999999, 4.0, 3.0), make_training_line(6, 2.0000001, 1.0, 6.0))
    assert [(row.epoch, row.train_loss) for row in compute_epoch_metrics(log)] == [
        (1, pytest.approx(4.0, abs=1e-5)), (2, pytest.approx(1.0)),
    ]  # fmt: skip


def test_a_resumed_run_has_each_step_once() -> None:
    first_attempt = make_entries(
        make_training_line(2, 0.5, 4.0, 10.0), make_training_line(4, 1.0, 3.0, 20.0), make_evaluation_line(4, 1.0, 2.5, 22.0),
        make_training_line(6, 1.5, 2.0, 30.0),
    )  # fmt: skip
    # The second attempt resumes from the checkpoint of step 4. It continues to count its training seconds from the checkpoint's last log line.
    second_attempt = make_entries(make_training_line(6, 1.5, 2.0, 40.0), make_training_line(8, 2.0, 1.0, 50.0), make_evaluation_line(8, 2.0, 2.0, 52.0))
    log = join_attempts([first_attempt, second_attempt])
    assert [(row.step, row.loss) for row in compute_step_metrics(log)] == [(2, 4.0), (4, 3.0), (6, 2.0), (8, 1.0)]
    assert [(row.train_loss, row.eval_loss, row.epoch_time) for row in compute_epoch_metrics(log)] == [(3.5, 2.5, 22.0), (1.5, 2.0, 30.0)]
    assert compute_training_metrics(log).step_times == [5.0, 5.0, 9.0, 5.0]
    assert compute_final_metrics(log, compute_epoch_metrics(log), RUN).training_summary.total_training_time == 52.0


def test_a_run_without_lines_or_facts_has_files_with_nulls() -> None:
    run = RunDescription(model="m", technique="full", started_at=RUN.started_at, completed_at=RUN.completed_at)
    files = build_metric_files([], run)
    assert files[ResultFile.STEP_METRICS] == files[ResultFile.EPOCH_METRICS] == "[]\n"
    assert files[ResultFile.LOG] == ""
    final_metrics = json.loads(files[ResultFile.FINAL_METRICS])
    summary = final_metrics["training_summary"]
    assert (summary.pop("total_steps"), summary.pop("total_epochs")) == (0, 0) and set(summary.values()) == {None}
    assert final_metrics["configuration"] == dict.fromkeys(SAMPLE_KEYS["configuration"]) | {"model": "m", "technique": "full"}
    assert final_metrics["run_info"]["metrics_directory"] == "." and final_metrics["metrics_files"]["step_metrics"] == "step_metrics.json"
    assert json.loads(files[ResultFile.PERFORMANCE_SUMMARY]) == {
        "training_time_minutes": None, "trainable_parameters": None, "total_parameters": None, "parameter_efficiency": None, "pruning": None,
    }  # fmt: skip
    assert json.loads(files[ResultFile.TRAINING_METRICS]) == {"loss_history": [], "resource_usage": [], "step_times": []}


def test_lines_of_an_older_release_have_no_times() -> None:
    log = make_entries({"step": 2, "epoch": 0.5, "loss": 2.0}, {"step": 4, "epoch": 1.0, "loss": 1.0}, {"step": 5, "loss": 1.0})
    assert [row.timestamp for row in compute_step_metrics(log)] == [None] * 3
    (epoch,) = compute_epoch_metrics(log)
    assert (epoch.epoch_time, epoch.timestamp, epoch.train_loss) == (None, None, 1.5)
    assert compute_training_metrics(log).step_times == [None] * 3


def test_the_training_seconds_of_the_description_take_precedence() -> None:
    run = RUN.model_copy(update={"training_seconds": 120.0})
    assert json.loads(build_metric_files(TWO_EPOCHS, run)[ResultFile.PERFORMANCE_SUMMARY])["training_time_minutes"] == 2.0


def test_numbers_of_the_configuration_must_be_strings() -> None:
    with pytest.raises(ValidationError):
        RunDescription.model_validate({**RUN.model_dump(), "learning_rate": 3e-4})
