"""The metric files that are built from the log of a real run with evaluations and a test set."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.log_entry import LineKind, LogEntry
from finetune_trainer.results.metric_files import RunDescription, build_metric_files

from tests.support.learning import run_training

pytestmark = pytest.mark.pod


def test_metric_files_of_a_real_run(model: Path, tmp_path: Path) -> None:
    """The run has two epochs of four steps (eight rows, two rows per step). The validation set is evaluated at steps 3, 6 and 8."""
    started_at = datetime.now(UTC)
    spec = {
        "training": {"maxSteps": 8}, "dataset": {"split": {"validation": 0.1, "test": 0.1}},
        "evaluation": {"strategy": "steps", "steps": 3}, "method": {"type": "lora"},
    }  # fmt: skip
    outcome = run_training(tmp_path, model, spec)
    log = [LogEntry.model_validate(line) for line in outcome.logs]
    times = [(line.unix_time or 0, line.training_seconds or 0) for line in log]
    assert times == sorted(times) and times[0][0] >= started_at.timestamp() - 1 and 0 < times[0][1] <= times[-1][1]
    kinds = [line.kind for line in log]
    assert [kinds.count(kind) for kind in LineKind] == [8, 3, 1, 1, 0]
    assert kinds[-2:] == [LineKind.SUMMARY, LineKind.TEST]
    run = RunDescription(model="tiny", technique="lora", started_at=started_at, completed_at=datetime.now(UTC))
    files = build_metric_files(log, run)
    steps = json.loads(files[ResultFile.STEP_METRICS])
    assert [entry["step"] for entry in steps] == list(range(1, 9)) and [entry["loss"] for entry in steps] == outcome.losses
    first_epoch, second_epoch = json.loads(files[ResultFile.EPOCH_METRICS])
    assert first_epoch["train_loss"] == pytest.approx(sum(outcome.losses[:4]) / 4)
    assert second_epoch["train_loss"] == pytest.approx(sum(outcome.losses[4:]) / 4)
    assert [first_epoch["eval_loss"], second_epoch["eval_loss"]] == [outcome.eval_losses[0], outcome.eval_losses[2]]
    assert 0 <= first_epoch["eval_accuracy"] <= 1 and first_epoch["eval_f1"] is None
    summary = json.loads(files[ResultFile.FINAL_METRICS])["training_summary"]
    assert summary["total_training_time"] == pytest.approx(first_epoch["epoch_time"] + second_epoch["epoch_time"], abs=1.0)
    assert min(json.loads(files[ResultFile.TRAINING_METRICS])["step_times"]) > 0
    assert len(files[ResultFile.LOG].splitlines()) == len(outcome.logs)
